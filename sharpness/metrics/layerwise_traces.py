"""Trace and diagonal of every layer out of the same products: those of the whole matrix."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sharpness._checks import check_choice, check_count, check_positive
from sharpness._progress import progress_bar
from sharpness.linalg import LinearOperator, hutchinson_diagonal, xdiag
from sharpness.linalg.budget import LIMIT, budget_of, entries, is_small, most_vectors, sizes
from sharpness.linalg.confidence import half_width
from sharpness.linalg.diagonal import diagonal_of, result_of
from sharpness.linalg.leave_one_out import Grams, leave_one_out
from sharpness.linalg.probes import Probes
from sharpness.linalg.sketch import Sketch
from sharpness.metrics.door import provenance
from sharpness.metrics.estimating import plan_vectors
from sharpness.metrics.memory import warn_of_memory
from sharpness.objective import Objective
from sharpness.objective.curvature import Curvature
from sharpness.operators import CurvatureOperator
from sharpness.results import DiagonalResult, TraceResult

Slices: TypeAlias = "list[slice]"
_FIRST_VECTORS = 8  # before the first look at the tolerance
_LIKELY = 64  # vectors kept
_LEAST_VECTORS = 3
_REASON = "two for each of three random vectors"


def traces_of_layers(
    objective: Objective, groups: Mapping[str, Sequence[int]], options: Mapping[str, Any]
) -> dict[str, TraceResult]:
    """Estimate the trace of every diagonal block by leave-one-out estimates of the diagonal, summed over the block.

    The tolerance is relative to the sum over all layers of their traces in magnitude, or of the Frobenius norms of
    their blocks where these are more, so that the bars of one plot are equally true.
    """
    check_choice("method", options.get("method", "xtrace"), ("xtrace",))
    tol = check_positive("tol", options.get("tol", 0.02))
    num_matvecs, n = options.get("num_matvecs"), objective.n
    budget = budget_of(num_matvecs, min(2 * _LEAST_VECTORS, n), "xtrace", _REASON)
    curvature = Curvature(options.get("curvature", "hessian"))
    objective.require(curvature)
    where = slices_of(objective, groups)
    exact = is_small(n, num_matvecs)
    operator = _operator(objective, curvature, n if exact else num_matvecs or _LIKELY)
    most = 0 if exact else _most_vectors(objective, operator, None if num_matvecs is None else budget // 2)
    started, passes = time.perf_counter(), objective.num_passes
    total = n if exact else num_matvecs
    with objective.session(), progress_bar(objective.progress, total=total, title="traces of layers") as bar:
        if exact:
            diagonal, lengths = entries(operator, bar.update)
            rounding = 16 * torch.finfo(operator.dtype).eps * diagonal.abs().sum().item()
            found = {layer: (_sum(diagonal, own).reshape(1), 0.0) for layer, own in where.items()}
            norms = {layer: _sum(lengths, own).sqrt().item() for layer, own in where.items()}
            spent, half = n, dict.fromkeys(where, rounding)
        else:
            sketch = _sketch(objective, operator, bar.update)
            for size in sizes(min(budget // 2, most), _FIRST_VECTORS, adaptive=num_matvecs is None):
                sketch.multiply(size - sketch.size, into_basis=True)
                blocks = dict(zip(where, sketch.groups([*where.values()]), strict=True))
                estimates = {layer: leave_one_out(grams, n, sphere=False) for layer, grams in blocks.items()}
                found = {layer: (samples, variance.item()) for layer, (samples, variance) in estimates.items()}
                norms = {layer: _captured_norm(grams) for layer, grams in blocks.items()}
                half = {layer: half_width(v, size - 1, sketch.rounding) for layer, (_, v) in found.items()}
                if num_matvecs is None and max(half.values()) <= _allowed(tol, found, norms):
                    break
            spent = sketch.num_matvecs
        objective.check()
    allowed = _allowed(tol, found, norms)
    converged = {layer: width <= allowed for layer, width in half.items()}
    if num_matvecs is None and not exact and all(converged.values()) and size > _FIRST_VECTORS:
        # see `linalg.estimate`
        half = {k: (width + allowed) / 2 if 2 * width > allowed else width for k, width in half.items()}
    settings = provenance(
        objective,
        {
            "metric": "trace",
            "method": "xtrace",
            "tol": tol,
            "tol_relative_to": "the sum over all layers",
            "num_matvecs": num_matvecs,
            "limit": LIMIT if num_matvecs is None else num_matvecs,
            "shared_products": True,
            "curvature": curvature.name,
            "exact": exact,
        },
        curvature,
    )
    return {
        layer: TraceResult(
            value=samples.mean().item(),
            stderr=math.sqrt(variance),
            interval=(samples.mean().item() - half[layer], samples.mean().item() + half[layer]),
            samples=samples,
            converged=converged[layer],
            num_matvecs=spent,
            num_passes=objective.num_passes - passes,
            seconds=time.perf_counter() - started,
            settings=settings,
        )
        for layer, (samples, variance) in found.items()
    }


def diagonals_of_layers(
    objective: Objective, groups: Mapping[str, Sequence[int]], options: Mapping[str, Any]
) -> dict[str, DiagonalResult]:
    """Split one estimate of the diagonal over the layers."""
    method = check_choice("method", options.get("method", "xdiag"), ("xdiag", "hutchinson"))
    curvature = Curvature(options.get("curvature", "hessian"))
    num_matvecs, n = check_count("num_matvecs", options.get("num_matvecs", 64)), objective.n
    objective.require(curvature)
    where = slices_of(objective, groups)
    started, passes = time.perf_counter(), objective.num_passes
    asked: dict[str, Any] = {"num_matvecs": num_matvecs, "seed": objective.seed, "progress": objective.progress}
    with objective.session():
        operator = _operator(objective, curvature, num_matvecs)
        if method == "xdiag" and num_matvecs < n:
            whole, variances = _xdiag(objective, operator, where, num_matvecs)
        else:
            whole = (xdiag if method == "xdiag" else hutchinson_diagonal)(operator, **asked)
            variances = None
        objective.check()
    settings = {**whole.settings, "metric": "diagonal", "shared_products": True, "curvature": curvature.name}
    found = {}
    for layer, own in where.items():
        value, stderr = (torch.cat([t[piece] for piece in own]) for t in (whole.value, whole.stderr))
        noise = stderr.double().square().sum().item()
        # With independent vectors each pair of entries of a block is met twice in the variance of its trace, and once
        # in that of each entry; pairs with entries of other blocks are counted twice as well, for safety.
        variance = 2 * noise if variances is None else variances[layer]
        found[layer] = dataclasses.replace(
            whole,
            value=value,
            stderr=stderr,
            trace=value.double().sum().item(),
            trace_stderr=math.sqrt(variance),
            sum_of_squares=value.double().square().sum().item() - noise,
            num_passes=objective.num_passes - passes,
            seconds=time.perf_counter() - started,
            layout=tuple(objective.parameters.layout[i] for i in groups[layer]),
            settings=provenance(objective, settings, curvature),
        )
    return found


def _xdiag(
    objective: Objective, operator: LinearOperator, where: Mapping[str, Slices], num_matvecs: int
) -> tuple[DiagonalResult, dict[str, float]]:
    """Return the diagonal as `xdiag` does, and the variance of its sum over each layer, out of the same products."""
    vectors = budget_of(num_matvecs, 2 * _LEAST_VECTORS, "xdiag", _REASON) // 2
    _most_vectors(objective, operator, vectors)
    started = time.perf_counter()
    with progress_bar(objective.progress, total=2 * vectors, title="diagonals of layers") as bar:
        sketch = _sketch(objective, operator, bar.update)
        sketch.multiply(vectors, into_basis=True)
    moments, variance = diagonal_of(sketch)
    settings = {"method": "xdiag", "num_matvecs": num_matvecs, "rank": sketch.rank}
    whole = result_of(operator, moments, variance, sketch.num_matvecs, settings, started)
    blocks = sketch.groups([*where.values()])
    return whole, {
        layer: leave_one_out(grams, sketch.n, sphere=False)[1].item()
        for layer, grams in zip(where, blocks, strict=True)
    }


SHARED: dict[str, Callable[..., Any]] = {"trace": traces_of_layers, "diagonal": diagonals_of_layers}


def slices_of(objective: Objective, groups: Mapping[str, Sequence[int]]) -> dict[str, Slices]:
    """Return the ranges of coordinates of each group of parameters."""
    ends = list(itertools.accumulate((math.prod(shape) for shape in objective.parameters.shapes), initial=0))
    return {layer: [slice(ends[i], ends[i + 1]) for i in block] for layer, block in groups.items()}


def _sum(diagonal: Tensor, pieces: Slices) -> Tensor:
    return torch.stack([diagonal[piece].sum() for piece in pieces]).sum()


def _operator(objective: Objective, curvature: Curvature, expected: int) -> CurvatureOperator:
    return CurvatureOperator(
        objective, curvature, before=lambda: warn_of_memory(objective, curvature, None, None), expected=expected
    )


def _sketch(objective: Objective, operator: LinearOperator, spent: Callable[[int], object]) -> Sketch:
    return Sketch(operator, Probes(operator, objective.seed, "rademacher"), keep_products=True, spent=spent)


def _most_vectors(objective: Objective, operator: LinearOperator, wanted: int | None) -> int:
    """Return how many random vectors fit, each with a vector of the basis and its product; refuse too few."""
    room = plan_vectors(objective, min(2 * (wanted or _LIKELY), objective.n))
    return most_vectors(operator, room, wanted, each=2) if room else LIMIT


def _captured_norm(grams: Grams) -> float:
    """Return the Frobenius norm of what the basis holds of a block, a little less than that of the block."""
    inside = grams.h @ grams.basis
    return math.sqrt(max((inside * inside.T).sum().item(), 0.0))


def _allowed(tol: float, found: Mapping[str, tuple[Tensor, float]], norms: Mapping[str, float]) -> float:
    """Return how wide half the interval of a layer may be."""
    return tol * sum(max(abs(samples.mean().item()), norms[layer]) for layer, (samples, _) in found.items())
