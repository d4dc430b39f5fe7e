"""Sharpness against loss: the records by hand, and a training with two batch sizes."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError
from sharpness.results import TrajectoryComparison, TrajectoryResult
from tests.zoo import features

X, Y = features(3).float(), torch.arange(11) % 3


TRAINING = {"batch_sizes": (2, 11), "seeds": 2, "lr": 0.2, "stop_loss": 0.5, "max_epochs": 18}


def made(loss, values, **changes):
    m = len(loss)
    fields = {
        "steps": torch.arange(m),
        "loss": torch.tensor(loss, dtype=torch.float64),
        "gradient_norms": torch.ones(m, dtype=torch.float64),
        "metrics": {"top_eigenvalues": torch.tensor(values, dtype=torch.float64)},
        "intervals": {"top_eigenvalues": torch.tensor([[v, v] for v in values], dtype=torch.float64).view(m, 2)},
        "converged": {"top_eigenvalues": torch.ones(m, dtype=torch.bool)},
        "learning_rates": torch.full((m,), 0.5, dtype=torch.float64),
        "limits": torch.full((m,), 4.0, dtype=torch.float64),
        "num_passes": 3,
        "seconds": 1.0,
    }
    return TrajectoryResult(**{**fields, **changes})


def compared(**curves):
    curves = {int(size[1:]): tuple(runs) for size, runs in curves.items()}
    return TrajectoryComparison(
        curves=curves, reached={size: (True,) * len(runs) for size, runs in curves.items()}, num_passes=1, seconds=1.0
    )


@pytest.mark.parametrize(
    ("level", "expected"),
    [(10.0, 1.0), (1.0, 3.0), (math.sqrt(10), 2.0), (0.1, 7.0), (11.0, math.nan), (0.05, math.nan), (0.0, math.nan)],
)
def test_at_loss_interpolates_in_the_logarithm_of_the_loss(level, expected):
    run = made([10.0, 1.0, 5.0, 0.1], [1.0, 3.0, 5.0, 7.0])
    assert run.at_loss(level) == pytest.approx(expected, nan_ok=True)


def test_at_loss_where_something_is_not_finite():
    assert math.isnan(made([math.nan, 0.5], [1.0, 2.0]).at_loss(0.7))
    assert math.isnan(made([1.0, 0.0], [1.0, 2.0]).at_loss(0.7))
    assert made([1.0, 0.5], [1.0, 2.0]).at_loss(0.5) == 2
    with pytest.raises(ArgumentError, match="`metric` must be one of 'top_eigenvalues', got 'trace'"):
        made([1.0], [1.0]).at_loss(0.5, "trace")


def test_the_table_compares_at_equal_losses():
    comparison = compared(_8=[made([2.0, 0.5], [1.0, 1.0]), made([2.0, 0.5], [3.0, 3.0])], _64=[made([1.0], [7.0])])
    assert comparison.levels() == [2.0, 1.0, 0.5]
    lines = [line.split() for line in comparison.table().splitlines()[2:]]
    assert lines == [["2", "2"], ["1", "2", "7"], ["0.5", "2"]]
    assert compared(_8=[made([math.nan], [1.0])]).levels() == []
    with pytest.raises(ArgumentError, match="`metric`"):
        comparison.table(metric="trace")


def test_long_tables_are_thinned_and_columns_of_nothing_left_out():
    nothing = torch.full((100,), math.nan, dtype=torch.float64)
    run = made([1.0] * 100, [1.0] * 100, limits=nothing, test_loss=nothing)
    lines = run.table().splitlines()
    assert len(lines) == 22
    assert lines[2].startswith("0 ")
    assert lines[-1].startswith("99 ")
    assert "limit" not in lines[0]
    assert "test loss" not in lines[0]


@pytest.mark.parametrize("run", [made([], []), made([1.0], [2.0]), made([math.nan, -1.0], [math.nan, -2.0])])
def test_every_record_prints_and_draws(run):
    import matplotlib.pyplot as plt

    assert "\n" not in repr(run)
    assert run.table().startswith("step")
    for loss in (True, False):
        ax = run.plot(loss=loss)
        assert ax.get_xlabel() == "step"
        assert len(ax.figure.axes) == 1 + loss
        plt.close(ax.figure)
    if len(run.steps):
        plt.close(compared(_8=[run]).plot().figure)


def test_pictures_show_what_was_tracked():
    import matplotlib.pyplot as plt

    run = made([1.0, 0.1], [2.0, 4.0])
    figure, axes = plt.subplots(1, 3)
    assert run.plot(axes[0]) is axes[0]
    curve, limit = axes[0].get_lines()
    assert curve.get_ydata().tolist() == [2, 4]
    assert limit.get_ydata().tolist() == [4, 4]
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == [
        "top eigenvalues",
        "limit of stability",
        "loss",
    ]
    other = dataclasses.replace(
        run,
        **{name: {"epsilon_sharpness": next(iter(getattr(run, name).values()))} for name in ("metrics", "intervals")},
    )
    assert len(other.plot(axes[1]).get_lines()) == 1  # an eigenvalue's limit is no limit of anything else
    compared(_8=[run, run], _64=[run]).plot(axes[2])
    assert [line.get_xdata().tolist() for line in axes[2].get_lines()] == 3 * [[1.0, 0.1]]
    assert [text.get_text() for text in axes[2].get_legend().get_texts()] == ["batch size 8", "batch size 64"]
    with pytest.raises(ArgumentError, match="`metric`"):
        run.plot(metric="trace")
    plt.close(figure)


def net():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def comparison():
    state = torch.get_rng_state()
    found = sharpness.trajectory(net, (X, Y), (X[:4], Y[:4]), every=5, **TRAINING)
    assert torch.equal(torch.get_rng_state(), state)
    return found


def test_batch_sizes_start_alike_and_are_measured_to_the_end(comparison):
    assert list(comparison) == [2, 11]
    assert len(comparison) == 2
    for seed in (0, 1):
        small, large = (comparison[size][seed] for size in comparison)
        for name in ("loss", "test_loss", "gradient_norms"):
            assert getattr(small, name)[0] == getattr(large, name)[0]
        assert small.metrics["top_eigenvalues"][0] == large.metrics["top_eigenvalues"][0]
    assert comparison[2][0].loss[0] != comparison[2][1].loss[0]
    for size, runs in comparison.items():
        per_epoch = math.ceil(11 / size)
        for run, reached in zip(runs, comparison.reached[size], strict=True):
            steps = run.steps.tolist()
            assert steps[0] == 0
            assert 5 * per_epoch in steps or reached
            assert reached is (run.loss[-1].item() <= 0.5)
            assert reached or steps[-1] == 18 * per_epoch
            assert run.limits.unique().item() == pytest.approx(3.8 / 0.2)
    assert comparison.num_passes == sum(run.num_passes for runs in comparison.values() for run in runs)
    assert any(reached for flags in comparison.reached.values() for reached in flags)
    assert "missed the loss" in repr(dataclasses.replace(comparison, reached={2: (False,), 11: (True,)}))


def test_the_end_of_a_training_is_what_a_training_alone_ends_in(comparison):
    ends = []
    sharpness.compare_batch_sizes(
        net,
        (X, Y),
        (X, Y),
        **{**TRAINING, "batch_sizes": (11,), "seeds": 1},
        metrics=["top_eigenvalues"],
        on_trained=lambda size, seed, model: ends.append(sharpness.Objective(model, [(X, Y)]).value()),
    )
    assert comparison[11][0].loss[-1].item() == pytest.approx(ends[0])


def test_it_trains_as_a_comparison_of_batch_sizes_does():
    how = {"batch_sizes": (2, 5), "seeds": 2, "lr": 0.2, "updates": 4}
    found = sharpness.trajectory(net, (X, Y), every=2, **how)
    other = sharpness.compare_batch_sizes(net, (X, Y), (X, Y), metrics=["top_eigenvalues"], **how)
    for size, runs in found.items():
        assert [run.steps[-1].item() for run in runs] == [4, 4]
        ends = [run.loss[-1].item() for run in runs]
        assert ends == pytest.approx(other[str(size)].train_loss.values, rel=1e-6)
        tops = [run.metrics["top_eigenvalues"][-1].item() for run in runs]
        assert tops == pytest.approx(other[str(size)].metrics["top_eigenvalues"].values, rel=1e-2)
    assert found.settings["updates"] == 4
    assert found.settings["stop_loss"] is None


def test_learning_rates_scale():
    found = sharpness.trajectory(net, (X, Y), batch_sizes=(2, 8), lr=0.01, lr_scaling="linear", max_epochs=1)
    assert [found[size][0].learning_rates[0].item() for size in found] == pytest.approx([0.01, 0.04])
    assert found[2][0].test_loss is None


def test_custom_optimizers_and_metrics():
    found = sharpness.trajectory(
        net, (X, Y), batch_sizes=(4,), max_epochs=2, every=5, optimizer=torch.optim.Adam,
        metrics=[("epsilon_sharpness", {"max_iter": 1}), "critical_sharpness"], max_batches=1, mode="train",
    )  # fmt: skip
    (run,) = found[4]
    assert run.steps.tolist() == [0, 6]
    assert list(run.metrics) == ["epsilon_sharpness", "critical_sharpness"]
    assert run.limits.isnan().all()
    assert found.settings["mode"] == "train"


def test_a_diverging_training_says_so():
    with pytest.raises(sharpness.NonFiniteError, match="diverged"):
        sharpness.trajectory(lambda: nn.Linear(3, 3), (X, Y), lr=1e38, batch_sizes=(4,), max_epochs=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"make_model": net()}, "`make_model` must be a function that returns a new model, got Sequential"),
        ({"train_set": 3}, "`train_set` must be a data set"),
        ({"test_set": 3}, "`test_set` must be a data set"),
        ({"loss_fn": 3}, "`loss_fn`"),
        ({"batch_sizes": ()}, "`batch_sizes` must be a list of different batch sizes"),
        ({"batch_sizes": 3}, "`batch_sizes` must be a list of different batch sizes"),
        ({"batch_sizes": (2, 12)}, "`batch_sizes` must be between 1 and 11"),
        ({"seeds": 0}, "`seeds`"),
        ({"max_epochs": 0}, "`max_epochs`"),
        ({"every": 0.5}, "`every`"),
        ({"lr": -1}, "`lr`"),
        ({"momentum": -1}, "`momentum`"),
        ({"stop_loss": 0}, "`stop_loss`"),
        ({"lr_scaling": "cubic"}, "`lr_scaling`"),
        ({"mode": "as_is"}, "`mode`"),
        ({"seed": -1}, "`seed`"),
        ({"progress": 1}, "`progress`"),
        ({"optimizer": "sgdm"}, "`optimizer`"),
        ({"metrics": ["trase"]}, "`metrics`"),
        ({"max_batches": 0}, "`max_batches`"),
        ({"on_failure": "die"}, "`on_failure`"),
        ({"memory": "lots"}, "`memory`"),
    ],
)
def test_options_are_checked_before_anything_is_trained(options, message):
    def untrained():
        raise AssertionError("a model was made")

    with pytest.raises(ArgumentError, match=message):
        sharpness.trajectory(**{"make_model": untrained, "train_set": (X, Y), "batch_sizes": (4,), **options})


def test_a_factory_must_make_new_models():
    model = net()
    with pytest.raises(ArgumentError, match="`make_model` returned the same object twice"):
        sharpness.trajectory(lambda: model, (X, Y), batch_sizes=(4, 11), max_epochs=1)
    with pytest.raises(ArgumentError, match="`make_model` must return a torch.nn.Module, got int"):
        sharpness.trajectory(lambda: 3, (X, Y), batch_sizes=(4,))
