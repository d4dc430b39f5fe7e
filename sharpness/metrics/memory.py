"""How the memory of a run is shared out, and a word beforehand where it will not do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch

from sharpness._checks import size_text
from sharpness._warn import warn
from sharpness.errors import MemoryWarning
from sharpness.linalg.lanczos import least_rows
from sharpness.objective import Objective
from sharpness.objective.curvature import Curvature
from sharpness.objective.memory import free_bytes

_SHARE = 0.25  # of what is free, for the basis, beside the half that data and graphs may take
_RESUMABLE_ROWS = 256
_USUAL_ROWS = 20  # products beyond four per eigenvalue that a trained network seldom needs more than
_MAGNIFIED = 1e6  # no graph takes so many times the bytes of its batch
_VECTORS = 5  # leaves, sum in float64, gradient, product


@final
@dataclass(frozen=True)
class BasisPlan:
    """Bytes that the basis of Lanczos may take, and what it is likely to take."""

    memory: int
    likely: int


def plan_basis(
    objective: Objective,
    wanted: int,
    *,
    num_matvecs: int | None = None,
    basis_dtype: torch.dtype | None = None,
    basis_device: Any = None,
    resumable: bool = False,
) -> BasisPlan:
    """Share the objective's memory between the basis of Lanczos, and data and graphs.

    The basis may take half of a limit that the user sets, more if less would not work; a quarter of what is free if
    there is none. What it is likely to take is kept free of data and graphs, unless it lives elsewhere. A run that is
    to be resumed may not depend on what happens to be free, and has room for a fixed number of rows.
    """
    device = objective.device if basis_device is None else torch.device(basis_device)
    row = objective.n * (basis_dtype or objective.dtype).itemsize
    least = min(least_rows(wanted), objective.n) * row
    likely = min(objective.n, num_matvecs or 4 * wanted + _USUAL_ROWS) * row
    if objective.memory == 0:
        return BasisPlan(memory=0, likely=min(likely, least))
    if objective.memory is None and resumable:
        memory = max(_RESUMABLE_ROWS * row, least)
    elif objective.memory is None:
        memory = max(int(_SHARE * free_bytes(device)), least)
    else:
        memory = max(objective.memory // 2, min(least, objective.memory))
        if device.type == objective.device.type:
            objective.reserve(min(memory, likely))
    return BasisPlan(memory=memory, likely=min(memory, likely))


def warn_of_memory(objective: Objective, curvature: Curvature, plan: BasisPlan | None, basis_device: Any) -> None:
    """Warn before a run that will hardly fit into the memory, with what would make it fit."""
    free = free_bytes(objective.device)
    graph = objective.graph_size(curvature, unless=free / _MAGNIFIED)
    if graph is None:
        return
    vector = objective.n * objective.dtype.itemsize
    others = sum(t.nbytes for t in (*objective.model.parameters(), *objective.model.buffers())) - vector
    elsewhere = basis_device is not None and torch.device(basis_device).type != objective.device.type
    basis = 0 if plan is None or elsewhere else plan.likely
    few = _VECTORS * vector + max(others, 0)  # what is not measured is copied for each pass
    needed = graph.bytes + basis + few
    if needed <= free:
        return
    advice = []
    room = free - basis - few
    if graph.samples > 1 and graph.bytes > room > 0:
        advice.append(f"microbatch_size={graph.fitting(room)}")
    if basis > free // 2 or room <= 0 < basis:
        if objective.device.type != "cpu":
            advice.append('basis_device="cpu"')
        if objective.memory != 0:
            advice.append("memory=0, which restarts Lanczos from the smallest basis that works")
    warn(
        f"this will need about {size_text(needed)} and {size_text(free)} are free: {size_text(graph.bytes)} for the "
        f"graph of a batch of {graph.samples} samples, {size_text(basis)} for the basis of Lanczos, the rest for a few "
        f"vectors of {size_text(vector)}. Pass {' or '.join(advice) or 'params=..., to measure fewer parameters'}.",
        MemoryWarning,
    )
