"""The bracket of the full data's eigenvalue from a subset of it."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sharpness
from sharpness import Objective
from sharpness.errors import ArgumentError, DataError
from tests.checks import assert_untouched
from tests.zoo import batches, features, tanh_net


def regression(seed, *, count=400, columns=6):
    """Inputs whose second moments are the Hessian of a linear model, and so known in every batch."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.linspace(1.0, 1.4, columns, dtype=torch.float64)
    x = torch.randn(count, columns, generator=g, dtype=torch.float64) * scales
    return x, torch.zeros(count, 1, dtype=torch.float64)


def model():
    return nn.Linear(6, 1, bias=False).double()


def test_quadratic_forms_are_those_of_each_batch():
    problem = tanh_net()
    v = torch.linspace(-1, 1, len(problem.hessian), dtype=torch.float64)
    for memory in (0, "auto"):
        objective = Objective(problem.model, problem.loader, memory=memory)
        forms, weights = objective.quadratic_forms(v)
        assert weights.tolist() == [4, 4, 3]
        alone = [v @ Objective(problem.model, [batch]).hvp(v) for batch in problem.loader]
        torch.testing.assert_close(forms, torch.stack(alone))
        assert ((forms * weights).sum() / 11).item() == pytest.approx((v @ problem.hessian @ v).item(), rel=1e-10)


def test_both_ends_are_what_they_are_said_to_be():
    x, y = regression(0)
    loader = batches(x, y, sizes=(50,) * 8)
    net = model()
    with assert_untouched(net):
        result = sharpness.top_eigenvalues(net, loader, max_batches=4, sample_interval=True)
    found = result.sample_interval
    half, rest = x[:200], x[200:]
    values, vectors = torch.linalg.eigh(2 * half.T @ half / 200)
    v = vectors[:, -1]
    assert found.outer == pytest.approx(values[-1].item(), rel=1e-6)
    assert found.inner == pytest.approx((2 * (rest @ v).square().mean()).item(), rel=1e-3)
    for forms, stderr in (
        ((half @ v).view(4, 50).square().mean(1) * 2, found.outer_stderr),
        ((rest @ v).view(4, 50).square().mean(1) * 2, found.inner_stderr),
    ):
        assert stderr == pytest.approx((forms.std() / 2).item(), rel=2e-3)
    # 3.182446: Student's t at 97.5 % with 3 degrees of freedom
    assert found.low == pytest.approx(found.inner - 3.182446 * found.inner_stderr)
    assert found.high == pytest.approx(found.outer + 3.182446 * found.outer_stderr)
    assert (found.num_batches, found.num_held_out) == (4, 4)
    assert result.eigenvectors is None  # not asked for
    assert result.num_passes == result.num_matvecs + 2  # inside and outside


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_the_biases_point_outwards_and_inwards_and_the_bracket_holds(which):
    """Over many draws of the data: E[inner] <= truth <= E[outer], and the bracket misses in few cases."""
    scales = torch.linspace(1.0, 1.4, 6, dtype=torch.float64)
    truth = 2 * (scales.square().max() if which == "largest" else scales.square().min()).item()
    sign = 1 if which == "largest" else -1
    inner, outer, held = [], [], 0
    for seed in range(150):
        x, y = regression(seed + 100)
        loader = batches(x, y, sizes=(20,) * 20)
        found = sharpness.top_eigenvalues(
            model(), loader, which=which, max_batches=10, sample_interval=True, tol=1e-6
        ).sample_interval
        inner.append(sign * found.inner)
        outer.append(sign * found.outer)
        held += found.low <= truth <= found.high
    for values, above in ((torch.tensor(outer), 1), (torch.tensor(inner), -1)):
        gap = above * (values.mean() - sign * truth) / (values.std() / math.sqrt(150))
        assert gap > 4  # the bias is there, and points where it should
    assert held >= 0.95 * 150


def test_a_shuffling_loader_holds_out_other_samples():
    x, y = regression(1, count=120)
    data = TensorDataset(x, y)
    torch.manual_seed(0)
    loader = DataLoader(data, batch_size=10, shuffle=True)
    objective = Objective(model(), loader, max_batches=6)
    inside = [row for _, (rows, _) in objective.batches.walk() for row in rows.tolist()]
    outside = [row for _, (rows, _) in objective.held_out().batches.walk() for row in rows.tolist()]
    assert len(inside) == len(outside) == 60
    assert not {tuple(row) for row in inside} & {tuple(row) for row in outside}
    sharpness.top_eigenvalues(model(), loader, max_batches=6, sample_interval=True)  # no word about another draw


def test_what_has_no_bracket_is_refused():
    x, y = regression(0, count=60)
    loader = batches(x, y, sizes=(20, 20, 20))

    def ask(loader=loader, **options):
        return sharpness.top_eigenvalues(model(), loader, sample_interval=True, **options)

    with pytest.raises(ArgumentError, match=r"needs a subset of at least 2 batches, got max_batches=None"):
        ask()
    with pytest.raises(ArgumentError, match=r"at least 2 batches, got max_batches=1"):
        ask(max_batches=1)
    with pytest.raises(ArgumentError, match="brackets one end of the spectrum, got which='both'"):
        ask(max_batches=2, which="both")
    with pytest.raises(DataError, match="needs at least 2 batches beyond the first 2, the loader has one"):
        ask(max_batches=2)
    with pytest.raises(DataError, match="needs batches beyond the first 3, and the loader has none"):
        ask(max_batches=3)
    with pytest.raises(ArgumentError, match="`sample_interval` must be True or False"):
        sharpness.top_eigenvalues(model(), loader, sample_interval=1)


def test_a_bracket_of_a_network_and_its_line():
    problem = tanh_net()
    x, y = features(3, seed=21), torch.arange(11) % 3
    loader = [*problem.loader, *batches(x, y)]
    result = sharpness.top_eigenvalues(problem.model, loader, max_batches=3, sample_interval=True)
    assert repr(result.sample_interval).startswith("SampleInterval(")
    assert result.to_dict()["sample_interval"]["num_held_out"] == 3
