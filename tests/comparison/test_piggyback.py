import math

import pytest
import torch
from torch import nn
from torch.utils.data import RandomSampler

import sharpness
from sharpness.comparison.starts import Starts
from sharpness.errors import ArgumentError, NonFiniteError
from tests.checks import assert_untouched

torch.manual_seed(0)
X = torch.randn(30, 5)
Y = (X[:, 0] + X[:, 1] > 0).long()
DATA, TEST = (X[:24], Y[:24]), (X[24:], Y[24:])


def net():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def run(make_model=net, **options):
    settings = {
        "batch_sizes": (4, 24),
        "switch_epochs": (0, 1, 3),
        "seeds": 1,
        "epochs": 2,
        "metric": "fisher_rao_norm",
    }
    return sharpness.piggyback(make_model, DATA, TEST, **{**settings, **options})


def epochs_by_hand(model, batch_size, epochs, optimizer):
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        order = torch.tensor(list(RandomSampler(range(24), generator=generator)))
        for chosen in order.split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(DATA[0][chosen]), DATA[1][chosen]).backward()
            optimizer.step()
    return model.eval()


def by_hand(switch, large):
    model = Starts(net).model(0)
    epochs_by_hand(model, 4, switch, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    if large:
        epochs_by_hand(model, 24, 2, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    return sharpness.compare({"a": model}, [DATA], test_loader=[TEST], metrics=["fisher_rao_norm"]).rows[0]


def test_each_switch_is_what_it_says():
    result = run()
    assert result.switch_epochs == (0, 1, 3)
    for i, switch in enumerate((0, 1, 3)):
        for row, large in ((result.small[i], False), (result.large[i], True)):
            expected = by_hand(switch, large)
            assert row.train_loss.mean == pytest.approx(expected.train_loss.mean, rel=1e-4)
            assert row.test_accuracy.mean == expected.test_accuracy.mean
            assert row.metrics["fisher_rao_norm"].mean == pytest.approx(
                expected.metrics["fisher_rao_norm"].mean, rel=1e-3, abs=1e-6
            )
        small, large = result.small[i], result.large[i]
        assert (small.epochs.mean, small.updates.mean, small.samples.mean) == (switch, 6 * switch, 24 * switch)
        assert (large.epochs.mean, large.updates.mean, large.samples.mean) == (2, 2, 48)


def test_the_small_batch_is_trained_once_per_seed():
    made = []

    def factory(parameters):
        made.append(torch.optim.SGD(parameters, lr=0.1))
        return made[-1]

    run(optimizer=factory, seeds=2)
    assert len(made) == 2 * (1 + 3)


def test_large_batches_stop_at_the_loss_and_an_iterate_below_it_is_its_own_solution():
    result = run(epochs=None, stop_loss=0.4, lr=0.2, switch_epochs=(0, 12))
    assert result.large[0].train_loss.mean <= 0.4 < result.small[0].train_loss.mean
    assert result.large[0].updates.mean > 0
    assert result.small[1].train_loss.mean <= 0.4
    assert result.large[1].updates.mean == 0
    assert result.large[1].train_loss.values == result.small[1].train_loss.values
    assert result.settings["stop_loss"] == 0.4
    assert result.warnings == ()


def test_what_missed_the_stop_is_marked():
    result = run(epochs=None, stop_loss=1e-6, max_epochs=1, seeds=2)
    assert result.warnings[0] == "large batch from epoch 0 did not reach the loss 1e-06 in 1 epochs for 2 of 2 seeds."
    assert len(result.warnings) == 3


def test_metrics_that_did_not_converge_are_marked():
    result = run(metric=("top_eigenvalues", {"num_matvecs": 1}), switch_epochs=(1,))
    assert "top_eigenvalues of the small batch at epoch 1 did not converge for 1 of 1 models." in result.warnings
    assert "top_eigenvalues of the large batch at epoch 1 did not converge for 1 of 1 models." in result.warnings
    assert result.settings["metric_options"] == {"num_matvecs": 1}


def test_the_default_metric_is_that_of_keskar():
    result = sharpness.piggyback(net, DATA, TEST, batch_sizes=(4, 24), switch_epochs=[1], updates=1, seeds=1)
    assert result.metric == "epsilon_sharpness"
    record = result.large[0].records["epsilon_sharpness"][0]
    assert record.settings["epsilon"] == 1e-3


def test_scaling_is_of_the_large_batch():
    result = run(lr_scaling="linear", lr=0.01, switch_epochs=(1,))
    assert result.small[0].learning_rate.mean == pytest.approx(0.01)
    assert result.large[0].learning_rate.mean == pytest.approx(0.06)


def test_same_seed_same_numbers_and_the_global_state_is_left_alone():
    def dropping():
        return nn.Sequential(nn.Linear(5, 4), nn.Dropout(), nn.Linear(4, 2))

    with assert_untouched():
        first = run(dropping)
    torch.rand(3)
    again, other = run(dropping), run(dropping, seed=1)
    assert [row.train_loss.values for row in again.large] == [row.train_loss.values for row in first.large]
    assert [row.train_loss.values for row in other.large] != [row.train_loss.values for row in first.large]


def test_factories_of_other_weights_start_from_those_of_the_first_model():
    generator, first = torch.Generator().manual_seed(5), []

    def unruly():
        model = nn.Linear(5, 2)
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 5, generator=generator))
        first.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return model

    result = run(unruly, switch_epochs=(0, 1), epochs=None, stop_loss=100.0)
    model = nn.Linear(5, 2)
    model.load_state_dict(first[0])
    expected = sharpness.compare({"a": model}, [DATA], metrics=["fisher_rao_norm"]).rows[0].train_loss.mean
    assert result.small[0].train_loss.mean == pytest.approx(expected, rel=1e-6)
    assert result.large[0].train_loss.mean == result.small[0].train_loss.mean  # at the stop already
    assert result.large[1].train_loss.mean == result.small[1].train_loss.mean
    assert result.settings["initial_weights"] == "copied"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_sizes": (4,)}, "`batch_sizes` must be a small one and a large one"),
        ({"batch_sizes": (24, 4)}, "`batch_sizes` must be a small one and a large one"),
        ({"batch_sizes": (4, 25)}, "`batch_sizes` must be between 1 and 24"),
        ({"switch_epochs": 3}, "`switch_epochs` must be a list of different epochs"),
        ({"switch_epochs": ()}, "`switch_epochs` must be a list of different epochs"),
        ({"switch_epochs": (1, 1)}, "`switch_epochs` must be a list of different epochs"),
        ({"switch_epochs": (-1,)}, "`switch_epochs` must be at least 0"),
        ({"switch_epochs": (0.5,)}, "`switch_epochs` must be an integer"),
        ({"seeds": 0}, "`seeds` must be at least 1"),
        ({"seed": -1}, "`seed`"),
        ({"metric": "sharpnes"}, "`metric` must be one of"),
        ({"metric": ("top_eigenvalues", {"kk": 1})}, "'kk', which is not an option"),
        ({"stop_loss": 0.1}, "got `epochs` and `stop_loss`"),
        ({"progress": 1}, "`progress`"),
        ({"memory": "lots"}, "`memory` must be"),
        ({"make_model": net()}, "`make_model` must be a function"),
        ({"optimizer": "lbfgs"}, "`optimizer` must be one of"),
    ],
)
def test_bad_input_is_found_before_anything_is_trained(options, match):
    with pytest.raises(ArgumentError, match=match):
        run(**{"make_model": lambda: pytest.fail("made a model"), **options})


def test_divergence_is_named():
    with pytest.raises(NonFiniteError, match="training with batch size 4 and seed 0 diverged in epoch 1"):
        run(lambda: nn.Linear(5, 2), optimizer=lambda p: torch.optim.SGD(p, lr=1e38, momentum=0.99))


def test_table_and_picture():
    plt = pytest.importorskip("matplotlib.pyplot")
    result = run(seeds=2)
    lines = str(result).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "3"]
    assert "large: fisher_rao_norm" in lines[0]
    assert "PiggybackResult(fisher_rao_norm of the large batch: " in repr(result)
    axes = result.plot()
    right = axes.figure.axes[1]
    heights = [list(map(float, container.lines[0].get_ydata())) for container in axes.containers]
    assert heights == [[row.metrics["fisher_rao_norm"].mean for row in rows] for rows in (result.small, result.large)]
    accuracies = [list(map(float, container.lines[0].get_ydata())) for container in right.containers]
    assert accuracies == [[row.test_accuracy.mean for row in rows] for rows in (result.small, result.large)]
    assert len(axes.get_legend().get_texts()) == 4
    plt.close("all")


def test_regression_has_no_accuracy_axis():
    plt = pytest.importorskip("matplotlib.pyplot")
    data = (X, X[:, :1])
    result = sharpness.piggyback(
        lambda: nn.Linear(5, 1), data, data, batch_sizes=(5, 30), switch_epochs=(1,), epochs=1, seeds=1,
        metric=("top_eigenvalues", {"k": 1}),
    )  # fmt: skip
    assert len(result.plot().figure.axes) == 1
    assert "%" not in result.table()
    assert math.isfinite(result.large[0].train_loss.mean)
    plt.close("all")


def test_the_bar_says_what_is_going_on(monkeypatch):
    import sys

    module = sys.modules["sharpness.comparison.piggyback"]
    bars, original = [], module.progress_bar
    monkeypatch.setattr(module, "progress_bar", lambda *a, **k: bars.append(original(*a, **k)) or bars[-1])
    run(progress=True)
    assert (bars[0].n, bars[0].total) == (4, 4)
    assert "batch 24 from epoch 3, seed 0, epoch 2, loss" in bars[0].postfix
