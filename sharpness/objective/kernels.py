"""Which kernels run: those that have a second derivative, in the precision that is asked for."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from sharpness.errors import ArgumentError

PRECISIONS = ("exact", "tf32", "bfloat16", "float16")


@dataclass(frozen=True)
class _Switch:
    """One flag: how to read and to write it, the values that mean exact, and the one that means fast."""

    read: Callable[[], Any]
    write: Callable[[Any], None]
    exact: tuple[Any, ...]
    fast: Any


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Run ``model`` with kernels that have a second derivative.

    The fused attention kernels have none, attention by matrix products has; cuDNN's recurrent layers have none,
    PyTorch's own have; code that ``torch.compile`` has made has none, so it runs as it was written. The forward pass
    decides, but checkpointed blocks run it again in the backward pass, so both belong inside.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # The fast path of transformer layers has no derivative at all, and puts zeros in padded places: another
        # function than the one that is differentiated.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if any(map(_has_weight_norm, model.modules())):
            stack.enter_context(_PlainWeightNorm())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
            torch.backends.cudnn.enabled = False
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):  # since PyTorch 2.6
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _PlainWeightNorm(TorchFunctionMode):
    """Computes weight normalisation by its formula: the second derivative of PyTorch's own kernel is wrong (2.13)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the one function, and let the others be."""
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))
        v, g, *dim = args
        axis = dim[0] if dim else (kwargs or {}).get("dim", 0)
        others = [d for d in range(v.ndim) if d != axis % v.ndim] if axis != -1 else None
        return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=others is not None))


def _has_weight_norm(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return type(module).__name__ == "_WeightNorm" or any(type(hook).__name__ == "WeightNorm" for hook in hooks)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Allow TF32 for ``"tf32"`` and only then; on leaving, every flag reads as before.

    PyTorch's defaults compute convolutions in TF32. The flags of 2.9 and the older ones are two views of one state,
    and the older cannot be read where the two differ: those are left alone then.
    """
    before = [(switch, _read(switch)) for switch in _switches()]
    try:
        for switch, value in before:
            wanted = (switch.fast,) if precision == "tf32" else switch.exact
            if value is not None and value not in wanted:
                _write(switch, wanted[0])
        yield
    finally:
        for switch, value in before:
            if value is not None and _read(switch) != value:
                _write(switch, value)


def _read(switch: _Switch) -> Any:
    with _silently():
        try:
            return switch.read()
        except RuntimeError:  # the older and the newer flags disagree
            return None


def _write(switch: _Switch, value: Any) -> None:
    with _silently():
        switch.write(value)


@contextmanager
def _silently() -> Iterator[None]:
    """Leave out PyTorch's warning that the older flags will go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _switches() -> list[_Switch]:
    """Return the flags that this version of PyTorch has, the older ones first, since they set the newer."""

    def attribute(owner: Any, name: str, exact: tuple[Any, ...], fast: Any) -> _Switch:
        return _Switch(lambda: getattr(owner, name), lambda value: setattr(owner, name, value), exact, fast)

    backends: Any = torch.backends
    found: list[_Switch] = [
        attribute(backends.cuda.matmul, "allow_tf32", (False,), True),
        attribute(backends.cudnn, "allow_tf32", (False,), True),
        _Switch(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, ("highest",), "high"),
    ]
    if hasattr(backends, "fp32_precision"):  # since PyTorch 2.9
        operations = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        operations += [getattr(backends.mkldnn, name) for name in ("matmul", "conv", "rnn")]
        found += [attribute(operation, "fp32_precision", ("ieee", "none"), "tf32") for operation in operations]
    return found


def check_autocast(precision: str, dtype: torch.dtype) -> None:
    """Refuse what autocast leaves as it is.

    Raises:
        ArgumentError: If a float64 model is to run in half precision.
    """
    if precision in ("bfloat16", "float16") and dtype == torch.float64:
        raise ArgumentError(
            f"`precision` is {precision!r}, and autocast leaves a float64 model as it is. Leave it out, or convert the "
            "model to float32."
        )


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context for forward passes in ``precision``, or in full precision whatever the caller's context."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    # Without the cache, since casts of one batch's graph may not be part of another's.
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
