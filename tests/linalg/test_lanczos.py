import numpy as np
import pytest
import torch

from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning, NonFiniteError
from sharpness.linalg import DenseOperator, FunctionOperator, LinearOperator, dense, lanczos, power_iteration
from sharpness.linalg.krylov import KrylovSpace
from sharpness.linalg.which import WHICH, select
from tests.checks import contains
from tests.zoo import rotated, spectra

SPECTRA = spectra()


def truth(values, which, k):
    ascending = values.sort().values
    return ascending[select(ascending.numpy(), which, k).copy()]


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SPECTRA)
def test_ends_of_known_spectra_with_multiplicity(name, which):
    values = SPECTRA[name]
    for k in {1, min(3, len(values)), min(6, len(values)), len(values)}:
        result = lanczos(DenseOperator(rotated(values)), k, which=which)
        assert result.converged
        expected = truth(values, which, k)
        if which == "magnitude":  # plus and minus five tie
            assert (result.eigenvalues.abs() - expected.abs()).abs().le(result.residuals).all()
        else:
            assert contains(result.interval, expected, slack=1e-15 * values.abs().max().item())


@pytest.mark.parametrize("name", SPECTRA)
def test_float32_ends_agree_to_the_tolerance(name):
    values = SPECTRA[name]
    result = lanczos(DenseOperator(rotated(values).float()), 1)
    assert result.converged
    assert contains(result.interval, values.max()[None])


def test_every_interval_contains_an_eigenvalue_in_400_random_trials():
    inside_kato_temple = rows = 0
    for seed in range(400):
        g = torch.Generator().manual_seed(seed)
        n = int(torch.randint(1, 70, (1,), generator=g))
        k = int(torch.randint(1, min(n, 6) + 1, (1,), generator=g))
        normal = torch.randn(n, generator=g, dtype=torch.float64)
        values = [normal, normal.abs() ** 3, torch.round(2 * normal)][seed % 3]
        which = WHICH[seed % 4]
        result = lanczos(DenseOperator(rotated(values, seed)), k, which=which, on_failure="ignore")
        near = (result.eigenvalues[:, None] - values).abs().min(1).values
        assert (near <= result.residuals).all(), seed
        known = ~result.kato_temple[:, 0].isnan()
        low, high = result.kato_temple[known, :1], result.kato_temple[known, 1:]
        inside_kato_temple += int(((low <= values) & (values <= high)).any(1).sum())
        rows += int(known.sum())
    assert rows > 600
    assert inside_kato_temple >= 0.98 * rows  # nearly always: certain only if nothing nearby was missed


@pytest.mark.parametrize("kind", ["random", "geometric", "outliers"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_at_most_two_products_past_the_first_that_a_dense_check_accepts(kind, k):
    g = torch.Generator().manual_seed(k)
    values = {
        "random": torch.randn(150, generator=g, dtype=torch.float64),
        "geometric": 0.8 ** torch.arange(150, dtype=torch.float64),
        "outliers": torch.cat([torch.tensor([40.0, 25, 17, 9, 6]), torch.rand(145, generator=g)]).double(),
    }[kind]
    matrix, tol = rotated(values), 1e-3
    operator = DenseOperator(matrix)
    exact = values.sort(descending=True).values[:k]
    space = KrylovSpace(operator, torch.Generator().manual_seed(0))
    for first in range(1, 151):
        space.absorb(operator.matvec(space.request()))
        if first < k:
            continue
        theta, s, _ = space.ritz()
        top = theta[::-1][:k].copy()
        rows = space.vectors(s[:, ::-1][:, :k])
        residuals = torch.linalg.vector_norm(rows @ matrix - torch.from_numpy(top)[:, None] * rows, dim=1)
        right = (torch.from_numpy(top) - exact).abs() <= tol * exact.abs()
        if (residuals <= tol * exact.abs()).all() and right.all():
            break
    assert first <= lanczos(operator, k, tol=tol).num_matvecs <= first + 2


def test_residuals_are_those_of_the_operator_and_eigenvectors_are_orthonormal():
    matrix = rotated(SPECTRA["indefinite"])
    result = lanczos(DenseOperator(matrix), 4, vectors=True, tol=1e-2)
    rows, theta = result.eigenvectors, result.eigenvalues
    true = torch.linalg.vector_norm(rows @ matrix - theta[:, None] * rows, dim=1)
    assert (true <= result.residuals).all()
    assert (result.residuals <= true + 1e-12).all()
    torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-13)


def test_the_basis_stays_orthonormal_and_obeys_the_recurrence():
    values = torch.cat([torch.tensor([1e4, 3e3]), torch.linspace(0, 1, 98)]).double()
    matrix = rotated(values)
    for dtype, level in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        operator = DenseOperator(matrix.to(dtype))
        space = KrylovSpace(operator, torch.Generator().manual_seed(0))
        for _ in range(60):
            space.absorb(operator.matvec(space.request()))
        q = space.vectors(np.eye(60)).double()
        torch.testing.assert_close(q @ q.T, torch.eye(60, dtype=torch.float64), rtol=0, atol=level)
        t = torch.diag(torch.tensor(space.diagonal, dtype=torch.float64)) + sum(
            torch.diag(torch.tensor(space.coupling[:-1], dtype=torch.float64), sign) for sign in (1, -1)
        )
        remainder = matrix @ q.T - q.T @ t
        assert torch.linalg.matrix_norm(remainder[:, :-1], 2) <= 10 * level * 1e4
        torch.testing.assert_close(
            torch.linalg.vector_norm(remainder[:, -1]),
            torch.tensor(space.coupling[-1]),
            rtol=1e-2,
            atol=0,
            check_dtype=False,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_basis_made_of_random_starts_is_orthonormal_to_the_last_row(dtype):
    operator = DenseOperator(torch.zeros(60, 60, dtype=dtype))
    space = KrylovSpace(operator, torch.Generator().manual_seed(0))
    for _ in range(60):
        space.absorb(operator.matvec(space.request()))
    q = space.vectors(np.eye(60)).double()
    level = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(q @ q.T, torch.eye(60, dtype=torch.float64), rtol=0, atol=level)


def test_long_runs_have_no_ghost_copies():
    values = torch.cat([torch.tensor([100.0, 50, 20]), torch.linspace(0, 1, 197)]).double()
    result = lanczos(DenseOperator(rotated(values).float()), 30, on_failure="ignore")
    assert (result.eigenvalues[:3] - values[:3]).abs().max() < 1e-2
    assert result.eigenvalues[3] < 1.01  # hessian-eigenthings finds 100.0 ten times here


def test_the_other_end_is_waited_for_when_the_largest_in_magnitude_are_wanted():
    """Here the negative end converges first, while the second largest in magnitude is positive and still growing."""
    values = torch.randn(57, generator=torch.Generator().manual_seed(137), dtype=torch.float64)
    result = lanczos(DenseOperator(rotated(values, 137)), 2, which="magnitude")
    assert contains(result.interval, values[values.abs().argsort(descending=True)][:2])


def test_breakdown_is_relative_to_the_scale_of_the_operator():
    for scale in (1e-12, 1.0, 1e12):
        values = scale * torch.tensor([5.0, 4, 3, 2, 1, 0.5, 0.25, 0.1], dtype=torch.float64)
        result = lanczos(DenseOperator(rotated(values)), 8)
        torch.testing.assert_close(result.eigenvalues, values, rtol=1e-9, atol=0)


def test_an_operator_that_changes_is_never_reported_converged():
    matrix = rotated(torch.linspace(0, 1, 50, dtype=torch.float64))
    g = torch.Generator().manual_seed(0)

    def noisy(v):
        return matrix @ v + 0.05 * torch.randn(50, generator=g, dtype=torch.float64)

    result = lanczos(FunctionOperator(noisy, 50, dtype=torch.float64), 2, on_failure="ignore")
    assert not result.converged
    assert result.residuals.min() > 0.05


def test_not_converged_warns_with_the_numbers_or_raises_with_the_result():
    operator = DenseOperator(rotated(torch.linspace(0, 1, 200, dtype=torch.float64)))
    with pytest.warns(
        ConvergenceWarning, match=r"spent 5 products, and 2 of 2 .* asked for 1.0e-06. Raise num_matvecs"
    ):
        result = lanczos(operator, 2, num_matvecs=5, tol=1e-6)
    assert not result.converged
    assert result.num_matvecs == 5
    with pytest.raises(ConvergenceError, match="spent 5 products") as caught:
        lanczos(operator, 2, num_matvecs=5, tol=1e-6, on_failure="raise")
    torch.testing.assert_close(caught.value.result.eigenvalues, result.eigenvalues)


def test_the_default_budget_is_what_the_docstring_says():
    values = torch.linspace(0, 1, 5000, dtype=torch.float64)
    operator = FunctionOperator(lambda v: values * v, 5000, dtype=torch.float64)
    assert lanczos(operator, tol=1e-13, on_failure="ignore").num_matvecs == 220


class Doubtful(LinearOperator):
    """Its products are said to be off by 0.05."""

    def _matvec(self, v):
        return torch.linspace(0, 1, self.n, dtype=self.dtype) * v

    def product_error(self, rows):
        assert rows.shape[1] == self.n
        return 0.05


@pytest.mark.parametrize("method", [lanczos, power_iteration, dense])
def test_a_measured_rounding_error_widens_the_interval(method):
    operator = Doubtful(40, dtype=torch.float64, device="cpu")
    result = method(operator, 2, num_matvecs=3000)
    half = (result.interval[:, 1] - result.interval[:, 0]) / 2
    assert ((half >= 0.2 - 1e-9) & (half < 0.21)).all()
    assert (result.residuals < 2e-3).all()
    assert result.settings["rounding"] == pytest.approx(0.2)


def test_rounding_that_hides_everything_ends_the_run():
    """More products cannot help once all that is left is rounding."""
    values = torch.linspace(0, 1, 400, dtype=torch.float64) ** 8
    g = torch.Generator().manual_seed(99)

    def noisy(v):
        return values * v + 1e-5 * torch.randn(400, generator=g, dtype=torch.float64)

    result = lanczos(FunctionOperator(noisy, 400, dtype=torch.float64), tol=1e-5, on_failure="ignore")
    assert not result.converged
    assert result.num_matvecs < 60


def test_a_budget_that_ends_before_the_complement_is_searched_is_not_called_converged():
    operator = DenseOperator(rotated(SPECTRA["degenerate"]))
    with pytest.warns(ConvergenceWarning, match="before all of the spectrum"):
        result = lanczos(operator, 2, num_matvecs=3)
    assert not result.converged


def test_nan_and_infinity_stop_the_run():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError, match="product 1 of the operator holds NaN or infinity"):
            lanczos(FunctionOperator(lambda v, bad=bad: v * bad, 4))


@pytest.mark.parametrize("method", [lanczos, power_iteration, dense])
def test_bad_options_are_named(method):
    operator = DenseOperator(torch.eye(3))
    with pytest.raises(
        ArgumentError, match=r"`k` must be between 1 and 3 \(the dimension of the operator\), got 4. Pass k=3"
    ):
        method(operator, 4)
    with pytest.raises(ArgumentError, match=r"`k` must be between 1 and 3 .* got 0. Pass k=1 or more"):
        method(operator, 0)
    with pytest.raises(ArgumentError, match="`which` must be one of 'largest', .* got 'top'"):
        method(operator, which="top")
    with pytest.raises(ArgumentError, match="`tol` must be a finite number above 0, got 0"):
        method(operator, tol=0)
    with pytest.raises(ArgumentError, match="num_matvecs"):
        method(operator, 3, num_matvecs=2)
    with pytest.raises(ArgumentError, match="`on_failure` must be one of 'warn', 'raise', 'ignore'"):
        method(operator, on_failure="stop")


@pytest.mark.parametrize("k", [1, 4])
def test_a_start_near_the_answer_saves_products_and_gives_the_same_answer(k):
    matrix = rotated(torch.logspace(1, -4, 200, base=10.0, dtype=torch.float64))
    near = matrix + 1e-3 * rotated(torch.linspace(-1, 1, 200, dtype=torch.float64), seed=5)
    before = lanczos(DenseOperator(matrix), k, vectors=True)
    cold, warm = (lanczos(DenseOperator(near), k, start=s) for s in (None, before.eigenvectors))
    assert warm.num_matvecs < cold.num_matvecs
    exact = torch.linalg.eigvalsh(near).flip(0)[:k]
    assert warm.converged
    torch.testing.assert_close(warm.eigenvalues, exact, rtol=1e-3, atol=0)
    assert contains(warm.interval, exact)
    assert (cold.settings["warm_start"], warm.settings["warm_start"]) == (False, True)


def test_what_a_warm_start_overlooks_is_found_by_a_confirmation():
    """The old top eigenvector converges at once; of the one that has overtaken it the start holds next to nothing."""
    spectrum = torch.cat([torch.tensor([11.0, 10.0]), torch.linspace(1e-3, 0, 3000)]).double()
    operator = FunctionOperator(lambda v: spectrum * v, n=len(spectrum), dtype=torch.float64)
    old = torch.eye(1, len(spectrum), dtype=torch.float64).roll(1, dims=1)
    overlooked = lanczos(operator, start=old, tol=0.05)
    assert overlooked.eigenvalues.item() == pytest.approx(10.0, rel=1e-2)
    assert lanczos(operator, start=old, tol=0.05, confirm=True).eigenvalues.item() == pytest.approx(11.0, rel=1e-2)


@pytest.mark.parametrize("start", [torch.ones(4), torch.ones(2, 2, 3), [1.0, 0.0, 0.0]])
def test_a_start_of_another_size_is_refused(start):
    with pytest.raises(ArgumentError, match=r"`start` must be a tensor of shape \(3,\) or \(m, 3\), got"):
        lanczos(DenseOperator(torch.eye(3)), start=start)


@pytest.mark.parametrize("start", [torch.zeros(3), torch.tensor([1.0, torch.nan, 0.0])])
def test_a_start_of_no_length_is_refused(start):
    with pytest.raises(ArgumentError, match="`start` must have a finite sum other than zero"):
        lanczos(DenseOperator(torch.eye(3)), start=start)
