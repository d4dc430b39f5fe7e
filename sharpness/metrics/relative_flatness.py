"""Relative flatness of a layer (Petzka et al. 2021)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from sharpness._checks import check_choice, check_count, nearest
from sharpness._progress import progress_bar
from sharpness.errors import ArgumentError
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.metrics.door import open_objective, provenance
from sharpness.metrics.perturbation import standard_error
from sharpness.metrics.rows import Rows
from sharpness.objective import Objective
from sharpness.objective.guard import derived_seed
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.results import ScalarResult

FlatnessMethod: TypeAlias = Literal["auto", "exact", "hutchinson"]
METHODS = ("auto", "exact", "hutchinson")
_BLOCK = 16  # vectors per pass over the data
_SAMPLES = 64
_RANK = 1e-12  # singular values below this share of the largest are rounding


def relative_flatness(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    layer: str | None = None,
    method: FlatnessMethod = "auto",
    num_samples: int | None = None,
    batch_loss: BatchLoss | None = None,
    params: ParameterChoice | None = None,
    mode: str = "eval",
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    on_failure: OnFailure = "warn",
    memory: int | str = "auto",
    microbatch_size: int | None = None,
    precision: str = "exact",
    compile: bool | str = "auto",
) -> ScalarResult:
    r"""Compute the relative flatness of a layer: the trace of the Hessian weighed by the layer's own weights.

    .. math:: \kappa = \sum_{s, s'} \langle w_s, w_{s'} \rangle \, \mathrm{tr}(H_{s s'})

    with :math:`w_s` the rows of the layer's weights, each what feeds one output unit (a filter of a convolution is a
    row), and :math:`H_{s s'}` the block of the Hessian that belongs to the rows ``s`` and ``s'``. Large means sharp.
    For any factor :math:`F F^\top = W W^\top` with ``r`` columns :math:`f_i` it is the sum of the quadratic forms of
    :math:`f_i e_j^\top` over ``i`` and the ``m`` columns ``j`` of ``W``: ``r m`` products in all. Where these are too
    many it is estimated from random matrices :math:`F Z` with independent signs ``Z``, whose quadratic forms have this
    mean.

    Invariant to: rescaling of whole layers, and of the layer's own neurons (its rows), that leaves the function as it
    is; the scale of weights before a normalisation. Not to rescaling of the neurons *before* the layer (its columns).
    It is multiplied by ``c`` with the loss.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        layer: Name of a module with a weight matrix, or of a parameter; ``None`` takes the last matrix that is measured
            and that the loss depends on, as the paper does. The record names it.
        method: ``"exact"``, ``"hutchinson"``, or ``"auto"``: exact where that takes at most ``4 num_samples`` products.
        num_samples: Random vectors of the estimate; ``None`` means 64.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the answer is then about this subset.
        seed: Same call, same bits; models with the same seed get the same random numbers.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` has no part here, since there always is an answer.
        memory: Bytes (or ``"2GiB"``) of batches that may be kept between evaluations.
        microbatch_size: Cut each batch into pieces of at most so many samples.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Returns:
        The number, with a standard error where it was estimated.

    Raises:
        ArgumentError: If an option cannot be accepted.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If a loss or gradient is NaN or infinite; names the batch.
        ModelError: If the loss cannot be differentiated twice.

    Cost: ``min(rows, m) m`` products with the layer's block of the Hessian at most, or ``num_samples``; 16 of them in
    one pass over the data, with a few vectors of the layer's size for each. Where ``F`` is not ``W`` itself it takes of
    the order of ``min(rows, m)^2 max(rows, m)`` operations.

    References:
        Petzka et al. (2021), arXiv 2001.00939.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = [(torch.eye(2), torch.ones(2, 1))]
        >>> round(sharpness.relative_flatness(model, data).value, 5)  # |w|^2 tr(H) = 2 x 2
        4.0
    """
    if layer is not None and not isinstance(layer, str):
        raise ArgumentError(f"`layer` must be the name of a module or a parameter, got {layer!r}.")
    check_choice("method", method, METHODS)
    if method == "exact" and num_samples is not None:
        raise ArgumentError(
            f'`num_samples` is for the estimate, got {num_samples!r} with method="exact". Leave one of the two out.'
        )
    num_samples = _SAMPLES if num_samples is None else check_count("num_samples", num_samples, low=2)
    check_on_failure(on_failure)
    objective = open_objective(model, loader, loss_fn, locals())
    started, passes = time.perf_counter(), objective.num_passes
    positions = _positions(objective, layer)
    with objective.session():
        for position in positions:
            found = _measure(objective, position, method, num_samples)
            if objective.parameters.names[position] not in objective.unused:
                break
        objective.check()
    name, exact, forms = (
        objective.parameters.names[position],
        found.exact,
        torch.tensor(found.forms, dtype=torch.float64),
    )
    return ScalarResult(
        value=forms.sum().item() if exact else forms.mean().item(),
        stderr=None if exact else standard_error(forms),
        samples=None if exact else forms,
        about=name,
        num_evaluations=len(forms),
        num_passes=objective.num_passes - passes,
        seconds=time.perf_counter() - started,
        settings=provenance(
            objective,
            {
                "metric": "relative_flatness",
                "layer": name,
                "shape": list(objective.parameters.shapes[position]),
                "method": "exact" if exact else "hutchinson",
                "num_samples": None if exact else num_samples,
            },
        ),
    )


@final
@dataclass(frozen=True)
class _Forms:
    exact: bool
    forms: list[float]


def _measure(objective: Objective, position: int, method: str, num_samples: int) -> _Forms:
    """Return the quadratic forms whose sum, or mean, is the relative flatness of one matrix."""
    name, shape = objective.parameters.layout[position]
    rows = Rows(objective.model, name, shape)
    weights = rows.of(objective.parameters.split(objective.vector())[position])
    columns, smaller = weights.shape[1], min(weights.shape)
    exact = method == "exact" or (method == "auto" and smaller * columns <= 4 * num_samples)
    factor = _factor(weights, minimal=exact)  # (rows, r)
    total = factor.shape[1] * columns if exact else num_samples

    def vector(i: int) -> Tensor:
        if exact:
            matrix = torch.zeros_like(weights)
            matrix[:, i % columns] = factor[:, i // columns]
        else:
            generator = torch.Generator().manual_seed(derived_seed(objective.seed, i))
            signs = torch.randint(2, (factor.shape[1], columns), generator=generator, dtype=torch.int8) * 2 - 1
            matrix = factor @ signs.to(factor)
        return rows.back(matrix).reshape(-1)

    forms: list[float] = []
    with progress_bar(objective.progress, total=total, title="relative flatness", unit="product") as bar:
        for first in range(0, total, _BLOCK):
            vectors = [vector(i) for i in range(first, min(first + _BLOCK, total))]
            products = objective.products(vectors, blocks=[[position]] * len(vectors))
            forms += [torch.sum(v.double() * p.double()).item() for v, p in zip(vectors, products, strict=True)]
            bar.update(len(vectors))
            if name in objective.unused:
                return _Forms(True, [0.0])
    return _Forms(exact, forms or [0.0])


def _factor(weights: Tensor, *, minimal: bool) -> Tensor:  # (rows, columns) -> (rows, r)
    """Return ``F`` with ``F F' = W W'``, of no more columns than rows; of as many as the rank if ``minimal``."""
    if not minimal and weights.shape[0] >= weights.shape[1]:
        return weights
    if not minimal:  # W = L Q
        lower: Tensor = torch.linalg.qr(weights.double().T, mode="r").R.T
        return lower.to(weights)
    left, values, _ = torch.linalg.svd(weights.double(), full_matrices=False)
    kept = values > _RANK * values[0]
    factor: Tensor = left[:, kept] * values[kept]
    return factor.to(weights)


def _positions(objective: Objective, layer: str | None) -> list[int]:
    """Return where the layer's weights are among the parameters that are measured; for no name, the last ones first."""
    names = objective.parameters.names
    matrices = [i for i, shape in enumerate(objective.parameters.shapes) if len(shape) >= 2]
    if layer is None:
        if not matrices:
            raise ArgumentError("`layer`: none of the parameters measured is a matrix, which relative flatness needs.")
        return matrices[::-1]
    if layer in names and names.index(layer) not in matrices:
        raise ArgumentError(f"`layer`: {layer!r} is a vector, and a matrix is needed. Name the layer's weight.")
    everything = dict(objective.model.named_parameters(remove_duplicate=False))  # a tied parameter has several names
    tensors = {id(p) for name, p in everything.items() if name == layer or name.rpartition(".")[0] == layer}
    found = [i for i in matrices if id(everything[names[i]]) in tensors]
    if len(found) != 1:
        options = [names[i] for i in found or matrices]
        raise ArgumentError(
            f"`layer`: {layer!r} names {'several weight matrices' if found else 'no weight matrix that is measured'}. "
            f"Pass one of {', '.join(map(repr, options[:8]))}.{nearest(layer, options)}"
        )
    return found
