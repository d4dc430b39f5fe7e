import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import sharpness
from sharpness.errors import ArgumentError, NonFiniteError
from tests.checks import assert_untouched

torch.manual_seed(0)
X = torch.randn(40, 5)
Y = (X[:, 0] + X[:, 1] > 0).long()
TRAIN, TEST = (X[:30], Y[:30]), (X[30:], Y[30:])


def net():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))


def run(make_model=net, train=TRAIN, **options):
    settings = {"batch_sizes": (4, 30), "seeds": 2, "stop_loss": 0.1, "metrics": ["top_eigenvalues"]}
    if not callable(options.get("optimizer")):
        settings["lr"] = 0.2
    return sharpness.compare_batch_sizes(make_model, train, TEST, **{**settings, **options})


def test_trains_to_the_stop_loss_and_reports_what_it_took():
    comparison = run()
    small, large = comparison.rows
    assert (small.name, large.name) == ("4", "30")
    for row, updates_per_epoch in ((small, 8), (large, 1)):
        assert all(loss <= 0.1 for loss in row.train_loss.values)
        for epochs, updates in zip(row.epochs.values, row.updates.values, strict=True):
            assert (epochs - 1) * updates_per_epoch < updates <= epochs * updates_per_epoch
        assert len(row.train_loss.values) == 2
    assert not any("did not reach" in text or "not matched" in text for text in comparison.warnings)
    assert comparison.settings["batch_sizes"] == [4, 30]
    assert comparison.settings["optimizer"] == "sgd"


def test_the_losses_are_matched_from_just_below_the_stop():
    for row in run(stop_loss=0.05, lr=0.02).rows:
        assert min(row.train_loss.values) > 0.05 / 1.5


def test_near_the_stop_a_small_batch_is_looked_at_within_an_epoch():
    row = run(batch_sizes=(1,), seeds=3).rows[0]
    assert any(updates % 30 for updates in row.updates.values)


def test_all_batch_sizes_start_from_the_same_weights_and_seeds_differ():
    made = []

    def recorded():
        model = net()
        made.append(torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]))
        return model

    run(recorded, max_epochs=1)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[2], made[3])
    assert not torch.equal(made[0], made[2])


def test_seeds_that_start_alike_are_noted():
    def seeded():
        torch.manual_seed(0)
        return net()

    def noted(*arguments, **options):
        return any("all seeds start from the same weights" in note for note in run(*arguments, **options).notes)

    assert noted(seeded, max_epochs=1)
    assert not noted(seeded, max_epochs=1, seeds=1)
    assert not noted(max_epochs=1)


def test_same_seed_same_table_and_the_global_state_is_left_alone():
    first, second, other = run(), run(), run(seed=7)
    for a, b in zip(first.rows, second.rows, strict=True):
        assert a.metrics["top_eigenvalues"].values == b.metrics["top_eigenvalues"].values
        assert a.train_loss.values == b.train_loss.values
    assert first.rows[0].train_loss.values != other.rows[0].train_loss.values
    with assert_untouched():
        run(max_epochs=2)


class Slow(Dataset):
    """Not a TensorDataset: one sample at a time."""

    def __len__(self):
        return 30

    def __getitem__(self, i):
        return X[i], Y[i]


@pytest.mark.parametrize("train", [TensorDataset(*TRAIN), Slow()], ids=["tensors", "samples"])
def test_data_sets_of_either_kind(train):
    comparison = run(train=train, seeds=1)
    assert all(row.train_loss.mean <= 0.1 for row in comparison.rows)


def test_runs_that_miss_the_stop_loss_are_marked():
    comparison = run(max_epochs=1, stop_loss=1e-6)
    assert comparison.warnings[0] == "batch size 4 did not reach the loss 1e-06 in 1 epochs for 2 of 2 seeds."


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("linear", 7.5), ("sqrt", math.sqrt(7.5))])
def test_the_learning_rate_is_scaled_as_asked(scaling, factor, monkeypatch):
    rates = []
    original = torch.optim.SGD.__init__

    def recorded(self, params, lr, **options):
        rates.append(lr)
        original(self, params, lr=lr, **options)

    monkeypatch.setattr(torch.optim.SGD, "__init__", recorded)
    run(seeds=1, max_epochs=1, lr=0.01, lr_scaling=scaling)
    assert rates == pytest.approx([0.01, 0.01 * factor])


def test_other_optimizers_and_the_hook_for_trained_models():
    kept = []
    run(optimizer="adam", lr=0.02, seeds=1, on_trained=lambda size, seed, model: kept.append((size, seed, model)))
    assert [(size, seed) for size, seed, _ in kept] == [(4, 0), (30, 0)]
    factory = run(optimizer=lambda parameters: torch.optim.RMSprop(parameters, lr=0.01), seeds=1)
    assert all(row.train_loss.mean <= 0.1 for row in factory.rows)


def test_bad_input_is_found_before_anything_is_trained():
    def never():
        raise AssertionError("trained")

    for options, match in (
        ({"batch_sizes": (4, 31)}, r"`batch_sizes` must be between 1 and 30 \(the size of the training set\), got 31"),
        ({"batch_sizes": (4, 4)}, "a list of different batch sizes"),
        ({"batch_sizes": 4}, "a list of different batch sizes"),
        ({"seeds": 0}, "`seeds` must be at least 1"),
        ({"lr": -1}, "`lr` must be a finite number above 0"),
        ({"optimizer": "lbfgs"}, "`optimizer` must be one of 'sgd', 'adam'"),
        ({"lr_scaling": "cubic"}, "`lr_scaling` must be one of 'none', 'linear', 'sqrt'"),
        ({"metrics": ["sharpness"]}, "holds 'sharpness'; the names are"),
        ({"train": [TRAIN]}, "`train_set` must be a data set"),
        ({"train": (X, Y[:5])}, "`train_set` has 40 inputs and 5 targets"),
        ({"train": (X[:0], Y[:0])}, "`train_set` is empty"),
        ({"metrics": [("top_eigenvalues", {"kk": 1})]}, "asks top_eigenvalues for 'kk'"),
        ({"memory": "lots"}, "`memory` must be"),
        ({"loss_fn": "ce"}, "`loss_fn` must be a callable"),
        ({"on_trained": 3}, "`on_trained` must be callable, got int"),
    ):
        with pytest.raises(ArgumentError, match=match):
            run(never, **options)


def test_a_model_in_place_of_a_factory_is_named():
    for make_model in (net(), 3):
        with pytest.raises(ArgumentError, match="`make_model` must be a function that returns a new model"):
            run(make_model)


def test_an_optimizer_factory_that_makes_something_else_is_named():
    with pytest.raises(ArgumentError, match="`optimizer` must return a torch.optim.Optimizer, got int"):
        run(optimizer=lambda parameters: 3)


def test_samples_may_be_dicts():
    class Dicts(Slow):
        def __getitem__(self, i):
            return {"input": X[i], "labels": Y[i]}

    assert all(row.train_loss.mean <= 0.1 for row in run(train=Dicts(), seeds=1).rows)


def test_factories_that_do_not_make_new_models():
    one = net()
    with pytest.raises(ArgumentError, match="returned the same object twice"):
        run(lambda: one, max_epochs=1)
    with pytest.raises(ArgumentError, match=r"must return a torch.nn.Module, got int"):
        run(lambda: 3)


def test_a_training_that_diverges_is_named():
    with pytest.raises(NonFiniteError, match="training with batch size 4 and seed 0 diverged in epoch 1: .* Lower lr"):
        run(lr=1e38)
