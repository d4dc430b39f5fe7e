"""Critical sharpness against closed forms of quadratics, and the ways it can fail."""

import math

import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning
from tests.checks import assert_untouched
from tests.zoo import Quadratic, by_rows, rotated, tanh_net

ROWS = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
H = rotated(torch.tensor([5.0, 2.0, 0.5], dtype=torch.float64))


def quadratic(scale=1.0, constant=0.0, at=None):
    """``f = w'Hw / 2 + b'w + c``, with gradient ``Hw + b``."""
    return Quadratic(scale * H, at, constant), [scale * ROWS]


def gradient_of(model, loader):
    return model.h @ model.w.detach() + loader[0].mean(0)


@pytest.mark.parametrize("tol", [0.3, 0.01, 1e-6])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("constant", [0.0, 100.0])
def test_on_a_quadratic_it_is_the_rayleigh_quotient_of_the_gradient(scale, constant, tol):
    model, loader = quadratic(scale, scale * constant)
    with assert_untouched(model):
        result = sharpness.critical_sharpness(model, loader, batch_loss=by_rows, tol=tol, directional_curvature=True)
    g = gradient_of(model, loader)
    expected = (g @ model.h @ g / (g @ g)).item()
    assert result.value == pytest.approx(expected, rel=1e-8)
    assert result.directional_curvature == pytest.approx(expected, rel=1e-10)
    assert result.critical_step == pytest.approx(2 / expected, rel=1e-8)
    assert result.interval[0] <= expected * (1 + 1e-9)
    assert result.interval[1] >= expected * (1 - 1e-9)
    assert result.interval[1] - result.interval[0] <= 1.5 * tol * expected
    assert result.converged
    assert result.num_forward_passes == len(result.steps) <= 10


@pytest.mark.parametrize("scale", [0.1, 8.0])
def test_the_scale_of_the_loss_moves_it_with_the_gradient_only(scale):
    (model, loader), (other, others) = quadratic(), quadratic(scale)
    d = gradient_of(model, loader)
    one, two = (
        sharpness.critical_sharpness(m, data, batch_loss=by_rows, direction=d).value
        for m, data in ((model, loader), (other, others))
    )
    assert two == pytest.approx(one, rel=1e-8)
    along = sharpness.critical_sharpness(other, others, batch_loss=by_rows).value
    assert along == pytest.approx(scale * one, rel=1e-8)


@pytest.mark.parametrize("kind", ["list", "vector", "mapping"])
@pytest.mark.parametrize("length", [1e-4, 1.0, 1e4])
def test_any_direction_that_is_subtracted(kind, length):
    model, loader = quadratic()
    g = gradient_of(model, loader)
    d = length * (g + 0.3 * torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64))
    direction = {"list": [d], "vector": d, "mapping": {"w": d}}[kind]
    result = sharpness.critical_sharpness(
        model, loader, batch_loss=by_rows, direction=direction, directional_curvature=True
    )
    expected = (d @ H @ d / (g @ d)).item()
    assert result.value == pytest.approx(expected, rel=1e-8)
    assert result.directional_curvature == pytest.approx(expected, rel=1e-10)
    assert result.num_forward_passes <= 10
    plain = sharpness.critical_sharpness(model, loader, batch_loss=by_rows, direction=direction)
    assert plain.directional_curvature is None
    assert plain.num_passes == plain.num_forward_passes + 1  # the loss at the start, which is not repeated; no gradient


def test_the_step_found_is_where_the_loss_comes_back_to_its_value():
    problem = tanh_net()
    result = sharpness.critical_sharpness(problem.model, problem.loader, tol=1e-3)
    objective = sharpness.Objective(problem.model, problem.loader)
    start, gradient = objective.value_and_gradient()
    low, high = (2 / end for end in reversed(result.interval))
    assert low <= result.critical_step <= high <= low * 1.0011
    assert objective.value(objective.vector() - low * gradient) <= start
    assert objective.value(objective.vector() - high * gradient) > start
    for step, loss in zip(result.steps.tolist(), result.losses.tolist(), strict=True):
        assert loss == pytest.approx(objective.value(objective.vector() - step * gradient), rel=1e-12)
    assert (result.losses[(result.steps > 0) & (result.steps <= low)] <= start).all()
    assert (result.losses[result.steps >= high] > start).all()
    assert result.num_forward_passes <= 10


def test_digits_in_single_precision_take_few_passes():
    train_set, _ = sharpness.datasets.digits(num_train=100)
    x, y = (torch.stack([torch.as_tensor(row[i]) for row in train_set]) for i in (0, 1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(3):
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        result = sharpness.critical_sharpness(model, [(x, y)])
        top = sharpness.top_eigenvalues(model, [(x, y)])
        assert result.converged
        assert result.num_forward_passes <= 10
        assert 0 < result.value < 1.5 * top.headline


def test_a_loss_that_never_rises_one_that_rises_at_once_and_none_at_all():
    for constant in (0.0, 1e6):  # with the constant, short steps are lost in rounding
        model, loader = quadratic(constant=constant)
        g = gradient_of(model, loader)
        with pytest.warns(ConvergenceWarning, match="the loss rises along the direction at once"):
            wrong = sharpness.critical_sharpness(model, loader, batch_loss=by_rows, direction=[-g])
        assert (wrong.value, wrong.critical_step, wrong.converged) == (math.inf, 0.0, False)
        assert wrong.interval[1] == math.inf
    linear = Quadratic(torch.zeros(3, 3, dtype=torch.float64))
    with pytest.warns(ConvergenceWarning, match="the loss does not rise along the direction, up to a step of"):
        endless = sharpness.critical_sharpness(linear, loader, batch_loss=by_rows)
    assert (endless.value, endless.critical_step, endless.interval[0]) == (0.0, math.inf, 0.0)
    stationary = Quadratic(H, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ConvergenceError, match="the gradient is zero, so there is no direction") as caught:
        sharpness.critical_sharpness(stationary, [0 * ROWS], batch_loss=by_rows, on_failure="raise")
    assert math.isnan(caught.value.result.value)
    assert "NOT converged" in repr(caught.value.result)


def test_what_rounding_hides_is_said():
    model, loader = quadratic(constant=1e12)
    with pytest.warns(ConvergenceWarning, match="which rounding hides"):
        result = sharpness.critical_sharpness(model, loader, batch_loss=by_rows, tol=1e-6)
    assert not result.converged


def test_a_loss_that_overflows_has_risen():
    class Walled(nn.Module):
        """``w^2`` inside the wall, infinite or NaN beyond it."""

        def __init__(self, wall):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))
            self.wall = wall

        def forward(self, rows):
            return (self.w**2).sum() + torch.where(self.w < -0.5, self.wall, 0.0).sum()

    for wall in (math.inf, math.nan):
        result = sharpness.critical_sharpness(Walled(wall), [ROWS], batch_loss=by_rows, tol=1e-3)
        assert result.critical_step == pytest.approx(0.75, rel=1e-3)  # 1 - 2 step = -0.5
        assert result.converged


@pytest.mark.parametrize(
    ("direction", "text"),
    [
        ("adam", '`direction` must be "gradient" or hold tensors'),
        ([torch.ones(2)], "`direction` must hold one tensor per parameter .*; got 1 of other shapes"),
        (torch.ones(4), r"`direction` must .* be one vector of 3 entries; got a tensor of shape \(4,\)"),
        ({"v": torch.ones(3)}, "`direction` must .*; got a mapping that differs in 'v' first"),
        ([torch.zeros(3)], "`direction` must be finite and not zero everywhere"),
        ([torch.full((3,), math.nan)], "`direction` must be finite and not zero"),
        (3, "`direction` must hold one tensor per parameter .*; got 3"),
    ],
)
def test_directions_that_do_not_fit(direction, text):
    model, loader = quadratic()
    with pytest.raises(ArgumentError, match=text):
        sharpness.critical_sharpness(model, loader, batch_loss=by_rows, direction=direction)


def test_few_passes_are_not_enough_for_any_tolerance(monkeypatch):
    from sharpness.metrics import critical

    monkeypatch.setattr(critical, "_MAX_PASSES", 6)
    problem = tanh_net()
    with pytest.warns(ConvergenceWarning, match=r"between .* only, after \d forward passes. Pass a larger tol"):
        sharpness.critical_sharpness(problem.model, problem.loader, tol=1e-12)


class Line(nn.Module):
    """A loss of one parameter."""

    def __init__(self, loss, w, dtype=torch.float64):
        super().__init__()
        self.loss = loss
        self.w = nn.Parameter(torch.tensor([w], dtype=dtype))

    def forward(self, rows):
        return self.loss(self.w).sum()


def test_a_tolerance_below_rounding_ends_with_what_is_known():
    with pytest.warns(ConvergenceWarning, match=r"between .* only, after \d+ forward passes. Pass a larger tol"):
        result = sharpness.critical_sharpness(Line(lambda w: w**4, 1.0), [ROWS], batch_loss=by_rows, tol=1e-18)
    assert result.critical_step == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("direction", ["gradient", [torch.ones(1)]])
@pytest.mark.parametrize("offset", [1e-4, 1e-5])
def test_a_loss_that_rounding_hides_is_not_said_to_rise_at_once(direction, offset):
    model = Line(lambda w: (w - 1) ** 2 + 1, 1 + offset, torch.float32)
    with pytest.warns(ConvergenceWarning, match="rounding hides how the loss begins along the direction"):
        result = sharpness.critical_sharpness(model, [ROWS.float()], batch_loss=by_rows, direction=direction)
    assert math.isnan(result.value)
    assert not result.converged
    slope = 2 * (model.w.item() - 1) if direction == "gradient" else 1.0
    assert result.interval[1] == math.inf
    assert 0 < result.interval[0] <= 2.1 / (2 * (model.w.item() - 1) / slope)


def test_the_length_of_the_weights_does_not_bound_the_search():
    result = sharpness.critical_sharpness(Line(lambda w: (w - 1) ** 2, 1e-12), [ROWS], batch_loss=by_rows)
    assert result.value == pytest.approx(2.0)
