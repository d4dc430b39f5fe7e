"""How far rounding moves a product: its distance from the one in float64, measured on the first samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharpness.objective.curvature import Curvature
from sharpness.objective.data import Batches, map_tensors, num_samples, samples
from sharpness.objective.functional import Functional
from sharpness.objective.guard import default_dtype, reseed
from sharpness.objective.products import Products, Request

_SAMPLES = 32  # to measure on


def product_error(
    functional: Functional, batches: Batches, curvature: Curvature, request: Request, seed: int
) -> float | None:
    """Return the error of a float32 product; ``None`` if the model cannot run in float64."""
    left, weight = _SAMPLES, 0.0
    error = torch.zeros(request.parameters.n, dtype=torch.float64, device=request.parameters.device)
    for _, batch in batches.walk():
        found = _error_on(functional, samples(batch, 0, left), curvature, request, seed) or _error_on(
            functional, batch, curvature, request, seed
        )
        if found is None:
            return None
        error += found[0]
        weight += found[1]
        left -= num_samples(batch) or 1
        if left <= 0:
            break
    return float(torch.linalg.vector_norm(error)) / weight if weight else None


def _error_on(
    functional: Functional, batch: Any, curvature: Curvature, request: Request, seed: int
) -> tuple[Tensor, float] | None:
    """Return the float64 less the float32 product on one batch, times its weight; ``None`` if they fail."""
    products = []
    for dtype in (torch.float32, torch.float64):
        reseed(seed, 0, 0)
        try:
            products.append(_product(functional, batch, curvature, request, dtype, seed))
        except Exception:  # whatever a model raises that has a dtype or a batch size written into it
            return None
    (single, weight), (double, _) = products
    return double - single, weight


def _product(
    functional: Functional, batch: Any, curvature: Curvature, request: Request, dtype: torch.dtype, seed: int
) -> tuple[Tensor, float]:
    """Return the product for one batch's total loss, computed in ``dtype``, and the batch's weight."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    leaves = [cast(leaf.detach()).requires_grad_(True) for leaf in functional.leaves()]
    places = {name: cast(tensor) for name, tensor in functional.places(leaves).items()}

    own = [leaves[i] for i in request.block]

    def body() -> tuple[Tensor, float]:
        terms = functional.terms(map_tensors(cast, batch), places)
        if terms.weight == 0:
            return request.parameters.flatten([leaf.detach() * 0 for leaf in own], torch.float64), 0.0
        graph = Products(curvature, seed).linearise(0, terms, leaves)
        pieces = graph.product(leaves, request.block, request.directions, keep=False)
        whole = [leaf.detach() * 0 if g is None else g.detach() for g, leaf in zip(pieces, own, strict=True)]
        return request.parameters.flatten(whole, torch.float64), terms.weight

    with default_dtype(dtype):
        return functional.inside(places, body)
