"""The command line, and the demo that it runs."""

import json
import subprocess
import sys

import pytest
import torch

import sharpness
from sharpness import cli, demo
from sharpness.results import Comparison, ComparisonRow, Spread


@pytest.fixture
def quick(monkeypatch):
    """The demo on a fraction of its work: few epochs are enough to see that everything is connected."""
    original = demo.compare_batch_sizes

    def hasty(*args, **options):
        return original(*args, **{**options, "max_epochs": 3})

    monkeypatch.setattr(demo, "compare_batch_sizes", hasty)


def test_the_demo_prints_a_table_and_writes_its_files(quick, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    numbers, figure, page = tmp_path / "a.json", tmp_path / "a.png", tmp_path / "a.html"
    files = ["--json", str(numbers), "--plot", str(figure), "--html", str(page)]
    assert cli.main(["demo", "--seeds", "1", "--quiet", *files]) == 0
    printed = capsys.readouterr().out
    for word in ("batch 16", "batch 1000", "large / small", "epochs", "updates", "test accuracy", "certified to"):
        assert word in printed
    document = json.loads(numbers.read_text())
    assert [row["name"] for row in document["comparison"]["rows"]] == ["16", "1000"]
    assert len(document["interpolation"]["train_loss"]) == 25
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "epsilon_sharpness" in page.read_text()
    assert cli.main(["demo", "--html", str(tmp_path / "missing" / "a.html")]) == 1


def test_files_that_cannot_be_written_are_found_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "compare_batch_sizes", None)  # would fail if it were reached
    assert cli.main(["demo", "--json", str(tmp_path / "missing" / "a.json")]) == 1
    assert "cannot be written. Choose a file in a folder that exists" in capsys.readouterr().err


def test_pictures_of_an_unknown_kind_are_found_before_the_work(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "compare_batch_sizes", None)
    assert cli.main(["demo", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.xyz")]) == 1
    assert "is no kind of picture known here. Use one of" in capsys.readouterr().err


def test_bad_options_give_the_reason_and_exit_code_1(tmp_path, capsys):
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert cli.main(["demo", "--seeds", "0", *files]) == 1
    assert capsys.readouterr().err == "sharpness: `seeds` must be at least 1, got 0. Pass seeds=1 or more.\n"


def test_an_interruption_is_exit_code_130(monkeypatch, capsys):
    def interrupted(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "sharpness: interrupted\n"


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "sharpness", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == (
        f"sharpness {sharpness.__version__}\n"
    )


def table(small, large, accuracies):
    def row(name, values, accuracy):
        return ComparisonRow(
            name=name,
            train_loss=Spread.of([0.01] * len(values)),
            test_accuracy=Spread.of(accuracy),
            metrics={"top_eigenvalues": Spread.of(values)},
        )

    rows = (row("16", small, accuracies[0]), row("1000", large, accuracies[1]))
    ratios = tuple(
        Spread.of(b / a for a, b in zip(small, r.metrics["top_eigenvalues"].values, strict=True)) for r in rows
    )
    return Comparison(rows=rows, ratios={"top_eigenvalues": ratios}, warnings=(), seconds=0.0)


@pytest.mark.parametrize(
    ("small", "large", "accuracies", "expected"),
    [
        (
            [1, 2, 1],
            [4, 8, 5],
            ([0.97, 0.971, 0.97], [0.95, 0.951, 0.95]),
            ["With every seed", "The flatter minimum is the better"],
        ),
        (
            [1, 2, 1],
            [4, 8, 5],
            ([0.97, 0.95, 0.96], [0.96, 0.96, 0.96]),
            ["With every seed", "cannot tell from nothing"],
        ),
        (
            [4, 8, 5],
            [1, 2, 1],
            ([0.97, 0.971, 0.97], [0.95, 0.951, 0.95]),
            ["With no seed", "The sharper minimum is the better"],
        ),
        (
            [1, 2, 1],
            [4, 1, 5],
            ([0.97, 0.97, 0.97], [0.97, 0.97, 0.97]),
            ["depends on the seed", "cannot tell from nothing"],
        ),
        ([1], [4], ([0.97], [0.95]), ["With this one seed", "from a single seed", "prove no law"]),
    ],
)
def test_the_conclusion_says_what_was_found(small, large, accuracies, expected):
    text = demo.conclusion(table(small, large, accuracies))
    for words in expected:
        assert words in text


def test_the_digits_are_the_real_ones():
    train, test = sharpness.datasets.digits()
    images = torch.cat([train.tensors[0], test.tensors[0]])
    labels = torch.cat([train.tensors[1], test.tensors[1]])
    assert images.shape == (1797, 64)
    assert images.min() == 0
    assert images.max() == 1
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert labels[:10].tolist() == list(range(10))
    with pytest.raises(sharpness.ArgumentError, match=r"`num_train` must be between 1 and 1796 \(all images but one\)"):
        sharpness.datasets.digits(num_train=1797)
