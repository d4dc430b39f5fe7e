"""Every option of every metric refuses nonsense, names itself, and does so before any data is touched."""

import inspect

import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError

METRICS = [
    sharpness.top_eigenvalues,
    sharpness.epsilon_sharpness,
    sharpness.worst_case_sharpness,
    sharpness.average_case_sharpness,
    sharpness.low_pass_sharpness,
    sharpness.pac_bayes_sharpness,
    sharpness.relative_flatness,
    sharpness.fisher_rao_norm,
    sharpness.trace,
    sharpness.diagonal,
    sharpness.frobenius_norm,
    sharpness.spectral_density,
    sharpness.gradient_noise_scale,
    sharpness.learning_rate_limit,
    sharpness.critical_sharpness,
    sharpness.report,
    sharpness.landscape,
]
NONSENSE = object()
CASES = [
    (function, name)
    for function in METRICS
    for name in list(inspect.signature(function).parameters)[2:]
    if name not in ("loader",)
]


class Untouchable:
    """A loader that must not be walked."""

    def __iter__(self):
        raise AssertionError("data were touched")


@pytest.mark.parametrize(("function", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_nonsense_is_refused_by_name_before_data_are_touched(function, name):
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        function(nn.Linear(2, 2), Untouchable(), **{name: NONSENSE})


TRAININGS = [
    (function, name)
    for function in (sharpness.compare_batch_sizes, sharpness.piggyback)
    for name in list(inspect.signature(function).parameters)[3:]
    if name != "optimizer"  # any callable is one, until it is called
]


@pytest.mark.parametrize(("function", "name"), TRAININGS, ids=lambda x: getattr(x, "__name__", x))
def test_nonsense_is_refused_by_name_before_anything_is_trained(function, name):
    data = (torch.zeros(600, 2), torch.zeros(600, dtype=torch.long))
    with pytest.raises(ArgumentError, match=f"`{name}`"):
        function(lambda: pytest.fail("made a model"), data, data, **{name: NONSENSE})


@pytest.mark.parametrize(
    ("memory", "allowed"),
    [
        *((memory, True) for memory in (0, 10**9, "2GiB", "500 MB", "1.5gib", "auto")),
        *((memory, False) for memory in (-1, "lots", "2 parsecs", 1.5, True, "1.2.3GB", ".GB")),
    ],
)
def test_memory_is_bytes_or_a_size(memory, allowed):
    def make():
        return sharpness.Objective(nn.Linear(2, 2), [(torch.ones(1, 2), torch.ones(1, 2))], memory=memory)

    if allowed:
        assert make().value() >= 0
    else:
        with pytest.raises(ArgumentError, match='`memory` must be "auto", a number of bytes, or a size'):
            make()


def test_sizes_are_what_they_say():
    from sharpness._checks import check_memory

    assert [check_memory(m) for m in ("2GiB", "500MB", "1.5kB", "7", "1 TiB")] == [2 * 2**30, 5 * 10**8, 1500, 7, 2**40]


def test_flags_are_flags():
    for name in ("vectors", "progress"):
        with pytest.raises(ArgumentError, match=f"`{name}` must be True or False, got 1"):
            sharpness.top_eigenvalues(nn.Linear(2, 2), Untouchable(), **{name: 1})
