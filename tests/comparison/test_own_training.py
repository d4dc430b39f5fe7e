"""The user's own training in place of ours."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import sharpness
from sharpness.errors import ArgumentError, NonFiniteError

torch.manual_seed(0)
X = torch.randn(30, 5)
Y = (X[:, 0] + X[:, 1] > 0).long()
DATA = (X, Y)


def net():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def run(train, **options):
    settings = {"batch_sizes": (4, 30), "seeds": 2, "metrics": ["fisher_rao_norm"]}
    return sharpness.compare_batch_sizes(net, DATA, DATA, **{**settings, **options}, train=train)


def test_it_gets_the_model_and_a_shuffled_seeded_loader():
    seen = []

    def train(model, loader):
        assert isinstance(loader, DataLoader)
        first = torch.cat([inputs for inputs, _ in loader])
        seen.append((loader.batch_size, len(loader), first, model[0].weight.detach().clone()))
        with torch.no_grad():
            model[0].weight.fill_(float(len(seen)))

    comparison = run(train)
    assert [(size, count) for size, count, _, _ in seen] == [(4, 8), (30, 1)] * 2
    assert torch.equal(seen[0][2], seen[1][2])  # one order for all batch sizes of a seed
    assert not torch.equal(seen[0][2], seen[2][2])
    assert sorted(seen[0][2].tolist()) == sorted(X.tolist())
    assert not torch.equal(seen[0][2], X)
    assert torch.equal(seen[0][3], seen[1][3])
    row = comparison["4"]
    assert (row.epochs, row.updates, row.samples, row.learning_rate) == (None,) * 4
    assert all(seconds > 0 for seconds in row.seconds.values)
    assert "lr" not in comparison.settings
    assert comparison.settings["train"].endswith("train")
    assert not [w for w in comparison.warnings if "did not reach" in w]


def test_what_it_did_is_what_is_measured():
    def train(model, loader):
        for parameter in model.parameters():
            nn.init.constant_(parameter, 1 / loader.batch_size)

    by_hand = net()
    for parameter in by_hand.parameters():
        nn.init.constant_(parameter, 1 / 4)
    expected = sharpness.compare({"a": by_hand}, [DATA], metrics=["top_eigenvalues"]).rows[0]
    row = run(train, metrics=["top_eigenvalues"])["4"]
    assert row.train_loss.mean == pytest.approx(expected.train_loss.mean, rel=1e-6)
    assert row.metrics["top_eigenvalues"].mean == pytest.approx(expected.metrics["top_eigenvalues"].mean, rel=1e-4)


@pytest.mark.parametrize(
    "answer", [{"epochs": 3, "updates": 24, "samples": 90.0, "loss": [1, 2], "learning_rate": None}]
)
def test_the_counts_it_returns_are_in_the_table(answer):
    row = run(lambda model, loader: answer)["30"]
    assert (row.epochs.mean, row.updates.mean, row.samples.mean, row.learning_rate) == (3, 24, 90, None)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "three", True])
def test_counts_that_are_none(value):
    with pytest.raises(ArgumentError, match="`train` returned epochs=.*; a number of at least 0 is needed"):
        run(lambda model, loader: {"epochs": value})


def test_returning_the_model_or_a_history_is_fine_and_another_model_is_not():
    assert run(lambda model, loader: model).rows[0].epochs is None
    assert run(lambda model, loader: [0.3, 0.2]).rows[0].epochs is None
    with pytest.raises(ArgumentError, match="`train` returned another model"):
        run(lambda model, loader: net())


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam"},
        {"lr": 0.05},
        {"momentum": 0.9},
        {"stop_loss": 1e-2},
        {"epochs": 1},
        {"updates": 1},
        {"max_epochs": 1},
        {"lr_scaling": "linear"},
        {"warmup_epochs": 1.0},
        {"ghost_batch_size": 2},
    ],
)
def test_options_of_our_training_are_refused_by_name(options):
    with pytest.raises(ArgumentError, match=f"`train` is your own, and `{next(iter(options))}` would be ignored"):
        run(lambda model, loader: pytest.fail("trained"), **options)


def test_it_must_be_callable():
    with pytest.raises(ArgumentError, match=r"`train` must be a callable \(model, loader\), got int"):
        run(3)


def test_a_model_it_ruined_is_named():
    def train(model, loader):
        nn.init.constant_(model[0].weight, float("nan"))

    with pytest.raises(
        NonFiniteError, match="`train` diverged with batch size 4 and seed 0: .* Lower its learning rate"
    ):
        run(train)


def test_its_random_numbers_are_seeded():
    drawn = []
    run(lambda model, loader: drawn.append(torch.rand(1).item()))
    run(lambda model, loader: drawn.append(torch.rand(1).item()))
    assert drawn[:4] == drawn[4:]
    assert drawn[0] == drawn[1] != drawn[2]
