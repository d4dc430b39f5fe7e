import math

import numpy as np
import pytest
import torch

from sharpness.comparison.intervals import paired_log_ratio, paired_noise, ratio_interval, unpaired_log_ratio
from sharpness.linalg import DenseOperator, frobenius_norm, xtrace
from sharpness.results import DiagonalResult, EigenResult, EpsilonSharpnessResult, PerturbationResult, ScalarResult

DRAWS = 400


def eigen(value, half=0.0, converged=True):
    row = torch.tensor([[value - half, value + half]], dtype=torch.float64)
    return EigenResult(
        eigenvalues=torch.tensor([value], dtype=torch.float64),
        residuals=torch.tensor([half]),
        interval=row,
        kato_temple=row,
        converged=converged,
        num_matvecs=1,
        num_passes=1,
        seconds=0.0,
    )


def average(samples, rounding=0.0):
    samples = torch.as_tensor(samples, dtype=torch.float64)
    stderr = math.hypot(samples.std().item() / len(samples) ** 0.5, rounding)
    return PerturbationResult(
        value=samples.mean().item(),
        loss=0.1,
        stderr=stderr,
        samples=samples,
        num_evaluations=1,
        num_passes=1,
        seconds=0.0,
    )


def exact(value):
    return ScalarResult(value=value, num_evaluations=1, num_passes=1, seconds=0.0)


def bound(value):
    return EpsilonSharpnessResult(
        value=value, loss=0.1, max_loss=0.2, starts=(), num_evaluations=1, num_passes=1, seconds=0.0
    )


def diagonal(value, error):
    return DiagonalResult(
        value=torch.full((4,), value / 4),
        stderr=torch.full((4,), 0.1),
        trace=value,
        trace_stderr=error,
        sum_of_squares=1.0,
        num_samples=8,
        num_matvecs=16,
        num_passes=1,
        seconds=0.0,
    )


def coverage(draw, truth):
    """Share of the draws whose interval holds the truth, and the mean width of its logarithm."""
    intervals = [draw(np.random.default_rng(seed)) for seed in range(DRAWS)]
    hits = np.mean([low <= truth <= high for low, high in intervals])
    return hits, float(np.mean([math.log(high / low) for low, high in intervals]))


@pytest.mark.parametrize("n", [2, 3, 10])
def test_over_seeds_the_interval_holds_the_ratio_in_95_percent(n):
    def draw(rng):
        common = rng.normal(size=n)  # the seed moves both: pairing takes it out
        a, b = (np.exp(mean + common + 0.3 * rng.normal(size=n)) for mean in (2.0, 0.5))
        return ratio_interval([exact(v) for v in a], [exact(v) for v in b])

    hits, _ = coverage(draw, math.exp(1.5))
    assert abs(hits - 0.95) < 4 * math.sqrt(0.95 * 0.05 / DRAWS)


def test_unequal_numbers_of_seeds_take_welchs_interval():
    def draw(rng):
        a, b = np.exp(1.0 + 0.2 * rng.normal(size=4)), np.exp(0.6 * rng.normal(size=7))
        return ratio_interval([exact(v) for v in a], [exact(v) for v in b])

    hits, _ = coverage(draw, math.e)
    assert abs(hits - 0.95) < 4 * math.sqrt(0.95 * 0.05 / DRAWS)


def quadratic_forms(rng, spectra, m=32):
    """What average-case sharpness draws on quadratics: half of z'Hz, with the same z for each."""
    z = rng.normal(size=(m, len(spectra[0])))
    return [0.5 * z**2 @ np.array(spectrum) for spectrum in spectra]


ALIKE = np.geomspace(1, 0.01, 20), 3 * np.geomspace(1, 0.01, 20) + 0.02
TRUTH = ALIKE[1].sum() / ALIKE[0].sum()


def test_shared_directions_give_a_calibrated_and_narrower_interval():
    def draw(rng, same_draws=True):
        a, b = quadratic_forms(rng, ALIKE)
        return ratio_interval([average(b)], [average(a)], same_draws=same_draws)

    hits, width = coverage(draw, TRUTH)
    assert 0.93 <= hits <= 0.97
    unpaired, wide = coverage(lambda rng: draw(rng, same_draws=False), TRUTH)
    assert unpaired > 0.99
    assert width < wide / 5


def test_directions_of_their_own_give_a_calibrated_interval_as_well():
    def draw(rng):
        a, b = quadratic_forms(rng, ALIKE)[0], quadratic_forms(rng, ALIKE)[1]
        return ratio_interval([average(b)], [average(a)], same_draws=False)

    hits, _ = coverage(draw, TRUTH)
    assert 0.93 <= hits <= 0.975


def test_seeds_and_shared_directions_add_up():
    spread, n = 0.004, 5  # either part matters as much as the other

    def draw(rng):
        a, b = quadratic_forms(rng, ALIKE, m=64)
        factors = np.exp(spread * rng.normal(size=n))
        return ratio_interval([average(f * b) for f in factors], [average(a)] * n)

    hits, _ = coverage(draw, TRUTH)
    assert 0.93 <= hits <= 0.98


@pytest.mark.parametrize("estimate", [xtrace, frobenius_norm])
def test_the_interval_of_an_estimate_counts_once(estimate):
    """It is one of 95 %, and not for certain; and the samples tell of the same error."""
    operators = [DenseOperator(torch.diag(torch.linspace(0.2, top, 60, dtype=torch.float64))) for top in (1.0, 1.5)]
    exact = [estimate(o, num_matvecs=60).value for o in operators]

    def draw(rng):
        seeds = rng.integers(2**31, size=2)
        a, b = (estimate(o, num_matvecs=24, tol=1.0, seed=int(s)) for o, s in zip(operators, seeds, strict=True))
        return ratio_interval([b], [a], same_draws=False)

    hits, _ = coverage(draw, exact[1] / exact[0])
    assert 0.93 <= hits <= 0.985


def test_the_sum_of_a_diagonal_has_its_standard_error():
    low, high = ratio_interval([diagonal(3.0, 0.03)], [diagonal(2.0, 0.02)])
    assert math.log(high / low) / 2 == pytest.approx(1.96 * 0.01 * math.sqrt(2), rel=1e-3)


def test_directions_that_all_seeds_share_do_not_average_out():
    """Ten seeds whose Hessians are alike see one and the same set of directions."""

    def draw(rng):
        a, b = quadratic_forms(rng, ALIKE, m=8)
        return ratio_interval([average(b)] * 10, [average(a)] * 10)

    hits, _ = coverage(draw, TRUTH)
    assert 0.92 <= hits <= 0.97


def test_rounding_in_the_standard_error_is_kept():
    a, b = quadratic_forms(np.random.default_rng(0), ALIKE)
    tight, wide = [ratio_interval([average(b, r)], [average(a, r)]) for r in (0.0, 0.1)]
    center = b.mean() / a.mean()
    added = 1.96 * 0.1 * math.hypot(1 / b.mean(), 1 / a.mean())
    expected = math.hypot(math.log(tight[1] / center), added)
    assert math.log(wide[1] / center) == pytest.approx(expected, rel=1e-3)


def test_certified_intervals_of_one_seed_are_divided_end_by_end():
    assert ratio_interval([eigen(6.0, 0.3)], [eigen(2.0, 0.1)]) == pytest.approx((5.7 / 2.1, 6.3 / 1.9))
    low, high = ratio_interval([eigen(-6.0, 0.3)], [eigen(-2.0, 0.1)])
    assert (low, high) == pytest.approx((5.7 / 2.1, 6.3 / 1.9))
    # Over seeds they widen the ends by their mean.
    narrow = ratio_interval([eigen(6.0), eigen(5.0)], [eigen(2.0), eigen(2.0)])
    wide = ratio_interval([eigen(6.0, 0.6), eigen(5.0, 0.5)], [eigen(2.0), eigen(2.0)])
    assert wide == pytest.approx((narrow[0] * 0.9, narrow[1] * 1.1))


def test_the_interval_turned_round_is_its_inverse():
    a, b = [eigen(v, 0.01) for v in (3.0, 4.0, 6.0)], [eigen(v, 0.02) for v in (1.0, 1.5, 1.4)]
    low, high = ratio_interval(a, b)
    assert ratio_interval(b, a) == pytest.approx((1 / high, 1 / low))


def test_exact_numbers_of_one_seed_have_an_exact_ratio():
    assert ratio_interval([exact(3.0)], [exact(2.0)]) == pytest.approx((1.5, 1.5))


@pytest.mark.parametrize(
    ("over", "under"),
    [
        ([eigen(1.0)], [eigen(-2.0)]),
        ([exact(1.0), exact(-1.0)], [exact(2.0), exact(-2.0)]),
        ([exact(0.0)], [exact(1.0)]),
        ([exact(float("nan"))], [exact(1.0)]),
        ([exact(float("inf")), exact(1.0)], [exact(1.0), exact(1.0)]),
        ([eigen(1.0, converged=False)], [eigen(1.0)]),
        ([eigen(1.0, 2.0)], [eigen(1.0)]),  # it holds zero
        ([bound(1.0)], [bound(2.0)]),
        ([exact(1.0), exact(2.0)], [exact(1.0)]),
    ],
    ids=["signs", "signs over seeds", "zero", "nan", "inf", "not converged", "zero inside", "bounds", "one and two"],
)
def test_where_nothing_is_known_there_is_no_interval(over, under):
    assert ratio_interval(over, under) is None
    assert ratio_interval(under, over) is None


def test_bounds_over_seeds_have_the_interval_of_what_was_computed():
    low, high = ratio_interval([bound(1.0), bound(2.0)], [bound(1.0), bound(1.0)])
    assert low < math.sqrt(2) < high


def test_half_widths_by_hand():
    a, b = np.array([2.0, 8.0]), np.array([1.0, 1.0])
    center, half = paired_log_ratio(a, b)
    assert center == pytest.approx(math.log(4))
    assert half == pytest.approx(12.7062 * math.log(4) / math.sqrt(2) / math.sqrt(2), rel=1e-4)
    assert unpaired_log_ratio(a, np.array([1.0, 1.0, 1.0]))[1] == pytest.approx(half, rel=1e-4)  # the other is known
    assert unpaired_log_ratio(np.array([2.0, 2.0]), np.array([1.0, 1.0, 1.0])) == (pytest.approx(math.log(2)), 0.0)
    same = np.array([[1.0, 2.0, 3.0]])
    assert paired_noise(5 * same, same) == pytest.approx(0.0, abs=1e-12)
    seeds = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])  # what a direction does to one, it undoes for the other
    assert paired_noise(seeds, np.ones((2, 3))) == pytest.approx(0.0, abs=1e-12)
    assert paired_noise(seeds[:1], np.ones((1, 3))) == pytest.approx(4.30265 * 0.5 / math.sqrt(3), rel=1e-5)


def test_there_is_no_interval_that_would_hold_all_numbers():
    far, one = [exact(1e-60), exact(1.0)], [exact(1.0), exact(1.0)]
    assert ratio_interval(far, one) is None
    assert ratio_interval(one, far) is None
    low, high = ratio_interval([exact(1e-20), exact(1.0)], one)
    assert 0 < low < 1e-10 < high < math.inf
