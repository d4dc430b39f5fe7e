"""Traces: budgets, tolerances, intervals, ranks, and the variances that theory gives."""

import math

import pytest
import torch

from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning, NonFiniteError
from sharpness.linalg import DenseOperator, FunctionOperator, frobenius_norm, hutchinson, hutchpp, xtrace
from sharpness.linalg.confidence import quantile
from sharpness.linalg.leave_one_out import leave_one_out
from sharpness.linalg.probes import Probes
from sharpness.linalg.sketch import Sketch
from tests.linalg.spectra_of_traces import TRACED
from tests.zoo import rotated, spectra

METHODS = [hutchinson, hutchpp, xtrace]
MATRICES = {name: rotated(values) for name, values in TRACED.items()}


class Counting:
    def __init__(self, matrix):
        self.matrix, self.count = matrix, 0
        self.operator = FunctionOperator(self, len(matrix), dtype=matrix.dtype)

    def __call__(self, v):
        self.count += 1
        return self.matrix @ v


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [10, 12, 30, 60])
def test_a_budget_is_spent_exactly_and_reported(method, budget):
    counting = Counting(MATRICES["slow"])
    result = method(counting.operator, num_matvecs=budget, on_failure="ignore")
    assert result.num_matvecs == counting.count == budget
    assert result.value == pytest.approx(result.samples.mean().item())


def test_an_odd_product_is_left_over_by_xtrace():
    assert xtrace(DenseOperator(MATRICES["slow"]), num_matvecs=13, on_failure="ignore").num_matvecs == 12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["fast", "slow", "indefinite", "near zero", "classes"])
def test_the_tolerance_holds_when_it_says_so(name, method):
    values = TRACED[name]
    results = [method(DenseOperator(MATRICES[name]), tol=0.1, seed=seed, on_failure="ignore") for seed in range(10)]
    allowed = 0.1 * max(abs(values.sum().item()), values.norm().item())
    done = [r for r in results if r.converged]
    assert len(done) == 10 or method is hutchinson  # which may need more than 1000 products
    assert sum(abs(r.value - values.sum().item()) <= allowed for r in done) >= 0.9 * len(done)
    for r in done:
        assert (r.interval[1] - r.interval[0]) / 2 <= 0.1 * max(abs(r.value), r.settings["frobenius_norm"]) * 1.0001


@pytest.mark.parametrize(
    ("method", "name"), [(xtrace, "fast"), (xtrace, "slow"), (hutchpp, "indefinite"), (hutchinson, "flat")]
)
def test_an_interval_is_true_although_the_run_stopped_by_itself(method, name):
    operator, runs = DenseOperator(MATRICES[name]), 100
    least = 0.95 - 4 * (0.05 * 0.95 / runs) ** 0.5
    assert least <= covered(method, operator, TRACED[name].sum().item(), runs, tol=0.06)


def covered(method, operator, trace, runs=500, **options):
    """The share of the runs whose interval holds the truth."""
    results = (method(operator, seed=seed, on_failure="ignore", **options) for seed in range(runs))
    return sum(r.interval[0] <= trace <= r.interval[1] for r in results) / runs


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        *(("fast", 9), ("indefinite", 12), ("outliers", 12)),
        *(pytest.param(name, budget, marks=pytest.mark.slow) for name in TRACED for budget in (9, 12, 24, 48)),
    ],
)
def test_hutchpp_covers_the_trace(name, budget):
    operator = DenseOperator(torch.diag(TRACED[name]))  # its vectors are rotationally invariant
    assert 0.92 <= covered(hutchpp, operator, TRACED[name].sum().item(), num_matvecs=budget) <= 0.98


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
@pytest.mark.parametrize("name", ["indefinite", "near zero"])
def test_the_variance_of_hutchinson_is_what_theory_gives(name, distribution):
    matrix, n = MATRICES[name], 100
    result = hutchinson(DenseOperator(matrix), distribution=distribution, num_matvecs=4000, on_failure="ignore")
    squares, trace = (matrix**2).sum().item(), matrix.trace().item()
    variance = {
        "rademacher": 2 * (squares - (matrix.diagonal() ** 2).sum().item()),
        "gaussian": 2 * squares,
        "sphere": 2 * n / (n + 2) * (squares - trace**2 / n),
    }[distribution]
    assert result.stderr == pytest.approx(math.sqrt(variance / 4000), rel=0.1)
    assert abs(result.value - trace) < 4 * result.stderr
    assert len(result.samples) == 4000


def test_the_variance_on_a_sphere_of_few_dimensions():
    matrix = rotated(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    result = hutchinson(DenseOperator(matrix), distribution="sphere", num_matvecs=2000, on_failure="ignore")
    assert result.stderr == pytest.approx(math.sqrt(6 / 5 * (21 - 49 / 3) / 2000), rel=0.05)
    assert result.samples.var().item() / 2000 == pytest.approx(result.stderr**2, rel=0.1)
    assert hutchinson(DenseOperator(torch.eye(3)), distribution="sphere").stderr < 1e-3


@pytest.mark.parametrize("method", [hutchpp, xtrace])
def test_what_is_outside_of_the_basis_is_scaled_to_its_dimensions(method):
    result = method(DenseOperator(torch.eye(70, dtype=torch.float64)), num_matvecs=24)
    assert result.value == pytest.approx(70)  # by every single sample
    assert result.stderr < 1e-5


@pytest.mark.parametrize(
    ("method", "name", "tol"),
    [(hutchinson, "near zero", 0.2), (xtrace, "both ends", 0.2), (frobenius_norm, "near zero", 0.03)],
)
def test_a_run_that_stops_by_itself_reports_half_way_to_its_tolerance(method, name, tol):
    operator = DenseOperator(MATRICES[name])
    stopped = method(operator, tol=tol)
    spent = stopped.num_evaluations if method is frobenius_norm else stopped.num_matvecs
    fixed = method(operator, num_matvecs=spent, on_failure="ignore")
    assert spent > 16  # it has looked more than once
    assert stopped.value == pytest.approx(fixed.value, rel=1e-12)
    assert stopped.stderr == pytest.approx(fixed.stderr, rel=1e-9)
    scale = stopped.value if method is frobenius_norm else max(abs(stopped.value), stopped.settings["frobenius_norm"])
    for end, own, sign in zip(stopped.interval, fixed.interval, (-1, 1), strict=True):
        assert end == pytest.approx((own + stopped.value + sign * tol * scale) / 2, rel=1e-9)


@pytest.mark.parametrize("method", [hutchpp, xtrace])
def test_a_run_that_has_left_its_basis_does_so_too(method):  # its vectors are not those of a fixed budget
    stopped = method(DenseOperator(MATRICES["near zero"]), tol=0.2)
    assert stopped.num_matvecs > 24
    assert method is hutchpp or stopped.settings["beyond"] > 16
    half = (stopped.interval[1] - stopped.interval[0]) / 2
    own = 2 * half - 0.2 * stopped.settings["frobenius_norm"]
    assert 1.95 <= own / stopped.stderr <= 2.3


def test_as_many_dimensions_as_are_multiplied_one_by_one():
    for n in (64, 65):
        result = xtrace(DenseOperator(torch.diag(TRACED["slow"][:n])))
        assert ("exact" in result.settings) == (n == 64)


DISTRIBUTIONS = ["rademacher", "gaussian", "sphere"]


@pytest.mark.parametrize(
    ("name", "distribution", "budget"),
    [
        *(("fast", "rademacher", 4), ("outliers", "gaussian", 4), ("indefinite", "sphere", 4)),
        *(("indefinite", "rademacher", 10), ("near zero", "rademacher", 10)),
        *(
            pytest.param(name, distribution, budget, marks=pytest.mark.slow)
            for name in TRACED
            for distribution in DISTRIBUTIONS
            for budget in (4, 10)
        ),
    ],
)
def test_hutchinson_covers_the_trace(name, distribution, budget):
    options = {"distribution": distribution, "num_matvecs": budget}
    # Two forms of opposite signs are seldom further apart than their lengths say, with few of them: wider than need be.
    most = 0.998 if (name, budget) == ("pair", 4) else 0.98
    assert 0.92 <= covered(hutchinson, DenseOperator(MATRICES[name]), TRACED[name].sum().item(), **options) <= most


def test_signs_are_exact_for_a_diagonal_matrix():
    result = hutchinson(DenseOperator(torch.diag(TRACED["slow"])), num_matvecs=3)
    assert result.value == pytest.approx(TRACED["slow"].sum().item())
    assert result.stderr < 1e-14


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", spectra())
def test_any_spectrum_of_the_zoo(name, method):
    matrix = rotated(spectra()[name])
    result = method(DenseOperator(matrix), on_failure="ignore", num_matvecs=None if method is not hutchinson else 200)
    assert abs(result.value - matrix.trace().item()) <= 4 * result.stderr + 1e-10 * matrix.abs().sum().item()
    assert result.num_matvecs <= 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("method", [hutchpp, xtrace])
def test_low_rank_is_found_out(method, scale, dtype):
    g = torch.Generator().manual_seed(1)
    a = torch.randn(100, 3, generator=g, dtype=torch.float64)
    matrix = (scale * (a * torch.tensor([1.0, -2.0, 3.0])) @ a.T).to(dtype)
    counting = Counting(matrix)
    result = method(counting.operator, num_matvecs=40)
    assert result.settings["rank"] == 3
    assert result.num_matvecs == counting.count
    assert result.num_matvecs == (23 if method is xtrace else 40)
    low, high = result.interval
    assert low <= matrix.double().trace().item() <= high
    assert high - low <= 1e-3 * abs(result.value) * (1 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("method", [*METHODS, frobenius_norm])
@pytest.mark.parametrize("n", [1, 3, 100])
def test_the_zero_operator(method, n):
    result = method(DenseOperator(torch.zeros(n, n)))
    assert result.value == result.stderr == 0.0
    assert result.interval == (0.0, 0.0)
    assert result.converged
    assert "exact up to rounding" in repr(result)


@pytest.mark.parametrize("method", METHODS)
def test_one_dimension(method):
    result = method(DenseOperator([[-5.0]]))
    assert result.value == pytest.approx(-5.0)
    assert result.stderr == 0.0


@pytest.mark.parametrize("method", [hutchpp, xtrace, frobenius_norm])
def test_as_many_products_as_dimensions_are_exact(method):
    counting = Counting(MATRICES["slow"])
    result = method(counting.operator, num_matvecs=150)
    truth = counting.matrix.norm() if method is frobenius_norm else counting.matrix.trace()
    assert result.value == pytest.approx(truth.item(), rel=1e-12)
    assert result.stderr == 0.0
    assert counting.count == 100


@pytest.mark.parametrize("name", TRACED)
def test_the_frobenius_norm(name):
    truth = TRACED[name].norm().item()
    operator = DenseOperator(torch.diag(TRACED[name]))
    assert covered(frobenius_norm, operator, truth, 50, num_matvecs=24) >= 0.95 - 4 * (0.05 * 0.95 / 50) ** 0.5
    result = frobenius_norm(DenseOperator(MATRICES[name]), tol=0.05)
    assert result.converged
    assert abs(result.value - truth) <= 0.1 * truth


def test_the_error_of_the_norm_is_that_of_its_square():
    operator = DenseOperator(MATRICES["outliers"])
    result = frobenius_norm(operator, num_matvecs=24, on_failure="ignore")
    low, high = result.interval
    assert (high**2 - low**2) / 2 == pytest.approx(quantile(11) * 2 * result.value * result.stderr, rel=1e-6)
    sketch = Sketch(operator, Probes(operator, 0, "sphere"), keep_products=True)
    sketch.multiply(12, into_basis=True)
    _, variance = leave_one_out(sketch.square(), 100, sphere=True, negative=0.25)
    assert (2 * result.value * result.stderr) ** 2 == pytest.approx(variance.item(), rel=1e-9)


def test_an_interval_knows_how_few_vectors_it_is_from():
    result = hutchinson(DenseOperator(torch.diag(torch.eye(80)[0])), distribution="gaussian", num_matvecs=4, tol=9)
    assert (result.interval[1] - result.interval[0]) / 2 >= 2.1 * result.stderr  # the quantile of many would be 1.96


@pytest.mark.parametrize("method", [*METHODS, frobenius_norm])
def test_not_converged_says_so_with_the_numbers(method):
    operator = DenseOperator(MATRICES["indefinite"])
    with pytest.warns(ConvergenceWarning, match=r"spent 10 products on a .*; tol asks for 0.01 %. Raise num_matvecs"):
        result = method(operator, num_matvecs=10, tol=1e-4)
    assert not result.converged
    assert "NOT converged" in repr(result)
    with pytest.raises(ConvergenceError, match="spent 10 products") as caught:
        method(operator, num_matvecs=10, tol=1e-4, on_failure="raise")
    assert caught.value.result.value == result.value


def test_a_trace_near_zero_is_relative_to_the_frobenius_norm():
    with pytest.warns(ConvergenceWarning, match="of the Frobenius norm, since the trace is smaller than that"):
        xtrace(DenseOperator(MATRICES["near zero"]), num_matvecs=12)
    assert xtrace(DenseOperator(MATRICES["near zero"]), tol=0.1).converged


@pytest.mark.parametrize(("method", "least"), [(hutchinson, 3), (hutchpp, 9), (xtrace, 6), (frobenius_norm, 6)])
def test_too_few_products_are_refused_with_the_number_that_is_needed(method, least):
    operator = DenseOperator(MATRICES["slow"])
    name = method.__name__
    with pytest.raises(ArgumentError, match=f"`num_matvecs` must be at least {least} for {name}.*got {least - 1}"):
        method(operator, num_matvecs=least - 1)
    assert method(operator, num_matvecs=least, on_failure="ignore")


@pytest.mark.parametrize("method", [hutchpp, xtrace, frobenius_norm])
def test_a_basis_that_does_not_fit_is_refused_and_one_that_fits_is_kept_small(method):
    operator = DenseOperator(MATRICES["near zero"])
    with pytest.raises(
        ArgumentError, match=r"`memory` must be at least \d+ bytes for \d+ random vectors, \d to keep for each"
    ):
        method(operator, num_matvecs=60, memory=800 * 5)
    result = method(operator, memory=800 * 30, tol=1e-3, on_failure="ignore")
    if method is hutchpp:
        assert result.settings["rank"] == 10  # a third each for the basis, its products, and the other products
    elif method is xtrace:
        assert result.num_matvecs == 60 + 100  # then the entries are fewer than the vectors that it would take
        assert result.settings["exact"]
    else:
        assert result.num_evaluations == 30  # it keeps the products of the basis too
    assert result.converged == (method is xtrace)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "name"),
    [({"tol": 0}, "tol"), ({"seed": -1}, "seed"), ({"progress": 1}, "progress"), ({"on_failure": "x"}, "on_failure")],
)
def test_bad_options(method, options, name):
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        method(DenseOperator(MATRICES["slow"]), **options)
    with pytest.raises(ArgumentError, match="`operator`"):
        method(torch.eye(3))
    if method is hutchinson:
        with pytest.raises(ArgumentError, match="`distribution` must be one of"):
            hutchinson(DenseOperator(MATRICES["slow"]), distribution="normal")


@pytest.mark.parametrize("method", [*METHODS, frobenius_norm])
def test_a_product_that_is_not_finite(method):
    with pytest.raises(NonFiniteError, match="a product of the operator holds NaN or infinity"):
        method(FunctionOperator(lambda v: v * float("nan"), 80))


@pytest.mark.parametrize("method", [*METHODS, frobenius_norm])
def test_same_seed_same_bits_and_the_global_state_is_left_alone(method):
    operator = DenseOperator(MATRICES["slow"])
    before = torch.get_rng_state()
    first, again, other = (method(operator, seed=s, num_matvecs=12, on_failure="ignore") for s in (0, 0, 1))
    assert torch.equal(first.samples, again.samples)
    assert not torch.equal(first.samples, other.samples)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("estimate", "rows"), [(frobenius_norm, 6), (hutchpp, 9)])
def test_memory_limits_the_vectors_and_the_warning_says_so(estimate, rows):
    operator, row = DenseOperator(torch.diag(torch.linspace(-1.0, 1.0, 200).double() ** 3)), 200 * 8
    with pytest.raises(ArgumentError, match=rf"`memory` must be at least {rows * row} bytes for 3 random vectors"):
        estimate(operator, memory=rows * row - 1)
    with pytest.warns(ConvergenceWarning, match="Raise memory, or loosen tol"):
        result = estimate(operator, memory=rows * row, tol=1e-3)
    assert len(result.samples) >= 3
    spent = result.num_evaluations if estimate is frobenius_norm else result.num_matvecs
    assert spent <= 3 * rows


def slowly_decaying(n, power=0.6):
    values = torch.arange(1.0, n + 1).double() ** -power
    return FunctionOperator(lambda v: values * v, n, dtype=torch.float64)


@pytest.mark.parametrize(("power", "tol"), [(0.6, 0.01), (0.5, 0.005), (0.4, 0.005)])
def test_a_run_leaves_the_basis_where_the_spectrum_levels_off_and_is_never_much_dearer_than_the_mean(power, tol):
    operator = slowly_decaying(2000, power)
    found = [xtrace(operator, tol=tol, seed=seed) for seed in range(6)]
    plain = [hutchinson(operator, tol=tol, seed=seed, distribution="sphere") for seed in range(6)]
    assert all("beyond" in result.settings and result.converged for result in found)
    assert sum(r.num_matvecs for r in found) <= 1.1 * sum(r.num_matvecs for r in plain)


def test_runs_that_may_leave_the_basis_hold_the_trace():
    operator, runs = slowly_decaying(150), 300
    truth = (torch.arange(1.0, 151).double() ** -0.6).sum().item()
    found = [xtrace(operator, tol=0.02, seed=seed) for seed in range(runs)]
    left = [result for result in found if "beyond" in result.settings]
    assert runs / 4 < len(left) < runs
    covered = sum(result.interval[0] <= truth <= result.interval[1] for result in found) / runs
    assert 0.92 <= covered <= 0.985
    assert all(result.num_matvecs == 2 * result.settings["rank"] + result.settings["beyond"] for result in left)
    assert abs(sum(r.value - truth for r in found)) < 4 * math.sqrt(sum(r.stderr**2 for r in found))


def test_without_room_for_a_larger_basis_the_rest_is_found_beyond_it():
    operator = DenseOperator(torch.diag(torch.linspace(-0.5, 1.0, 200).double() ** 3))
    with pytest.raises(ArgumentError, match="`memory` must be at least 4800 bytes for 3 random vectors"):
        xtrace(operator, memory=4799)
    result = xtrace(operator, memory=4800, tol=0.1)
    assert result.converged
    assert result.settings["rank"] == 3
    assert result.interval[0] <= operator.matrix.trace() <= result.interval[1]
