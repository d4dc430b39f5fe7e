"""The largest stable step, against what the iterations themselves do on quadratics."""

import math

import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError
from tests.checks import assert_untouched
from tests.zoo import Quadratic, by_rows, rotated, tanh_net

SPECTRUM = torch.tensor([5.0, 2.0, 0.5], dtype=torch.float64)
H = rotated(SPECTRUM)
ROWS = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
FORMS = [(0.0, False), (0.5, False), (0.9, False), (0.5, True), (0.9, True)]


def limit_of(momentum, nesterov, model=None, rows=ROWS, **options):
    model = Quadratic(H) if model is None else model
    with assert_untouched(model):
        return sharpness.learning_rate_limit(
            model, [rows], batch_loss=by_rows, momentum=momentum, nesterov=nesterov, tol=1e-8, **options
        )


def distance_after(step, momentum, nesterov, iterations=3000):
    """How far `torch.optim.SGD` is from the minimum of the quadratic, against where it started."""
    model = Quadratic(H)
    optimizer = torch.optim.SGD(model.parameters(), lr=step, momentum=momentum, nesterov=nesterov)
    start = model.w.norm().item()
    for _ in range(iterations):
        optimizer.zero_grad()
        model(torch.zeros(1, 3, dtype=torch.float64)).backward()
        optimizer.step()
        if not model.w.norm().item() < 1e6 * start:
            break
    return model.w.norm().item() / start


@pytest.mark.parametrize(("momentum", "nesterov"), FORMS)
def test_below_the_limit_the_iterations_converge_and_above_they_diverge(momentum, nesterov):
    limit = limit_of(momentum, nesterov).value
    assert distance_after(0.98 * limit, momentum, nesterov) < 1e-3
    assert distance_after(1.02 * limit, momentum, nesterov) > 1e3


@pytest.mark.parametrize(("momentum", "nesterov"), FORMS)
def test_the_forms_and_their_intervals(momentum, nesterov):
    result = limit_of(momentum, nesterov)
    factor = (2 + 2 * momentum) / (1 + 2 * momentum if nesterov else 1)
    assert result.value == pytest.approx(factor / 5.0, rel=1e-8)
    assert result.interval[0] <= factor / 5.0 * (1 + 1e-12)
    assert result.interval[1] >= factor / 5.0 * (1 - 1e-12)
    low, high = result.sharpness.interval[0].tolist()
    assert result.interval == (factor / high, factor / low)
    assert result.sharpness.headline == pytest.approx(5.0)
    assert result.converged


def test_on_a_quadratic_the_approximation_holds_and_breaks_down_where_it_must():
    result = limit_of(0.0, False)
    model = Quadratic(H)
    g = H @ model.w.detach() + ROWS.mean(0)
    curvature = (g @ H @ g / (g @ g)).item()
    assert result.gradient_norm_squared == pytest.approx((g @ g).item())
    assert result.directional_curvature == pytest.approx(curvature)
    torch.testing.assert_close(result.decrease, result.quadratic_decrease, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.linear_decrease, result.steps * (g @ g))
    torch.testing.assert_close(
        result.quadratic_decrease, result.steps * (g @ g) * (1 - result.steps * curvature / 2), rtol=1e-9, atol=1e-12
    )
    assert result.breakdown == pytest.approx(1 / curvature, rel=1e-9)  # where the decrease is largest
    assert result.quadratic_breakdown == math.inf
    for i, step in enumerate(result.steps.tolist()):
        moved = Quadratic(H, model.w.detach() - step * g)
        assert result.decrease[i].item() == pytest.approx((model(ROWS) - moved(ROWS)).item(), abs=1e-12)


def test_along_a_flat_gradient_it_goes_further_until_it_breaks_down():
    u = torch.linalg.eigh(H).eigenvectors[:, 0]  # of the eigenvalue 0.5
    result = limit_of(0.0, False, Quadratic(H, u), rows=torch.zeros(4, 3, dtype=torch.float64))
    assert result.value == pytest.approx(0.4)
    assert result.breakdown == pytest.approx(2.0, rel=1e-9)
    assert result.steps[-1] > 2.0


class Quartic(nn.Module):
    """``w^4 / 4``, whose curvature falls towards the minimum: ``g = w^3``, ``H = 3 w^2``."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, rows):
        return (self.w**4).sum() / 4


def test_where_the_loss_is_not_quadratic_it_says_from_which_step_on():
    steps = torch.linspace(0.01, 3, 600).tolist()
    result = limit_of(0.0, False, Quartic(), steps=steps)
    assert result.value == pytest.approx(2 / 3)
    actual = [(1 - (1 - step) ** 4) / 4 for step in steps]  # at w = 1 the gradient is 1
    torch.testing.assert_close(result.decrease, torch.tensor(actual, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    linear = next(step for step, a in zip(steps, actual, strict=True) if a < step / 2)
    assert result.breakdown == pytest.approx(linear, abs=0.006)
    off = next(step for step, a in zip(steps, actual, strict=True) if abs(a - step + 1.5 * step**2) > step / 2)
    assert result.quadratic_breakdown == pytest.approx(off, abs=0.006)
    assert result.steps.tolist() == steps


def test_without_positive_curvature_there_is_no_limit():
    concave = Quadratic(-H)
    result = limit_of(0.0, False, concave)
    assert (result.value, result.interval[1]) == (math.inf, math.inf)
    assert result.breakdown == math.inf  # the loss falls faster than predicted
    flat = limit_of(0.0, False, Quadratic(torch.zeros(3, 3, dtype=torch.float64)))
    assert flat.value == math.inf
    assert flat.quadratic_breakdown == math.inf


def test_without_a_gradient_or_within_rounding_there_is_nothing_to_check():
    still = limit_of(0.0, False, Quadratic(H, torch.zeros(3).double()), rows=torch.zeros(4, 3, dtype=torch.float64))
    assert still.value == pytest.approx(0.4)
    assert math.isnan(still.breakdown)
    assert len(still.steps) == 0
    hidden = limit_of(0.0, False, Quadratic(H, constant=1e18))
    assert math.isnan(hidden.breakdown)


def test_a_loss_that_overflows_on_the_way_is_no_decrease():
    class Walled(Quartic):
        def forward(self, rows):
            return (self.w**2).sum() / torch.where(self.w > -0.5, 1.0, 0.0).sum()

    result = limit_of(0.0, False, Walled(), steps=[0.25, 0.5, 1.0, 2.0])
    assert result.decrease.tolist()[2:] == [-math.inf, -math.inf]
    assert result.breakdown == pytest.approx(0.5)


def test_a_network_whatever_the_split_of_the_data():
    problem = tanh_net()
    result = sharpness.learning_rate_limit(problem.model, problem.loader, tol=1e-6)
    assert result.value == pytest.approx(2 / problem.eigenvalues[0].item(), rel=1e-6)
    x, y = (torch.cat(parts) for parts in zip(*problem.loader, strict=True))
    whole = sharpness.learning_rate_limit(problem.model, [(x, y)], tol=1e-6)
    assert whole.breakdown == pytest.approx(result.breakdown, rel=1e-6)
    assert result.value / 2 < result.breakdown < result.quadratic_breakdown


def test_bad_input():
    for wrong in (1.0, -0.1, 2):
        with pytest.raises(ArgumentError, match="`momentum` must be"):
            limit_of(wrong, False)
    for wrong in ([], [0.0], [math.nan], 3):
        with pytest.raises(ArgumentError, match="`steps` must be a list of finite numbers above 0"):
            limit_of(0.0, False, steps=wrong)


def test_with_neither_gradient_nor_curvature_there_is_no_limit_and_nothing_to_check():
    flat = limit_of(0.0, False, Quadratic(torch.zeros(3, 3).double()), rows=torch.zeros(4, 3, dtype=torch.float64))
    assert flat.value == math.inf
    assert math.isnan(flat.breakdown)
    assert len(flat.steps) == 0


def test_steps_of_any_size():
    result = limit_of(0.0, False, steps=[1e-300, 0.1, 1e200])
    assert result.quadratic_decrease[-1].item() == -math.inf
    assert result.decrease[-1].item() == -math.inf
    assert result.breakdown == 0.1  # the last step before the loss overflows
