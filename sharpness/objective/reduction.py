"""How many terms a loss has on a batch, and whether it is their mean or their sum."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from sharpness.errors import ArgumentError, ModelError
from sharpness.objective.data import describe, map_tensors, tensors_in
from sharpness.objective.tape import unrecorded

LossFn: TypeAlias = Callable[[Any, Any], Tensor]

# At an exact fit a loss is zero and says nothing about its reduction: then it is looked at beside the outputs.
_PROBES = ((1.0, 0.0), (0.5, 0.25))
_CLASS_CRITERIA = (nn.CrossEntropyLoss, nn.NLLLoss)
_CLASS_FUNCTIONS = (functional.cross_entropy, functional.nll_loss)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute cross-entropy for class labels of any integer dtype."""
    return functional.cross_entropy(outputs, targets.long())


def options_of(loss_fn: Any) -> tuple[Any, dict[str, Any]]:
    """Return the function behind a partial, and the keywords it was given."""
    if isinstance(loss_fn, functools.partial):
        function, options = options_of(loss_fn.func)
        return function, {**options, **loss_fn.keywords}
    return (functional.cross_entropy if loss_fn is cross_entropy else loss_fn), {}


def criterion_of(loss_fn: LossFn | None) -> tuple[Any, dict[str, Any]]:
    """Return what computes the loss, a module's class or a function, and the options it was given."""
    function, options = options_of(loss_fn)
    if isinstance(function, nn.Module):
        public = {name: value for name, value in vars(function).items() if not name.startswith("_")}
        return type(function), {**public, **dict(function.named_buffers())}
    return function, options


@unrecorded()
def count_terms(loss_fn: LossFn, outputs: Any, targets: Any) -> float:
    """Return the number of terms that the mean over this batch would divide by.

    Raises:
        ArgumentError: If it cannot be told, for an unknown loss over targets that may be padding.
    """
    function, options = options_of(loss_fn)
    if isinstance(function, _CLASS_CRITERIA):
        options = {"weight": function.weight, "ignore_index": function.ignore_index}
    if isinstance(function, _CLASS_CRITERIA) or any(function is known for known in _CLASS_FUNCTIONS):
        if targets.is_floating_point():  # probabilities: one term per distribution
            return float(targets.numel() / outputs.shape[1 if outputs.ndim > 1 else 0])
        counted = targets[targets != options.get("ignore_index", -100)]
        weight = options.get("weight")
        return float(counted.numel() if weight is None else weight.to(counted.device)[counted.long()].sum().item())
    if not isinstance(targets, Tensor):
        lengths = {tensor.shape[0] for tensor in tensors_in(targets) if tensor.ndim}
        if len(lengths) != 1:
            raise ArgumentError(
                f"the number of loss terms of targets {describe(targets)} cannot be told. "
                "Pass batch_loss=callable(model, batch) -> (mean loss, number of terms)."
            )
        return float(lengths.pop())
    if getattr(function, "reduction", None) == "batchmean":
        return float(targets.shape[0])
    if not isinstance(function, nn.modules.loss._Loss):
        integers = not targets.is_floating_point() and targets.dtype != torch.bool
        if integers and targets.numel() and bool((targets < 0).any()):
            raise ArgumentError(
                f"the loss {name_of(loss_fn)} is unknown and some targets are negative, so which of them count as loss "
                "terms cannot be told. Pass torch.nn.CrossEntropyLoss(ignore_index=...), or "
                "batch_loss=callable(model, batch) -> (mean loss, number of terms)."
            )
    elif isinstance(outputs, Tensor) and targets.is_floating_point():
        return float((outputs.detach() - targets).numel())
    return float(targets.numel() if targets.ndim else 1)


def find_reduction(loss_fn: LossFn, outputs: Any, targets: Any) -> str:
    """Return ``"mean"`` or ``"sum"``: as the criterion says, else by doubling the batch and seeing what it does.

    Raises:
        ArgumentError: If doubling the batch neither keeps nor doubles the loss.
    """
    function, options = options_of(loss_fn)
    known = any(function is one for one in _CLASS_FUNCTIONS)
    declared = options.get("reduction", "mean" if known else getattr(function, "reduction", None))
    if declared in ("mean", "sum", "batchmean"):
        return "sum" if declared == "sum" else "mean"
    with torch.no_grad():
        for scale, shift in _PROBES:
            probe = map_tensors(lambda t: scale * t.detach() + shift, outputs)  # noqa: B023 - used at once
            try:
                single, double = (
                    scalar(loss_fn(*pair)).item() for pair in ((probe, targets), (_twice(probe), _twice(targets)))
                )
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise ArgumentError(
                    f"whether the loss {name_of(loss_fn)} is a mean or a sum over samples cannot be told "
                    f"({error}). Pass batch_loss=callable(model, batch) -> (mean loss, number of terms)."
                ) from error
            if abs(single) > 1e-12:
                break
        if abs(double - single) <= 1e-3 * abs(single):
            return "mean"
    if abs(double - 2 * single) <= 1e-3 * abs(single):
        return "sum"
    raise ArgumentError(
        f"the loss {name_of(loss_fn)} is neither a mean nor a sum over samples: it gives {single:.6g} on a batch and "
        f"{double:.6g} on the same batch twice. Pass batch_loss=callable(model, batch) -> (loss, weight)."
    )


def declares_reduction(loss_fn: LossFn) -> bool:
    """Return whether a loss says of itself what it is, or is one of PyTorch's that is known."""
    function, options = options_of(loss_fn)
    return "reduction" in options or hasattr(function, "reduction") or any(function is one for one in _CLASS_FUNCTIONS)


def require_additive(loss_fn: LossFn, outputs: Any, targets: Any) -> None:
    """Refuse a mean whose terms do not all weigh the same, as with class weights or ignored targets inside of it.

    Raises:
        ArgumentError: If the loss on the batch is not the mean of those on its parts.
    """
    outputs = map_tensors(torch.detach, outputs)
    with torch.no_grad():
        whole = scalar(loss_fn(outputs, targets)).item()
        if math.isfinite(whole):  # else it is refused for that
            _require_additive(loss_fn, outputs, targets, whole)


def _require_additive(loss_fn: LossFn, outputs: Any, targets: Any, whole: float) -> None:
    count = min(tensor.shape[0] for tensor in (*tensors_in(outputs), *tensors_in(targets)))
    if count < 2:
        return
    for cut in {1, count // 2}:
        parts = []
        for piece, weight in ((slice(None, cut), cut), (slice(cut, None), count - cut)):
            pair = (map_tensors(lambda t: t[piece], batch) for batch in (outputs, targets))  # noqa: B023 - used at once
            parts.append(weight * scalar(loss_fn(*pair)).item() / count)
        if not abs(sum(parts) - whole) <= 1e-3 * abs(whole):  # NaN is no agreement either
            break
    else:
        return
    raise ArgumentError(
        f"the loss {name_of(loss_fn)} is no plain mean over samples: {whole:.6g} on a batch, {sum(parts):.6g} from its "
        "parts; terms seem to be weighted or ignored. Pass torch.nn.CrossEntropyLoss(weight=..., ignore_index=...) "
        "itself, or batch_loss=callable(model, batch) -> (mean loss, total weight)."
    )


def _twice(batch: Any) -> Any:
    return map_tensors(lambda t: torch.cat([t, t]), batch)


def scalar(loss: Any) -> Tensor:
    """Return a loss as a tensor without dimensions.

    Raises:
        ModelError: If it is no real number.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        raise ModelError(
            f"the loss must be a real scalar tensor, got {describe(loss)}. "
            'Reduce it to one number, with reduction="mean" for instance.'
        )
    return loss.reshape(())


def name_of(loss_fn: Any) -> str:
    """Return what the user knows a loss by."""
    function, _ = options_of(loss_fn)
    return getattr(function, "__name__", type(function).__name__)
