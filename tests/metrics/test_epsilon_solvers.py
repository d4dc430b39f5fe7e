"""Both solvers of epsilon-sharpness: the closed forms, the budget, and how near they come to the true maximum."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sharpness
from sharpness.errors import ModelError, PrecisionWarning
from sharpness.metrics.box_search import projected_gradient
from tests.zoo import Quadratic, by_rows, tanh_net

SOLVERS = ("l-bfgs-b", "projected-gradient")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
H = torch.tensor([4.0, 2.5, 1.0, 0.3, 0.02, 1e-4], dtype=torch.float64)
AT = torch.tensor([0.8, -1.5, 2.0, -0.1, 3.0, -0.7], dtype=torch.float64)
U = torch.nn.functional.normalize(torch.tensor([3.0, -1, 2, 0.5, -0.2, 1]).double(), dim=0)
G = torch.tensor([0.3, -0.2, 0.1, 0.0, 1e-3, -2.0], dtype=torch.float64)
NONE = torch.zeros(6, dtype=torch.float64)
EPSILON = 1e-2
WIDTH = EPSILON * (AT.abs() + 1)

# Hessian, point, slope, constant -> the percentage (facts of the definition, by hand).
CLOSED_FORMS = {
    "T1 separable": (
        (torch.diag(H), AT, NONE, 0.5),
        100 * (H * (AT.abs() * WIDTH + WIDTH**2 / 2)).sum() / (1.5 + (H * AT**2).sum() / 2),
    ),
    "T2 separable at its minimum": ((torch.diag(H), NONE, NONE, 1.0), 50 * EPSILON**2 * H.sum() / 2),
    "T3 linear": ((0 * torch.diag(H), AT, G, 0.0), 100 * (G.abs() * WIDTH).sum() / (1 + G @ AT)),
    "T4 rank one": ((7 * torch.outer(U, U), NONE, NONE, 0.5), 50 * 7 * EPSILON**2 * U.abs().sum() ** 2 / 1.5),
}


def measure(problem, dtype=torch.float64, **options):
    h, at, g, constant = problem
    rows = g.to(dtype).expand(7, len(g))
    model = Quadratic(h.to(dtype), at.to(dtype), constant)
    return sharpness.epsilon_sharpness(
        model, [rows[:4], rows[4:]], batch_loss=by_rows, **{"epsilon": EPSILON, **options}
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms(name, solver, dtype):
    problem, expected = CLOSED_FORMS[name]
    result = measure(problem, dtype, solver=solver)
    assert result.value == pytest.approx(expected.item(), rel=TOLERANCE[dtype])
    assert result.settings["solver"] == solver


@pytest.mark.parametrize("solver", SOLVERS)
def test_convex_quadratics_reach_the_best_corner_nearly_and_never_exceed_it(solver):
    """100 random positive semidefinite quadratics of dimension 16 against all 2^16 corners."""
    side = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=torch.float64)
    reached = []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(16, 1 + seed % 16, generator=generator, dtype=torch.float64)
        h, at = a @ a.T, torch.randn(16, generator=generator, dtype=torch.float64) * (seed % 3)
        # f at the corner (s, t) of two halves: f(x) + slope's + s'H s / 2 + t'H t / 2 + s'H t, 256 x 256 of them.
        width = 0.05 * (at.abs() + 1)
        scaled, slope = width[:, None] * h * width, width * (h @ at)
        halves = [
            side @ slope[part] + ((side @ scaled[part, part]) * side).sum(1) / 2 for part in (slice(8), slice(8, 16))
        ]
        rise = halves[0][:, None] + halves[1] + side @ scaled[:8, 8:] @ side.T
        best = 100 * rise.max().item() / (1 + (at @ h @ at).item() / 2)
        zero = torch.zeros(16, dtype=torch.float64)
        reached.append(measure((h, at, zero, 0.0), epsilon=0.05, solver=solver).value / best)
    assert max(reached) <= 1 + 1e-9
    assert sorted(reached)[50] >= 0.95
    assert min(reached) > 0.5


def test_the_corners_by_halves_are_all_corners():
    """The table of the test above, against the quadratic at each of the corners, in a smaller dimension."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    h, at = a @ a.T, torch.randn(4, generator=generator, dtype=torch.float64)
    points = at + 0.1 * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4))).double() * (at.abs() + 1)
    best = (((points @ h) * points).sum(1).max() - at @ h @ at).item() / 2
    found = measure((h, at, torch.zeros(4, dtype=torch.float64), 0.0), epsilon=0.1, num_starts=8).value
    assert found == pytest.approx(100 * best / (1 + (at @ h @ at).item() / 2), rel=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("max_iter", [1, 2, 7])
def test_exactly_the_budget_is_spent_and_every_evaluation_is_counted(solver, max_iter):
    problem = tanh_net()
    objective = sharpness.Objective(problem.model, problem.loader)
    calls, real = [], objective.value_and_gradient
    objective.value_and_gradient = lambda at=None: calls.append(at) or real(at)
    result = sharpness.epsilon_sharpness(objective, epsilon=0.5, max_iter=max_iter, num_starts=3, solver=solver)
    assert [start["iterations"] for start in result.starts] == [max_iter] * 3
    assert result.num_evaluations == len(calls) + 1  # that of the model itself, without a gradient
    assert result.num_passes == result.num_evaluations + 1  # one look whether the loss stays the same
    for start in result.starts:
        assert start["message"]
        if solver == "projected-gradient":  # an iteration is an evaluation, beside one for each climb
            assert start["evaluations"] <= max_iter + start["climbs"]
    assert result.max_loss == pytest.approx(max(real(at)[0] for at in calls), rel=1e-12)
    center = objective.vector()
    for at in calls:
        assert ((at - center).abs() <= 0.5 * (center.abs() + 1) * (1 + 1e-12)).all()


def test_the_solvers_agree_on_a_network():
    problem = tanh_net()
    one, other = (sharpness.epsilon_sharpness(problem.model, problem.loader, solver=solver) for solver in SOLVERS)
    assert one.loss == other.loss
    assert other.value == pytest.approx(one.value, rel=0.02)


class Trough:
    """``-(z - 0.3)^2`` in the unit box: its maximum is inside, where a step to the corner goes down."""

    def __init__(self):
        self.points = []

    def evaluate(self, z):
        self.points.append(z.item())
        return -((z.item() - 0.3) ** 2), -2 * (z - 0.3)


def test_a_projected_gradient_steps_part_of_the_way_where_the_corner_is_lower():
    box = Trough()
    climb = projected_gradient(box, torch.tensor([-0.9]), 10, lambda: None)
    assert climb.max_loss == max(-((z - 0.3) ** 2) for z in box.points) > -0.05
    assert climb.iterations == 10
    assert len(box.points) == 11


def test_a_projected_gradient_stays_in_a_corner_and_gives_up_at_a_peak():
    flat = SimpleNamespace(evaluate=lambda z: (1.0, torch.ones_like(z)))
    assert projected_gradient(flat, torch.ones(3), 10, lambda: None).iterations == 0
    peak = SimpleNamespace(evaluate=lambda z: (-z.abs().sum().item(), -z.sign() - (z == 0).float()))
    climb = projected_gradient(peak, torch.zeros(3), 20, lambda: None)
    assert climb.iterations < 20
    assert climb.message == "no higher point on the way to the corner"


def test_projected_gradients_keep_the_dtype_of_the_model(monkeypatch):
    seen = set()
    real = sharpness.Objective.value_and_gradient
    monkeypatch.setattr(
        sharpness.Objective,
        "value_and_gradient",
        lambda self, at=None: (seen.add(None if at is None else at.dtype), real(self, at))[1],
    )
    measure(CLOSED_FORMS["T1 separable"][0], torch.float32, solver="projected-gradient")
    assert seen == {torch.float32}


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_iteration_reaches_the_sides_of_the_box(solver):
    n = 300
    h, zero = torch.diag(torch.linspace(0.1, 3, n, dtype=torch.float64)), torch.zeros(n, dtype=torch.float64)
    result = measure((h, zero, zero, 0.0), solver=solver, max_iter=1, num_starts=1)
    assert result.value == pytest.approx(50 * EPSILON**2 * h.trace().item(), rel=1e-6)


def test_a_rise_of_the_size_of_rounding_is_said_to_be():
    problem = (torch.diag(H), NONE, NONE, 10.0)
    with pytest.warns(PrecisionWarning, match=r"the loss rises by .* from 10, and in float32 it is rounded by about"):
        single = measure(problem, torch.float32, epsilon=1e-3)
    double = measure(problem, epsilon=1e-3)
    assert double.value == pytest.approx(50 * 1e-6 * H.sum().item() / 11, rel=1e-6)
    rounding = 100 * torch.finfo(torch.float32).eps * 10 / 11
    assert abs(single.value - double.value) < rounding
    model, rows = Quadratic(torch.diag(H).float(), NONE.float(), 10.0), [NONE.float().expand(7, 6)]
    with pytest.warns(PrecisionWarning, match="Convert the model and the data to float64"):
        sharpness.worst_case_sharpness(model, rows, batch_loss=by_rows, rho=1e-2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_constant_loss_takes_no_iteration(solver):
    flat = measure((0 * torch.diag(H), NONE, NONE, 1.0), solver=solver, max_iter=3, on_failure="ignore")
    assert flat.value == 0
    for start in flat.starts:
        assert start["iterations"] == 0
        assert start["climbs"] == 3


def test_a_loss_of_minus_one_is_refused_and_a_fall_is_no_rise():
    with pytest.raises(ModelError, match=r"the loss is -1; epsilon-sharpness divides by 1 \+ loss"):
        measure((torch.diag(H), NONE, NONE, -1.0))
    hill = measure((-torch.diag(H), NONE, NONE, 0.0), on_failure="ignore")
    assert hill.value == 0
    assert hill.max_loss == hill.loss == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_line_says_lower_bound(solver):
    result = measure(CLOSED_FORMS["T1 separable"][0], solver=solver)
    assert "a lower bound; starts reached" in repr(result)
    assert np.isfinite(result.value)
