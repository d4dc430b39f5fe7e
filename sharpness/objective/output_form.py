"""What the outputs tell of the weights: their length in the metric of the loss, and how they grow with the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sharpness.objective.curvature import Curvature
from sharpness.objective.data import tensors_in
from sharpness.objective.guard import derived_seed, reseed
from sharpness.objective.objective import Objective
from sharpness.objective.output_curvature import count_samples, output_curvature
from sharpness.objective.output_matrices import OuterProducts

_STRETCH = 1.0625  # exact in every dtype
_ROUNDING = 1e-4  # relative change of outputs that rounding may make


@final
@dataclass(frozen=True)
class OutputForm:
    r"""The form :math:`z' M z` of the outputs ``z``, summed over the data, with the number of samples and of terms."""

    total: float
    num_samples: float
    num_terms: float
    drawn: bool  # whether the curvature is that of targets that were drawn


def output_form(objective: Objective, curvature: Curvature, draw: int = 0) -> OutputForm:
    r"""Return :math:`z' M z` with ``z`` the outputs and ``M`` their curvature; one pass."""
    with objective.session():
        leaves = objective.functional.leaves()
        total = rows = weight = 0.0
        drawn = False
        for i, terms in objective.passes.terms(leaves):
            generator = torch.Generator().manual_seed(derived_seed(objective.seed, i, draw))
            middle = output_curvature(curvature, terms, generator)
            drawn = drawn or (curvature.name == "fisher" and isinstance(middle, OuterProducts))
            outputs = [out.detach() for out in middle.outputs]
            pairs = zip(outputs, middle.times(outputs), strict=True)
            total += sum(torch.sum(a.double() * b.double()).item() for a, b in pairs)
            rows, weight = rows + count_samples(terms), weight + terms.weight
            del terms, middle, outputs, pairs  # before the next batch is evaluated
        return OutputForm(total, rows, weight, drawn)


def homogeneity(objective: Objective) -> float | None:
    """Return ``d`` where scaling all weights by ``c`` scales the outputs by ``c^d``, as seen on the first samples.

    ``None`` where it does something else, or the first samples cannot be evaluated alone.
    """
    with objective.session():
        objective.batches.settle(objective.passes.room())
        sample = objective.batches.sample
        if sample is None:
            return None
        functional, outputs = objective.functional, list[Tensor]()
        for c in (1.0, _STRETCH):
            scaled = {name: c * p.detach() for name, p in objective.model.named_parameters() if p.is_floating_point()}
            reseed(objective.seed, 0, 0)
            places = functional.places(functional.leaves(differentiable=False), scaled)
            try:
                terms = functional.terms(sample.batch, places)
            except Exception:  # whatever a model raises that has a batch size written into it
                return None
            outputs.append(torch.cat([t.double().flatten() for t in tensors_in(terms.outputs)]))
    before, after = (torch.linalg.vector_norm(out).item() for out in outputs)
    if not (before > 0 and after > 0 and math.isfinite(before) and math.isfinite(after)):
        return None
    apart = torch.linalg.vector_norm(outputs[1] * (before / after) - outputs[0]).item() / before
    return math.log(after / before) / math.log(_STRETCH) if apart < _ROUNDING else None
