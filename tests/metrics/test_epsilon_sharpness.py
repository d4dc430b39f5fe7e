"""Keskar's Metric 2.1 against its closed forms."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning, DeterminismWarning, ModelError
from tests.checks import assert_untouched
from tests.zoo import Quadratic, batches, features, rotated, tanh_net

ROWS = torch.zeros(11, 6, dtype=torch.float64)
H = torch.tensor([4.0, 2.5, 1.0, 0.3, 0.02, 1e-4], dtype=torch.float64)
AT = torch.tensor([0.8, -1.5, 2.0, -0.1, 3.0, -0.7], dtype=torch.float64)


def measure(model, rows=ROWS, epsilon=1e-2, **options):
    return sharpness.epsilon_sharpness(
        model, batches(rows), batch_loss=lambda m, b: (m(b), len(b)), epsilon=epsilon, **options
    )


@pytest.mark.parametrize("epsilon", [5e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("constant", [0.0, 2.0])
def test_a_separable_quadratic(epsilon, constant):
    """T1: phi = 100 sum h_i (|x_i| b_i + b_i^2 / 2) / (1 + f), b_i = epsilon (|x_i| + 1)."""
    model = Quadratic(torch.diag(H), AT, constant)
    b = epsilon * (AT.abs() + 1)
    loss = (H * AT**2).sum() / 2 + constant
    phi = 100 * (H * (AT.abs() * b + b**2 / 2)).sum() / (1 + loss)
    result = measure(model, epsilon=epsilon)
    assert result.value == pytest.approx(phi.item(), rel=1e-9)
    assert result.loss == pytest.approx(loss.item(), rel=1e-12)
    assert result.max_loss == pytest.approx(loss.item() + phi.item() * (1 + loss.item()) / 100, rel=1e-12)


def test_at_the_minimum_it_is_the_trace_and_quadratic_in_epsilon():
    """T2: phi = 50 epsilon^2 tr(H) / (1 + c), and not the largest eigenvalue."""
    for epsilon in (1e-3, 1e-2):
        value = measure(Quadratic(torch.diag(H), torch.zeros(6, dtype=torch.float64), 1.0), epsilon=epsilon).value
        assert value == pytest.approx(50 * epsilon**2 * H.sum().item() / 2, rel=1e-9)


def test_a_linear_loss_doubles_with_epsilon():
    """T3: phi = 100 epsilon sum |g_i| (|x_i| + 1) / (1 + f)."""
    g = torch.tensor([0.3, -0.2, 0.1, 0.0, 1e-3, -2.0], dtype=torch.float64)
    model = Quadratic(torch.zeros(6, 6, dtype=torch.float64), AT)
    loss = (g @ AT).item()
    for epsilon in (1e-3, 2e-3):
        phi = 100 * epsilon * (g.abs() * (AT.abs() + 1)).sum().item() / (1 + loss)
        assert measure(model, g.expand(11, 6), epsilon=epsilon).value == pytest.approx(phi, rel=1e-9)


def test_a_rank_one_quadratic_grows_with_the_l1_norm():
    """T4: phi = 50 lambda epsilon^2 |u|_1^2 / (1 + c) at the minimum."""
    u = torch.nn.functional.normalize(torch.tensor([3.0, -1, 2, 0.5, -0.2, 1]).double(), dim=0)
    model = Quadratic(7 * torch.outer(u, u), torch.zeros(6, dtype=torch.float64), 0.5)
    expected = 50 * 7 * 1e-4 * u.abs().sum().item() ** 2 / 1.5
    assert measure(model).value == pytest.approx(expected, rel=1e-9)


def test_float32_reaches_the_closed_form_too():
    model = Quadratic(torch.diag(H).float(), AT.float())
    b = 1e-2 * (AT.abs() + 1)
    phi = 100 * (H * (AT.abs() * b + b**2 / 2)).sum() / (1 + (H * AT**2).sum() / 2)
    assert measure(model, ROWS.float()).value == pytest.approx(phi.item(), rel=1e-3)


def test_convex_quadratics_reach_nearly_the_best_corner_and_never_exceed_it():
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=10)), dtype=torch.float64)
    reached = []
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        a = torch.randn(10, 10, generator=g, dtype=torch.float64)
        h, at = a @ a.T, torch.randn(10, generator=g, dtype=torch.float64) * (seed % 2)
        points = at + 0.05 * corners * (at.abs() + 1)
        loss = (at @ h @ at).item() / 2
        best = 100 * (((points @ h) * points).sum(1).max().item() / 2 - loss) / (1 + loss)
        reached.append(
            measure(Quadratic(h, at), torch.zeros(4, 10, dtype=torch.float64).repeat(3, 1)[:11], 0.05).value / best
        )
    assert max(reached) <= 1 + 1e-9
    assert sorted(reached)[15] > 0.97
    assert min(reached) > 0.8


def test_a_start_at_zero_would_find_nothing_but_random_starts_do():
    model = Quadratic(rotated(H.flip(0)), torch.zeros(6, dtype=torch.float64))
    assert sharpness.Objective(model, [ROWS], batch_loss=lambda m, b: (m(b), 1)).gradient().norm() == 0
    assert measure(model, num_starts=1, max_iter=1).value > 0


def test_the_iterations_are_really_used_and_counted():
    problem = tanh_net()
    result = sharpness.epsilon_sharpness(problem.model, problem.loader, max_iter=7, num_starts=3)
    assert [start["iterations"] for start in result.starts] == [7, 7, 7]
    assert result.num_evaluations == 1 + sum(start["evaluations"] for start in result.starts)
    assert result.num_passes == result.num_evaluations + 1  # and one look whether the loss stays the same
    assert result.value == pytest.approx(max(start["value"] for start in result.starts))


def test_the_best_point_is_kept_and_lies_in_the_box():
    problem = tanh_net()
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = problem.model

        def forward(self, x):
            weights = [p.detach().reshape(-1) for name, p in self.inner.named_parameters() if name != "frozen"]
            out = self.inner(x)
            seen.append(torch.cat(weights))
            return out

    model = Watched()
    center = sharpness.Objective(model, problem.loader).vector()
    whole = [tuple(torch.cat(parts) for parts in zip(*problem.loader, strict=True))]
    result = sharpness.epsilon_sharpness(model, whole, epsilon=2.0)  # so large that the search overshoots
    objective = sharpness.Objective(model, whole)
    points = [point for point in seen if not torch.equal(point, center)]
    assert all(((point - center).abs() <= 2.0 * (center.abs() + 1) * (1 + 1e-12)).all() for point in points)
    assert result.max_loss == pytest.approx(max(objective.value(point) for point in points), rel=1e-12)


def test_a_solver_that_ends_below_what_it_has_seen_loses_nothing(monkeypatch):
    def overshoots(function, start, **options):
        function(np.ones_like(start))  # a corner
        function(np.zeros_like(start))  # the model itself
        return start, 0.0, {"nit": 10, "task": "overshot"}

    monkeypatch.setattr("sharpness.metrics.box_search.fmin_l_bfgs_b", overshoots)
    model = Quadratic(torch.diag(H), torch.zeros(6, dtype=torch.float64))
    assert measure(model).value == pytest.approx(50 * 1e-4 * H.sum().item(), rel=1e-9)


def test_more_starts_never_find_less_and_begin_the_same():
    problem = tanh_net()
    one = sharpness.epsilon_sharpness(problem.model, problem.loader, num_starts=1)
    three = sharpness.epsilon_sharpness(problem.model, problem.loader, num_starts=3)
    assert three.starts[0] == one.starts[0]
    assert three.value >= one.value


def test_nothing_is_left_changed():
    problem = tanh_net()
    with assert_untouched(problem.model):
        sharpness.epsilon_sharpness(problem.model, problem.loader)


def test_bad_input():
    problem = tanh_net()
    for epsilon in (0, -1e-3, float("nan"), float("inf"), "small"):
        with pytest.raises(ArgumentError, match="`epsilon` must be a finite number above 0"):
            sharpness.epsilon_sharpness(problem.model, problem.loader, epsilon=epsilon)
    with pytest.raises(ArgumentError, match="`max_iter` must be at least 1, got 0"):
        sharpness.epsilon_sharpness(problem.model, problem.loader, max_iter=0)
    with pytest.raises(ArgumentError, match="`num_starts` must be an integer, got 1.5"):
        sharpness.epsilon_sharpness(problem.model, problem.loader, num_starts=1.5)
    with pytest.raises(ArgumentError, match="`solver` must be one of 'l-bfgs-b', 'projected-gradient', got 'sgd'"):
        sharpness.epsilon_sharpness(problem.model, problem.loader, solver="sgd")
    with pytest.raises(ModelError, match=r"the loss is -2; epsilon-sharpness divides by 1 \+ loss"):
        measure(Quadratic(torch.diag(H), torch.zeros(6, dtype=torch.float64), -2.0))


def test_a_constant_loss_is_said_to_be_one():
    model = Quadratic(torch.zeros(6, 6, dtype=torch.float64), AT, 1.0)
    with pytest.warns(ConvergenceWarning, match="no loss above the model's own, 1, was found in the box"):
        assert measure(model).value == 0
    with pytest.raises(ConvergenceError, match="no loss above"):
        measure(model, on_failure="raise")
    assert measure(model, on_failure="ignore").value == 0


def test_a_random_loss_warns():
    model = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    with pytest.warns(DeterminismWarning, match="changes from pass to pass"):
        sharpness.epsilon_sharpness(model, batches(features(3), torch.arange(11) % 3), mode="train")
