"""Everything public is listed, sorted, there, and described in the documentation."""

import importlib
import inspect
from pathlib import Path

import pytest

import sharpness
from sharpness.metrics.registry import METRICS

MODULES = ["sharpness", "sharpness.linalg", "sharpness.datasets", "sharpness.plotting", "sharpness.results"]
REFERENCE = Path(__file__).parents[2] / "docs" / "reference.md"
COMMON = {
    "batch_loss": None,
    "params": None,
    "mode": "eval",
    "max_batches": None,
    "seed": 0,
    "progress": None,
    "memory": "auto",
    "microbatch_size": None,
    "precision": "exact",
}


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_and_true(name):
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__)
    for public in module.__all__:
        assert getattr(module, public).__doc__ or public == "__version__"


@pytest.mark.skipif(not REFERENCE.exists(), reason="installed without its documentation")
@pytest.mark.parametrize("module", ["sharpness", "sharpness.linalg", "sharpness.results"])
def test_every_public_name_is_in_the_reference(module):
    text = REFERENCE.read_text()
    names = set(importlib.import_module(module).__all__) - {"__version__"}
    assert {name for name in names if name not in text} == set()


def test_landscapes_take_the_common_options_too():
    parameters = inspect.signature(sharpness.landscape).parameters
    assert list(parameters)[:3] == ["model", "loader", "loss_fn"]
    assert {name: parameters[name].default for name in COMMON} == COMMON


def test_trackers_take_the_common_options_too():
    parameters = inspect.signature(sharpness.SharpnessTracker).parameters
    assert list(parameters)[:2] == ["loader", "loss_fn"]
    assert {name: parameters[name].default for name in COMMON} == COMMON
    assert parameters["on_failure"].default == "warn"


@pytest.mark.parametrize("function", [*METRICS.values(), sharpness.report])
def test_metrics_take_model_loader_loss_and_the_common_options(function):
    parameters = inspect.signature(function).parameters
    assert list(parameters)[:3] == ["model", "loader", "loss_fn"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])
    assert {name: parameters[name].default for name in COMMON} == COMMON
    assert parameters["on_failure"].default == "warn"


def test_the_same_options_make_an_objective():
    parameters = inspect.signature(sharpness.Objective).parameters
    assert {name: parameters[name].default for name in COMMON} == COMMON


def test_errors_are_also_what_python_would_raise():
    from sharpness import errors

    for error, builtin in (
        (errors.ArgumentError, ValueError),
        (errors.ModelError, ValueError),
        (errors.DataError, ValueError),
        (errors.NonFiniteError, ArithmeticError),
        (errors.ConvergenceError, RuntimeError),
    ):
        assert issubclass(error, errors.SharpnessError)
        assert issubclass(error, builtin)
    for warning in (
        errors.ConvergenceWarning,
        errors.DeterminismWarning,
        errors.StateWarning,
        errors.PrecisionWarning,
        errors.MemoryWarning,
        errors.CompileWarning,
    ):
        assert issubclass(warning, errors.SharpnessWarning)
        assert issubclass(warning, UserWarning)
