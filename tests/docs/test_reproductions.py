"""The scripts that run published tables again, on a handful of random images in the files' layout."""

import gzip
import sys

import mnist
import numpy as np
import pytest
import reproduce_keskar
import reproduce_yao
import torch


@pytest.fixture
def folder(tmp_path):
    """Random MNIST: the training part zipped in MNIST/raw, the test part bare."""
    rng = np.random.default_rng(0)
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        images = bytes(16) + rng.integers(0, 256, count * 784, dtype=np.uint8).tobytes()
        labels = bytes(8) + rng.integers(0, 10, count, dtype=np.uint8).tobytes()
        for name, content in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            if part == "train":
                (tmp_path / "MNIST" / "raw" / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (tmp_path / "MNIST" / "raw" / name).write_bytes(content)
    return tmp_path


def run(script, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()
    return capsys.readouterr().out


def test_idx_files_are_read_zipped_or_not_from_any_level(folder):
    images, labels = mnist.read(folder, "train")
    assert images.shape == (40, 784)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < 0.02
    assert 0.98 < images.max() <= 1
    assert labels.shape == (40,)
    assert labels.dtype == torch.int64
    same, _ = mnist.read(folder / "MNIST" / "raw", "train")
    assert torch.equal(same, images)
    assert len(mnist.read(folder / "MNIST", "t10k")[1]) == 20
    with pytest.raises(SystemExit, match="train-images-idx3-ubyte"):
        mnist.read(folder / "MNIST" / "raw" / "nowhere", "train")


def test_keskar(folder, monkeypatch, capsys):
    class Narrow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(784, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 40))

        def forward(self, x):
            return self.layers(x)

    monkeypatch.setattr(reproduce_keskar, "f1", Narrow)
    options = ["--data", folder, "--seeds", 1, "--samples", 30, "--max-epochs", 2, "--stop-losses", 9, 8, 1e-9]
    options += ["--json", folder / "runs.json"]
    said = run(reproduce_keskar, monkeypatch, capsys, *options)
    for words in (
        "matched at 9, 1 and 1 seeds",
        "matched at 8, 1 and 1 seeds",
        "converged, 1 and 1 seeds",
        "205.14 ± 69.52",
        "99.66 ± 0.05",
        "9.17 ± 0.14",
    ):
        assert words in said
    assert "matched at 1e-09" not in said  # never reached
    assert said.count("| running ") == 3 * 4
    again = run(reproduce_keskar, monkeypatch, capsys, *options)
    assert "epoch 1" in said
    assert "epoch 1" not in again  # nothing is trained twice
    assert said.endswith(again)


def test_yao(folder, monkeypatch, capsys):
    options = ["--data", folder, "--images", 20, "--test-images", 10, "--batch-sizes", 8, 64, "--max-epochs", 1]
    options += ["--json", folder / "runs.json"]
    said = run(reproduce_yao, monkeypatch, capsys, *options)
    assert "(not reached)" in said
    assert "100 (99.21)" in said
    assert "0.49 (2.96)" in said
    again = run(reproduce_yao, monkeypatch, capsys, *options)
    assert again.startswith("|")  # nothing is trained twice
    assert said.endswith(again)
