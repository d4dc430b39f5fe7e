"""LOBPCG and ARPACK report like all others: what they deliver is checked by products of our own."""

import warnings

import numpy as np
import pytest
import torch

from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning, NonFiniteError
from sharpness.linalg import DenseOperator, FunctionOperator, LinearOperator, arpack, lobpcg
from sharpness.linalg.which import WHICH, count, select
from tests.checks import contains
from tests.zoo import rotated, spectra

SPECTRA = spectra()
METHODS = [arpack, lobpcg]


def truth(values, which, k):
    ascending = values.sort().values
    return ascending[select(ascending.numpy(), which, k).copy()]


def fits(method, values, which, k):
    n = len(values)
    ends = 2 if which in ("magnitude", "both") else 1
    return count(which, k, n) < n if method is arpack else 5 * k * ends <= n


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("method", METHODS)
def test_ends_of_known_spectra(method, name, which, dtype):
    values = SPECTRA[name]
    operator = DenseOperator(rotated(values).to(dtype))
    for k in (1, 3):
        if not fits(method, values, which, k):
            continue
        result = method(operator, k, which=which, vectors=True, on_failure="ignore")
        if name == "geometric" and which in ("smallest", "both"):  # its small end is a limit point
            assert not result.converged or dtype == torch.float32
            continue
        assert result.converged
        expected = truth(values, which, k)
        off = result.eigenvalues - expected if which != "magnitude" else result.eigenvalues.abs() - expected.abs()
        assert (off.abs() <= result.residuals).all()
        rows, theta = result.eigenvectors.double(), result.eigenvalues
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)).double(), rtol=0, atol=1e-5)
        true = torch.linalg.vector_norm(rows @ operator.matrix.double() - theta[:, None] * rows, dim=1)
        assert (true <= result.residuals).all()
        assert result.kato_temple.isnan().all()  # nothing is known of the neighbours


@pytest.mark.parametrize("method", METHODS)
def test_products_are_counted_and_never_exceed_the_budget(method):
    spent = [0]
    for name in ("indefinite", "geometric", "rank two", "multiple at the top"):
        matrix = rotated(SPECTRA[name])

        def product(v, matrix=matrix):
            spent[0] += 1
            return matrix @ v

        operator = FunctionOperator(product, len(matrix), dtype=torch.float64)
        for which, k in (("largest", 1), ("largest", 4), ("both", 2), ("magnitude", 2), ("smallest", 3)):
            least = None
            for budget in [*range(1, 40, 2), 44, 57, 75, 100]:
                spent[0] = 0
                try:
                    result = method(operator, k, which=which, num_matvecs=budget, tol=1e-6, on_failure="ignore")
                except ArgumentError as error:
                    assert spent[0] == 0
                    least = int(str(error).split("must be at least ")[1].split()[0])
                    assert budget < least
                    continue
                assert least is None or budget >= least
                assert result.num_matvecs == spent[0] <= budget
                near = (result.eigenvalues[:, None] - SPECTRA[name]).abs().min(1).values
                assert ((near <= result.residuals) | result.eigenvalues.isnan()).all()


def test_pairs_that_arpack_does_not_deliver_are_nan_and_said_so():
    values = torch.linspace(0, 1, 200, dtype=torch.float64)
    operator = DenseOperator(rotated(values))
    with pytest.warns(
        ConvergenceWarning, match=r"of 4 eigenvalues were not delivered: they are NaN. Raise num_matvecs"
    ):
        result = arpack(operator, 4, num_matvecs=40, tol=1e-8, vectors=True)
    missing = result.eigenvalues.isnan()
    assert missing.any()
    assert result.residuals[missing].isinf().all()
    assert (result.interval[missing] == torch.tensor([-np.inf, np.inf])).all()
    assert result.eigenvectors[missing].isnan().all()
    assert not result.converged
    assert "nan" in repr(result)
    assert result.to_dict()["eigenvalues"][-1] is None


def test_a_block_that_is_not_accurate_yet_is_kept_and_said_so():
    values = torch.linspace(0, 1, 200, dtype=torch.float64)
    operator = DenseOperator(rotated(values))
    with pytest.warns(ConvergenceWarning, match="lobpcg spent .* of 4 eigenvalues missed the tolerance"):
        result = lobpcg(operator, 4, num_matvecs=60, tol=1e-8)
    assert not result.converged
    assert result.eigenvalues.min() > 0.8
    assert ((result.eigenvalues[:, None] - values).abs().min(1).values <= result.residuals).all()
    with pytest.raises(ConvergenceError, match="missed the tolerance"):
        lobpcg(operator, 4, num_matvecs=60, tol=1e-8, on_failure="raise")


def test_lobpcg_goes_on_where_its_absolute_tolerance_was_too_loose():
    """The smallest eigenvalue is still far too large when the tolerance is scaled for the first time."""
    values = 10.0 ** torch.linspace(-4, 0, 60, dtype=torch.float64)
    result = lobpcg(DenseOperator(rotated(values)), which="smallest", tol=1e-2, num_matvecs=4000)
    assert result.converged
    assert contains(result.interval, values[:1])


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bits_and_the_global_generators_are_left_alone(method):
    for name in ("indefinite", "rank two", "multiple at the top"):
        operator = DenseOperator(rotated(SPECTRA[name]))
        state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
        first = method(operator, 2, seed=3, vectors=True)
        np.random.rand(3)
        np.random.set_state(("MT19937", state, *np.random.get_state()[2:]))
        second = method(operator, 2, seed=3, vectors=True)
        assert torch.equal(first.eigenvectors, second.eigenvectors)
        assert torch.equal(first.residuals, second.residuals)
        assert (np.random.get_state()[1] == state).all()
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert not torch.equal(first.eigenvectors, method(operator, 2, seed=4, vectors=True).eigenvectors)


def test_scipy_warnings_stay_inside_and_filters_are_as_before():
    before = list(warnings.filters)
    operator = DenseOperator(rotated(torch.linspace(0, 1, 200, dtype=torch.float64)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lobpcg(operator, 2, num_matvecs=40, tol=1e-9)
    assert [w.category for w in caught] == [ConvergenceWarning]
    assert list(warnings.filters) == before


def test_too_small_for_the_method_is_refused_with_advice():
    operator = DenseOperator(torch.eye(12))
    with pytest.raises(
        ArgumentError, match=r'LOBPCG needs 5 dimensions .* 15 in all, the operator has 12. Use method="d'
    ):
        lobpcg(operator, 3)
    with pytest.raises(ArgumentError, match="20 in all, the operator has 12"):
        lobpcg(operator, 2, which="both")
    with pytest.raises(
        ArgumentError, match=r'ARPACK finds fewer than n = 12 eigenvalues, 12 are wanted. Use method="d'
    ):
        arpack(operator, 12)
    with pytest.raises(ArgumentError, match="fewer than n = 12 eigenvalues, 12 are wanted"):
        arpack(operator, 6, which="both")
    with pytest.raises(ArgumentError, match="must be at least 6 for ARPACK to find 1 eigenvalues, got 5"):
        arpack(operator, num_matvecs=5)
    with pytest.raises(ArgumentError, match="must be at least 6 for LOBPCG to find 1 eigenvalues, got 5"):
        lobpcg(operator, num_matvecs=5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [0, 5])
def test_nan_stops_the_run(method, after):
    spent = [0]

    def product(v):
        spent[0] += 1
        return v * torch.linspace(0, 1, 40) * (float("nan") if spent[0] > after else 1.0)

    with pytest.raises(NonFiniteError, match="a product of the operator holds NaN or infinity"):
        method(FunctionOperator(product, 40))


class Blocks(LinearOperator):
    """Counts how it is asked."""

    def __init__(self, matrix):
        super().__init__(len(matrix), dtype=matrix.dtype, device=matrix.device)
        self.matrix, self.vectors, self.blocks = matrix, 0, []

    def _matvec(self, v):
        self.vectors += 1
        return self.matrix @ v

    def _matmat(self, V):
        self.blocks.append(V.shape[1])
        return self.matrix @ V


def test_lobpcg_asks_for_blocks():
    operator = Blocks(rotated(torch.linspace(0, 1, 100, dtype=torch.float64)))
    result = lobpcg(operator, 4)
    assert contains(result.interval, torch.linspace(0, 1, 100, dtype=torch.float64).flip(0)[:4], slack=1e-3)
    assert max(operator.blocks) == 4
    assert sum(operator.blocks) + operator.vectors == result.num_matvecs
    assert operator.vectors == 4  # the check of each pair


def test_blocks_of_another_shape_are_named():
    class Wrong(Blocks):
        def _matmat(self, V):
            return V[:-1]

    operator = Wrong(torch.eye(4))
    with pytest.raises(ArgumentError, match=r"product has shape \(3, 2\) .* it must have \(4, 2\)"):
        operator.matmat(torch.ones(4, 2))
    assert operator.matmat(torch.ones(4, 0)).shape == (4, 0)
    right = Blocks(torch.diag(torch.arange(4.0)))
    np.testing.assert_allclose(right.to_scipy() @ np.eye(4, dtype=np.float32), np.diag(np.arange(4)))
    assert right.blocks == [4]
    assert right.vectors == 0
