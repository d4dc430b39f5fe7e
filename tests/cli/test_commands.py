"""``sharpness compare``, ``report`` and ``sweep``, run in this process on modules written for the purpose."""

import csv
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sharpness
from sharpness import cli
from sharpness.cli.options import parse_metrics
from sharpness.errors import ConvergenceWarning

DOCS = Path(__file__).parents[2] / "docs"
TRAIN = """
import torch
from torch import nn
import neighbour

def make_model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

def sized(width, depth=1):
    return nn.Linear(width, 2)

class Loss(nn.CrossEntropyLoss):
    pass

INPUTS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
TARGETS = (INPUTS[:, 0] > 0).long()
BATCHES = [(INPUTS[:5], TARGETS[:5]), (INPUTS[5:], TARGETS[5:])]
MODEL = make_model()

def make_loader():
    return BATCHES

def train_set():
    return INPUTS, TARGETS

def slow(parameters):
    return torch.optim.SGD(parameters, lr=neighbour.RATE)

def once():
    return iter(BATCHES)

def broken():
    deeper()

def deeper():
    raise LookupError("no such\\n  data")

def not_a_model():
    return 3

class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        raise LookupError("in forward")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder: a module, another one that it needs, and two checkpoints."""
    (tmp_path / "training.py").write_text(TRAIN)
    (tmp_path / "neighbour.py").write_text("RATE = 0.1\n")
    monkeypatch.chdir(tmp_path)
    modules, path = set(sys.modules), list(sys.path)
    for seed, name in enumerate(["small", "large"]):
        torch.manual_seed(seed)
        save_file(net().state_dict(), tmp_path / f"{name}.safetensors")
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - modules:
        if name.startswith(("training", "neighbour", "fails", "ends", "wants")):
            del sys.modules[name]


def net():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


BOTH = ("training.py:make_model", "training.py:make_loader")
TWO = ("--checkpoint", "small.safetensors", "--checkpoint", "large.safetensors")
FAST = ("--metrics", "top_eigenvalues", "--quiet")


def test_metrics_may_be_given_in_one_list_or_in_several():
    assert parse_metrics(None) == parse_metrics(["default"]) == "default"
    both = ["trace", ("diagonal", {"num_matvecs": 8})]
    assert (
        parse_metrics(["trace,diagonal(num_matvecs=8)"]) == parse_metrics(["trace", "diagonal(num_matvecs=8)"]) == both
    )


def test_compare_measures_the_checkpoints_as_the_function_does(folder, capsys):
    files = ("--json", "a.json", "--csv", "a.csv", "--html", "a.html", "--plot", "a.png")
    assert run("compare", *BOTH, *TWO, "--test-loader", "training:make_loader", *FAST, *files) == 0
    printed = capsys.readouterr()
    assert "top_eigenvalues" in printed.out
    assert printed.err == ""
    document = json.loads((folder / "a.json").read_text())
    assert [row["name"] for row in document["rows"]] == ["small", "large"]
    spec = importlib.util.spec_from_file_location("training_again", folder / "training.py")
    sys.path.insert(0, str(folder))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(folder))
    for seed, row in enumerate(document["rows"]):
        torch.manual_seed(seed)
        expected = sharpness.top_eigenvalues(net(), module.BATCHES).eigenvalues[0].item()
        assert row["metrics"]["top_eigenvalues"]["mean"] == pytest.approx(expected, rel=1e-5)
        assert row["test_loss"] == row["train_loss"]
    lines = list(csv.DictReader(io.StringIO((folder / "a.csv").read_text())))
    assert {line["row"] for line in lines} == {"small", "large"}
    assert (folder / "a.html").read_text().startswith("<!DOCTYPE html>")
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in folder.glob(".*")) == []


def test_checkpoints_of_one_name_are_seeds_of_one_row(folder, capsys):
    names = ("--name", "x", "--name", "x", "--json", "-")
    assert run("compare", *BOTH, *TWO, *FAST, *names) == 0
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out)["rows"]
    assert row["name"] == "x"
    assert len(row["metrics"]["top_eigenvalues"]["values"]) == 2
    assert "top_eigenvalues" in printed.err  # the table went out of the way


def test_names_are_the_shortest_that_differ(folder, capsys):
    for name in ("a", "b"):
        (folder / name).mkdir()
        save_file(net().state_dict(), folder / name / "last.safetensors")
    files = ("--checkpoint", "a/last.safetensors", "--checkpoint", "b/last.safetensors")
    assert run("compare", *BOTH, *files, *FAST, "--csv", "-") == 0
    assert {line["row"] for line in csv.DictReader(io.StringIO(capsys.readouterr().out))} == {"a/last", "b/last"}


def test_report_takes_options_of_metrics_a_loss_and_a_subset(folder, capsys):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    metrics = "top_eigenvalues(k=2),epsilon_sharpness(epsilon=5e-4, num_starts=1)"
    options = (
        "--checkpoint",
        "small.safetensors",
        "--loss",
        "training.py:Loss",
        "--max-batches",
        "1",
        "--mode",
        "train",
    )
    files = ("--json", "a.json", "--csv", "a.csv", "--html", "a.html", "--plot", "a.svg")
    assert run("report", *BOTH, *options, "--metrics", metrics, "--quiet", *files, "--device", "cpu") == 0
    found = json.loads((folder / "a.json").read_text())
    assert found["settings"]["loss"] == "Loss (mean)"
    assert (found["settings"]["max_batches"], found["settings"]["mode"]) == (1, "train")
    assert len(found["records"]["top_eigenvalues"]["eigenvalues"]) == 2
    assert found["records"]["epsilon_sharpness"]["settings"]["epsilon"] == 5e-4
    assert "<svg" in (folder / "a.svg").read_text()
    assert "top_eigenvalues" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_checkpoint_the_model_is_as_it_is_made_and_a_loader_may_be_an_object(folder, capsys):
    outputs = []
    for model in ("training:MODEL", "training:make_model", "training:make_model"):
        assert run("report", model, "training:BATCHES", *FAST, "--csv", "-", "--seed", "5") == 0
        outputs.append(float(next(csv.DictReader(io.StringIO(capsys.readouterr().out)))["value"]))
    assert outputs[1] == outputs[2]  # initial weights are random, but the same
    module = sys.modules["training"]
    assert outputs[0] == sharpness.top_eigenvalues(module.MODEL, module.BATCHES, seed=5).eigenvalues[0].item()


def test_sweep_trains_what_it_is_given(folder, capsys):
    data = ("training.py:make_model", "training.py:train_set", "training.py:train_set")
    options = ("--batch-sizes", "3,12", "--seeds", "2", "--optimizer", "training.py:slow", "--stop-loss", "0.5")
    assert run("sweep", *data, *options, *FAST, "--max-epochs", "2", "--json", "a.json", "--html", "a.html") == 0
    document = json.loads((folder / "a.json").read_text())
    assert [row["name"] for row in document["rows"]] == ["3", "12"]
    assert document["rows"][0]["epochs"]["values"] == [2, 2]
    assert "did not reach the loss 0.5" in capsys.readouterr().out


def test_sweep_without_data_uses_the_digits(folder, monkeypatch):
    calls = []

    def record(new, train_set, test_set, loss, **options):
        calls.append((new(), len(train_set), len(test_set), options))
        raise sharpness.DataError("enough. Stop here.")

    monkeypatch.setattr(sys.modules["sharpness.cli.sweep"], "compare_batch_sizes", record)
    assert run("sweep", "--lr", "0.5", "--lr-scaling", "sqrt", "--momentum", "0", "--seed", "3", "--quiet") == 1
    ((model, train, test, options),) = calls
    assert (train, test) == (1000, 797)
    assert sum(p.numel() for p in model.parameters()) == 8970
    assert options == {
        "metrics": "default", "seed": 3, "memory": "auto", "progress": False,
        "lr": 0.5, "lr_scaling": "sqrt", "momentum": 0.0,
    }  # fmt: skip


MISTAKES = {
    "no object": (
        ("training", BOTH[1]),
        "MAKE_MODEL: 'training' does not say which object of which module. Write MODULE:",
    ),
    "no file": (("train.py:make_model", BOTH[1]), "there is no file 'train.py'.*Did you mean 'training.py'"),
    "no module": (
        ("trainin:make_model", BOTH[1]),
        "no module 'trainin' is found from the folder.*Did you mean 'training'",
    ),
    "no attribute": (("training:make_modle", BOTH[1]), "'training' has no 'make_modle'.*Did you mean 'make_model'"),
    "needs arguments": (
        ("training:sized", BOTH[1]),
        "needs the arguments width; it is called without any. Name a function",
    ),
    "not a model": (
        ("training:not_a_model", BOTH[1]),
        "returned int; a torch.nn.Module is needed. Return the model alone",
    ),
    "not callable": (("training:INPUTS", BOTH[1]), "'training:INPUTS' is Tensor, not a function"),
    "fails": (
        (BOTH[0], "training:broken"),
        r"'training:broken' failed with LookupError: no such data \(.*training.py, line .*, in deeper\)",
    ),
    "cannot be imported": (("fails.py:x", BOTH[1]), r"'fails.py' cannot be imported with ZeroDivisionError.*line 2"),
    "wants more": (
        ("wants:x", BOTH[1]),
        "'wants' cannot be imported with ModuleNotFoundError: No module named 'unheard_of'",
    ),
    "no Python": (("ends.py:x", BOTH[1]), "'ends.py' ends the program when it is imported. Put what it does"),
    "syntax": (("fails_to_parse.py:x", BOTH[1]), "cannot be imported with SyntaxError.*fails_to_parse.py, line 1"),
    "one-shot": ((BOTH[0], "training:once"), "one-shot iterator"),
    "metric": ((*BOTH, "--metrics", "top_eigenvalue"), "Did you mean 'top_eigenvalues'"),
    "metrics": ((*BOTH, "--metrics", "a b"), "--metrics: 'a b' cannot be understood. Write names"),
    "positional": ((*BOTH, "--metrics", "trace(3)"), r"--metrics: 'trace\(3\)' cannot be understood"),
    "nothing": ((*BOTH, "--metrics", ""), "--metrics: '' cannot be understood"),
    "device": ((*BOTH, "--device", "unheard"), "--device: 'unheard' is not there .*Use cpu"),
    "loss": ((*BOTH, "--loss", "torch.nn:CrossEntropy"), "'torch.nn' has no 'CrossEntropy'.*CrossEntropyLoss"),
    "same file": (
        (*BOTH, "--json", "a", "--csv", "a"),
        "--json and --csv would both be written to 'a'. Name two files",
    ),
    "standard output": ((*BOTH, "--json", "-", "--html", "-"), "--json and --html would both be written to '-'"),
    "no folder": ((*BOTH, "--html", "missing/a.html"), "`--html`: 'missing/a.html' cannot be written. Choose a file"),
    "no picture": ((*BOTH, "--plot", "a.xyz"), "'a.xyz' is no kind of picture known here"),
    "in forward": (
        ("training:Fails", BOTH[1]),
        r"^sharpness: LookupError: in forward \(.*training.py, line .*, in forward\)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_1(name, folder, capsys):
    (folder / "fails.py").write_text("import math\nx = 1 / 0\n")
    (folder / "fails_to_parse.py").write_text("def\n")
    (folder / "wants.py").write_text("import unheard_of\n")
    (folder / "ends.py").write_text("raise SystemExit\n")
    arguments, reason = MISTAKES[name]
    assert run("report", *arguments, "--quiet") == 1
    error = capsys.readouterr().err
    assert error.startswith("sharpness: ")
    assert error.count("\n") == 1
    assert re.search(reason, error), error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--checkpoint", "small.safetensors"), "compare needs two checkpoints or more, got 1"),
        ((*TWO, "--name", "a"), "there are 2 checkpoints and 1 names. Pass --name once for each"),
        (("--checkpoint", "small.safetensors") * 2, "a checkpoint comes twice.*Name them, with --name for each"),
        ((*TWO, "--html", "missing/a"), "`--html`: 'missing/a' cannot be written"),
    ],
)
def test_mistakes_of_compare(arguments, reason, folder, capsys):
    assert run("compare", *BOTH, *arguments, *FAST) == 1
    assert re.search(reason, capsys.readouterr().err)


def test_sweep_needs_all_or_nothing(folder, capsys):
    assert run("sweep", "training:make_model") == 1
    assert "sweep needs MAKE_MODEL, TRAIN_SET and TEST_SET, or none of them" in capsys.readouterr().err
    assert run("sweep", "training:MODEL", "training:train_set", "training:train_set") == 1
    assert "is a model; each training needs initial weights of its own. Name the function" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["sweep", "--batch-sizes", "16,x"], "'16,x' is no list of whole numbers such as 16,64,256"),
        (["compare", "a:b", "c:d"], "required: --checkpoint"),
        (["report"], "required: MODULE:MAKE_MODEL, MODULE:MAKE_LOADER"),
        (["unheard"], "invalid choice"),
        ([], "required: COMMAND"),
    ],
)
def test_a_command_line_that_cannot_be_understood_is_exit_code_2(arguments, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compare", "report", "sweep", "demo"])
def test_every_help_ends_in_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(command, "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    example = text[text.index("example:\n") + 9 :].replace("\\\n", " ").split()
    assert example[:2] == ["sharpness", command]
    options = sys.modules["sharpness.cli.command"]._parser().parse_args(example[1:])
    assert callable(options.run)


@pytest.mark.skipif(not DOCS.exists(), reason="installed without its documentation")
def test_the_commands_in_the_documentation_parse():
    pages = sorted(DOCS.glob("*.md"))
    blocks = [block for page in pages for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S)]
    commands = re.findall(r"^sharpness (.*)$", "".join(blocks).replace("\\\n", " "), re.M)
    parsed = [sys.modules["sharpness.cli.command"]._parser().parse_args(shlex.split(text)) for text in commands]
    assert len({options.run for options in parsed}) == 4  # every command is shown


def test_strict_makes_warnings_exit_code_3(folder, capsys, monkeypatch):
    assert run("report", *BOTH, "--metrics", "top_eigenvalues(k=3, num_matvecs=4)", "--quiet") == 0
    assert capsys.readouterr().err.startswith("warning: ")
    assert run("report", *BOTH, "--metrics", "top_eigenvalues(k=3, num_matvecs=4)", "--quiet", "--strict") == 3
    assert run("report", *BOTH, *FAST, "--strict") == 0
    torch.manual_seed(0)
    state = net().state_dict()
    save_file({key: 30 * value for key, value in state.items()}, folder / "large.safetensors")
    capsys.readouterr()
    assert run("compare", *BOTH, *TWO, *FAST) == 0
    assert "warning: the training losses are not matched" in capsys.readouterr().out
    assert run("compare", *BOTH, *TWO, *FAST, "--strict") == 3
    with pytest.warns(ConvergenceWarning):  # the command leaves the filters as they were
        warnings.warn("once", ConvergenceWarning, stacklevel=1)


def test_debug_shows_the_whole_traceback(folder):
    with pytest.raises(sharpness.ArgumentError, match="failed with LookupError") as raised:
        run("report", BOTH[0], "training:broken", "--debug")
    assert isinstance(raised.value.__cause__, LookupError)


def test_an_interruption_is_exit_code_130(folder, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["sharpness.cli.measure"], "report", interrupted)
    assert run("report", *BOTH) == 130
    assert capsys.readouterr().err == "sharpness: interrupted\n"


def test_files_are_checked_before_the_users_code_runs(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["sharpness.cli.measure"], "make_model", None)
    monkeypatch.setattr(sys.modules["sharpness.cli.sweep"], "compare_batch_sizes", None)
    for command in (("compare", *BOTH, *TWO), ("report", *BOTH), ("sweep",)):
        assert run(*command, "--csv", "missing/a.csv") == 1
        assert "cannot be written" in capsys.readouterr().err


def test_a_plot_needs_matplotlib(folder, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert run("report", *BOTH, "--plot", "a.png") == 1
    assert '--plot needs matplotlib. Install it with: pip install "sharpness[plot]"' in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error(folder):
    command = [sys.executable, "-m", "sharpness", "report", *BOTH, *FAST, "--csv", "-"]
    root = os.path.dirname(os.path.dirname(sharpness.__file__))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    ) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 141
    assert "Traceback" not in error
    assert "BrokenPipe" not in error
