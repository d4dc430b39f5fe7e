"""Wrappers around modules: those that are looked through, and those that cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sharpness.errors import ModelError
from sharpness.objective.embedding_bag import embedding_bag

STATE_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile, in the names of what they wrap


def inner(module: nn.Module) -> nn.Module | None:
    """Return what ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel`` wrap; ``None`` for the rest."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        wrapped: Any = module.module
    else:
        wrapped = getattr(module, "_orig_mod", None)
    return wrapped if isinstance(wrapped, nn.Module) else None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside all its wrappers."""
    while (wrapped := inner(model)) is not None:
        model = wrapped
    return model


def substitutes(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield the attributes of submodules that must be others while the model is measured: owner, name, value.

    Wrappers inside of the model call what they wrap, without compiling, scattering or synchronising anything;
    ``module.compile()`` is undone; embeddings give dense gradients, since sparse ones have no second derivative, nor
    have bags of them.
    """
    for module in model.modules():
        wrapped = inner(module)
        if wrapped is not None:
            yield module, "forward", wrapped.__call__
        if vars(module).get("_compiled_call_impl") is not None:
            yield module, "_compiled_call_impl", None
        if isinstance(module, nn.Embedding) and module.sparse:
            yield module, "sparse", False
        if type(module) is nn.EmbeddingBag:
            yield module, "forward", partial(embedding_bag, module)


def check_evaluable(model: nn.Module) -> None:
    """Refuse a model that cannot be evaluated with other tensors in the places of its own.

    Raises:
        ModelError: If it is sharded, or holds tensors without values.
    """
    for name, module in model.named_modules():
        bases = {base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.distributed")}
        if bases & {"FullyShardedDataParallel", "FSDPModule", "FSDP"}:
            raise _sharded(f"module {name!r} ({type(module).__name__})" if name else f"the {type(module).__name__}")
    for name, tensor in _tensors(model):
        if type(tensor).__name__ == "DTensor":
            raise _sharded(f"parameter {name!r} (DTensor)")
        if tensor.device.type == "meta":
            raise ModelError(
                f"{name!r} is on the meta device and has no values: it was never loaded, or is offloaded. "
                "Load all weights onto real devices first (from_pretrained without an offload folder, or "
                "model.to_empty(device=...) and load_state_dict)."
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _sharded(what: str) -> ModelError:
    return ModelError(
        f"{what} is sharded over processes (FSDP or tensor parallel); the whole parameters are needed in each process. "
        "Gather a full state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
        "full_state_dict=True), load it into an unwrapped model and pass that."
    )


def is_quantised(model: nn.Module) -> bool:
    """Return whether the model holds quantised layers or weights."""
    layers = any(
        type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))
        for module in model.modules()
    )
    return layers or any(p.is_quantized or p.dtype in _INTEGERS for p in model.parameters())


_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
