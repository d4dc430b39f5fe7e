"""Records are frozen, print one line, survive JSON, and come back from a file bit for bit."""

import dataclasses
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch

import sharpness
from sharpness.errors import ArgumentError, DataError
from sharpness.results import Record, Spread
from tests.zoo import tanh_net

PROBLEM = tanh_net()
MODEL, LOADER = PROBLEM.model, PROBLEM.loader
DATA = tuple(torch.cat(parts) for parts in zip(*LOADER, strict=True))


def tracked():
    tracker = sharpness.SharpnessTracker(LOADER, metrics=["top_eigenvalues", "fisher_rao_norm"], test_loader=LOADER)
    tracker.measure(MODEL)
    tracker.step(MODEL, torch.optim.SGD(MODEL.parameters(), lr=0.1))
    return tracker.result


MAKERS = {
    "EigenResult": lambda: sharpness.top_eigenvalues(MODEL, LOADER, k=3, vectors=True),
    "EpsilonSharpnessResult": lambda: sharpness.epsilon_sharpness(MODEL, LOADER),
    "PerturbationResult": lambda: sharpness.worst_case_sharpness(MODEL, LOADER, group_size=4),
    "ScalarResult": lambda: sharpness.relative_flatness(MODEL, LOADER, method="hutchinson", num_samples=2),
    "NoiseResult": lambda: sharpness.gradient_noise_scale(MODEL, LOADER, on_failure="ignore"),
    "LearningRateResult": lambda: sharpness.learning_rate_limit(MODEL, LOADER),
    "PiggybackResult": lambda: sharpness.piggyback(
        lambda: tanh_net().model, DATA, DATA, batch_sizes=(4, 8), switch_epochs=(0, 1), epochs=1, seeds=1
    ),
    "Report": lambda: sharpness.report(MODEL, LOADER, metrics=["top_eigenvalues", "fisher_rao_norm"]),
    "Comparison": lambda: sharpness.compare({"a": MODEL, "b": tanh_net(1).model}, LOADER, test_loader=LOADER),
    "InterpolationResult": lambda: sharpness.interpolate(MODEL, tanh_net(1).model, LOADER, alphas=[0.0, 1.0]),
    "ComparisonRow": lambda: sharpness.compare({"a": MODEL}, LOADER).rows[0],
    "LandscapeResult": lambda: sharpness.landscape(MODEL, LOADER, dims=2, steps=3),
    "LayerwiseResult": lambda: sharpness.per_layer("top_eigenvalues", MODEL, LOADER),
    "SampleInterval": lambda: (
        sharpness.top_eigenvalues(MODEL, [*LOADER, *LOADER], max_batches=3, sample_interval=True).sample_interval
    ),
    "TrajectoryResult": lambda: tracked(),
    "TrajectoryComparison": lambda: sharpness.trajectory(
        lambda: torch.nn.Linear(3, 3), (torch.eye(3), torch.arange(3)), batch_sizes=(1, 3), max_epochs=1, lr=1e-3
    ),
    "TraceResult": lambda: sharpness.trace(MODEL, LOADER),
    "DiagonalResult": lambda: sharpness.diagonal(MODEL, LOADER, num_matvecs=12),
    "DensityResult": lambda: sharpness.spectral_density(MODEL, LOADER, num_draws=2, num_steps=5),
    "Spread": lambda: Spread.of([1.0, float("nan"), float("inf")]),
}


@pytest.fixture(scope="module")
def records():
    return {name: make() for name, make in MAKERS.items()}


def same(a, b):
    if isinstance(a, Record):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and np.array_equal(a.numpy(), b.numpy(), equal_nan=True)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def test_every_record_is_tested_here():
    assert set(MAKERS) == set(Record.kinds)


@pytest.mark.parametrize("name", MAKERS)
def test_frozen_keyword_only_and_not_comparable_by_accident(name, records):
    record = records[name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, dataclasses.fields(record)[0].name, None)
    with pytest.raises(TypeError):
        type(record)(1, 2, 3)
    assert record == record
    assert (record == pickle.loads(pickle.dumps(record))) is False  # noqa: S301


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "Report"])  # its repr is a table
def test_the_repr_is_one_line(name, records):
    text = repr(records[name])
    assert "\n" not in text
    assert len(text) < 400
    assert name in text or name == "Spread"
    assert "tensor(" not in text


@pytest.mark.parametrize("name", MAKERS)
def test_to_dict_is_strict_json(name, records):
    plain = records[name].to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert "eigenvectors" not in plain


def test_vectors_only_when_asked(records):
    plain = records["EigenResult"].to_dict(vectors=True)
    assert len(plain["eigenvectors"]) == 3
    assert "value" not in records["DiagonalResult"].to_dict()
    assert len(records["DiagonalResult"].to_dict(vectors=True)["value"]) == len(records["DiagonalResult"].value)


@pytest.mark.parametrize("name", MAKERS)
def test_files_round_trip_bit_for_bit(name, records, tmp_path):
    record, path = records[name], tmp_path / "record.npz"
    record.save(path)
    assert same(type(record).load(path), record)
    assert same(Record.load(path), record)
    assert [p.name for p in tmp_path.iterdir()] == ["record.npz"]


def test_files_that_are_something_else(records, tmp_path):
    path = tmp_path / "file"
    path.write_text("nothing")
    with pytest.raises(DataError, match=r"is not a record saved by this library"):
        Record.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("record.json", '{"record": "Unheard", "fields": {}}')
    with pytest.raises(DataError, match="is not a record"):
        Record.load(path)
    records["Spread"].save(path)
    with pytest.raises(ArgumentError, match=r"holds a Spread, not a EigenResult. Read it with Spread.load\(path\)"):
        sharpness.EigenResult.load(path)
    with pytest.raises(FileNotFoundError):
        Record.load(tmp_path / "missing")


def test_nothing_is_ever_unpickled(tmp_path):
    path, touched = tmp_path / "evil.npz", tmp_path / "touched"

    class Evil:
        def __reduce__(self):
            return (touched.touch, ())

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "record.json", '{"record": "Spread", "fields": {"mean": {"tensor": "0.npy"}, "std": 0, "values": []}}'
        )
        with archive.open("0.npy", "w") as entry:
            np.lib.format.write_array(entry, np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="is not a record"):
        Record.load(path)
    assert not touched.exists()


def test_an_interrupted_save_leaves_the_older_file(records, tmp_path, monkeypatch):
    path = tmp_path / "record.npz"
    records["Spread"].save(path)
    before = path.read_bytes()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(np.lib.format, "write_array", interrupted)
    with pytest.raises(KeyboardInterrupt):
        records["EigenResult"].save(path)
    assert path.read_bytes() == before


def test_reprs_say_value_and_doubt(records):
    eigen = records["EigenResult"]
    assert repr(eigen).startswith("EigenResult([")
    assert " ± " in repr(eigen)
    assert f"converged in {eigen.num_matvecs} matvecs" in repr(eigen)
    assert "a lower bound" in repr(records["EpsilonSharpnessResult"])
    assert "exact up to rounding; " in repr(records["TraceResult"])
    assert "outliers (" in repr(records["DensityResult"])
    assert repr(Spread.of([2.0])) == "2"
    assert repr(Spread.of([1.0, 3.0])) == "2.0 ± 1.4"
    assert repr(Spread.of([0.05] * 3)) == "0.05"  # the mean of three of them is another number
