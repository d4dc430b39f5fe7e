"""From a model and a batch to the sum of its loss terms and their number.

The loss of a data set is the mean over all its loss terms. A criterion reports the mean or the sum over one batch, so
each batch's number of terms has to be known to put batches together: samples; tokens that are not ignored, or their
class weights; elements for a mean-squared error.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from sharpness.errors import ArgumentError, DataError, ModelError
from sharpness.objective.data import describe, map_tensors, tensors_in

LossFn: TypeAlias = Callable[[Any, Any], Tensor]
BatchLoss: TypeAlias = Callable[[nn.Module, Any], tuple[Tensor, float]]

# At an exact fit a loss is zero and says nothing about its reduction: then it is looked at beside the outputs.
_PROBES = ((1.0, 0.0), (0.5, 0.25))
_TARGET_KEYS = ("labels", "label", "targets", "target", "y")
_CLASS_CRITERIA = (nn.CrossEntropyLoss, nn.NLLLoss)
_CLASS_FUNCTIONS = (functional.cross_entropy, functional.nll_loss)


@final
@dataclass(frozen=True)
class Terms:
    """What one batch contributes."""

    total: Tensor  # scalar: the sum of the loss terms
    weight: float  # their number
    correct: float | None = None  # how many of the samples, or tokens, are classified correctly
    counted: float | None = None  # of how many


@final
class Criterion:
    """The loss of a batch, given by the user or inferred from the first batch.

    Args:
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it.
        batch_loss: ``(model, batch) -> (mean loss, weight)`` for anything else.
    """

    def __init__(self, loss_fn: LossFn | None, batch_loss: BatchLoss | None) -> None:
        if loss_fn is not None and batch_loss is not None:
            raise ArgumentError("`loss_fn` and `batch_loss` exclude each other; got both. Leave one of them out.")
        for name, value in (("loss_fn", loss_fn), ("batch_loss", batch_loss)):
            if value is not None and (not callable(value) or isinstance(value, type)):
                raise ArgumentError(
                    f"`{name}` must be a callable such as torch.nn.CrossEntropyLoss(), got {value!r}."
                    + (f" Pass an instance, {value.__name__}()." if isinstance(value, type) else "")
                )
        if getattr(loss_fn, "reduction", "mean") == "none":
            raise ArgumentError(
                'the loss must be a scalar, got a criterion with reduction="none". Use reduction="mean" or "sum".'
            )
        self._loss_fn = loss_fn
        self._batch_loss = batch_loss
        self._reduction: str | None = None
        self.name = "not resolved yet"
        self.function: LossFn | None = loss_fn  # (outputs, targets) -> loss, where the loss has this form

    def __call__(self, model: nn.Module, batch: Any) -> Terms:
        """Return the contribution of ``batch``."""
        if self._batch_loss is not None:
            return self._by_user(model, batch)
        inputs, named, targets = unpack(batch)
        if named:
            named = _accepted(model, named, targets is not None and self._loss_fn is None)
        outputs = model(*inputs, **named)
        if self._loss_fn is None:
            own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
            if isinstance(own, Tensor):
                self.name = "the model's own loss"
                weight = _labels(targets, outputs)
                return Terms(_scalar(own) * weight, weight)
        predictions = _logits(outputs)
        if targets is None:
            raise DataError(
                f"the batch holds no targets: {describe(batch)}. Yield (inputs, targets), or a dict with one of "
                f"{', '.join(_TARGET_KEYS)}, or pass batch_loss=callable(model, batch) -> (loss, weight)."
            )
        loss_fn, predictions = (self._loss_fn, predictions) if self._loss_fn else self._infer(predictions, targets)
        loss = _scalar(_in_float64(loss_fn)(predictions, targets))
        weight = count_terms(loss_fn, predictions, targets)
        if self._reduction is None:
            self._reduction = find_reduction(loss_fn, predictions, targets)
        if self._loss_fn is not None:
            self.name = f"{_name(loss_fn)} ({self._reduction})"
        total = loss if self._reduction == "sum" else loss * weight
        return Terms(total, weight, *_accuracy(predictions, targets))

    def _by_user(self, model: nn.Module, batch: Any) -> Terms:
        self.name = f"batch_loss {_name(self._batch_loss)}"
        answer = self._batch_loss(model, batch) if self._batch_loss else None
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise ModelError(
                f"`batch_loss` must return (mean loss, weight), got {describe(answer)}. "
                "The weight is the batch's number of loss terms, its number of samples for instance."
            )
        loss, weight = answer
        weight = float(weight)
        if not weight >= 0 or weight == float("inf"):
            raise ModelError(f"`batch_loss` returned the weight {weight}; it must be a finite number of at least 0.")
        return Terms(_scalar(loss) * weight, weight)

    def _infer(self, predictions: Any, targets: Any) -> tuple[LossFn, Any]:
        """Choose the loss by the targets: cross-entropy for classes, mean-squared error for numbers."""
        if isinstance(predictions, Tensor) and isinstance(targets, Tensor) and predictions.is_floating_point():
            classes = targets.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
            if (
                classes
                and targets.ndim
                and predictions.ndim == targets.ndim + 1
                and predictions.shape[0] == targets.shape[0]
            ):
                if predictions.ndim == 3 and predictions.shape[1] == predictions.shape[2] == targets.shape[1]:
                    raise DataError(
                        f"outputs {describe(predictions)} fit targets {describe(targets)} with the classes in either "
                        "of the last two dimensions, so the loss cannot be inferred. Pass loss_fn."
                    )
                if predictions.shape[1:2] + targets.shape[1:] == predictions.shape[1:] and predictions.shape[1] > 1:
                    self.name, self.function = "cross-entropy (inferred)", _cross_entropy
                    return _cross_entropy, predictions
                if predictions.shape[:-1] == targets.shape and predictions.shape[-1] > 1:  # (batch, time, classes)
                    self.name = "cross-entropy over the last dimension (inferred)"
                    self.function = _cross_entropy_last
                    return _cross_entropy, predictions.movedim(-1, 1)
            if targets.is_floating_point() and predictions.shape == targets.shape:
                self.name, self.function = "mean-squared error (inferred)", functional.mse_loss
                return functional.mse_loss, predictions
        raise DataError(
            f"no loss can be inferred for outputs {describe(predictions)} and targets {describe(targets)}: integer "
            "targets want one output per class (cross-entropy), float targets want outputs of their own shape "
            "(mean-squared error). Pass loss_fn, or batch_loss=callable(model, batch) -> (loss, weight)."
        )


def _in_float64(loss_fn: LossFn) -> LossFn:
    """Return a classification loss that computes in float64, any other loss as it is.

    Where a sample is classified with near certainty the derivatives of cross-entropy are small differences of large
    numbers, ``p - 1`` with ``p`` near 1. Single precision loses them, and with them the curvature of a well trained
    model; the logits are the small end of the network, so computing there in float64 costs next to nothing.
    """
    function, options = _options(loss_fn)
    if isinstance(loss_fn, functools.partial) and (loss_fn.args or function is not functional.cross_entropy):
        return loss_fn
    if type(function) is nn.CrossEntropyLoss:  # a subclass may compute something else
        names = ("weight", "ignore_index", "reduction", "label_smoothing")
        options = {name: getattr(function, name) for name in names}
    elif function is not functional.cross_entropy:
        return loss_fn
    if isinstance(options.get("weight"), Tensor):
        options["weight"] = options["weight"].double()

    def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
        labels = targets.double() if targets.is_floating_point() else targets.long()
        return functional.cross_entropy(
            outputs if outputs.device.type == "mps" else outputs.double(), labels, **options
        )

    return cross_entropy


def unpack(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Split a batch into positional inputs, named inputs and targets.

    Raises:
        DataError: If the batch has a structure that no convention covers.
    """
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    if isinstance(batch, Mapping):
        targets = next((batch[key] for key in _TARGET_KEYS if key in batch), None)
        return (), {str(key): item for key, item in batch.items()}, targets
    if isinstance(batch, Tensor):
        return (batch,), {}, None
    if isinstance(batch, (list, tuple)) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    if isinstance(batch, (list, tuple)) and len(batch) == 1:
        return tuple(batch), {}, None
    raise DataError(
        f"a batch of type {describe(batch)} has no known structure. Yield (inputs, targets) or a dict, or pass "
        "batch_loss=callable(model, batch) -> (loss, weight)."
    )


def _accepted(model: nn.Module, named: dict[str, Any], keep_targets: bool) -> dict[str, Any]:
    """Return the entries that the model's forward takes; targets only if the model may compute the loss itself."""
    parameters = inspect.signature(model.forward).parameters.values()
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    kept = {key: item for key, item in named.items() if key in names or open_ended}
    if open_ended and not (names & set(_TARGET_KEYS)):
        keep_targets = False
    if not keep_targets:
        kept = {key: item for key, item in kept.items() if key not in _TARGET_KEYS}
    if not kept:
        raise DataError(
            f"none of the batch's keys {list(named)} is an argument of {type(model).__name__}.forward "
            f"({', '.join(sorted(names))}). Rename them, or pass batch_loss=callable(model, batch) -> (loss, weight)."
        )
    return kept


def _logits(outputs: Any) -> Any:
    """Return the predictions of a model output: its ``logits`` if it has them."""
    own = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return outputs if own is None else own


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        raise ModelError(
            f"the loss must be a real scalar tensor, got {describe(loss)}. "
            'Reduce it to one number, with reduction="mean" for instance.'
        )
    return loss.reshape(())


def _labels(targets: Any, outputs: Any) -> float:
    """Return how many labels a Hugging Face loss averages over; those of -100 are ignored.

    A causal language model predicts each token from those before it, so the first label of a row does not count.
    """
    if not isinstance(targets, Tensor):
        raise DataError(
            "the model computes its own loss, but the batch holds no labels to weigh it by. "
            "Pass batch_loss=callable(model, batch) -> (loss, weight)."
        )
    if targets.is_floating_point():
        return float(targets.numel())
    logits = _logits(outputs)
    causal = "Causal" in type(outputs).__name__ and isinstance(logits, Tensor) and logits.ndim == 3
    return float((targets[..., 1:] if causal else targets).ne(-100).sum().item())


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets.long())


def _cross_entropy_last(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.movedim(-1, 1), targets.long())


def _options(loss_fn: Any) -> tuple[Any, dict[str, Any]]:
    """Return the function behind a partial, and the keywords it was given."""
    if isinstance(loss_fn, functools.partial):
        function, options = _options(loss_fn.func)
        return function, {**options, **loss_fn.keywords}
    return (functional.cross_entropy if loss_fn is _cross_entropy else loss_fn), {}


def count_terms(loss_fn: LossFn, outputs: Any, targets: Any) -> float:
    """Return the number of terms that the mean over this batch would divide by.

    Raises:
        ArgumentError: If it cannot be told, for an unknown loss over targets that may be padding.
    """
    function, options = _options(loss_fn)
    if isinstance(function, _CLASS_CRITERIA):
        options = {"weight": function.weight, "ignore_index": function.ignore_index}
    if isinstance(function, _CLASS_CRITERIA) or any(function is known for known in _CLASS_FUNCTIONS):
        if targets.is_floating_point():  # probabilities: one term per distribution
            return float(targets.numel() / outputs.shape[1 if outputs.ndim > 1 else 0])
        counted = targets[targets != options.get("ignore_index", -100)]
        weight = options.get("weight")
        return float(counted.numel() if weight is None else weight.to(counted.device)[counted].sum().item())
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
                f"the loss {_name(loss_fn)} is unknown and some targets are negative, so which of them count as loss "
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
    function, options = _options(loss_fn)
    known = any(function is one for one in _CLASS_FUNCTIONS)
    declared = options.get("reduction", "mean" if known else getattr(function, "reduction", None))
    if declared in ("mean", "sum", "batchmean"):
        return "sum" if declared == "sum" else "mean"
    with torch.no_grad():
        for scale, shift in _PROBES:
            probe = map_tensors(lambda t: scale * t.detach() + shift, outputs)  # noqa: B023 - used at once
            try:
                single, double = (
                    _scalar(loss_fn(*pair)).item() for pair in ((probe, targets), (_twice(probe), _twice(targets)))
                )
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise ArgumentError(
                    f"whether the loss {_name(loss_fn)} is a mean or a sum over samples cannot be told "
                    f"({error}). Pass batch_loss=callable(model, batch) -> (mean loss, number of terms)."
                ) from error
            if abs(single) > 1e-12:
                break
        if abs(double - single) <= 1e-3 * abs(single):
            _require_additive(loss_fn, probe, targets, single)
            return "mean"
    if abs(double - 2 * single) <= 1e-3 * abs(single):
        return "sum"
    raise ArgumentError(
        f"the loss {_name(loss_fn)} is neither a mean nor a sum over samples: it gives {single:.6g} on a batch and "
        f"{double:.6g} on the same batch twice. Pass batch_loss=callable(model, batch) -> (loss, weight)."
    )


def _require_additive(loss_fn: LossFn, outputs: Any, targets: Any, whole: float) -> None:
    """Refuse a mean whose terms do not all weigh the same, as with class weights or ignored targets inside of it."""
    count = min(tensor.shape[0] for tensor in (*tensors_in(outputs), *tensors_in(targets)))
    if count < 2:
        return
    for cut in {1, count // 2}:
        parts = []
        for piece, weight in ((slice(None, cut), cut), (slice(cut, None), count - cut)):
            pair = (map_tensors(lambda t: t[piece], batch) for batch in (outputs, targets))  # noqa: B023 - used at once
            parts.append(weight * _scalar(loss_fn(*pair)).item() / count)
        if not abs(sum(parts) - whole) <= 1e-3 * abs(whole):  # NaN is no agreement either
            break
    else:
        return
    raise ArgumentError(
        f"the loss {_name(loss_fn)} is no plain mean over samples: {whole:.6g} on a batch, {sum(parts):.6g} from its "
        "parts; terms seem to be weighted or ignored. Pass torch.nn.CrossEntropyLoss(weight=..., ignore_index=...) "
        "itself, or batch_loss=callable(model, batch) -> (mean loss, total weight)."
    )


def _twice(batch: Any) -> Any:
    return map_tensors(lambda t: torch.cat([t, t]), batch)


def _accuracy(outputs: Any, targets: Any) -> tuple[float | None, float | None]:
    """Return how many targets are classified correctly, of how many; ``None`` where there are no classes."""
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return None, None
    integers = not targets.is_floating_point() and targets.dtype != torch.bool
    if not integers or outputs.ndim != targets.ndim + 1 or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        return None, None
    counted = targets >= 0
    hits = (outputs.argmax(dim=1) == targets) & counted
    return float(hits.sum().item()), float(counted.sum().item())


def _name(loss_fn: Any) -> str:
    function, _ = _options(loss_fn)
    return getattr(function, "__name__", type(function).__name__)
