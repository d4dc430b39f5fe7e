import pytest
import torch

from sharpness.errors import ArgumentError
from sharpness.linalg import DeflatedOperator, DenseOperator, FunctionOperator, lanczos
from tests.checks import check_operator, contains
from tests.zoo import rotated


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_operator_in_the_complement(dtype):
    values = torch.tensor([5.0, 4, 3, 1, -2, -3]).double()
    matrix = rotated(values)
    found = lanczos(DenseOperator(matrix), 2, vectors=True, tol=1e-10).eigenvectors
    complement = torch.eye(6).double() - found.T @ found
    deflated = DeflatedOperator(DenseOperator(matrix.to(dtype)), found.to(dtype))
    check_operator(deflated, complement @ matrix @ complement)
    left = torch.tensor([3.0, 1, 0, 0, -2, -3]).double()
    assert contains(lanczos(deflated, 6).interval, left, slack=1e-5)


def test_rounding_passes_through_and_bad_rows_are_refused():
    operator = FunctionOperator(lambda v: v, 4)
    operator.product_error = lambda rows: 0.25
    assert DeflatedOperator(operator, torch.eye(4)[:1]).product_error(torch.eye(4)) == 0.25
    with pytest.raises(
        ArgumentError, match=r"`rows` must be a matrix with 4 columns, got \(2, 3\). Pass the eigenvectors"
    ):
        DeflatedOperator(operator, torch.ones(2, 3))
    with pytest.raises(ArgumentError, match="must be a matrix with 4 columns, got NoneType"):
        DeflatedOperator(operator, None)
    with pytest.raises(ArgumentError, match="`rows` must be orthonormal, their products are off by 3.0e"):
        DeflatedOperator(operator, torch.ones(1, 4))
