"""Finished trainings are kept, never repeated, never mixed up, and never unpickled."""

import functools
import io
import json
import os
import pickle

import pytest
import torch
from torch import nn

import sharpness
from sharpness.comparison.checkpoints import _digest, _sealed
from sharpness.errors import ArgumentError, DataError, NonFiniteError
from tests.checks import assert_untouched

torch.manual_seed(0)
X = torch.randn(30, 5)
Y = (X[:, 0] + X[:, 1] > 0).long()
DATA = (X, Y)


def net():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 2))


def run(folder, make_model=net, data=DATA, **options):
    settings = {"batch_sizes": (10, 30), "seeds": 2, "metrics": ["fisher_rao_norm"]}
    if "train" not in options and not {"updates", "stop_loss"} & set(options):
        settings["epochs"] = 2
    return sharpness.compare_batch_sizes(make_model, data, DATA, **{**settings, **options}, checkpoint_dir=folder)


def numbers(comparison):
    return [
        (row.train_loss.values, row.test_loss.values, row.metrics["fisher_rao_norm"].values, row.samples.values)
        for row in comparison.rows
    ]


class Interrupting:
    """An optimizer factory that is interrupted in the midst of a run."""

    def __init__(self, at=None, error=KeyboardInterrupt):
        self.runs, self.at, self.error = 0, at, error

    def __call__(self, parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        self.runs += 1
        if self.runs == self.at:
            step, steps = optimizer.step, []

            def interrupted(*args, **kwargs):
                steps.append(1)
                if len(steps) == 2:
                    raise self.error
                return step(*args, **kwargs)

            optimizer.step = interrupted
        return optimizer


def test_after_an_interruption_the_answer_is_that_of_a_call_that_was_not(tmp_path):
    whole = run(None, optimizer=Interrupting())
    with assert_untouched(), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "runs", optimizer=Interrupting(at=4))  # the first is for the fingerprint; so in run 3
    finished = sorted(path.name for path in (tmp_path / "runs").glob("*batch*.json"))
    assert finished == ["seed-0_batch-10.json", "seed-0_batch-30.json"]
    left = Interrupting()
    resumed = run(tmp_path / "runs", optimizer=left)
    assert numbers(resumed) == numbers(whole)
    assert left.runs == 1 + 2
    again = Interrupting()
    third = run(tmp_path / "runs", optimizer=again)
    assert numbers(third) == numbers(whole)
    assert again.runs == 1
    assert [row.seconds.values for row in third.rows] == [row.seconds.values for row in resumed.rows]


def test_an_exception_in_the_users_training(tmp_path):
    trained = []

    def train(model, loader):
        trained.append(loader.batch_size)
        if fails and len(trained) == 3:
            raise RuntimeError("out of luck")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        return {"samples": 30}

    fails = False
    whole = run(None, train=train)
    trained.clear()
    fails = True
    with pytest.raises(RuntimeError, match="out of luck"):
        run(tmp_path, train=train)
    fails = False
    trained.clear()
    seen = []
    resumed = run(tmp_path, train=train, on_trained=lambda size, seed, model: seen.append((size, seed)))
    assert trained == [10, 30]
    assert seen == [(10, 0), (30, 0), (10, 1), (30, 1)]
    assert numbers(resumed) == numbers(whole)


def test_a_run_that_diverges_leaves_the_finished_ones(tmp_path):
    def train(model, loader):
        nn.init.constant_(model[0].weight, float("nan") if loader.batch_size == 30 else 1.0)

    with pytest.raises(NonFiniteError, match="batch size 30 and seed 0"):
        run(tmp_path, train=train)
    assert [path.name for path in tmp_path.glob("*batch*.json")] == ["seed-0_batch-10.json"]


def test_more_seeds_and_batch_sizes_train_only_what_is_new(tmp_path):
    run(tmp_path)
    trained = []
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    comparison = run(tmp_path, batch_sizes=(5, 10), seeds=3)
    trained = {path.name for path in tmp_path.iterdir()} - set(before)
    assert {name for name in trained if name.endswith(".pt")} == {
        "seed-0_batch-5.pt",
        "seed-1_batch-5.pt",
        "seed-2_batch-5.pt",
        "seed-2_batch-10.pt",
        "seed-2_initial.pt",
    }
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    assert numbers(comparison) == numbers(run(None, batch_sizes=(5, 10), seeds=3))


def wider():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))


def relu():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 2))


def scaled():
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(2)
    return model


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": 0.2}, "lr: 0.05 there, 0.2 now"),
        ({"momentum": 0.5}, "momentum: 0.9 there, 0.5 now"),
        ({"optimizer": "adam"}, "optimizer: 'sgd' there, 'adam' now; lr"),
        (
            {"optimizer": functools.partial(torch.optim.SGD, lr=0.05)},
            "optimizer: 'sgd' there, 'torch.optim.sgd.SGD' now",
        ),
        ({"updates": 2}, "epochs: 2 there, None now; updates: None there, 2 now"),
        ({"stop_loss": 0.3}, "stop_loss: None there, 0.3 now"),
        ({"lr_scaling": "linear"}, "lr_batch_size"),
        ({"warmup_epochs": 1}, "warmup_epochs: 0.0 there, 1.0 now"),
        ({"ghost_batch_size": 5}, "ghost_batch_size: None there, 5 now"),
        ({"data": (X[:-1], Y[:-1]), "batch_sizes": (10,)}, "samples: 30 there, 29 now; data:"),
        ({"data": (X + 1, Y)}, "data:"),
        ({"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss: 'inferred' there"),
        ({"make_model": wider}, "model:"),
        ({"make_model": relu}, "model:"),
        ({"make_model": scaled}, "start from other weights than `make_model` makes now for seed 0"),
        ({"train": lambda model, loader: None}, "train: None there"),
    ],
)
def test_other_settings_are_refused_before_training(options, match, tmp_path, monkeypatch):
    run(tmp_path, seeds=1, batch_sizes=(10,))
    monkeypatch.setattr("sharpness.comparison.grid.run_grid", None)
    monkeypatch.setattr("sharpness.comparison.batch_sizes.run_grid", None)
    with pytest.raises(ArgumentError, match=match) as caught:
        run(tmp_path, **options)
    assert str(tmp_path) in str(caught.value)


def test_the_scaled_learning_rate_is_bound_to_its_batch_size(tmp_path):
    run(tmp_path, lr_scaling="linear", seeds=1)
    with pytest.raises(ArgumentError, match="lr_batch_size: 10 there, 30 now"):
        run(tmp_path, lr_scaling="linear", seeds=1, batch_sizes=(30, 10))


def test_the_options_inside_of_a_factory_count(tmp_path):
    run(tmp_path, seeds=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    run(tmp_path, seeds=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(ArgumentError, match="optimizer_groups: .*'0.1'.* there"):
        run(tmp_path, seeds=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.2))


def test_the_text_of_the_users_training_counts(tmp_path):
    def make(power):
        return functools.partial(lambda model, loader, power, other: None, power=power, other=object())

    run(tmp_path, train=make(1))
    run(tmp_path, train=make(1), stop_loss=None)
    with pytest.raises(ArgumentError, match="train_source"):
        run(tmp_path, train=make(2))


def test_a_factory_of_entropy_goes_on_from_the_weights_that_were_made_first(tmp_path):
    def unruly():
        model = nn.Linear(5, 2)
        with torch.no_grad():
            model.weight.copy_(torch.frombuffer(bytearray(os.urandom(10)), dtype=torch.uint8).reshape(2, 5) / 255)
        return model

    starts = []
    first = run(tmp_path, unruly, seeds=1, batch_sizes=(10, 30))
    run(tmp_path, unruly, seeds=1, batch_sizes=(10, 30, 15))
    assert numbers(run(tmp_path, unruly, seeds=1)) == numbers(first)
    starts = torch.load(tmp_path / "seed-0_initial.pt", weights_only=True)
    initial = {
        name: json.loads((tmp_path / f"seed-0_batch-{name}.json").read_text())["initial"] for name in (10, 30, 15)
    }
    assert len(set(initial.values())) == 1
    assert starts["weight"].shape == (2, 5)


def test_frozen_parameters_stay_frozen(tmp_path):
    def train(model, loader):
        model[0].requires_grad_(False)

    options = {"seeds": 1, "train": train, "metrics": ["top_eigenvalues"]}
    sizes = [run(tmp_path, **options).rows[0].records["top_eigenvalues"][0].settings["n"] for _ in range(2)]
    assert sizes[0] == sizes[1] == 4 + 4 + 8 + 2


def test_a_training_that_rebuilds_the_model_cannot_be_kept(tmp_path):
    def train(model, loader):
        model[0] = nn.Linear(5, 4, bias=False)

    run(None, train=train)
    with pytest.raises(ArgumentError, match="`train` changed the names, shapes or types"):
        run(tmp_path, train=train)


def test_a_run_that_missed_the_stop_stays_marked(tmp_path):
    first, again = (run(tmp_path, stop_loss=1e-9, max_epochs=1) for _ in range(2))
    assert "batch size 10 did not reach the loss 1e-09 in 1 epochs for 2 of 2 seeds." in first.warnings
    assert again.warnings == first.warnings


def test_folders_that_cannot_be_used(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    for folder, match in (
        (3, "`checkpoint_dir` must be the path of a folder, got 3"),
        (file, "must be a folder that can be written"),
        (file / "below", "must be a folder that can be written"),
        (tmp_path, "is not empty, and holds no settings.json"),
    ):
        with pytest.raises(ArgumentError, match=match):
            run(folder, lambda: nn.Linear(5, 2))
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda *a: (_ for _ in ()).throw(PermissionError("read only")))
    with pytest.raises(ArgumentError, match="must be a folder that can be written: read only"):
        run(tmp_path / "new", lambda: pytest.fail("made a model"))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


def test_files_that_are_damaged_or_unsafe(tmp_path):
    folder, touched = tmp_path / "runs", tmp_path / "touched"
    run(folder, seeds=1)
    weights, about, start = (folder / f"seed-0_{name}" for name in ("batch-30.pt", "batch-30.json", "initial.pt"))
    kept = {path: path.read_bytes() for path in (weights, about, start, folder / "settings.json")}

    def forged(data):
        return json.dumps(_sealed({**json.loads(kept[about]), "weights": _digest(data)})).encode()

    evil = pickle.dumps(Evil(touched))
    buffer = io.BytesIO()
    torch.save(Evil(touched), buffer)
    listed = io.BytesIO()
    torch.save([1, 2], listed)
    edited = json.dumps({**json.loads(kept[about]), "took": {}}).encode()
    again = r"Delete 'seed-0_batch-30.json' to train this run again"
    for changes, match in (
        ({weights: kept[weights][:-100]}, f"content is not what was written. {again}"),
        ({weights: None}, f"seed-0_batch-30.pt' cannot be used: .*No such file.*{again}"),
        ({weights: evil, about: forged(evil)}, f"nothing else is unpickled: .*{again}"),
        ({weights: buffer.getvalue(), about: forged(buffer.getvalue())}, f"nothing else is unpickled: .*{again}"),
        ({weights: listed.getvalue(), about: forged(listed.getvalue())}, "it is no file of weights"),
        ({about: kept[about][:20]}, f"seed-0_batch-30.json' cannot be used: .*{again}"),
        ({about: b"[]"}, "it holds no JSON object"),
        ({about: edited}, "seed-0_batch-30.json' cannot be used: its content is not what was written"),
        ({about: json.dumps(_sealed({**json.loads(kept[about]), "initial": "x"})).encode()}, "other initial weights"),
        ({start: b"junk"}, r"seed-0_initial.pt' cannot be used: .* Choose an empty folder"),
        ({folder / "settings.json": b"{"}, r"settings.json' cannot be used: .* Choose an empty folder"),
    ):
        for path, content in changes.items():
            path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(DataError, match=match) as caught:
            run(folder, seeds=1, on_trained=lambda *a: pytest.fail("went on"))
        assert "weights_only" not in str(caught.value)  # PyTorch tells how to run the code all the same
        for path, content in kept.items():
            path.write_bytes(content)
    assert not touched.exists()
    run(folder, seeds=1)
    about.unlink()  # as advised
    assert len(run(folder, seeds=1).rows) == 2


def test_what_a_killed_process_leaves_is_written_anew(tmp_path):
    run(tmp_path, seeds=1)
    (tmp_path / "seed-0_batch-30.json").unlink()
    (tmp_path / "seed-0_batch-30.pt").write_bytes(b"half")
    (tmp_path / "seed-0_batch-30.pt.part").write_bytes(b"half")
    assert numbers(run(tmp_path, seeds=1)) == numbers(run(None, seeds=1))
    assert not list(tmp_path.glob("*.part"))


def test_data_that_change_each_time_are_bound_by_their_number_alone(tmp_path):
    class Drifting(torch.utils.data.Dataset):
        reads = 0

        def __len__(self):
            return 30

        def __getitem__(self, i):
            self.reads += 1
            return X[i] + self.reads, Y[i]

    run(tmp_path, data=Drifting(), seeds=1)
    assert json.loads((tmp_path / "settings.json").read_text())["data"] is None


def test_the_bar_counts_only_what_is_trained_now(tmp_path, monkeypatch):
    bars = []
    from sharpness.comparison import grid

    original = grid.progress_bar
    monkeypatch.setattr(grid, "progress_bar", lambda *a, **k: bars.append(original(*a, **k)) or bars[-1])
    run(tmp_path, seeds=1, progress=True)
    run(tmp_path, seeds=2, progress=True)
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(0, 2, 2), (2, 4, 4)]
    assert "batch 30, seed 1, epoch 2, loss" in bars[-1].postfix
    run(None, seeds=1, progress=False)
    assert bars[-1].disable
