"""Each option of a training against its closed form, or against the same done by hand."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, RandomSampler, TensorDataset

import sharpness
from sharpness.comparison.ghost import ghost_batches, ghost_sizes
from sharpness.comparison.train import train as train_one
from sharpness.errors import ArgumentError, ModelError, NonFiniteError
from tests.checks import assert_untouched

torch.manual_seed(0)
X = torch.randn(30, 5)
Y = (X[:, 0] + X[:, 1] > 0).long()
DATA = (X, Y)


def net():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def normed():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def run(make_model=net, data=DATA, **options):
    settings = {"batch_sizes": (4, 30), "seeds": 1, "metrics": ["fisher_rao_norm"]}
    return sharpness.compare_batch_sizes(make_model, data, DATA, **{**settings, **options})


class Spy(torch.optim.SGD):
    """Notes the learning rate of each update."""

    def __init__(self, parameters, rates, lr=0.1):
        super().__init__(parameters, lr=lr)
        self.rates = rates

    def step(self, closure=None):
        self.rates.append(float(self.param_groups[0]["lr"]))
        return super().step(closure)


def spied(**options):
    made = []

    def factory(parameters):
        made.append([])
        return Spy(parameters, made[-1])

    return run(optimizer=factory, **options), made


def by_hand(model, batch_size, epochs, seed=0, lr=0.05, momentum=0.9, data=DATA, on_batch=None):
    """The same training, in the plainest words."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = list(RandomSampler(range(len(data[0])), generator=generator))
        for chosen in torch.tensor(order).split(batch_size):
            inputs, targets = data[0][chosen], data[1][chosen]
            optimizer.zero_grad()
            outputs = model(inputs) if on_batch is None else on_batch(model, inputs)
            nn.functional.cross_entropy(outputs, targets).backward()
            optimizer.step()
    return model


def started(make_model, seed=0):
    from sharpness.comparison.starts import Starts

    return Starts(make_model).model(seed)


def test_epochs_and_updates_are_exact():
    for row, per_epoch in zip(run(epochs=3).rows, (8, 1), strict=True):
        assert (row.epochs.mean, row.updates.mean, row.samples.mean) == (3, 3 * per_epoch, 90)
    for row, epochs, samples in zip(run(updates=11).rows, (2, 11), (30 + 12, 330), strict=True):
        assert (row.epochs.mean, row.updates.mean, row.samples.mean) == (epochs, 11, samples)


def test_a_training_is_what_it_says():
    kept = {}
    run(epochs=2, on_trained=lambda size, seed, model: kept.update({size: model}))
    for size in (4, 30):
        expected = by_hand(started(net), size, 2)
        for ours, theirs in zip(kept[size].parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stop_loss": 0.1, "epochs": 2}, "got `epochs` and `stop_loss`. Pass exactly one"),
        ({"epochs": 2, "updates": 2}, "got `epochs` and `updates`. Pass exactly one"),
        ({"stop_loss": None}, "got none of them. Pass exactly one"),
        ({"stop_loss": None, "max_epochs": 3}, "got none of them"),
        ({"epochs": 2, "max_epochs": 3}, "`max_epochs` is the ceiling for `stop_loss`, and `epochs` stops"),
        ({"epochs": 0}, "`epochs` must be at least 1"),
        ({"updates": 1.5}, "`updates` must be an integer"),
        ({"max_epochs": 0}, "`max_epochs` must be at least 1"),
        ({"stop_loss": 0}, "`stop_loss` must be a finite number above 0"),
        ({"momentum": -1}, "`momentum` must be a finite number of at least 0"),
        ({"warmup_epochs": -1}, "`warmup_epochs` must be a finite number of at least 0"),
        ({"ghost_batch_size": 1}, "`ghost_batch_size` must be at least 2"),
        ({"ghost_batch_size": 30}, "`ghost_batch_size` must be smaller than the largest batch size, 30, got 30"),
        ({"optimizer": "adam", "momentum": 0.9}, '`momentum` is 0.9, and only optimizer="sgd" has it'),
        ({"optimizer": torch.optim.SGD, "momentum": 0.9}, "`momentum` is 0.9, and only"),
        ({"optimizer": torch.optim.SGD, "lr": 0.1}, "`lr` is 0.1, and `optimizer` is a factory"),
        ({"batch_sizes": ([1], [2])}, "a list of different batch sizes"),
    ],
)
def test_options_that_contradict_or_would_be_ignored(options, match):
    with pytest.raises(ArgumentError, match=match):
        run(lambda: pytest.fail("made a model"), **options)


def test_one_rule_is_in_force_and_recorded():
    for options, expected in (
        ({"updates": 2}, (None, None, 2, None)),
        ({"stop_loss": None, "epochs": 2}, (None, 2, None, None)),
        ({"max_epochs": 1}, (0.01, None, None, 1)),
    ):
        settings = run(**options).settings
        assert tuple(settings[name] for name in ("stop_loss", "epochs", "updates", "max_epochs")) == expected
    assert run(stop_loss=10.0).settings["max_epochs"] == 1000


def test_the_default_optimizer_has_the_momentum_and_rate_of_the_signature():
    settings = run(epochs=1).settings
    assert (settings["optimizer"], settings["lr"], settings["momentum"]) == ("sgd", 0.05, 0.9)
    adam = run(epochs=1, optimizer="adam").settings
    assert adam["momentum"] is None
    assert adam["lr"] == 0.001  # the 0.05 of SGD would be fifty times PyTorch's own
    assert run(epochs=1, optimizer="adam", lr=0.05).settings["lr"] == 0.05


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 7.5), ("sqrt", math.sqrt(7.5))])
def test_scaling_and_warm_up_of_a_factory(scaling, factor):
    comparison, (small, large) = spied(epochs=5, lr_scaling=scaling, warmup_epochs=2.2)
    ramp = math.ceil(2.2 * 8)
    assert small == pytest.approx([0.1 * min(t / ramp, 1) for t in range(1, 41)], rel=1e-12)
    assert large == pytest.approx([0.1 * factor * min(t / 3, 1) for t in range(1, 6)], rel=1e-12)
    assert small[ramp - 1 :] == [0.1] * (41 - ramp)  # to the bit
    assert [row.learning_rate.mean for row in comparison.rows] == pytest.approx([0.1, 0.1 * factor])


def test_no_warm_up_leaves_the_users_schedule_alone():
    class Halving(Spy):
        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["lr"] /= 2

    rates = []
    run(batch_sizes=(15,), epochs=2, optimizer=lambda parameters: Halving(parameters, rates))
    assert rates == [0.1, 0.05, 0.025, 0.0125]


def test_rates_that_are_tensors_are_warmed_up_too():
    rates = []
    shared = torch.tensor(0.1)
    run(batch_sizes=(15,), epochs=1, warmup_epochs=2, optimizer=lambda p: Spy(p, rates, lr=shared))
    assert rates == pytest.approx([0.025, 0.05])
    assert shared == torch.tensor(0.1)


def test_adam_is_warmed_up(monkeypatch):
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *a: rates.append(self.param_groups[0]["lr"]) or step(self, *a)
    )
    run(batch_sizes=(15,), epochs=1, warmup_epochs=1, lr=0.02, optimizer="adam")
    assert rates == pytest.approx([0.01, 0.02])


class Rateless(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data -= 0.1 * p.grad


def test_an_optimizer_without_a_learning_rate():
    assert run(epochs=1, optimizer=Rateless).rows[0].learning_rate is None
    for options, name in (({"lr_scaling": "linear"}, "lr_scaling"), ({"warmup_epochs": 1.0}, "warmup_epochs")):
        with pytest.raises(ArgumentError, match=f"`{name}` changes the learning rate, and .* has none"):
            run(epochs=1, optimizer=Rateless, **options)


def test_factories_that_ignore_the_parameters_or_need_closures():
    other = net()
    with pytest.raises(ArgumentError, match="returned an optimizer of parameters that it was not given"):
        run(optimizer=lambda parameters: torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(ArgumentError, match=r"LBFGS, whose step\(\) needs a closure"):
        run(optimizer=torch.optim.LBFGS)


def test_how_a_batch_is_cut():
    assert ghost_sizes(8, 4) == [4, 4]
    assert ghost_sizes(10, 4) == [4, 4, 2]
    assert ghost_sizes(9, 4) == [4, 5]
    assert ghost_sizes(3, 4) == [3]


def in_ghosts(size):
    """Hoffer et al., Algorithm 1, with the formulas of batch normalisation written out."""

    def forward(model, inputs):
        first, norm, tanh, last = model
        pieces = []
        for z in first(inputs).split(ghost_sizes(len(inputs), size)):
            mean, variance = z.mean(0), z.var(0, unbiased=False)
            with torch.no_grad():
                norm.running_mean += norm.momentum * (mean - norm.running_mean)
                norm.running_var += norm.momentum * (z.var(0, unbiased=True) - norm.running_var)
            pieces.append(norm.weight * (z - mean) / torch.sqrt(variance + norm.eps) + norm.bias)
        return last(tanh(torch.cat(pieces)))

    return forward


@pytest.mark.parametrize("size", [6, 7])
def test_ghost_batches_are_those_of_hoffer(size):
    kept = {}
    run(
        normed,
        batch_sizes=(6, 20),
        epochs=2,
        ghost_batch_size=size,
        on_trained=lambda size, seed, model: kept.update({size: model}),
    )
    for batch in (6, 20):
        expected = by_hand(started(normed), batch, 2, on_batch=in_ghosts(size))
        for (name, ours), theirs in zip(kept[batch].state_dict().items(), expected.state_dict().values(), strict=True):
            if "tracked" not in name:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
        assert "forward" not in vars(kept[batch][1])
    assert kept[20][1].num_batches_tracked == 2 * (len(ghost_sizes(20, size)) + len(ghost_sizes(10, size)))


def test_ghosts_of_layers_that_see_several_rows_per_sample():
    norm = nn.BatchNorm1d(2)
    rows = torch.randn(12, 2)  # six samples of two rows each
    with ghost_batches(norm, 3, 6):
        ours = norm(rows)
    plain = nn.BatchNorm1d(2)
    torch.testing.assert_close(ours, torch.cat([plain(rows[:6]), plain(rows[6:])]))
    torch.testing.assert_close(norm.running_var, plain.running_var)
    with ghost_batches(norm, 3, 7), pytest.raises(ModelError, match="gets 12 rows for a batch of 7 samples"):
        norm(rows)


def test_ghosts_leave_no_trace_even_after_an_exception():
    model = normed()
    own = model[1].forward = nn.BatchNorm1d(4).forward
    with assert_untouched(model), pytest.raises(RuntimeError, match="stop"), ghost_batches(model, 2, 6):
        raise RuntimeError("stop")
    assert vars(model[1])["forward"] is own


def test_ghosts_want_batch_normalisation():
    with pytest.raises(ArgumentError, match="`ghost_batch_size` is 2, and the model has no BatchNorm layer"):
        run(ghost_batch_size=2)


@pytest.mark.parametrize("own", [False, True])
def test_a_last_batch_of_one_sample_is_left_out_where_batches_normalise(own):
    data = (X[:29], Y[:29])  # 29 = 7 * 4 + 1

    def train(model, loader):
        by = torch.optim.SGD(model.parameters(), lr=0.1)
        count = 0
        for inputs, targets in loader:
            by.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            by.step()
            count += len(targets)
        return {"samples": count}

    options = {"train": train} if own else {"epochs": 1}
    assert run(normed, data, batch_sizes=(4,), **options).rows[0].samples.mean == 28
    assert run(net, data, batch_sizes=(4,), **options).rows[0].samples.mean == 29


class Doubling(Dataset):
    """Augments with Python's, NumPy's and PyTorch's generators."""

    def __len__(self):
        return 30

    def __getitem__(self, i):
        import random

        import numpy as np

        return X[i] + 0.01 * torch.randn(5) + 0.01 * random.random() + 0.01 * np.random.rand(), Y[i]


def test_augmentation_is_seeded_and_the_global_state_is_left_alone():
    with assert_untouched(), pytest.warns(sharpness.DeterminismWarning):
        first = run(data=Doubling(), epochs=1)
    with pytest.warns(sharpness.DeterminismWarning):
        assert run(data=Doubling(), epochs=1).rows[0].train_loss.values == first.rows[0].train_loss.values


def test_the_plain_function_reports_each_epoch():
    model, seen = net(), []
    training = train_one(
        model,
        TensorDataset(X, Y),
        None,
        batch_size=10,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        stop_loss=None,
        max_epochs=3,
        max_updates=7,
        seed=0,
        report=lambda epoch, loss: seen.append((epoch, loss)),
    )
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert seen[-1][1] == training.loss
    assert (training.epochs, training.updates, training.samples, training.reached) == (3, 7, 70, True)
    assert not model.training


def test_divergence_by_updates_is_named_too():
    with pytest.raises(NonFiniteError, match="batch size 4 and seed 3 diverged in epoch 1"):
        run(batch_sizes=(4,), updates=3, lr=1e38, seed=3)


def test_initial_weights_are_copied_where_the_factory_makes_others(monkeypatch):
    generator = torch.Generator().manual_seed(5)  # not one of the global ones

    def unruly():
        model = net()
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(4, 5, generator=generator))
        model.register_buffer("extra", torch.randn(2, generator=generator), persistent=False)
        return model

    seen = []
    comparison = run(unruly, train=lambda model, loader: seen.append(copy.deepcopy(model)), seeds=2)
    assert comparison.settings["initial_weights"] == "copied"
    assert torch.equal(seen[0][0].weight, seen[1][0].weight)
    assert torch.equal(seen[0].extra, seen[1].extra)
    assert not torch.equal(seen[0][0].weight, seen[2][0].weight)
    assert run(epochs=1).settings["initial_weights"] == "as made"


def test_factories_that_cannot_be_used():
    widths = iter((4, 3))
    with pytest.raises(
        ArgumentError, match=r"another architecture than before: 'weight' is float32\[3, 5\], and was float32\[4, 5\]"
    ):
        run(lambda: nn.Linear(5, next(widths)), train=lambda model, loader: None)
    shared = nn.Linear(5, 4)
    with pytest.raises(ArgumentError, match="two models that share parameters"):
        run(lambda: nn.Sequential(shared, nn.Linear(4, 2)), epochs=1)
    with pytest.raises(ArgumentError, match="lazy layers"):
        run(lambda: nn.LazyLinear(2), epochs=1)
