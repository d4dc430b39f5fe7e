r"""A model, a loss and data as one twice-differentiable function of a flat parameter vector.

With :math:`\ell_t` the loss terms of all batches, :math:`f(\theta) = \frac{1}{T} \sum_{t=1}^{T} \ell_t(\theta)`: every
batch is weighted by its own number of terms, so any split of the same data gives the same function. Hessian-vector
products differentiate twice in reverse (Pearlmutter 1994). The graph of the first differentiation is kept between
products while memory lasts, which saves two of the four passes that a product costs otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from sharpness._checks import check_choice, check_compile, check_count, check_memory, check_seed
from sharpness._progress import check_progress
from sharpness._warn import warn
from sharpness.errors import ArgumentError, DeterminismWarning
from sharpness.objective.compiler import Compiler
from sharpness.objective.curvature import HESSIAN, Curvature
from sharpness.objective.data import Batches
from sharpness.objective.estimate import GraphSize, graph_size
from sharpness.objective.evaluation import Evaluation, evaluate, value_and_gradient
from sharpness.objective.fingerprint import fingerprint
from sharpness.objective.functional import Functional
from sharpness.objective.guard import MODES, guarded
from sharpness.objective.kernels import PRECISIONS, check_autocast
from sharpness.objective.losses import BatchLoss, Criterion
from sharpness.objective.microbatch import check_no_batch_statistics, check_pieces
from sharpness.objective.parameters import ParameterChoice, choose
from sharpness.objective.passes import Passes
from sharpness.objective.products import Products, Request
from sharpness.objective.reduction import LossFn
from sharpness.objective.rounding import product_error
from sharpness.objective.wrappers import unwrap

T = TypeVar("T")
_IDENTITY = ("mode", "seed", "max_batches", "skip_batches", "memory", "microbatch_size", "precision")
_SLACK = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative change of the loss by another order of summation


@final
class Objective:
    """The loss of a model over data, as a function of the flat vector of its parameters.

    The model is never changed: it is evaluated with other tensors in its parameters' and buffers' places, and its
    flags and all random states are restored after each call. Nothing is computed at construction. After the weights,
    buffers or flags of the model, or the tensors of the criterion, have changed, the objective is that of the model as
    it is then; after anything else has (data changed in place, a Python attribute), call `release`.

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
        max_batches: Use only so many batches, the first ones after ``skip_batches`` that are left out.
        skip_batches: See ``max_batches``.
        seed: Seed of everything random; the global generators are left alone.
        progress: Show progress bars; ``None`` shows them on a terminal after two seconds.
        memory: Bytes (or ``"2GiB"``) to keep between products; ``"auto"`` keeps up to half of what is free.
        microbatch_size: Cut each batch into pieces of at most so many samples. The loss stays what it is; that is
            checked on the first batch, and refused where batch statistics would change it.
        precision: ``"exact"`` switches off autocast and TensorFloat-32, whatever the settings around the call;
            ``"tf32"`` allows the latter; ``"bfloat16"`` and ``"float16"`` run the forward pass under autocast.
        compile: ``"auto"`` compiles products, or loads the code that an earlier run has left, where that is likely to
            save time; ``True`` does so in any case, ``False`` never.

    Attributes:
        model: The module itself, without wrappers.
        parameters: Which parameters are measured, and how they line up in a vector.
        passes: Walks over the data, which count themselves.
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
        skip_batches: int = 0,
        seed: int = 0,
        progress: bool | None = None,
        memory: int | str = "auto",
        microbatch_size: int | None = None,
        precision: str = "exact",
        compile: bool | str = "auto",
    ) -> None:
        self._given = {name: value for name, value in locals().items() if name not in ("self", "model")}
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        self.model = unwrap(model)
        self.mode = check_choice("mode", mode, MODES)
        self.skip_batches = check_count("skip_batches", skip_batches, low=0)
        self.max_batches = None if max_batches is None else check_count("max_batches", max_batches)
        self.seed = check_seed(seed)
        self.progress = check_progress(progress)
        self.memory = check_memory(memory)
        self.microbatch_size = None if microbatch_size is None else check_count("microbatch_size", microbatch_size)
        self.precision = check_choice("precision", precision, PRECISIONS)
        self.compile = check_compile(compile)
        self.criterion = Criterion(loss_fn, batch_loss)
        self.parameters = choose(self.model, params)
        check_autocast(self.precision, self.dtype)
        self.batches = Batches(
            loader,
            device=self.parameters.entrance,
            skip=self.skip_batches,
            max_batches=self.max_batches,
            seed=self.seed,
            uniform=batch_loss is None,
            piece=self.microbatch_size,
        )
        self.unused: tuple[str, ...] = ()
        self.functional = Functional(self.model, self.criterion, self.parameters, self.precision)
        self.passes = Passes(self.model, self.functional, self.batches, seed=self.seed, memory=self.memory)
        if self.microbatch_size is not None:
            check_no_batch_statistics(self.model, self.mode)
        self._pieces_checked = self.microbatch_size is None
        self._depth = 0
        self._compiler = Compiler(self.compile, self.precision)
        self._engines: dict[Curvature, Products] = {}
        self._leaves: list[Tensor] = []
        self._snapshot: list[Tensor] | None = None  # what the kept graphs were made for
        self._loss: float | None = None
        self._checked = False

    @property
    def num_passes(self) -> int:
        """Return the number of passes over the data so far."""
        return self.passes.count

    @property
    def num_terms(self) -> float | None:
        """Return the number of loss terms in the data, once walked."""
        return self.passes.num_terms

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

    def reserve(self, size: int) -> None:
        """Keep so many bytes of ``memory`` free of data and graphs; what is kept is forgotten if that changes."""
        if size != self.passes.reserved:
            self.passes.reserved = size
            self.release()

    def graph_size(self, curvature: Curvature = HESSIAN, *, unless: float = 0.0) -> GraphSize | None:
        """Return the memory that the graph of the first batch takes; ``None`` if that has at most ``unless`` bytes."""
        with self.session():
            self.batches.settle(self.passes.room())
            sample = self.batches.sample
            if sample is None or sample.bytes <= unless:
                return None
            return graph_size(self.functional, sample, curvature, self.seed)

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the function: digests of data and weights, and the options; one walk over the data."""
        with self.session():
            self.passes.count += 1
            return {
                **fingerprint(self.model, self.batches, self._given["loss_fn"] or self._given["batch_loss"]),
                "parameters": list(self.parameters.names),
                **{name: getattr(self, name) for name in _IDENTITY},
            }

    def restricted(self, block: Sequence[int]) -> Objective:
        """Return the objective as a function of some of its parameters, by position; the others are held fixed."""
        return self._again(params=[self.parameters.names[i] for i in block])

    def held_out(self) -> Objective:
        """Return the same objective on the next ``max_batches`` batches of the loader."""
        return self._again(skip_batches=self.skip_batches + (self.max_batches or 0), memory=0)

    def _again(self, **changes: Any) -> Objective:
        other = Objective(self.model, **{**self._given, **changes})
        other.criterion.adopt(self.criterion)
        return other

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
            found = evaluate(self.passes, self.functional.leaves(at, differentiable=False), tensors=tensors)
        self._loss = found.loss if at is None and tensors is None else self._loss
        return found

    def value(self, at: Tensor | None = None) -> float:
        """Return the loss at ``at``, ``(n,)``, or at the parameters as they are; one forward pass."""
        return self.evaluate(at).loss

    def value_and_gradient(self, at: Tensor | None = None) -> tuple[float, Tensor]:
        """Return the loss and its gradient, ``(n,)``, at ``at`` or at the parameters as they are.

        Raises:
            NonFiniteError: If the loss or the gradient of a batch is NaN or infinite.
        """
        with self.session():
            leaves = self.functional.leaves(at)
            loss, gradient = self.functional.inside(
                self.functional.places(leaves), lambda: value_and_gradient(self.passes, leaves, self.parameters)
            )
            if at is None:
                self._loss = loss
            return loss, gradient

    def gradient(self, at: Tensor | None = None) -> Tensor:  # -> (n,)
        """Return the gradient at ``at`` or at the parameters as they are."""
        return self.value_and_gradient(at)[1]

    def hvp(self, v: Tensor) -> Tensor:  # (n,) -> (n,)
        """Return the product of the Hessian at the parameters as they are with ``v``; see `products`."""
        return self.products([v])[0]

    def products(
        self,
        vectors: Sequence[Tensor],
        *,
        curvature: Curvature = HESSIAN,
        blocks: Sequence[Sequence[int]] | None = None,
        expected: int | None = None,
    ) -> list[Tensor]:
        """Return the product of a curvature matrix with each vector; one pass over the data for all of them.

        Args:
            vectors: ``(n,)`` each, or with the entries of its block.
            curvature: Which matrix.
            blocks: For each vector the positions in `parameters` of the diagonal block to multiply by; all if ``None``.
            expected: About how many products are to come, these included, which decides what is worth preparing;
                ``None`` takes them to be as many as there were.

        Raises:
            NonFiniteError: If the loss, gradient or product of a batch is NaN or infinite.
            ModelError: If an operation of the model has no second derivative.
            ArgumentError: If the loss tells too little for this curvature.
        """
        self.require(curvature)
        wanted = [Request.of(self.parameters, v, None if blocks is None else blocks[i]) for i, v in enumerate(vectors)]
        with self.session():
            found = self._with_graphs(curvature, lambda e, leaves: e.multiply(self.passes, leaves, wanted, expected))
            engine = self._engines[curvature]
            self._loss = engine.loss
            self.unused = tuple(name for i, name in enumerate(self.parameters.names) if i not in engine.used)
            return found

    def quadratic_forms(self, v: Tensor, *, curvature: Curvature = HESSIAN) -> tuple[Tensor, Tensor]:
        """Return ``v' H_b v`` for the mean loss of each batch ``b``, and the batches' weights; one pass."""
        self.require(curvature)
        request = Request.of(self.parameters, v)
        with self.session():
            forms = self._with_graphs(curvature, lambda engine, leaves: engine.forms(self.passes, leaves, request))
            values, weights = zip(*forms, strict=True)
            return torch.tensor(values, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)

    def require(self, curvature: Curvature) -> None:
        """Refuse a curvature that this loss does not define.

        Raises:
            ArgumentError: If it is defined by the model's outputs, and a ``batch_loss`` hides them.
        """
        if curvature.name != "hessian" and self.criterion.hides_outputs:
            raise ArgumentError(
                f'curvature="{curvature.name}" is defined by the outputs of the model, and a batch_loss hides them. '
                'Pass loss_fn=callable(outputs, targets) in its place, or curvature="hessian".'
            )

    def product_error(
        self, rows: Tensor, *, curvature: Curvature = HESSIAN, block: Sequence[int] | None = None
    ) -> float | None:  # (k, n)
        """Return by how much rounding moves products with the rows: their distance from those in float64.

        Measured on the first samples only. Zero for a float64 model; ``None`` if the model cannot run in float64.
        ``block`` is the positions of the parameters that the rows belong to, all if ``None``.
        """
        if self.dtype == torch.float64:
            return 0.0
        summed = rows.sum(dim=0)  # stands for each of them: the error of any one shows up in it
        request = Request.of(self.parameters, summed, block)
        with self.session():
            return product_error(self.functional, self.batches, curvature, request, self.seed)

    def check(self) -> None:
        """Warn, with the measured difference, if the loss is not the same on another walk over the data.

        Costs two forward passes, or one after a product; the outcome is remembered.
        """
        with self.session():
            if self._checked:
                return
            first = self.value() if self._loss is None else self._loss
            again = evaluate(self.passes, self.functional.leaves(differentiable=False), draw=1).loss
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
        self._engines, self._leaves, self._snapshot, self._loss = {}, [], None, None
        self.passes.forget()

    def provenance(self, curvature: Curvature | None = None) -> dict[str, Any]:
        """Return what the objective resolved to, for a result's ``settings``; how products were made, if asked for."""
        engine = None if curvature is None else self._engines.get(curvature)
        return {
            **({} if engine is None else engine.provenance()),
            "loss": self.criterion.label,
            "mode": self.mode,
            "seed": self.seed,
            "n": self.n,
            "dtype": str(self.dtype),
            "device": str(self.device),
            "num_terms": self.num_terms,
            "num_batches": self.batches.loaded,
            "max_batches": self.max_batches,
            "microbatch_size": self.microbatch_size,
            "precision": self.precision,
            "kept_graphs": sum(len(engine.kept) for engine in self._engines.values()),
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
        with guarded(self.model, self.mode, self.device, self.batches.generators(), self.precision):
            self.functional.check_unmoved()
            if self._snapshot is None or not all(map(torch.equal, self._snapshot, self.functional.state())):
                self.release()
            self._depth += 1
            try:
                if not self._pieces_checked:
                    check_pieces(self.functional, self.batches, self.seed)
                    self._pieces_checked = True
                yield
            finally:
                self._depth -= 1

    def _with_graphs(self, curvature: Curvature, use: Callable[[Products, list[Tensor]], T]) -> T:
        """Return ``use(engine, leaves)``, run with the leaves of the kept graphs, or new ones, in their places."""
        self.batches.settle(self.passes.room())
        if self.batches.kept and self._snapshot is None:
            self._leaves = self.functional.leaves()
            self._snapshot = [tensor.detach().clone() for tensor in self.functional.state()]
        leaves = self._leaves or self.functional.leaves()
        engine = self._engines.setdefault(curvature, Products(curvature, self.seed, self._compiler))
        return self.functional.inside(self.functional.places(leaves), lambda: use(engine, leaves))
