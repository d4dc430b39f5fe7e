import pytest
import torch

from sharpness.errors import NonFiniteError
from sharpness.linalg import DenseOperator, FunctionOperator, power_iteration
from tests.checks import contains
from tests.zoo import rotated, spectra

SPECTRA = spectra()


@pytest.mark.parametrize(
    "name", ["definite", "degenerate", "rank two", "zero", "one dimension", "geometric", "multiple at the top"]
)
def test_largest_with_deflation(name):
    values = SPECTRA[name]
    k = min(3, len(values))
    result = power_iteration(DenseOperator(rotated(values)), k, num_matvecs=3000, vectors=True)
    assert result.converged
    assert contains(result.interval, values.sort(descending=True).values[:k], slack=1e-14)
    rows = result.eigenvectors
    torch.testing.assert_close(rows @ rows.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)


def test_plus_and_minus_five_are_told_apart():
    operator = DenseOperator(rotated(SPECTRA["plus and minus five"]))
    for which, expected in (("largest", 5.0), ("smallest", -5.0)):
        result = power_iteration(operator, which=which, num_matvecs=500)
        assert result.converged
        assert abs(result.eigenvalues[0].item() - expected) <= result.residuals[0]


def test_a_dominant_negative_end_is_not_taken_for_the_top():
    values = torch.tensor([-10.0, 3, 1, 0.5], dtype=torch.float64)
    result = power_iteration(DenseOperator(rotated(values)))
    assert contains(result.interval, torch.tensor([3.0], dtype=torch.float64))


def test_smallest_and_both_ends():
    values = torch.tensor([9.0, 6, 2, 1, -1, -4], dtype=torch.float64)
    operator = DenseOperator(rotated(values))
    assert contains(
        power_iteration(operator, 2, which="smallest", num_matvecs=2000).interval, torch.tensor([-4.0, -1]).double()
    )
    assert contains(
        power_iteration(operator, 1, which="both", num_matvecs=2000).interval, torch.tensor([9.0, -4]).double()
    )


def test_the_vector_before_a_shift_is_never_accepted():
    values = torch.tensor([5.0, -5.0, *[0.0] * 18], dtype=torch.float64)
    result = power_iteration(DenseOperator(torch.diag(values)), 2, num_matvecs=2000)
    assert result.eigenvalues.tolist() == pytest.approx([5.0, 0.0], abs=1e-3)


def test_a_stalled_iteration_is_not_called_converged():
    operator = DenseOperator(rotated(SPECTRA["plus and minus five"]))
    result = power_iteration(operator, which="magnitude", on_failure="ignore")
    assert not result.converged
    assert result.num_matvecs == 200


def test_nan_stops_the_run():
    with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        power_iteration(FunctionOperator(lambda v: v * float("nan"), 4))
