"""The loss on a line or a plane through a trained model."""

from __future__ import annotations

import itertools
import math
import numbers
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sharpness._checks import check_choice, check_count
from sharpness._progress import progress_bar
from sharpness.comparison.directions import all_tensors, filter_normalised, require_alike
from sharpness.errors import ArgumentError
from sharpness.metrics import top_eigenvalues
from sharpness.metrics.door import open_objective, provenance
from sharpness.objective import Objective
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.objective.surface import as_direction, evaluate_anywhere
from sharpness.results import LandscapeResult
from sharpness.results.eigen import as_float64

Directions: TypeAlias = "str | Sequence[nn.Module | Tensor | Sequence[Tensor] | Mapping[str, Tensor]]"
Point: TypeAlias = "tuple[float, ...]"
KINDS = ("filter", "eigenvectors")


def landscape(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    directions: Directions = "filter",
    dims: int = 1,
    extent: float | tuple[float, float] = 1.0,
    steps: int = 51,
    batch_loss: BatchLoss | None = None,
    params: ParameterChoice | None = None,
    mode: str = "eval",
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    memory: int | str = "auto",
    microbatch_size: int | None = None,
    precision: str = "exact",
    compile: bool | str = "auto",
) -> LandscapeResult:
    r"""Evaluate the loss on a grid through a model, :math:`f(\theta + \alpha d_1 + \beta d_2)`.

    ``"filter"`` draws the random directions of Li et al.: Gaussian, each filter (the weights that make one output)
    scaled to the length of that of the weights, biases and the weights of normalisations held fixed. Coordinates then
    mean the same for models with other scales of their layers. Two such directions are nearly orthogonal in many
    dimensions and are left as they are drawn; ``cosine`` says how nearly. ``"eigenvectors"`` takes the unit
    eigenvectors of the largest Hessian eigenvalues, along which the loss rises most. A list of one or two other
    *models* spans the line or plane through them: they are at the coordinates (1, 0) and (0, 1), where the loss is
    theirs exactly; floating-point buffers (running statistics) move along with the weights.

    The grid is exact: the loss at each coordinate is that of the weights moved by it, and the one at 0 is that of the
    model. Nothing is smoothed, clipped or filled in; a loss that is NaN or infinite is in the result as such. A picture
    shows two of very many directions: what is flat in it may be sharp elsewhere.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        directions: ``"filter"``, ``"eigenvectors"``, or a list of ``dims`` models or directions; a direction is a list
            of tensors in the order of the parameters that are measured, a mapping from their names, or one vector.
        dims: 1 for a line, 2 for a plane.
        extent: Coordinates reach from minus this to this, or from the first to the second of two numbers.
        steps: Points along each direction; odd, so that the model is one of them, where they are symmetric.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose the parameters that move.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches.
        seed: Same call, same bits; models of one shape and the same seed get directions from the same random numbers.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        memory: Bytes (or ``"2GiB"``) of batches that may be kept between evaluations.
        microbatch_size: Cut each batch into pieces of at most so many samples.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Returns:
        Coordinates, losses and accuracies, lengths of the directions, and the cosine between them.

    Raises:
        ArgumentError: If an option cannot be accepted, or another model has another architecture.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If the loss of the model as it is is NaN or infinite; names the batch.

    Cost: ``steps ** dims + 1`` forward passes over the data; for ``"eigenvectors"`` also `top_eigenvalues`.

    References:
        Li et al. (2018), arXiv 1712.09913, section 4, and the authors' code; Goodfellow et al. (2015), arXiv 1412.6544.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = [(torch.ones(1, 1), torch.zeros(1, 1))]  # f = w^2
        >>> sharpness.landscape(model, data, directions=[[torch.ones(1, 1)]], steps=3).loss
        tensor([0., 1., 4.], dtype=torch.float64)
    """
    dims = check_count("dims", dims, high=2, of="a plane")
    steps = check_count("steps", steps, low=2)
    coordinates = _coordinates(extent, steps)
    if isinstance(directions, str):
        check_choice("directions", directions, KINDS)
    elif not isinstance(directions, (list, tuple)) or len(directions) != dims:
        got = (
            f"{len(directions)} of them" if isinstance(directions, (list, tuple)) else f"a {type(directions).__name__}"
        )
        raise ArgumentError(
            f'`directions` must be "filter", "eigenvectors" or a list of dims={dims} models or directions, got {got}.'
        )
    objective = open_objective(model, loader, loss_fn, locals())
    kind = directions if isinstance(directions, str) else "given directions"
    eigenvalues = None
    if not isinstance(directions, str) and any(isinstance(item, nn.Module) for item in directions):
        kind = "other models"
        flats, at = _through(objective, directions)
    elif not isinstance(directions, str):
        flats = [as_direction(objective, item, "directions") for item in directions]
        at = _along(objective, flats)

    started, passes = time.perf_counter(), objective.num_passes
    with objective.session():
        if kind == "filter":
            flats = [filter_normalised(objective, i) for i in range(dims)]
            if not all(bool(flat.any()) for flat in flats):
                raise ArgumentError(
                    'directions="filter" moves weights of two dimensions or more, and none of them is measured, or all '
                    "are zero. Pass directions=[...] instead."
                )
        elif kind == "eigenvectors":
            found = top_eigenvalues(objective, k=check_count("dims", dims, high=objective.n), vectors=True)
            eigenvalues = found.eigenvalues
            flats = list(found.eigenvectors) if found.eigenvectors is not None else []
        if isinstance(directions, str):
            at = _along(objective, flats)
        center = objective.value()
        grid = list(itertools.product(coordinates, repeat=dims))
        evaluations = []
        with progress_bar(objective.progress, total=len(grid), title="landscape", unit="point") as bar:
            for point in grid:
                evaluations.append(evaluate_anywhere(objective, tensors=at(point)))
                bar.update()
        objective.check()
        accuracies = [e.accuracy for e in evaluations if e.accuracy is not None]
        whole = len(accuracies) == len(grid)
        wide = [flat.cpu().double() for flat in flats]
        lengths = [float(torch.linalg.vector_norm(flat)) for flat in wide]
        return LandscapeResult(
            coordinates=as_float64(coordinates),
            loss=as_float64([e.loss for e in evaluations]).view([steps] * dims),
            accuracy=as_float64(accuracies).view([steps] * dims) if whole else None,
            center=center,
            direction_norms=as_float64(lengths),
            cosine=float(torch.dot(*wide)) / (lengths[0] * lengths[1]) if dims == 2 else None,
            eigenvalues=eigenvalues,
            num_evaluations=1 + len(grid),
            num_passes=objective.num_passes - passes,
            seconds=time.perf_counter() - started,
            settings=provenance(objective, {"directions": kind, "dims": dims, "steps": steps}),
        )


def _coordinates(extent: Any, steps: int) -> list[float]:
    """Return the coordinates, with 0 and 1 exact where they are among them.

    Raises:
        ArgumentError: If the extent is none, or the model would not be on a symmetric grid.
    """
    both = extent if isinstance(extent, (tuple, list)) else (-extent if _is_real(extent) else extent, extent)
    if len(both) != 2 or not all(map(_is_real, both)) or not both[0] < both[1]:
        raise ArgumentError(
            f"`extent` must be a finite number above 0, or two numbers (low, high) in this order, got {extent!r}."
        )
    low, high = map(float, both)
    if low == -high and steps % 2 == 0:
        raise ArgumentError(f"`steps` must be odd, so that the model is on the grid, got {steps}. Pass {steps + 1}.")
    last = steps - 1
    found = [(low * (last - i) + high * i) / last for i in range(steps)]
    exact = ((near, x) for x in found for near in (0.0, 1.0) if abs(x - near) < 1e-12 * (high - low))
    snapped = {x: near for near, x in exact}
    return [snapped.get(x, x) for x in found]


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _along(objective: Objective, flats: Sequence[Tensor]) -> Callable[[Point], dict[str, Tensor]]:
    """Return what the parameters are at each point, for directions in their own space."""
    center, parameters = objective.vector(), objective.parameters
    named = dict(objective.model.named_parameters())
    dtypes = [named[name].dtype for name in parameters.names]

    def at(point: Point) -> dict[str, Tensor]:
        moved = center.clone()
        for share, flat in zip(point, flats, strict=True):
            if share:
                moved += share * flat.to(center)
        if not any(point):
            return {}
        pieces = zip(parameters.split(moved), dtypes, strict=True)
        return dict(zip(parameters.names, (_in_dtype(piece, dtype) for piece, dtype in pieces), strict=True))

    return at


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in the dtype of its parameter; half precision is evaluated in single."""
    return tensor if dtype in (torch.float16, torch.bfloat16) else tensor.to(dtype)


def _through(objective: Objective, models: Sequence[Any]) -> tuple[list[Tensor], Callable[[Point], dict[str, Tensor]]]:
    """Return the directions to other models, and what parameters and buffers are at each point.

    Raises:
        ArgumentError: If one is no model, or of another architecture.
    """
    own = all_tensors(objective.model, "model")
    others = [all_tensors(model, "directions") for model in models]
    for other in others:
        require_alike(own, other)
    flats = []
    for i, other in enumerate(others):
        pieces = [other[name].to(own[name].device) - own[name] for name in objective.parameters.names]
        flats.append(objective.parameters.flatten(pieces))
        if not bool(flats[-1].any()):
            raise ArgumentError(
                f"`directions`: model {i} (counted from 0) has the weights of the model itself, and gives no direction."
            )
    trainable = {name for name, p in objective.model.named_parameters() if p.requires_grad}
    moving = set(own)
    if trainable != set(objective.parameters.names):  # only some of the parameters were to move
        moving = {*objective.parameters.names, *(name for name, _ in objective.model.named_buffers())}
    corners = {tuple(float(i == j) for j in range(len(others))): other for i, other in enumerate(others)}

    def at(point: Point) -> dict[str, Tensor]:
        if not any(point):
            return {}
        if point in corners:  # that model, to the bit
            return {name: corners[point][name].to(own[name].device, copy=True) for name in moving}
        found = {}
        for name in moving:
            here = own[name].float() if own[name].dtype in (torch.float16, torch.bfloat16) else own[name]
            if here.is_floating_point():
                shares = (s * (other[name].to(here) - here) for s, other in zip(point, others, strict=True))
                found[name] = sum(shares, here)
        return found

    return flats, at
