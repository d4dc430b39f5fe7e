import pytest
import torch

from sharpness.errors import NonFiniteError
from sharpness.linalg import DenseOperator, FunctionOperator
from sharpness.linalg.newton import newton_decrease
from tests.zoo import rotated

SPECTRUM = torch.tensor([7.0, 3.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64)


def problem(spectrum=SPECTRUM, seed=0):
    g = torch.Generator().manual_seed(seed)
    return rotated(spectrum, seed), torch.randn(len(spectrum), generator=g, dtype=torch.float64)


def test_an_exhausted_space_gives_the_closed_form():
    for seed in range(5):
        hessian, g = problem(seed=seed)
        found = newton_decrease(DenseOperator(hessian), g)
        assert found.decrease == pytest.approx(0.5 * (g @ torch.linalg.solve(hessian, g)).item(), rel=1e-10)
        assert found.step_norm == pytest.approx(torch.linalg.solve(hessian, g).norm().item(), rel=1e-10)
        assert found.gradient_norm == pytest.approx(g.norm().item())
        assert (found.least, found.largest) == pytest.approx((0.25, 7.0))
        assert not found.descends
        assert found.num_matvecs == 6


def test_fewer_products_bound_it_from_below_as_the_best_step_in_their_space():
    hessian, g = problem()
    exact, before = 0.5 * (g @ torch.linalg.solve(hessian, g)).item(), 0.0
    for m in range(1, 6):
        found = newton_decrease(DenseOperator(hessian), g, num_matvecs=m)
        krylov = torch.stack([torch.linalg.matrix_power(hessian, i) @ g for i in range(m)], 1)
        slopes = krylov.T @ g
        best = 0.5 * (slopes @ torch.linalg.solve(krylov.T @ hessian @ krylov, slopes)).item()
        assert found.decrease == pytest.approx(best, rel=1e-6)
        assert before < found.decrease <= exact * (1 + 1e-12)
        assert found.num_matvecs == m
        before = found.decrease


def test_two_eigenvalues_need_two_products():
    hessian, g = problem(torch.tensor([4.0, 4, 4, 1, 1, 1], dtype=torch.float64))
    found = newton_decrease(DenseOperator(hessian), g)
    assert found.num_matvecs == 2
    assert found.decrease == pytest.approx(0.5 * (g @ torch.linalg.solve(hessian, g)).item(), rel=1e-10)


def test_negative_curvature_is_said_and_left_out():
    spectrum = torch.tensor([5.0, 2.0, -1.0], dtype=torch.float64)
    g = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found = newton_decrease(DenseOperator(torch.diag(spectrum)), g)
    assert found.descends
    assert found.least == pytest.approx(-1.0)
    assert found.decrease == pytest.approx(0.5 * (1 / 5 + 4 / 2), rel=1e-10)


def test_a_flat_direction_is_neither_a_gain_nor_a_descent():
    for dtype in (torch.float32, torch.float64):
        spectrum = torch.tensor([5.0, 2.0, 0.0, 0.0], dtype=torch.float64)
        g = (rotated(spectrum) @ torch.ones(4, dtype=torch.float64)).to(dtype)  # in the range: half of 1'H1
        found = newton_decrease(DenseOperator(rotated(spectrum).to(dtype)), g)
        assert not found.descends
        assert found.decrease == pytest.approx(0.5 * rotated(spectrum).sum().item(), rel=1e-5)


def test_rounding_is_no_descent():
    spectrum = torch.cat([torch.linspace(0.1, 1, 20), torch.zeros(20)]).double()
    below = 0
    for seed in range(10):
        g = torch.randn(40, generator=torch.Generator().manual_seed(seed))
        found = newton_decrease(DenseOperator(rotated(spectrum, seed).float()), g, num_matvecs=30)
        below += found.least < 0
        assert not found.descends
    assert below  # or nothing was tested


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scales_of_gradient_and_curvature_do_not_matter(scale):
    hessian, g = problem()
    exact = 0.5 * (g @ torch.linalg.solve(hessian, g)).item()
    assert newton_decrease(DenseOperator(scale * hessian), g).decrease == pytest.approx(exact / scale, rel=1e-9)
    assert newton_decrease(DenseOperator(hessian), scale * g).decrease == pytest.approx(exact * scale**2, rel=1e-9)


def test_no_gradient_no_products():
    hessian, _ = problem()
    found = newton_decrease(DenseOperator(hessian), torch.zeros(6, dtype=torch.float64))
    assert (found.decrease, found.num_matvecs, found.descends) == (0.0, 0, False)


def test_a_product_that_is_not_finite():
    with pytest.raises(NonFiniteError, match="product 1 of the operator holds NaN"):
        newton_decrease(FunctionOperator(lambda v: v * float("nan"), 3), torch.ones(3))
