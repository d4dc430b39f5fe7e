"""How an estimate of `linalg` becomes that of a model: memory, session, and what only the objective knows."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sharpness.errors import ConvergenceError
from sharpness.linalg import LinearOperator
from sharpness.metrics.door import provenance
from sharpness.metrics.memory import warn_of_memory
from sharpness.objective import Objective
from sharpness.objective.curvature import Curvature
from sharpness.objective.memory import free_bytes
from sharpness.operators import CurvatureOperator
from sharpness.results import DensityResult, DiagonalResult, ScalarResult, TraceResult

R = TypeVar("R", TraceResult, DiagonalResult, DensityResult, ScalarResult)
_SHARE = 0.25  # of what is free, for vectors, beside the half that data and graphs may take


def plan_vectors(objective: Objective, likely: int) -> int:
    """Share the objective's memory between vectors that an estimate keeps, and data and graphs.

    Vectors may take half of a limit that the user sets, more where the ``likely`` number takes more; a quarter of what
    is free if there is none. With ``memory=0`` nothing is kept but the vectors, which are the method itself.

    Returns:
        Bytes that the vectors may take, 0 for no limit.
    """
    if objective.memory == 0:
        return 0
    if objective.memory is None:
        return max(int(_SHARE * free_bytes(objective.device)), 1)
    wanted = likely * objective.n * objective.dtype.itemsize
    memory = max(objective.memory // 2, min(wanted, objective.memory))
    objective.reserve(min(memory, wanted))
    return memory


def measure(
    objective: Objective,
    curvature: Curvature,
    run: Callable[[LinearOperator], R],
    settings: Mapping[str, Any],
    *,
    expected: int,
) -> R:
    """Return the record of an estimate with what the objective knows: passes, time, names, provenance.

    Args:
        objective: The objective.
        curvature: Which matrix.
        run: The estimate.
        settings: Added to those of the record.
        expected: About how many products it takes.
    """
    started, passes = time.perf_counter(), objective.num_passes

    def completed(result: R) -> R:
        objective.check()
        names: dict[str, Any] = {}
        if isinstance(result, DiagonalResult):
            names["layout"] = objective.parameters.layout
        return dataclasses.replace(
            result,
            num_passes=objective.num_passes - passes,
            seconds=time.perf_counter() - started,
            settings=provenance(objective, {**result.settings, **settings, "curvature": curvature.name}, curvature),
            **names,
        )

    with objective.session():
        operator = CurvatureOperator(
            objective, curvature, before=lambda: warn_of_memory(objective, curvature, None, None), expected=expected
        )
        try:
            return completed(run(operator))
        except ConvergenceError as error:
            raise ConvergenceError(str(error), completed(error.result)) from None
