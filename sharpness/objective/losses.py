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
from sharpness.objective.data import describe, map_tensors
from sharpness.objective.diagnosis import Source
from sharpness.objective.reduction import (
    LossFn,
    count_terms,
    criterion_of,
    cross_entropy,
    declares_reduction,
    find_reduction,
    name_of,
    options_of,
    require_additive,
    scalar,
)
from sharpness.objective.tape import unrecorded

BatchLoss: TypeAlias = Callable[[nn.Module, Any], tuple[Tensor, float]]

_TARGET_KEYS = ("labels", "label", "targets", "target", "y")


@final
@dataclass(frozen=True)
class Terms:
    """What one batch contributes."""

    total: Tensor  # scalar: the sum of the loss terms
    weight: float  # their number
    correct: float | None = None  # how many of the samples, or tokens, are classified correctly
    counted: float | None = None  # of how many
    outputs: Any = None  # what the loss was computed from; None where that is not known
    targets: Any = None
    loss_fn: LossFn | None = None  # None for a model's own loss
    resum: Callable[[Any, Any], Tensor] | None = None  # (outputs, targets) -> the sum of the loss terms
    source: Source | None = None

    @property
    def number(self) -> float:
        """Return the sum of the loss terms as a number."""
        with unrecorded():
            return self.total.item()

    @property
    def loss_name(self) -> str:
        """Return what the user knows the loss by."""
        return "the model's own loss" if self.loss_fn is None else name_of(self.loss_fn)


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
        self._inferred: str | None = None
        self.name = "not resolved yet"
        self.function: LossFn | None = loss_fn  # (outputs, targets) -> loss, where the loss has this form
        self._normalised = False

    @property
    def hides_outputs(self) -> bool:
        """Return whether only the user's ``batch_loss`` knows what the model's outputs are."""
        return self._batch_loss is not None

    @property
    def label(self) -> str:
        """Return the loss in words, and what is done before it."""
        return self.name + ", normalised logits" * self._normalised

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the user's criterion holds, such as class weights."""
        _, options = criterion_of(self._loss_fn)
        return [value for value in options.values() if isinstance(value, Tensor)]

    def adopt(self, other: Criterion) -> None:
        """Take over what was found out about the same loss."""
        self._reduction, self._inferred, self._normalised = other._reduction, other._inferred, other._normalised
        self.name, self.function = other.name, other.function

    def normalise(self) -> None:
        """Centre the logits of each sample, and scale them to unit length, before the loss."""
        self._normalised = True

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
            if isinstance(own, Tensor) and self._normalised:
                raise ArgumentError(
                    "`normalize_logits` acts before the loss, and this model computes its own. Pass loss_fn, with a "
                    "model or batches that make it return logits alone."
                )
            if isinstance(own, Tensor):
                self._settle({"the model's own loss": None}, outputs, targets)
                weight = _labels(targets, outputs)
                return Terms(scalar(own) * weight, weight, outputs=_logits(outputs), targets=targets)
        # A criterion for one tensor of targets wants one tensor of outputs; a user's for several gets them all.
        predictions = _apart(_logits(outputs) if self._loss_fn is None or isinstance(targets, Tensor) else outputs)
        if targets is None:
            raise DataError(
                f"the batch holds no targets: {describe(batch)}. Yield (inputs, targets), or a dict with one of "
                f"{', '.join(_TARGET_KEYS)}, or pass batch_loss=callable(model, batch) -> (loss, weight)."
            )
        predictions = self._for_criterion(predictions, targets)
        if isinstance(predictions, Tensor):
            targets = map_tensors(lambda t: t.to(predictions.device), targets)
        loss_fn, predictions = (self._loss_fn, predictions) if self._loss_fn else self._infer(predictions, targets)
        if self._normalised:
            predictions = _normalised(loss_fn, predictions, targets)
        loss, weight = _measured(loss_fn, predictions, targets)
        with unrecorded():
            if self._reduction is None:
                self._reduction = find_reduction(loss_fn, predictions, targets)
            if self._reduction == "mean" and self._loss_fn is not None and not declares_reduction(loss_fn):
                require_additive(loss_fn, predictions, targets)  # in each batch: ignored targets may be in any
        if self._loss_fn is not None:
            self.name = f"{name_of(loss_fn)} ({self._reduction})"
        summed = self._reduction == "sum"

        def resum(outputs: Any, targets: Any) -> Tensor:
            loss, weight = _measured(loss_fn, outputs, targets)
            return loss if summed else loss * weight

        return Terms(
            loss if summed else loss * weight,
            weight,
            *_accuracy(loss_fn, predictions, targets),
            outputs=predictions,
            targets=targets,
            loss_fn=loss_fn,
            resum=resum,
        )

    def _for_criterion(self, predictions: Any, targets: Any) -> Any:
        """Return the outputs as PyTorch's criteria want them.

        Raises:
            ModelError: If the outputs are no tensor, which no criterion of PyTorch takes.
        """
        function, _ = options_of(self._loss_fn)
        if self._loss_fn is None or not (isinstance(function, nn.modules.loss._Loss) or function is cross_entropy):
            return predictions
        if not isinstance(predictions, Tensor):
            raise ModelError(
                f"the model returns {describe(predictions)}, and {name_of(self._loss_fn)} takes one tensor. Pass "
                "loss_fn=lambda outputs, targets: criterion(outputs[0], targets), with the entry that you want."
            )
        last = isinstance(function, (nn.CrossEntropyLoss, nn.NLLLoss)) and isinstance(targets, Tensor)
        if last and predictions.ndim == 3 and predictions.shape[:2] == targets.shape != predictions.shape[::2]:
            return predictions.movedim(-1, 1)  # (batch, time, classes), as language models return them
        return predictions

    def _by_user(self, model: nn.Module, batch: Any) -> Terms:
        self.name = f"batch_loss {name_of(self._batch_loss)}"
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
        return Terms(scalar(loss) * weight, weight)

    def _infer(self, predictions: Any, targets: Any) -> tuple[LossFn, Any]:
        """Choose the loss by the targets: cross-entropy for classes, mean-squared error for numbers."""
        fits: dict[str, LossFn | None] = {}
        if isinstance(predictions, (tuple, list)) and len(predictions) == 1:
            predictions = predictions[0]
        if isinstance(predictions, Tensor) and isinstance(targets, Tensor) and predictions.is_floating_point():
            shape, classes = predictions.shape, not (targets.is_floating_point() or targets.is_complex())
            if classes and targets.dtype != torch.bool and targets.ndim and len(shape) == targets.ndim + 1:
                if shape[:1] + shape[2:] == targets.shape and shape[1] > 1:
                    fits["cross-entropy (inferred)"] = cross_entropy
                if targets.ndim > 1 and shape[:-1] == targets.shape and shape[-1] > 1:  # (batch, time, classes)
                    fits["cross-entropy over the last dimension (inferred)"] = _cross_entropy_last
            if targets.is_floating_point() and shape == targets.shape:
                fits["mean-squared error (inferred)"] = functional.mse_loss
        self._settle(fits, predictions, targets)
        self.function = fits[self.name]
        if self.function is _cross_entropy_last:
            return cross_entropy, predictions.movedim(-1, 1)
        return self.function or cross_entropy, predictions

    def _settle(self, fits: Mapping[str, Any], predictions: Any, targets: Any) -> None:
        """Take the one loss that fits the first batch; the others must be like it.

        Raises:
            DataError: If none or several fit, or another than before.
        """
        got = f"outputs {describe(predictions)} and targets {describe(targets)}"
        if self._inferred is not None and self._inferred not in fits:
            raise DataError(
                f"the loss of the first batch is {self._inferred}, which does not fit {got} of a later one; all "
                "batches must have one loss. Pass loss_fn, or batch_loss=callable(model, batch) -> (loss, weight)."
            )
        if self._inferred is None and len(fits) > 1:
            raise DataError(f"{got} fit with the classes in either of the last two dimensions. Pass loss_fn.")
        if not fits and isinstance(predictions, (tuple, list, Mapping)):
            raise DataError(
                f"no loss can be inferred for {got}: which part of the outputs is the prediction cannot be told. Name "
                "it `logits`, or pass loss_fn=lambda outputs, targets: ... that picks it."
            )
        if not fits:
            raise DataError(
                f"no loss can be inferred for {got}: integer targets want one output per class (cross-entropy), float "
                "targets want outputs of their own shape (mean-squared error). Pass loss_fn, or "
                "batch_loss=callable(model, batch) -> (loss, weight)."
            )
        self.name = self._inferred = self._inferred or next(iter(fits))


def _in_float64(loss_fn: LossFn) -> LossFn:
    """Return a classification loss that computes in float64, any other loss as it is.

    Where a sample is classified with near certainty the derivatives of cross-entropy are small differences of large
    numbers, ``p - 1`` with ``p`` near 1. Single precision loses them, and with them the curvature of a well trained
    model; the logits are the small end of the network, so computing there in float64 costs next to nothing.
    """
    function, options = options_of(loss_fn)
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


def _measured(loss_fn: LossFn, outputs: Any, targets: Any) -> tuple[Tensor, float]:
    """Return the loss as the criterion gives it, and the number of its terms."""
    return scalar(_in_float64(loss_fn)(outputs, targets)), count_terms(loss_fn, outputs, targets)


def _apart(outputs: Any) -> Any:
    """Return outputs that can be differentiated with respect to, each on its own, where one depends on another."""
    return outputs if isinstance(outputs, Tensor) else map_tensors(lambda t: t.view_as(t), outputs)


def _normalised(loss_fn: LossFn, outputs: Any, targets: Any) -> Tensor:
    """Return logits with mean zero and length one over the classes (Andriushchenko et al. 2023)."""
    kind, _ = criterion_of(loss_fn)
    probabilities = kind in (nn.CrossEntropyLoss, functional.cross_entropy) and _same_shape(outputs, targets)
    if not probabilities and _accuracy(loss_fn, outputs, targets)[0] is None:
        raise ArgumentError(
            f"`normalize_logits` needs one tensor of logits and class labels, got outputs {describe(outputs)} and "
            f"targets {describe(targets)}. Leave it out, or pass a loss_fn that normalises."
        )
    dim = 1 if outputs.ndim > 1 else 0
    centred: Tensor = outputs - outputs.mean(dim=dim, keepdim=True)
    length: Tensor = torch.linalg.vector_norm(centred, dim=dim, keepdim=True)
    logits = centred / length.clamp(min=1e-10)
    # Log-probabilities are logits but for a constant, and must be log-probabilities again.
    return functional.log_softmax(logits, dim=dim) if kind in (nn.NLLLoss, functional.nll_loss) else logits


def _same_shape(outputs: Any, targets: Any) -> bool:
    both = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
    return both and targets.is_floating_point() and outputs.shape == targets.shape


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
    with unrecorded():
        return float((targets[..., 1:] if causal else targets).ne(-100).sum().item())


def _cross_entropy_last(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.movedim(-1, 1), targets.long())


def _accuracy(loss_fn: LossFn, outputs: Any, targets: Any) -> tuple[float | None, float | None]:
    """Return how many targets are classified correctly, of how many; ``None`` where there are no classes."""
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return None, None
    integers = not targets.is_floating_point() and targets.dtype != torch.bool
    if not integers or outputs.ndim != targets.ndim + 1 or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        return None, None
    _, options = criterion_of(loss_fn)
    counted = (targets >= 0) & (targets != options.get("ignore_index", -100))
    with unrecorded():
        hits = (outputs.argmax(dim=1) == targets) & counted
        return float(hits.sum().item()), float(counted.sum().item())
