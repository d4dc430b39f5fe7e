"""Which module, and which operation, cannot be differentiated twice, and what to do about it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from sharpness.errors import ModelError
from sharpness.objective.data import tensors_in
from sharpness.objective.memory import graph_nodes

_ADVICE = (
    (
        ("use_reentrant=True",),
        "That is torch.utils.checkpoint with use_reentrant=True. Pass use_reentrant=False",
    ),
    (
        ("flash_attn", "flashattn", "flashattention", "xformers", "_fmha", "flexattention", "flex_attention"),
        'That is fused attention. Load the model with attn_implementation="eager" or "sdpa", or call '
        "torch.nn.functional.scaled_dot_product_attention, which is measured by plain matrix products",
    ),
    (
        ("torch.compile", "aot_autograd", "CompiledFunction"),
        "That is code that torch.compile has made. Pass the model as it was before, or update PyTorch to 2.6",
    ),
    (
        ("once_differentiable", "runs unseen by autograd"),
        "Write its backward with differentiable PyTorch operations and remove the mark, or use a plain counterpart",
    ),
    (
        ("",),
        "Replace it by one made of differentiable PyTorch operations; fused kernels often have a plain counterpart",
    ),
)


_LOSS = "the loss, or what it does with the model's outputs,"
_SOMEWHERE = "an operation of the model or the loss"


@final
@dataclass(frozen=True)
class Source:
    """Where a batch's loss comes from, to be looked at again when something is wrong with it."""

    model: nn.Module
    leaves: Sequence[Tensor]
    again: Callable[[], Tensor]  # runs the forward pass once more and returns the total loss

    def require_differentiable(self) -> None:
        """Refuse operations that PyTorch would silently take for constants in a second derivative.

        Raises:
            ModelError: If a custom function is marked ``once_differentiable``, or runs kernels unseen by autograd.
        """
        found = fault([self.again()], self.leaves)
        if found is not None:
            raise self.error(found)

    def error(self, text: str) -> ModelError:
        """Return the error that names the operation and its module, and says what to do."""
        culprit = self._culprit()
        return _error(*culprit) if culprit is not None else _error(_SOMEWHERE, text)

    def _culprit(self) -> tuple[str, str] | None:
        """Run the forward pass again and return the deepest module that fails, and how."""
        names = {id(module): name for name, module in self.model.named_modules()}
        found: list[tuple[str, str]] = []
        entered: list[nn.Module] = []
        busy = False  # checkpointed blocks call modules while they are differentiated

        def look(module: nn.Module, inputs: Any, outputs: Any) -> None:
            nonlocal busy
            if busy:
                return
            entered.pop()
            if found or is_frame(module):
                return
            busy = True
            try:
                text = fault(tensors_in(outputs), [*tensors_in(inputs), *module.parameters()])
            finally:
                busy = False
            if text is not None:
                found.append((describe(module), text))

        def is_frame(module: nn.Module) -> bool:  # our own, around the model and the loss
            return any(child is self.model for child in module.children())

        def enter(module: nn.Module, inputs: Any) -> None:
            if not busy:
                entered.append(module)

        def describe(module: nn.Module) -> str:
            if is_frame(module):
                return _LOSS
            name, kind = names.get(id(module)), type(module)
            known = f"module {name!r}" if name else "the model itself" if name == "" else "the loss"
            return f"{known} ({kind.__module__}.{kind.__qualname__})"

        handles = [register_module_forward_hook(look), register_module_forward_pre_hook(enter)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of compiled modules, about global hooks
                total = self.again()
        except RuntimeError as error:  # the forward pass itself refuses
            return (describe(entered[-1]), _first_line(error)) if _is_missing(error) else None
        finally:
            for handle in handles:
                handle.remove()
        if not found and (text := fault([total], self.leaves)) is not None:
            found.append((_LOSS, text))
        return found[0] if found else None


@contextmanager
def explained(source: Source | None = None) -> Iterator[None]:
    """Turn PyTorch's words for a missing derivative into ours."""
    try:
        yield
    except RuntimeError as error:
        if not _is_missing(error):
            raise
        text = _first_line(error)
        raise (_error(_SOMEWHERE, text) if source is None else source.error(text)) from error


def _error(where: str, text: str) -> ModelError:
    clue = f"{where} {text}".lower()
    advice = next(advice for words, advice in _ADVICE if any(word.lower() in clue for word in words))
    after = " measure only layers after it, with params=..., or" if where.startswith("module") else ""
    return ModelError(
        f"{where} cannot be differentiated twice: {text}. {advice}. Or{after} use "
        'curvature="empirical_fisher" (with a loss_fn), which needs first derivatives only.'
    )


def is_custom(node: Any) -> bool:
    """Return whether a node of a graph is a function that someone wrote in Python."""
    return hasattr(type(node), "_forward_cls")


def fault(outputs: Iterable[Tensor], variables: Iterable[Tensor]) -> str | None:
    """Differentiate a function of the outputs twice by the variables and say what goes wrong; ``None`` if nothing."""
    outputs = [tensor for tensor in outputs if tensor.requires_grad]
    inputs = list({id(tensor): tensor for tensor in variables if tensor.requires_grad}.values())
    if not outputs or not inputs:
        return None
    unseen: list[str] = []
    handles = [node.register_hook(partial(_watch, node, unseen)) for node in graph_nodes(outputs) if is_custom(node)]
    try:
        # A square, so that the derivative by each output depends on the output and is not zero.
        gradients = torch.autograd.grad(_bent(outputs), inputs, create_graph=True, allow_unused=True)
        moving = [g for g in gradients if g is not None and g.requires_grad]
        if moving and not unseen:
            torch.autograd.grad(_bent(moving), inputs, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        return unseen[0] if unseen else _first_line(error) if _is_missing(error) else None
    finally:
        for handle in handles:
            handle.remove()
    return unseen[0] if unseen else None


def _bent(tensors: Iterable[Tensor]) -> Tensor:
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    return torch.stack([(t + t.square()).sum().to(real[0]) for t in real]).sum()


def _watch(node: Any, unseen: list[str], outgoing: Sequence[Tensor | None], incoming: Sequence[Tensor | None]) -> None:
    """Note a backward function whose answer autograd has lost sight of.

    It is linear in what comes in; so where that depends on something, an answer that depends on nothing must be zero.
    """
    kind = type(node)._forward_cls
    name = f"the custom autograd function {kind.__module__}.{kind.__qualname__}"
    if not any(g is not None and g.requires_grad for g in incoming):
        return
    for g in outgoing:
        if g is None:
            continue
        if type(g.grad_fn).__name__ in ("Error", "DelayedError"):
            unseen.append(f"{name} is marked once_differentiable, so it has no second derivative")
        elif not g.requires_grad and bool(g.detach().any()):
            unseen.append(f"the backward of {name} runs unseen by autograd, so its second derivative would be lost")


def _is_missing(error: RuntimeError) -> bool:
    text = str(error)
    return ("is not implemented" in text and "derivative" in text) or any(words in text for words in _WORDS)


_WORDS = (
    "double backward",
    "differentiate twice",
    "use_reentrant=True",
    "no autograd formula was registered",
    "does not support backward",
)


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0].rstrip(". ")
