import pytest
import torch

from sharpness.errors import ArgumentError
from sharpness.linalg import DenseOperator, FunctionOperator, dense, lanczos, power_iteration
from tests.checks import check_operator
from tests.zoo import rotated


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_obey_the_contract(dtype):
    matrix = rotated(torch.linspace(-2, 3, 9, dtype=torch.float64))
    check_operator(DenseOperator(matrix.to(dtype)), matrix)
    check_operator(FunctionOperator(lambda v: matrix.to(dtype) @ v, 9, dtype=dtype), matrix)


def test_vectors_that_do_not_fit_are_refused():
    operator = DenseOperator(torch.eye(3))
    with pytest.raises(ArgumentError, match=r"multiplies a vector of 3 entries, got \(4,\)"):
        operator.matvec(torch.ones(4))
    with pytest.raises(ArgumentError, match=r"multiplies a matrix of 3 rows, got \(4, 2\)"):
        operator.matmat(torch.ones(4, 2))
    with pytest.raises(ArgumentError, match="got list"):
        operator.matvec([1.0, 2.0, 3.0])
    with pytest.raises(ArgumentError, match="torch.float32 vectors on cpu, got torch.float64"):
        operator.matvec(torch.ones(3, dtype=torch.float64))


def test_matrices_that_are_not_symmetric_are_refused():
    with pytest.raises(ArgumentError, match="must be symmetric"):
        DenseOperator([[1.0, 2.0], [0.0, 1.0]])
    with pytest.raises(ArgumentError, match="holds NaN or infinity"):
        DenseOperator([[1.0, float("nan")], [float("nan"), 1.0]])
    with pytest.raises(ArgumentError, match=r"must be square, got shape \(2, 3\)"):
        DenseOperator(torch.ones(2, 3))
    with pytest.raises(ArgumentError, match="must be torch.float32 or torch.float64, got torch.int64"):
        DenseOperator([[1, 0], [0, 1]])


def test_matrices_that_require_grad_and_functions_that_reuse_their_memory():
    matrix = torch.nn.Parameter(rotated(torch.linspace(-2, 3, 9, dtype=torch.float64)))
    memory = torch.zeros(9, dtype=torch.float64)

    def reused(v):
        return torch.matmul(matrix.detach(), v, out=memory)

    for operator in (
        DenseOperator(matrix),
        FunctionOperator(lambda v: matrix @ v, 9, dtype=torch.float64),
        FunctionOperator(reused, 9, dtype=torch.float64),
    ):
        check_operator(operator, matrix.detach())
        for method in (lanczos, power_iteration, dense):
            assert method(operator).eigenvalues.item() == pytest.approx(3.0, rel=1e-3)


def test_a_function_that_returns_another_shape_is_named():
    with pytest.raises(ArgumentError, match=r"product has shape \(2,\) .* it must have \(3,\)"):
        FunctionOperator(lambda v: v[:2], 3).matvec(torch.ones(3))
