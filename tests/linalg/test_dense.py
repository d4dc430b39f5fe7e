import pytest
import torch

from sharpness.errors import ArgumentError, ConvergenceWarning, NonFiniteError
from sharpness.linalg import DenseOperator, FunctionOperator, dense
from sharpness.linalg.which import WHICH, select
from tests.checks import contains
from tests.zoo import rotated, spectra

SPECTRA = spectra()


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SPECTRA)
def test_exact_with_all_multiplicities(name, which):
    values = SPECTRA[name].sort().values
    result = dense(DenseOperator(rotated(values)), min(4, len(values)), which=which, vectors=True)
    expected = values[select(values.numpy(), which, min(4, len(values))).copy()]
    found = result.eigenvalues
    if which == "magnitude":
        found, expected = found.abs(), expected.abs()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13 * values.abs().max().item())
    assert result.num_matvecs == len(values)
    assert contains(torch.stack([found - result.residuals, found + result.residuals], 1), expected, slack=1e-20)


def test_refused_above_a_size_with_the_memory_it_would_take():
    operator = FunctionOperator(lambda v: v, 20_000)
    with pytest.raises(
        ArgumentError, match=r"would need 14.9 GiB for the 20000 x 20000 matrix, 2.0 GiB .* memory=16000000000"
    ):
        dense(operator)
    with pytest.raises(ArgumentError, match="1000 bytes are allowed"):
        dense(DenseOperator(torch.eye(50)), memory=1000)


def test_an_asymmetric_operator_is_not_called_converged():
    matrix = torch.triu(torch.ones(6, 6, dtype=torch.float64))
    with pytest.warns(ConvergenceWarning, match="missed the tolerance"):
        result = dense(FunctionOperator(lambda v: matrix @ v, 6, dtype=torch.float64))
    assert not result.converged


def test_nan_stops_the_run():
    with pytest.raises(NonFiniteError, match="a product of the operator holds NaN or infinity"):
        dense(FunctionOperator(lambda v: v * float("nan"), 4))
