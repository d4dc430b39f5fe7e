"""Tracking: the numbers of known problems, the limits of known iterations, and a training that does not notice."""

import math
import warnings

import pytest
import torch
from torch import nn

import sharpness
from sharpness import SharpnessTracker
from sharpness.errors import ArgumentError, ConvergenceWarning, DataError, NonFiniteError, StateWarning
from tests.checks import assert_untouched, contains
from tests.zoo import Quadratic, batches, by_rows, features, rotated, tanh_net

SPECTRUM = torch.tensor([5.0, 2.0, 0.5], dtype=torch.float64)
H = rotated(SPECTRUM)
ROWS = torch.zeros(4, 3, dtype=torch.float64)
DATA = [(x.float(), y) for x, y in batches(features(3), torch.arange(11) % 3)]
OPTIMIZERS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.5, "dampening": 0.4},
    {"weight_decay": 3.0},
    {"momentum": 0.5, "nesterov": True, "weight_decay": 1.0},
]


class Untouchable:
    def __iter__(self):
        raise AssertionError("data were touched")


def quadratic_tracker(**options):
    return SharpnessTracker([ROWS], batch_loss=by_rows, **options)


def descend(model, optimizer, steps, tracker=None):
    for _ in range(steps):
        optimizer.zero_grad()
        model(ROWS).backward()
        optimizer.step()
        if tracker is not None:
            tracker.step(model, optimizer)


def test_on_a_quadratic_everything_is_known():
    model, tracker = Quadratic(H), quadratic_tracker(every=3, metrics=[("top_eigenvalues", {"tol": 1e-9})])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start, identity = model.w.detach().clone(), torch.eye(3, dtype=torch.float64)
    tracker.measure(model, optimizer)
    descend(model, optimizer, 10, tracker)
    result = tracker.result
    assert result.steps.tolist() == [0, 3, 6, 9]
    assert tracker.num_steps == 10
    for i, steps in enumerate(result.steps.tolist()):
        w = torch.linalg.matrix_power(identity - 0.1 * H, steps) @ start
        torch.testing.assert_close(result.loss[i], 0.5 * w @ H @ w)
        torch.testing.assert_close(result.gradient_norms[i], (H @ w).norm())
    assert contains(result.intervals["top_eigenvalues"], SPECTRUM[0].expand(4), 1e-12)
    assert result.metrics["top_eigenvalues"].tolist() == pytest.approx([5.0] * 4)
    assert result.converged["top_eigenvalues"].all()
    assert result.learning_rates.tolist() == [0.1] * 4
    assert result.limits.tolist() == [20.0] * 4
    assert result.test_loss is result.test_accuracy is None
    assert 4 * 4 <= result.num_passes <= 4 * 7  # gradient, at most three products and their graph, and a look twice
    assert tracker.latest == {
        "loss": result.loss[-1],
        "gradient_norm": result.gradient_norms[-1],
        "learning_rate": 0.1,
        "limit": 20.0,
        "top_eigenvalues": result.metrics["top_eigenvalues"][-1],
    }


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_the_limit_is_where_the_optimizer_itself_becomes_unstable(options):
    lr, tracker = 0.2, quadratic_tracker()
    stand_in = Quadratic(H)
    tracker.measure(stand_in, torch.optim.SGD(stand_in.parameters(), lr=lr, **options))
    (limit,) = tracker.result.limits.tolist()
    for factor, grows in ((0.97, False), (1.03, True)):
        model = Quadratic(torch.tensor([[factor * limit]], dtype=torch.float64), at=torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
        for _ in range(600):
            optimizer.zero_grad()
            model(torch.zeros(1, 1, dtype=torch.float64)).backward()
            optimizer.step()
        assert (model.w.abs().item() > 1) is grows


def test_limits_of_other_optimizers():
    model = nn.Linear(3, 3)
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.4, "momentum": 0.5}]
    sgd = torch.optim.SGD(groups, lr=1.0)
    still = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.0))
    cases = [
        (torch.optim.Adam(model.parameters(), lr=0.1), 0.1, math.nan),
        (torch.optim.SGD(model.parameters(), lr=0.1, maximize=True), 0.1, math.nan),
        (sgd, 0.4, 3 / 0.4),
        (still, 0.0, math.inf),
        (None, math.nan, math.nan),
    ]

    class Wrapper:
        optimizer = sgd

    for optimizer, lr, limit in [*cases, (Wrapper(), 0.4, 3 / 0.4)]:
        tracker = SharpnessTracker(DATA)
        tracker.measure(model, optimizer)
        assert tracker.result.learning_rates.item() == pytest.approx(lr, nan_ok=True)
        assert tracker.result.limits.item() == pytest.approx(limit, nan_ok=True)


class Noisy(nn.Module):
    """All that a measurement could disturb: dropout, batch statistics, a frozen weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop, self.last = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def trained(tracker, loader):
    model = Noisy()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(3):
        for x, y in loader:
            nn.functional.cross_entropy(model(x), y).backward()  # gradients accumulate over two batches
            if tracker is not None and tracker.num_steps % 4 == 0:
                tracker.measure(model, optimizer)  # with gradients that are yet to be used
            if torch.rand(1) < 0.8:
                optimizer.step()
                optimizer.zero_grad()
            if tracker is not None:
                tracker.step(model, optimizer)
    states = [entry[name] for entry in optimizer.state.values() for name in sorted(entry)]
    return [*model.state_dict().values(), *states, *(p.grad for p in model.parameters()), torch.get_rng_state()]


def test_a_training_ends_in_the_same_bits_with_and_without():
    x, y = (torch.cat(parts) for parts in zip(*DATA, strict=True))
    data = torch.utils.data.TensorDataset(x, y)
    ended = []
    for tracks in (False, True):
        torch.manual_seed(7)
        loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator())
        tracker = SharpnessTracker(loader, every=2) if tracks else None  # walks the loader while it is being walked
        ended.append(trained(tracker, loader))
    assert len(tracker.result.steps) == 5
    for bare, tracked in zip(*ended, strict=True):
        assert (bare is None and tracked is None) or torch.equal(bare, tracked)


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.set_grad_enabled(False),
    ],
)
def test_what_is_around_a_measurement_does_not_show_in_it(around):
    model, plain, inside = Noisy(), SharpnessTracker(DATA), SharpnessTracker(DATA)
    plain.measure(model)
    with around(), assert_untouched(model):
        inside.measure(model)
    for name in ("loss", "gradient_norms"):
        assert torch.equal(getattr(plain.result, name), getattr(inside.result, name))
    assert torch.equal(plain.result.metrics["top_eigenvalues"], inside.result.metrics["top_eigenvalues"])


def test_a_step_that_is_not_measured_touches_nothing():
    tracker = SharpnessTracker(Untouchable(), every=1000)
    for _ in range(999):
        tracker.step(object(), object())
    assert tracker.num_steps == 999
    assert tracker.latest == {}
    assert repr(tracker.result) == "TrajectoryResult(nothing measured yet)"
    with pytest.raises(AssertionError, match="data were touched"):
        tracker.step(Noisy())


def test_what_cannot_be_measured_is_nan_and_said_once():
    model, tracker = Noisy(), SharpnessTracker(DATA, metrics=["top_eigenvalues", "fisher_rao_norm"], test_loader=DATA)
    tracker.step(model)
    kept = model.first.weight.detach().clone()
    model.first.weight.data.fill_(math.nan)
    with pytest.warns(StateWarning, match="could not be measured at step 2 and is recorded as NaN") as caught:
        tracker.step(model)
    assert [str(w.message).split(" could")[0] for w in caught] == ["loss and gradient", "test loss"]
    tracker.step(model)  # a second warning would be an error
    model.first.weight.data.copy_(kept)
    tracker.step(model)
    result = tracker.result
    for values in (result.loss, result.gradient_norms, result.test_loss, *result.metrics.values()):
        assert values.isnan().tolist() == [False, True, True, False]
        assert values[0] == values[3]
    assert result.converged["top_eigenvalues"].tolist() == [True, False, False, True]
    assert "nan" in result.table()
    result.plot()


@pytest.mark.parametrize("on_failure", ["warn", "ignore", "raise"])
def test_on_failure(on_failure):
    model, tracker = Noisy(), SharpnessTracker(DATA, on_failure=on_failure)
    model.first.weight.data.fill_(math.inf)
    with assert_untouched(model), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if on_failure == "raise":
            with pytest.raises(NonFiniteError, match="the loss of batch 0"):
                tracker.step(model)
        else:
            tracker.step(model)
    assert len(caught) == (on_failure == "warn")
    assert tracker.num_steps == 1
    assert len(tracker.result.steps) == (on_failure != "raise")


def test_a_metric_alone_may_fail():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g

    class Model(nn.Linear):
        def forward(self, x):
            return Once.apply(super().forward(x))

    tracker = SharpnessTracker(DATA, metrics=["top_eigenvalues", "epsilon_sharpness"])
    with pytest.warns(StateWarning, match="top_eigenvalues could not be measured at step 1"):
        tracker.step(Model(3, 3))
    assert tracker.result.loss.isfinite().all()
    assert tracker.result.metrics["top_eigenvalues"].isnan().all()
    assert tracker.result.metrics["epsilon_sharpness"].isfinite().all()


def test_running_out_of_memory_does_not_end_the_training():
    class Large(nn.Linear):
        def forward(self, x):
            raise torch.cuda.OutOfMemoryError("no memory left")

    with pytest.warns(StateWarning, match="no memory left"):
        SharpnessTracker(DATA).step(Large(3, 3))


def test_not_converging_keeps_the_number_and_says_so_once():
    model, tracker = Noisy(), SharpnessTracker(DATA, metrics=[("top_eigenvalues", {"num_matvecs": 2})])
    with pytest.warns(ConvergenceWarning, match="top_eigenvalues has not converged at step 1: .* said once"):
        tracker.step(model)
    tracker.step(model)
    assert tracker.result.converged["top_eigenvalues"].tolist() == [False, False]
    assert tracker.result.metrics["top_eigenvalues"].isfinite().all()
    strict = SharpnessTracker(DATA, metrics=[("top_eigenvalues", {"num_matvecs": 2})], on_failure="raise")
    with pytest.raises(sharpness.ConvergenceError):
        strict.step(model)


def test_another_model_is_refused():
    tracker = SharpnessTracker(DATA)
    tracker.step(nn.Linear(3, 3))
    tracker.step(nn.Linear(3, 3))  # as good as the first
    with pytest.raises(ArgumentError, match="`model` is not the one .* 'weight' was of shape .* is missing, or frozen"):
        tracker.step(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ArgumentError, match=r"'weight' was of shape \(3, 3\) and is of shape \(4, 3\)"):
        tracker.step(nn.Linear(3, 4))
    with pytest.raises(ArgumentError, match="`model` must be a torch.nn.Module, got str"):
        tracker.step("model")


def test_the_parameters_are_those_of_the_first_measurement():
    model, tracker = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), SharpnessTracker(DATA)
    model[0].requires_grad_(False)
    tracker.step(model)
    model[0].requires_grad_(True)
    tracker.step(torch.nn.DataParallel(model))
    assert tracker.result.metrics["top_eigenvalues"].unique().numel() == 1
    model[2].requires_grad_(False)
    with pytest.raises(ArgumentError, match="missing, or frozen"):
        tracker.step(model)


def test_only_chosen_parameters():
    problem = tanh_net()
    tracker = SharpnessTracker(problem.loader, params="core.last.*")
    tracker.step(problem.model)
    alone = sharpness.top_eigenvalues(problem.model, problem.loader, params="core.last.*")
    assert tracker.result.metrics["top_eigenvalues"].item() == alone.headline
    assert tracker.result.settings["n"] == 15


def test_doubts_and_test_data():
    metrics = ["top_eigenvalues", ("average_case_sharpness", {"num_samples": 3}), "epsilon_sharpness"]
    model, tracker = Noisy(), SharpnessTracker(DATA, metrics=metrics, test_loader=DATA[:1], mode="as_is")
    model.eval()
    tracker.step(model)
    result, average = tracker.result, sharpness.average_case_sharpness(model, DATA, num_samples=3)
    low, high = result.intervals["average_case_sharpness"][0].tolist()
    assert (low, high) == (average.value - average.stderr, average.value + average.stderr)
    assert result.intervals["epsilon_sharpness"].isnan().all()
    evaluated = sharpness.Objective(model, DATA[:1]).evaluate()
    assert result.test_loss.item() == evaluated.loss
    assert result.test_accuracy.item() == evaluated.accuracy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "`every` must be at least 1"),
        ({"metrics": ["sharpnes"]}, "`metrics` holds 'sharpnes'"),
        ({"metrics": [("top_eigenvalues", {"tl": 1})]}, "'tl', which is not an option"),
        ({"on_failure": "die"}, "`on_failure`"),
        ({"loss_fn": 3}, "`loss_fn`"),
        *(({name: object()}, f"`{name}`") for name in ("batch_loss", "mode", "max_batches", "seed", "progress")),
        *(({name: object()}, f"`{name}`") for name in ("memory", "microbatch_size", "precision")),
    ],
)
def test_options_are_checked_at_construction_before_data_are_touched(options, message):
    state = torch.get_rng_state()
    with pytest.raises(ArgumentError, match=message):
        SharpnessTracker(Untouchable(), **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_loaders_are_checked_at_construction_and_parameters_at_the_first_step():
    for options in ({"loader": iter(DATA)}, {"loader": DATA, "test_loader": iter(DATA)}):
        with pytest.raises(DataError, match="one-shot iterator"):
            SharpnessTracker(**options)
    with pytest.raises(ArgumentError, match="`params`"):
        SharpnessTracker(DATA, params="nothing").step(Noisy())


def test_steps_of_ones_own():
    model, tracker = Noisy(), SharpnessTracker(DATA)
    tracker.measure(model, step=5)
    tracker.step(model)
    tracker.measure(model, torch.optim.SGD(model.parameters(), lr=0.5))  # in place of the one before
    assert tracker.result.steps.tolist() == [5, 6]
    assert tracker.result.limits[1] == 4
    with pytest.raises(ArgumentError, match="`step` must not go back, got 3 after 6"):
        tracker.measure(model, step=3)
    with pytest.raises(ArgumentError, match="`step` must be an integer"):
        tracker.measure(model, step=6.5)
    with pytest.raises(ArgumentError, match="`optimizer` must be a torch.optim.Optimizer, got str"):
        tracker.step(model, "sgd")


def test_the_spectrum_is_tracked_like_any_metric():
    metrics = ["trace", ("diagonal", {"num_matvecs": 6}), "frobenius_norm", "spectral_density"]
    model, tracker = tanh_net().model, SharpnessTracker(tanh_net().loader, metrics=metrics, on_failure="ignore")
    tracker.measure(model)
    found = tracker.result
    diagonal = sharpness.diagonal(model, tanh_net().loader, num_matvecs=6)
    ends = [diagonal.trace - diagonal.trace_stderr, diagonal.trace + diagonal.trace_stderr]
    assert found.intervals["diagonal"][0].tolist() == pytest.approx(ends)
    for name in ("trace", "frobenius_norm", "spectral_density"):
        low, high = found.intervals[name][0].tolist()
        assert low <= found.metrics[name].item() <= high


def test_a_warm_start_saves_passes_and_measures_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Linear(30, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trackers = [SharpnessTracker(DATA, every=2, warm_start=warm, metrics=["top_eigenvalues"]) for warm in (False, True)]
    for _ in range(8):
        optimizer.zero_grad()
        sum(nn.functional.cross_entropy(model(x), y) for x, y in DATA).backward()
        optimizer.step()
        with assert_untouched(model):
            for tracker in trackers:
                tracker.step(model, optimizer)
    cold, warm = (tracker.result for tracker in trackers)
    assert warm.num_passes < cold.num_passes
    torch.testing.assert_close(warm.metrics["top_eigenvalues"], cold.metrics["top_eigenvalues"], rtol=1e-3, atol=0)
    assert (cold.settings["warm_start"], warm.settings["warm_start"]) == (False, True)


def test_a_warm_start_is_for_lanczos_alone():
    other = [("top_eigenvalues", {"method": "power", "num_matvecs": 30}), "gradient_noise_scale"]
    tracker = SharpnessTracker(DATA, warm_start=True, metrics=other, on_failure="ignore")
    model = nn.Linear(3, 3)
    for _ in range(2):
        tracker.step(model)
    assert torch.isfinite(tracker.result.metrics["top_eigenvalues"]).all()
