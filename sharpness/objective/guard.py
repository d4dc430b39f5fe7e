"""The model is left as it was found, whatever happens.

Weights and buffers need no guarding: the model is evaluated through `torch.func.functional_call` with tensors of our
own, so the user's are never written to. What remains are the train/eval flags, a few attributes of modules that stand
in the way of second derivatives, the flags of PyTorch, and the random number generators.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from sharpness.objective.kernels import autocast, matmul_precision
from sharpness.objective.wrappers import substitutes

MODES = ("eval", "train", "as_is")
_ABSENT = object()


@contextmanager
def guarded(
    model: nn.Module, mode: str, device: torch.device, generators: list[torch.Generator], precision: str = "exact"
) -> Iterator[None]:
    """Put the model into ``mode``; on leaving restore every submodule's attributes and every random state."""
    flags = [(module, module.training) for module in model.modules()]
    # Some modules keep tensors outside of their parameters: recurrent ones a list, weight_norm an attribute.
    plain = [
        (module, name, value) for module in model.modules() for name, value in vars(module).items() if _held(value)
    ]
    own = [(generator, generator.get_state()) for generator in generators]
    state = _random_state()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(matmul_precision(precision))
            for kind in {device.type, "cpu"}:
                stack.enter_context(autocast(torch.device(kind), "exact"))
            for module, name, value in list(substitutes(model)):
                stack.callback(_put_back, module, name, vars(module).get(name, _ABSENT))
                vars(module)[name] = value
            if mode != "as_is":
                model.train(mode == "train")
            yield
    finally:
        for module, training in flags:
            module.training = training
        for module, name, value in plain:
            vars(module)[name] = value
        for generator, kept in own:
            generator.set_state(kept)
        _restore_random_state(state)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` what new tensors have for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def own_randomness(seed: int, *stream: int) -> Iterator[None]:
    """Seed all global generators for a while; on leaving they are as they were."""
    state = _random_state()
    try:
        reseed(seed, *stream)
        yield
    finally:
        _restore_random_state(state)


def _put_back(module: nn.Module, name: str, value: Any) -> None:
    """Restore an attribute, or remove one that was not there."""
    if value is _ABSENT:
        del vars(module)[name]
    else:
        vars(module)[name] = value


def _held(value: Any) -> bool:
    """Return whether an attribute of a module is a tensor, or a list of them."""
    return isinstance(value, torch.Tensor) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, torch.Tensor) for item in value)
    )


def derived_seed(seed: int, *stream: int) -> int:
    """Return the seed of one of many independent streams."""
    return int(np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0] >> 1)


def reseed(seed: int, *stream: int) -> None:
    """Seed all global generators from ``seed`` and a stream number; for use where they are restored later."""
    words = np.random.SeedSequence([seed, *stream]).generate_state(3)
    torch.default_generator.manual_seed(int(words[0]))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(int(words[0]))
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    return torch.get_rng_state(), cuda, mps, np.random.get_state(), random.getstate()


def _restore_random_state(state: tuple[Any, ...]) -> None:
    cpu, cuda, mps, for_numpy, for_python = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    if mps is not None:
        torch.mps.set_rng_state(mps)
    np.random.set_state(for_numpy)
    random.setstate(for_python)
