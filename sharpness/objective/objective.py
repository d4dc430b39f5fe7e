r"""A model, a loss and data as one twice-differentiable function of a flat parameter vector.

With :math:`\ell_t` the loss terms of all batches, :math:`f(\theta) = \frac{1}{T} \sum_{t=1}^{T} \ell_t(\theta)`: every
batch is weighted by its own number of terms, so any split of the same data gives the same function. Hessian-vector
products differentiate twice in reverse (Pearlmutter 1994). The graph of the first differentiation is kept between
products while memory lasts, which saves two of the four passes that a product costs otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from sharpness._checks import check_choice, check_count, check_memory, check_seed
from sharpness._progress import check_progress
from sharpness._warn import warn
from sharpness.errors import ArgumentError, DataError, DeterminismWarning, ModelError, NonFiniteError
from sharpness.objective.batch_sum import BatchSum
from sharpness.objective.data import Batches, first_samples, tensors_in
from sharpness.objective.evaluation import Evaluation
from sharpness.objective.first_order import FirstOrder
from sharpness.objective.functional import Functional, unwrap
from sharpness.objective.guard import MODES, guarded, reseed
from sharpness.objective.losses import BatchLoss, Criterion, LossFn, Terms
from sharpness.objective.memory import Budget
from sharpness.objective.parameters import ParameterChoice, choose

_SAMPLES = 32  # to measure rounding errors on
_SLACK = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative change of the loss by another order of summation


@final
class Objective:
    """The loss of a model over data, as a function of the flat vector of its parameters.

    The model is never changed: it is evaluated with other tensors in its parameters' and buffers' places, and its
    flags and all random states are restored after each call. Nothing is computed at construction. After the model's
    weights have changed, the objective is that of the model as it is then.

    Args:
        model: A module with trainable parameters; wrappers for compilation and data parallelism are looked through.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``; ``None`` takes the model's own ``.loss`` if its output
            has one, else cross-entropy for integer targets, else mean-squared error for float targets of the
            outputs' shape.
        batch_loss: ``callable(model, batch) -> (mean loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate ``(name, tensor) -> bool`` that choose
            among the parameters that require grad.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``: which train/eval flags the model has while it is measured.
        max_batches: Use only the first so many batches.
        seed: Seed of everything random; the global generators are left alone.
        progress: Show progress bars; ``None`` shows them on a terminal after two seconds.
        memory: Bytes (or ``"2GiB"``) that may be kept between products; ``0`` keeps nothing, ``"auto"`` up to half
            of what is free.

    Attributes:
        model: The module itself, without wrappers.
        parameters: Which parameters are measured, and how they line up in a vector.
        num_passes: Passes over the data so far.
        num_terms: Loss terms in the data, once walked.
        unused: Names of the parameters that the loss does not depend on, once a product was made.

    Raises:
        ArgumentError: If an option cannot be accepted.
        ModelError: If the model has nothing to measure.
        DataError: If the loader cannot be walked again and again.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> Objective(model, data).hvp(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        loss_fn: LossFn | None = None,
        *,
        batch_loss: BatchLoss | None = None,
        params: ParameterChoice | None = None,
        mode: str = "eval",
        max_batches: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
        memory: int | str = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        self.model = unwrap(model)
        self.mode = check_choice("mode", mode, MODES)
        self.max_batches = None if max_batches is None else check_count("max_batches", max_batches)
        self.seed = check_seed(seed)
        self.progress = check_progress(progress)
        self.memory = check_memory(memory)
        self.criterion = Criterion(loss_fn, batch_loss)
        self.parameters = choose(self.model, params)
        self.batches = Batches(loader, device=self.device, max_batches=self.max_batches, seed=self.seed)
        self.num_passes = 0
        self.num_terms: float | None = None
        self.unused: tuple[str, ...] = ()
        self._functional = Functional(self.model, self.criterion, self.parameters)
        self._depth = 0
        self._graphs: dict[int, FirstOrder] = {}
        self._leaves: list[Tensor] = []
        self._snapshot: list[Tensor] | None = None  # what the kept graphs were made for
        self._budget: Budget | None = None
        self._loss: float | None = None
        self._checked = False

    @property
    def n(self) -> int:
        """Return the number of parameters that are measured."""
        return self.parameters.n

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the flat vectors, float64 if a parameter is, else float32."""
        return self.parameters.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters."""
        return self.parameters.device

    def vector(self) -> Tensor:  # -> (n,)
        """Return the parameters as they are now, as one new vector."""
        named = dict(self.model.named_parameters())
        return self.parameters.flatten(named[name] for name in self.parameters.names)

    def evaluate(self, at: Tensor | None = None, *, tensors: Mapping[str, Tensor] | None = None) -> Evaluation:
        """Return loss and accuracy at ``at``, ``(n,)``, or at the parameters as they are; one forward pass.

        Args:
            at: Where to evaluate.
            tensors: What to put in the places of parameters and buffers, by name; goes before ``at``.
        """
        with self.session():
            return self._evaluate(at, tensors=tensors)

    def value(self, at: Tensor | None = None) -> float:
        """Return the loss at ``at``, ``(n,)``, or at the parameters as they are; one forward pass."""
        return self.evaluate(at).loss

    def value_and_gradient(self, at: Tensor | None = None) -> tuple[float, Tensor]:
        """Return the loss and its gradient, ``(n,)``, at ``at`` or at the parameters as they are.

        Raises:
            NonFiniteError: If the loss or the gradient of a batch is NaN or infinite.
        """
        with self.session():
            leaves = self._functional.leaves(at)
            loss, gradient = self._functional.inside(
                self._functional.places(leaves), lambda: self._value_and_gradient(leaves)
            )
            if at is None:
                self._loss = loss
            return loss, gradient

    def gradient(self, at: Tensor | None = None) -> Tensor:  # -> (n,)
        """Return the gradient at ``at`` or at the parameters as they are."""
        return self.value_and_gradient(at)[1]

    def hvp(self, v: Tensor) -> Tensor:  # (n,) -> (n,)
        """Return the product of the Hessian at the parameters as they are with ``v``; one pass over the data.

        Raises:
            NonFiniteError: If the loss, gradient or product of a batch is NaN or infinite.
            ModelError: If an operation of the model has no second derivative.
        """
        with self.session():
            self.parameters.check(v)
            leaves = self._current_leaves()
            return self._functional.inside(self._functional.places(leaves), lambda: self._hvp(leaves, v))

    def product_error(self, rows: Tensor) -> float | None:  # (k, n)
        """Return by how much rounding moves products with the rows: their distance from those in float64.

        Measured on the first samples only. Zero for a float64 model; ``None`` if the model cannot run in float64.
        """
        if self.dtype == torch.float64:
            return 0.0
        v = rows.sum(dim=0)  # stands for each of them: the error of any one shows up in it
        left, weight = _SAMPLES, 0.0
        error = torch.zeros(self.n, dtype=torch.float64, device=self.device)
        with self.session():
            for _, batch in self.batches.walk():
                found = self._error_on(first_samples(batch, left), v) or self._error_on(batch, v)
                if found is None:
                    return None
                error += found[0]
                weight += found[1]
                left -= len(next(iter(tensors_in(batch)), "1"))
                if left <= 0:
                    break
        return float(torch.linalg.vector_norm(error)) / weight if weight else None

    def _error_on(self, batch: Any, v: Tensor) -> tuple[Tensor, float] | None:
        """Return the float64 less the float32 product on one batch, times its weight; ``None`` if they fail."""
        products = []
        for dtype in (torch.float32, torch.float64):
            reseed(self.seed, 0, 0)
            try:
                products.append(self._functional.product(batch, v, dtype))
            except (
                RuntimeError,
                ValueError,
                IndexError,
                TypeError,
            ):  # a dtype, or a batch size, written into the model
                return None
        (single, weight), (double, _) = products
        return double - single, weight

    def check(self) -> None:
        """Warn, with the measured difference, if the loss is not the same on another walk over the data.

        Costs two forward passes, or one after a product; the outcome is remembered.
        """
        with self.session():
            if self._checked:
                return
            first = self._evaluate(None).loss if self._loss is None else self._loss
            again = self._evaluate(None, draw=1).loss
            self._loss, self._checked = first, True
            if abs(first - again) > _SLACK[self.dtype] * max(abs(first), abs(again), 1e-3):
                warn(
                    f"the loss changes from pass to pass: {first:.6g}, then {again:.6g} (difference "
                    f"{abs(first - again):.2g}). The answer is that of one fixed draw. Turn off augmentation and "
                    "dropout, and do not shuffle together with max_batches or with batch statistics.",
                    DeterminismWarning,
                )

    def release(self) -> None:
        """Forget the graphs kept between products."""
        self._graphs, self._leaves, self._snapshot, self._budget = {}, [], None, None
        self._loss = None

    def provenance(self) -> dict[str, Any]:
        """Return what the objective resolved to, for a result's ``settings``."""
        return {
            "loss": self.criterion.name,
            "mode": self.mode,
            "seed": self.seed,
            "n": self.n,
            "dtype": str(self.dtype),
            "device": str(self.device),
            "num_terms": self.num_terms,
            "num_batches": self.batches.count,
            "max_batches": self.max_batches,
            "kept_graphs": len(self._graphs),
            "unused_parameters": list(self.unused),
            "torch": torch.__version__,
        }

    @contextmanager
    def session(self) -> Iterator[None]:
        """Hold the model in the mode to measure it in; on leaving it is as it was. Sessions may be nested."""
        if self._depth:
            with torch.enable_grad():
                yield
            return
        with guarded(self.model, self.mode, self.device, self.batches.generators()):
            stale = self._snapshot is None or not all(map(torch.equal, self._snapshot, self._functional.state()))
            if stale:
                self.release()
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def _evaluate(self, at: Tensor | None, *, draw: int = 0, tensors: Mapping[str, Tensor] | None = None) -> Evaluation:
        total = weight = correct = counted = 0.0
        classes = True
        # Not under no_grad: a forward pass may take derivatives of its own.
        leaves = self._functional.leaves(at, differentiable=False)
        for _, terms in self._terms(leaves, draw=draw, tensors=tensors):
            total, weight = total + terms.total.item(), weight + terms.weight
            if terms.correct is None or terms.counted is None:
                classes = False
            else:
                correct, counted = correct + terms.correct, counted + terms.counted
        return Evaluation(loss=total / weight, accuracy=correct / counted if classes and counted else None)

    def _value_and_gradient(self, leaves: list[Tensor]) -> tuple[float, Tensor]:
        total, weight, gradient = 0.0, 0.0, BatchSum(self.parameters, "gradient")
        used: set[int] = set()
        for i, terms in self._terms(leaves):
            total, weight = total + terms.total.item(), weight + terms.weight
            gradients = torch.autograd.grad(terms.total, leaves, allow_unused=True)
            used |= {j for j, g in enumerate(gradients) if g is not None}
            gradient.add(i, gradients)
        _require_dependence(used)
        return total / weight, gradient.divided_by(weight)

    def _hvp(self, leaves: list[Tensor], v: Tensor) -> Tensor:
        directions = self.parameters.split(v.detach())
        total, weight, product = 0.0, 0.0, BatchSum(self.parameters, "Hessian-vector product")
        used: frozenset[int] = frozenset()
        for i, graph, keep in self._first_orders(leaves):
            total, weight, used = total + graph.total, weight + graph.weight, used | graph.used
            product.add(i, graph.product(leaves, directions, keep=keep))
        _require_dependence(used)
        self._loss = total / weight
        self.unused = tuple(name for i, name in enumerate(self.parameters.names) if i not in used)
        return product.divided_by(weight)

    def _terms(
        self,
        leaves: Sequence[Tensor],
        *,
        draw: int = 0,
        tensors: Mapping[str, Tensor] | None = None,
        skip: Mapping[int, Any] | None = None,
    ) -> Iterator[tuple[int, Terms]]:
        """Walk the data once and yield the position and the terms of each batch that has any, but for ``skip``."""
        self.num_passes += 1
        self.batches.settle(self._room())
        places = self._functional.places(leaves, tensors)
        renewed = any(module.training for module in self.model.modules())
        found = 0.0
        for i, batch in self.batches.walk(draw=draw):
            if skip is not None and i in skip:
                found += skip[i].weight
                continue
            if renewed:  # batch norm and its like write to their buffers
                places = self._functional.places(leaves, tensors)
            reseed(self.seed, draw, i)
            terms = self._functional.terms(batch, places)
            if terms.weight == 0:
                continue
            found += terms.weight
            _require_finite(i, terms)
            if leaves[0].requires_grad and not terms.total.requires_grad:
                _require_dependence(())
            yield i, terms
        if found == 0:
            raise DataError("the loader holds no loss term: every batch has weight 0. Check ignore_index and weights.")
        self.num_terms = found

    def _current_leaves(self) -> list[Tensor]:
        """Return the leaves of the kept graphs, or new ones."""
        self.batches.settle(self._room())
        if self._snapshot is None:
            self._leaves = self._functional.leaves()
            if self.batches.kept:
                self._snapshot = [tensor.detach().clone() for tensor in self._functional.state()]
        return self._leaves

    def _first_orders(self, leaves: list[Tensor]) -> Iterator[tuple[int, FirstOrder, bool]]:
        """Yield the position and the first-order graph of each batch, and whether the graph must survive.

        Graphs are kept only if the batches themselves are, since another walk may group the samples otherwise.
        """
        kept = dict(self._graphs)
        yield from ((i, graph, True) for i, graph in kept.items())
        if kept and len(kept) == self.batches.count:
            self.num_passes += 1
            return
        room = self.batches.kept and not kept
        for i, terms in self._terms(leaves, skip=kept):
            graph = FirstOrder.of(terms, leaves)
            if i == 0:  # the same operations for every batch
                graph.require_differentiable()
            room = room and self._room().take(graph.tensors())
            if room:
                self._graphs[i] = graph
            yield i, graph, room

    def _room(self) -> Budget:
        """Return what memory there is to keep batches and graphs."""
        if self._budget is None:
            self._budget = Budget(self.memory, self.device, [*self.model.parameters(), *self.model.buffers()])
            self._budget.take(self.batches.tensors())
        return self._budget


def _require_finite(i: int, terms: Terms) -> None:
    if not math.isfinite(terms.total.item()):
        raise NonFiniteError(
            f"the loss of batch {i} (counted from 0) is {terms.total.item()}. "
            "Check this batch for NaN, and the weights for overflow."
        )


def _require_dependence(used: Collection[int]) -> None:
    """Refuse a loss that none of the parameters has a part in."""
    if not used:
        raise ModelError(
            "the loss does not depend on the parameters that are measured. Look for .detach(), .item() and "
            "torch.no_grad() in the model and the loss, and at params=..."
        )
