"""Stochastic Lanczos quadrature: Gauss exactness, errors of moments, outliers, budgets."""

import math
import weakref

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from sharpness.errors import ArgumentError, NonFiniteError
from sharpness.linalg import DenseOperator, FunctionOperator, quadrature, stochastic_lanczos_quadrature
from sharpness.linalg.outliers import find_outliers
from tests.linalg.spectra_of_traces import TRACED
from tests.zoo import rotated, spectra

MATRICES = {name: rotated(values) for name, values in TRACED.items()}


def starts(monkeypatch):
    """The unit vectors that the draws start from, in order."""
    from sharpness.linalg.krylov import KrylovSpace

    seen, request = [], KrylovSpace.request

    def spy(self):
        v = request(self)
        if self.size == 1:
            seen.append(v.clone())
        return v

    monkeypatch.setattr(KrylovSpace, "request", spy)
    return seen


@pytest.mark.parametrize("name", ["flat", "slow", "indefinite", "near zero"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_each_draw_is_a_gauss_rule(name, steps, monkeypatch):
    seen, matrix = starts(monkeypatch), MATRICES[name]
    result = stochastic_lanczos_quadrature(DenseOperator(matrix), num_draws=3, num_steps=steps)
    assert result.nodes.shape == result.weights.shape == (3, steps)
    torch.testing.assert_close(result.weights.sum(1), torch.ones(3, dtype=torch.float64))
    for v, nodes, weights in zip(seen, result.nodes, result.weights, strict=True):
        power = v.clone()
        for p in range(2 * steps):
            assert (weights * nodes**p).sum().item() == pytest.approx((v @ power).item(), rel=1e-9, abs=1e-11)
            power = matrix @ power
        wrong = (weights * nodes ** (2 * steps)).sum().item()
        assert wrong != pytest.approx((v @ power).item(), rel=1e-9)  # one degree more is beyond any rule


@pytest.mark.parametrize("name", TRACED)
def test_moments_and_their_errors(name):
    values = TRACED[name]
    result = stochastic_lanczos_quadrature(DenseOperator(MATRICES[name]), num_draws=40, num_steps=12)
    for power in (1, 2, 3):
        mean, error = result.moment(power)
        assert abs(mean - (values**power).mean().item()) < 4 * error + 1e-12
    assert result.moment(0)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("name", TRACED)
def test_the_density_has_mass_one_and_gets_closer_with_more_draws(name):
    values, operator = TRACED[name], DenseOperator(MATRICES[name])
    distances = []
    for draws in (2, 32):
        result = stochastic_lanczos_quadrature(operator, num_draws=draws, num_steps=40)
        assert torch.trapezoid(result.density, result.grid).item() == pytest.approx(1.0, abs=1e-3)
        distances.append(wasserstein_distance(result.nodes.ravel(), values, result.weights.ravel()))
    spread = wasserstein_distance(values, [values.mean().item()])
    # Where two eigenvalues hold all of the spread, the error is that of their two weights, the root of 2 / 32 for each.
    assert distances[1] < (0.35 if name == "pair" else 0.15) * spread
    middle = (values.median() + 1e-9).item()
    assert abs(result.mass_above(middle) - (values > middle).double().mean().item()) < 0.1
    assert result.mass_above(values.max().item() + 1) == 0.0
    assert result.mass_above(values.min().item() - 1) == pytest.approx(1.0)
    assert result.mass_above_stderr(middle) < 0.1


def test_draws_run_together_or_as_memory_allows_with_the_same_answer():
    blocks = []

    matrix = MATRICES["slow"]
    operator = DenseOperator(matrix)
    product = operator._matmat

    def watched(v):
        blocks.append(v.shape[1])
        return product(v)

    operator._matmat = watched
    whole = stochastic_lanczos_quadrature(operator, num_draws=4, num_steps=10)
    assert blocks == [4] * 10
    assert whole.num_matvecs == 40
    blocks.clear()
    pieces = stochastic_lanczos_quadrature(operator, num_draws=4, num_steps=10, memory=3 * 10 * 100 * 8)
    assert blocks == [3] * 10 + [1] * 10
    torch.testing.assert_close(pieces.nodes, whole.nodes, rtol=1e-8, atol=1e-10)
    assert stochastic_lanczos_quadrature(operator, num_draws=2, num_steps=3, memory=0).settings["together"] == 2


@pytest.mark.parametrize("name", spectra())
def test_any_spectrum_of_the_zoo(name):
    values = spectra()[name]
    result = stochastic_lanczos_quadrature(DenseOperator(rotated(values)))
    scale = values.abs().max().item()
    assert result.num_matvecs == sum(result.settings["steps_taken"])
    assert result.nodes.max().item() <= values.max().item() + 1e-9 * scale + 1e-300
    assert result.nodes.min().item() >= values.min().item() - 1e-9 * scale - 1e-300
    distinct = len(torch.unique((values / (scale or 1.0) * 1e9).round()))
    assert max(result.settings["steps_taken"]) <= distinct + 1
    if max(result.settings["steps_taken"]) < 90:
        assert "all that the spectrum has, of 90" in repr(result)
    assert torch.isfinite(result.density).all()


def test_more_steps_than_dimensions_are_reduced_and_said():
    result = stochastic_lanczos_quadrature(DenseOperator(torch.diag(torch.arange(5.0))), num_draws=1, num_steps=50)
    assert result.num_matvecs == 5
    assert "1 draw x 5 steps, all that the spectrum has, of 50" in repr(result)
    assert result.nodes[0].tolist() == pytest.approx([0, 1, 2, 3, 4], abs=1e-5)
    assert math.isnan(result.moment(1)[1])


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_one_dimension(value):
    result = stochastic_lanczos_quadrature(DenseOperator([[value]]))
    assert result.nodes.unique().tolist() == [value]
    assert result.sigma > 0
    assert result.num_matvecs == 4


def test_the_kernel_follows_ghorbanis_rule_and_the_unit_of_the_loss():
    wide = stochastic_lanczos_quadrature(DenseOperator(100 * MATRICES["flat"]), num_steps=90)
    assert wide.sigma == pytest.approx((1e-5 * 200) ** 0.5, rel=1e-3)
    one, small = (
        stochastic_lanczos_quadrature(DenseOperator(c * MATRICES["fast"]), num_draws=2, num_steps=20)
        for c in (1.0, 1e-6)
    )
    assert small.sigma == pytest.approx(1e-6 * one.sigma)
    torch.testing.assert_close(small.density, 1e6 * one.density, rtol=1e-4, atol=1.0)
    assert stochastic_lanczos_quadrature(DenseOperator([[1.0]]), sigma=0.5).sigma == 0.5


@pytest.mark.parametrize("options", [{}, {"sigma": 1.0}])
def test_the_density_has_mass_one_on_any_scale(options):
    operator = DenseOperator(1e8 * MATRICES["indefinite"])
    result = stochastic_lanczos_quadrature(operator, num_draws=1, num_steps=20, **options)
    assert torch.trapezoid(result.density, result.grid).item() == pytest.approx(1.0, abs=1e-6)
    assert result.sigma >= (result.grid[1] - result.grid[0]).item() * 0.999  # as wide as the grid can show


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("flat", 0),
        ("indefinite", 4),
        ("outliers", 9),
        ("many", 10),
        ("both", 4),
        ("degenerate", 2),
        ("tail", 4),
        ("few", 0),
        ("apart", 1),
    ],
)
def test_outliers_are_counted_and_certified(name, count):
    g = torch.Generator().manual_seed(0)
    bulk = 0.1 * torch.randn(600, generator=g, dtype=torch.float64)
    values = {
        "flat": torch.linspace(-1, 1, 600, dtype=torch.float64),
        "indefinite": TRACED["indefinite"],  # 9, 8, 7, and -5 twice
        "outliers": torch.cat([60 / torch.arange(2.0, 11, dtype=torch.float64), bulk]),
        "many": torch.cat([torch.linspace(3, 5, 10, dtype=torch.float64), bulk]),
        "both": torch.cat([torch.tensor([4.0, 2.0, -3.0, -2.0], dtype=torch.float64), bulk]),
        "tail": 1 / torch.arange(1, 601, dtype=torch.float64),  # a fifth apart as far as 1 / 4
        "apart": torch.cat([torch.linspace(-1, 1, 600, dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)]),
        "few": torch.linspace(-1, 1, 12, dtype=torch.float64),  # all of them resolved, and none apart from the rest
        "degenerate": torch.cat([torch.tensor([4.0, 4.0, 4.0, 2.0], dtype=torch.float64), bulk]),
    }[name]
    result = stochastic_lanczos_quadrature(DenseOperator(torch.diag(values)), num_steps=60)
    assert result.num_outliers == count
    assert result.certified.all()
    assert result.certified.dtype == torch.bool
    assert f"{count} outlier{'s' * (count != 1)} ({count} certified)" in repr(result)
    for value, residual in zip(result.outliers, result.outlier_residuals, strict=True):
        assert (values - value).abs().min() <= residual + 1e-12
    assert result.outliers.tolist() == sorted(result.outliers.tolist(), reverse=True)


def test_an_outlier_whose_interval_reaches_its_neighbour_is_not_certified():
    nodes = np.array([[-0.1, 0.0, 0.1, 5.0, 5.006]])
    weights = np.array([[0.3, 0.3, 0.398, 0.001, 0.001]])
    residuals = np.array([[1.0, 1.0, 1.0, 0.004, 0.001]])
    values, _, certified = find_outliers(nodes, weights, residuals)
    assert values.tolist() == [5.006, 5.0]
    assert certified.tolist() == [True, False]


# A bulk of width 0.2 that has not converged, and what lies beyond.
@pytest.mark.parametrize(
    ("beyond", "weights", "residuals", "found"),
    [
        ([-5.0, 5.0, 5.0005], [1e-3] * 3, [1e-4, 1e-4, 5e-3], [5.0, -5.0]),  # two views of one, the better one counts
        ([-5.0, 5.0, 5.015], [1e-3] * 3, [1e-4, 9e-3, 9e-3], [5.0, -5.0]),  # two intervals that meet
        ([-5.0, 4.8, 5.0], [1e-3] * 3, [1e-4, 0.3, 1e-4], [5.0, -5.0]),  # a view of 5 that has not converged
        ([-5.0, 4.0, 5.0], [1e-3] * 3, [1e-4, 0.3, 1e-4], [5.0, -5.0]),  # the end of the bulk
        ([-5.0, 4.5, 5.0], [1e-3] * 3, [1e-4, 0.3, 1e-4], [-5.0]),  # too close to it
        ([-50.0, 0.2], [1e-3] * 2, [1e-4, 1e-4], [-50.0]),  # apart from the bulk, but not on the scale of the spectrum
    ],
)
def test_what_counts_as_an_outlier(beyond, weights, residuals, found):
    bulk = [-0.1, 0.0, 0.1]
    nodes = np.array([[*bulk, *beyond]])
    values, doubts, _ = find_outliers(
        nodes, np.array([[0.3, 0.4, 0.3, *weights]]), np.array([[1e-2 if len(beyond) == 3 else 1.0] * 3 + residuals])
    )
    assert values.tolist() == pytest.approx(found, abs=0.016)
    assert len(doubts) == len(found)
    if beyond[-1] == 5.0005:
        assert values[0] == 5.0


def test_an_eigenvalue_lies_within_the_residual_of_each_node():
    values = TRACED["flat"]
    result = stochastic_lanczos_quadrature(DenseOperator(MATRICES["flat"]), num_steps=4)
    distance = (result.nodes.unsqueeze(-1) - values).abs().amin(-1)
    assert (distance <= result.residuals).all()
    assert result.residuals.min() > 1e-3


def test_draws_that_end_early_repeat_a_node_without_weight():
    values = torch.cat([torch.zeros(38), torch.tensor([1.0, 2.0])]).double()
    operator = DenseOperator(torch.diag(values))
    operator.calls, product = 0, operator._matmat

    def stop_the_first(v):  # from the second step on it is made to see an invariant space
        operator.calls += 1
        w = product(v)
        if v.shape[1] == 2 and operator.calls == 2:
            w[:, 0] = 0.0
        return w

    operator._matmat = stop_the_first
    result = stochastic_lanczos_quadrature(operator, num_draws=2, num_steps=30)
    first, second = result.settings["steps_taken"]
    assert first < second
    torch.testing.assert_close(result.weights.sum(1), torch.ones(2, dtype=torch.float64))
    assert not result.weights[0, first:].any()
    assert (result.nodes[0, first:] == result.nodes[0, first - 1]).all()


def test_bad_options():
    operator = DenseOperator(MATRICES["slow"])
    for name, value in (("num_draws", 0), ("num_steps", 0), ("sigma", 0.0), ("seed", -1), ("progress", 2)):
        with pytest.raises(ArgumentError, match=f"`{name}`"):
            stochastic_lanczos_quadrature(operator, **{name: value})
    with pytest.raises(ArgumentError, match=r"`memory` must be at least 8000 bytes for the basis of one draw of 10 st"):
        stochastic_lanczos_quadrature(operator, num_steps=10, memory=100)
    with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        stochastic_lanczos_quadrature(FunctionOperator(lambda v: v * float("inf"), 5))


def test_no_more_bases_are_alive_than_run_together(monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Watched(quadrature.KrylovSpace):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(quadrature, "KrylovSpace", Watched)
    operator = DenseOperator(torch.diag(torch.arange(1.0, 31).double()))
    stochastic_lanczos_quadrature(operator, num_draws=5, num_steps=4, memory=2 * 4 * 30 * 8)
    assert len(most) == 5
    assert max(most) == 2
