"""What is recorded runs again with other inputs; what cannot be told from its operations is refused."""

import pytest
import torch

from sharpness.objective.tape import NotRecordableError, Recorder, unrecorded


def record(function, *inputs, known=None):
    """Record ``function(*inputs)`` and return its results, its tape, and what runs the tape."""
    inputs = [t.clone() for t in inputs]
    with Recorder(inputs) as recorder:
        results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    tape = recorder.tape(results, {} if known is None else known)

    def run(*others):
        found = tape.program.graph(*tape.residuals, *others)
        return [None if place is None else found[place] for place in tape.outputs]

    return results, tape, run


def vectors(count=2, n=6, seed=0):
    return list(torch.randn(count, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def in_place(x, y):
    z = x * 2
    z += y
    return z.mul_(3.0)


def into_a_constant(x, y):
    z = torch.zeros(6, dtype=torch.float64)
    z += x
    return z * y


def by_views(x, y):
    rows = torch.outer(x, y)[::3].T.reshape(2, -1)
    low, high = rows.chunk(2, dim=1)
    return low @ high.T, rows.max(dim=0).values


def with_a_matrix(x, y, matrix=torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6)):  # noqa: B008 - a constant
    return torch.softmax(matrix.exp() @ x, 0) * y


@pytest.mark.parametrize("function", [in_place, into_a_constant, by_views, with_a_matrix, lambda x, y: x])
def test_it_runs_again_with_other_inputs(function):
    _, _, run = record(function, *vectors())
    others = vectors(seed=1)
    expected = function(*(t.clone() for t in others))
    for found, exact in zip(run(*others), expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=0)


def test_what_does_not_depend_on_the_inputs_is_done_once():
    matrix = torch.randn(6, 6, dtype=torch.float64)
    _, tape, _ = record(lambda x: torch.linalg.inv(matrix.exp() + torch.eye(6)) @ x, *vectors(1))
    assert [node.target for node in tape.program.graph.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.mv.default
    ]
    assert len(tape.residuals) == 1


def test_what_the_outputs_do_not_need_is_left_out_and_independent_outputs_have_no_place():
    constant = torch.ones(6)

    def function(x, y):
        _ = (x.exp() @ y).sin()
        return x + 1, constant, None

    _, tape, _ = record(function, *vectors())
    assert tape.outputs == (0, None, None)
    assert len([node for node in tape.program.graph.graph.nodes if node.op == "call_function"]) == 1
    assert tape.residuals == ()


def test_the_same_operations_share_a_program_and_others_do_not():
    known = {}

    def scaled(by, matrix):
        return lambda x: (matrix @ x) * by

    first, second = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    tapes = [record(scaled(2.0, matrix), *vectors(1), known=known)[1] for matrix in (first, second)]
    assert tapes[0].program is tapes[1].program
    assert tapes[1].residuals[0] is second
    assert record(scaled(3.0, first), *vectors(1), known=known)[1].program is not tapes[0].program
    assert record(scaled(2.0, first.T), *vectors(1), known=known)[1].program is not tapes[0].program  # other strides
    assert len(known) == 3


def later_changed(x, y):
    z = torch.ones(6, dtype=torch.float64)
    found = x * z
    z += 1
    return found


def seen_by_others(x, y):
    z = x * 2
    row = z[:3]
    z += y
    return row


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, y: y * x.sum().item(), "turns a tensor into a number"),
        (lambda x, y: y if bool(x.sum() > 0) else x, "turns a tensor into a number"),
        (lambda x, y: x[x > 0], "a shape of its own"),
        (lambda x, y: torch.nn.functional.dropout(x), "is random"),
        (lambda x, y: torch.outer(x, y).to_sparse(), "sparse"),
        (later_changed, "is changed later"),
        (seen_by_others, "that others see"),
        (lambda x, y: torch.add(x, y, out=torch.empty(6, dtype=torch.float64)), "writes to its arguments"),
    ],
)
def test_what_cannot_be_told_from_its_operations_is_refused(function, reason):
    with pytest.raises(NotRecordableError, match=reason):
        record(function, *vectors())


def test_numbers_may_be_read_where_the_results_do_not_depend_on_them():
    def function(x):
        with unrecorded():
            assert x.sum().item() != 0
        return x * 2

    _, tape, _ = record(function, *vectors(1))
    assert tape.outputs == (0,)
