"""Epsilon-sharpness in a subspace: products with its matrix, the definition, the draws, and what is refused."""

import statistics

import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError, ConvergenceError
from sharpness.metrics import epsilon
from sharpness.metrics import subspace as subspaces
from sharpness.metrics.subspace import given_subspace, random_subspace
from tests.zoo import Quadratic, by_rows, tanh_net

N = 50
CPU = torch.device("cpu")


def drawn(n=N, p=4, *, seed=0, draw=0, columns="gaussian", dtype=torch.float64, keep=True):
    return random_subspace(n, p, seed=seed, draw=draw, columns=columns, dtype=dtype, device=CPU, keep=keep)


def dense(subspace):
    return torch.stack([subspace.multiply(unit) for unit in torch.eye(subspace.p, dtype=torch.float64)], dim=1)


def vector(n, seed=7):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(h, at, epsilon=1e-2, **options):
    rows = torch.zeros(5, len(h), dtype=h.dtype)
    return sharpness.epsilon_sharpness(
        Quadratic(h, at), [rows[:3], rows[3:]], batch_loss=by_rows, epsilon=epsilon, **options
    )


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(subspaces, "_ROWS", 16)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("columns", ["gaussian", "orthonormal"])
@pytest.mark.parametrize("n", [16, 17, 50])
def test_products_are_those_of_one_matrix(columns, n):
    subspace = drawn(n, columns=columns)
    a, y, g = dense(subspace), vector(4), vector(n)
    torch.testing.assert_close(subspace.multiply(y), a @ y)
    torch.testing.assert_close(subspace.multiply_transposed(g), a.T @ g)
    torch.testing.assert_close(subspace.coordinates(g), torch.linalg.pinv(a) @ g)


def test_orthonormal_columns_span_the_same_subspace():
    q, a = dense(drawn(columns="orthonormal")), dense(drawn())
    torch.testing.assert_close(q.T @ q, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(q @ (q.T @ a), a)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("columns", ["gaussian", "orthonormal"])
def test_what_is_kept_makes_no_difference_to_the_bits(columns):
    kept, drawn_again = drawn(columns=columns), drawn(columns=columns, keep=False)
    g = vector(N)
    assert torch.equal(kept.coordinates(g), drawn_again.coordinates(g))
    assert torch.equal(kept.multiply(vector(4)), drawn_again.multiply(vector(4)))
    assert torch.equal(kept.multiply_transposed(g), drawn_again.multiply_transposed(g))


@pytest.mark.usefixtures("small_tiles")
def test_columns_do_not_depend_on_how_many_there_are_but_on_seed_and_draw():
    a = dense(drawn())
    assert torch.equal(dense(drawn(p=7))[:, :4], a)
    for other in (drawn(seed=1), drawn(draw=1)):
        assert (dense(other) - a).abs().min() > 1e-6


def test_entries_are_standard_normal_and_uncorrelated():
    a = dense(drawn(40_000, 3))
    gram = a.T @ a / len(a)
    assert (gram - torch.eye(3)).abs().max() < 4 * (2 / len(a)) ** 0.5
    assert a.mean(0).abs().max() < 4 / len(a) ** 0.5
    assert abs((a**4).mean().item() - 3) < 4 * (96 / a.numel()) ** 0.5
    assert abs((a[:16384] * a[16384:32768]).mean().item()) < 4 / 49152**0.5  # tiles are not copies


@pytest.mark.parametrize(("keep", "drawings"), [(True, 1), (False, 2)])
def test_what_is_not_kept_is_drawn_again_tile_by_tile(monkeypatch, keep, drawings):
    n, p = 40_000, 20  # 3.2 MB in single precision
    sizes, real = [], torch.Tensor.normal_
    monkeypatch.setattr(torch.Tensor, "normal_", lambda row, **how: (sizes.append(row.numel()), real(row, **how))[1])
    drawn(n, p, dtype=torch.float32, keep=keep).coordinates(torch.ones(n))
    assert sum(sizes) == drawings * n * p  # for the Gram matrix, and again for the product where it is not kept
    assert max(sizes) == 2**14


def test_the_identity_is_the_full_space():
    """T5, on a network and for both solvers."""
    problem = tanh_net()
    n = sharpness.Objective(problem.model, problem.loader).n
    for solver in ("l-bfgs-b", "projected-gradient"):
        full, same = (
            sharpness.epsilon_sharpness(problem.model, problem.loader, solver=solver, subspace=a)
            for a in (None, torch.eye(n, dtype=torch.float64))
        )
        assert same.value == pytest.approx(full.value, rel=1e-9)
        assert same.settings["subspace"] == "given"
        assert full.settings["subspace"] == "full"


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
@pytest.mark.parametrize("solver", ["l-bfgs-b", "projected-gradient"])
def test_one_coordinate(solver, dtype, rel):
    """T5: A = e_j gives 100 h_j (|x_j| b + b^2 / 2) / (1 + f), also where its length is not 1."""
    h, at = torch.tensor([3.0, 1.0, 0.2], dtype=dtype), torch.tensor([0.5, -2.0, 1.0], dtype=dtype)
    loss = (h * at**2).sum().item() / 2
    for j, length in ((0, 1.0), (1, 1.0), (1, 4.0), (2, 0.25)):
        a = torch.zeros(3, 1, dtype=dtype)
        a[j] = length
        b = length * 1e-2 * (abs(at[j].item()) / length + 1)
        expected = 100 * h[j].item() * (abs(at[j].item()) * b + b * b / 2) / (1 + loss)
        assert quadratic(torch.diag(h), at, solver=solver, subspace=a).value == pytest.approx(expected, rel=rel)


def test_a_rank_one_hessian_shrinks_as_p_squared_over_n():
    """With unnormalised columns the ratio to the full space is about p^2 / n, with unit ones p^2 / n^2."""
    n, p = 400, 5
    generator = torch.Generator().manual_seed(0)
    u = nn.functional.normalize(torch.randn(n, generator=generator, dtype=torch.float64), dim=0)
    h, at = torch.outer(u, u), torch.zeros(n, dtype=torch.float64)
    full = quadratic(h, at).value
    assert full == pytest.approx(50 * 1e-4 * u.abs().sum().item() ** 2, rel=1e-9)
    for columns in ("gaussian", "orthonormal"):
        result = quadratic(h, at, subspace_dim=p, num_draws=20, subspace_columns=columns)
        # In z the Hessian is v v' with v = A'u, whose maximum over the box is eps^2 / 2 |v|_1^2.
        for i, found in enumerate(result.draws):
            v = drawn(n, p, draw=i, columns=columns).multiply_transposed(u)
            assert found == pytest.approx(50 * 1e-4 * v.abs().sum().item() ** 2, rel=1e-9)
        if columns == "gaussian":  # v is standard normal
            expected = 50 * 1e-4 * (p + p * (p - 1) * 2 / torch.pi)
            assert abs(result.value - expected) < 4 * result.stderr
            gaussian = result.value
    assert n / 3 < gaussian / result.value < 3 * n


def test_every_draw_has_starts_of_its_own(monkeypatch):
    problem, firsts = tanh_net(), []
    real = epsilon.Box.random_point
    monkeypatch.setattr(epsilon.Box, "random_point", lambda box, g: (firsts.append(real(box, g)), firsts[-1])[1])
    sharpness.epsilon_sharpness(problem.model, problem.loader, subspace_dim=3, num_draws=2, num_starts=2, max_iter=1)
    assert len({tuple(first.tolist()) for first in firsts}) == len(firsts) == 4


def test_draws_give_a_mean_and_its_standard_error():
    problem = tanh_net()
    several = sharpness.epsilon_sharpness(problem.model, problem.loader, subspace_dim=3, num_draws=4, num_starts=2)
    one = sharpness.epsilon_sharpness(problem.model, problem.loader, subspace_dim=3)
    assert several.draws[0] == one.value == one.draws[0]
    assert one.stderr is None
    assert len(set(several.draws)) == 4
    assert several.value == pytest.approx(statistics.mean(several.draws))
    assert several.stderr == pytest.approx(statistics.stdev(several.draws) / 2)
    assert [start["draw"] for start in several.starts] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert several.num_evaluations == 1 + sum(start["evaluations"] for start in several.starts)
    assert several.settings["num_draws"] == 4
    assert several.settings["subspace_columns"] == "gaussian"
    assert several.settings["subspace_dim"] == 3
    assert "± " in repr(several)
    assert "in 3 dimensions, a lower bound; draws reached" in repr(several)


def test_a_subspace_never_exceeds_the_box_of_its_own():
    """Every point evaluated is x + A y with y in the box of the definition."""
    problem = tanh_net()
    objective = sharpness.Objective(problem.model, problem.loader)
    a = torch.randn(objective.n, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    points, real = [], objective.value_and_gradient
    objective.value_and_gradient = lambda at=None: (points.append(at), real(at))[1]
    result = sharpness.epsilon_sharpness(objective, subspace=a, epsilon=0.1)
    center, inverse = objective.vector(), torch.linalg.pinv(a)
    half_width = 0.1 * ((inverse @ center).abs() + 1)
    steps = [inverse @ (at - center) for at in points]
    assert all((step.abs() <= half_width * (1 + 1e-9)).all() for step in steps)
    assert all(torch.allclose(a @ step, at - center) for step, at in zip(steps, points, strict=True))
    assert result.value > 0


def test_the_same_bits_again_and_with_nothing_kept():
    problem = tanh_net()
    results = [
        sharpness.epsilon_sharpness(problem.model, problem.loader, subspace_dim=3, memory=memory)
        for memory in ("auto", "auto", 0)
    ]
    assert len({result.value for result in results}) == 1


def test_the_matrix_and_the_batches_share_the_memory(monkeypatch):
    problem = tanh_net()
    asked, real = [], epsilon.random_subspace
    monkeypatch.setattr(epsilon, "random_subspace", lambda *a, **how: (asked.append(how["keep"]), real(*a, **how))[1])
    objective = sharpness.Objective(problem.model, problem.loader, memory=8 * problem.hessian.shape[0] * 3 + 1)
    reserved = []
    value = objective.value
    monkeypatch.setattr(objective, "value", lambda: (reserved.append(objective.passes.reserved), value())[1])
    for p in (3, 4):
        sharpness.epsilon_sharpness(objective, subspace_dim=p, on_failure="ignore")
    assert asked == [True, False]
    assert reserved == [8 * problem.hessian.shape[0] * 3, 0]
    assert objective.passes.reserved == 0


def test_a_matrix_is_the_same_in_every_dtype():
    double, single = dense(drawn()), dense(drawn(dtype=torch.float32))
    assert torch.equal(double.float(), single.float())


def test_a_bad_matrix_is_refused_before_the_data_are_touched():
    problem, walks = tanh_net(), []

    class Watched(list):
        def __iter__(self):
            walks.append(1)
            return super().__iter__()

    with pytest.raises(ArgumentError, match="`subspace` has the shape"):
        sharpness.epsilon_sharpness(problem.model, Watched(problem.loader), subspace=torch.ones(3, 2))
    assert not walks


def test_bad_subspaces_are_refused():
    problem = tanh_net()
    n = sharpness.Objective(problem.model, problem.loader).n

    def call(**options):
        return sharpness.epsilon_sharpness(problem.model, problem.loader, **options)

    with pytest.raises(ArgumentError, match=rf"`subspace_dim` must be between 1 and {n} \(the number of parameters"):
        call(subspace_dim=n + 1)
    with pytest.raises(ArgumentError, match="`subspace_dim` must be at least 1, got 0"):
        call(subspace_dim=0)
    eye = torch.eye(n, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="`subspace` and `subspace_dim` are both given"):
        call(subspace_dim=2, subspace=eye)
    with pytest.raises(ArgumentError, match="num_draws=2 is about random subspaces, and a subspace of your own"):
        call(num_draws=2, subspace=eye)
    with pytest.raises(ArgumentError, match="num_draws=2 is about random subspaces, and the full space is searched"):
        call(num_draws=2)
    with pytest.raises(ArgumentError, match="subspace_columns='orthonormal' is about random subspaces"):
        call(subspace_columns="orthonormal")
    with pytest.raises(ArgumentError, match="`subspace_columns` must be one of 'gaussian', 'orthonormal'"):
        call(subspace_dim=2, subspace_columns="unit")
    with pytest.raises(ArgumentError, match=r"`subspace` must be a floating point matrix \(n, p\).* got \(3,\)"):
        call(subspace=torch.ones(3))
    with pytest.raises(ArgumentError, match=r"`subspace` must be a floating point matrix .* got list"):
        call(subspace=[[1.0]])
    for shape in ((3, n), (n, n + 1), (n, 0)):
        with pytest.raises(ArgumentError, match=rf"`subspace` has the shape \({shape[0]}, {shape[1]}\); it must be"):
            call(subspace=torch.ones(shape))
    with pytest.raises(ArgumentError, match="`subspace` has entries that are NaN or infinite"):
        call(subspace=eye / 0)
    for dependent in (torch.cat([eye[:, :3], eye[:, :2] @ torch.ones(2, 1).double()], dim=1), 0 * eye[:, :2]):
        with pytest.raises(ArgumentError, match="columns that are not linearly independent"):
            call(subspace=dependent)


def test_columns_of_very_different_lengths_are_independent():
    a = torch.diag(torch.tensor([1e-9, 1.0, 1e9], dtype=torch.float64))
    subspace = given_subspace(a, torch.float64, CPU)
    torch.testing.assert_close(subspace.coordinates(torch.ones(3).double()), 1 / a.diagonal())


def test_a_subspace_along_which_nothing_changes_is_said_to_be_one():
    h, at = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ConvergenceError, match="no loss above the model's own, 0.5, was found in the box"):
        quadratic(h, at, subspace=torch.tensor([[0.0], [1.0]], dtype=torch.float64), on_failure="raise")
