"""Eigenvalues by the PyHessian package, checked with our own residuals.

PyHessian (Yao et al. 2020, arXiv 1912.07145) runs deflated power iteration until the eigenvalue moves little between
two steps. It changes the model it is given, so it gets a copy, and the batches that we measure ourselves.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from sharpness._checks import check_count
from sharpness.errors import ArgumentError, ModelError
from sharpness.linalg.answer import answer
from sharpness.linalg.bounds import rounding_level
from sharpness.linalg.products import norm
from sharpness.linalg.which import select
from sharpness.objective import Objective
from sharpness.objective.guard import reseed
from sharpness.operators import HessianOperator
from sharpness.results import EigenResult


def pyhessian_eigenvalues(
    objective: Objective, k: int, *, which: str, tol: float, num_matvecs: int | None, vectors: bool, on_failure: str
) -> EigenResult:
    """Return what PyHessian finds, each pair with the residual of one product of our own.

    Raises:
        ArgumentError: If PyHessian cannot honour an option.
        ModelError: If PyHessian cannot run on the model or the batches.
    """
    if which not in ("largest", "magnitude"):
        raise ArgumentError(
            f'method="pyhessian" finds the eigenvalues of largest magnitude only, got which={which!r}. '
            'Use method="lanczos".'
        )
    if objective.mode != "eval":
        raise ArgumentError(f'method="pyhessian" measures in eval mode only, got mode={objective.mode!r}.')
    if objective.precision != "exact":
        raise ArgumentError(f'method="pyhessian" knows no precision={objective.precision!r}. Use method="lanczos".')
    check_count("k", k, high=objective.n, of="the number of parameters")
    if num_matvecs is not None:
        check_count("num_matvecs", num_matvecs, low=2 * k)
    steps = 100 if num_matvecs is None else num_matvecs // k - 1  # one product per pair is ours
    started = time.perf_counter()
    operator = HessianOperator(objective)
    with objective.session():
        batches = _Counted([batch for _, batch in objective.batches.walk()])
        objective.value()  # resolves the loss
        criterion = objective.criterion.function
        if criterion is None:
            raise ModelError(
                f'method="pyhessian" needs a loss (outputs, targets) and batches (inputs, targets); the loss here is '
                f'{objective.criterion.name}. Use method="lanczos".'
            )
        found, rows = _run(objective, batches, criterion, k, steps, tol)
        spent = batches.walks + k
        objective.passes.count += batches.walks
        pairs = []
        for value, row in zip(found, rows, strict=True):
            unit = row / norm(row)
            pairs.append((value, norm(operator.matvec(unit) - value * unit), unit))
    theta = np.array([value for value, _, _ in pairs])
    ascending = np.argsort(theta, kind="stable")
    rounding = rounding_level(objective.dtype, float(np.abs(theta).max()))
    residuals = np.array([residual for _, residual, _ in pairs])[ascending] + rounding
    theta = theta[ascending]
    chosen = select(theta, which, k)
    negative = which == "largest" and bool(np.any(theta < -rounding))
    return answer(
        operator=operator,
        theta=theta,
        residuals=residuals,
        wanted=chosen,
        floor=rounding,
        allowed=rounding,
        tol=tol,
        num_matvecs=spent,
        rows=torch.stack([pairs[i][2] for i in ascending[chosen]]),
        vectors=vectors,
        settings={"method": "pyhessian", "which": which, "k": k, "tol": tol, "num_matvecs": num_matvecs},
        started=started,
        on_failure=on_failure,
        hint='PyHessian stops when the value moves little, whatever the residual. Use method="lanczos".',
        unfinished="took the largest magnitude for the largest value" if negative else "",
    )


def _run(
    objective: Objective, batches: Any, criterion: Any, k: int, steps: int, tol: float
) -> tuple[list[float], list[torch.Tensor]]:
    """Run the package on a copy of the model; return its eigenvalues and its vectors, flattened."""
    from pyhessian import hessian

    try:
        model = copy.deepcopy(objective.model)
    except Exception as error:
        raise ModelError(f"the model cannot be copied for PyHessian: {error}") from error
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model.to(objective.dtype)  # half precision is measured in single precision
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in objective.parameters.names)
    reseed(objective.seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its backward(create_graph=True) warns at every step
            guest = hessian(model, criterion, dataloader=batches, cuda=objective.device.type == "cuda")
            values, vectors = guest.eigenvalues(maxIter=steps, tol=tol, top_n=k)
    except Exception as error:  # whatever the guest may raise
        raise ModelError(
            f"PyHessian failed on this model or these batches ({type(error).__name__}: {error}); it needs batches "
            '(inputs, targets) and parameters that are all used, none linearly. Use method="lanczos".'
        ) from error
    for parameter in model.parameters():
        parameter.grad = None  # it holds a graph that holds the copy
    return list(values), [objective.parameters.flatten(vector) for vector in vectors]


class _Counted:
    """Batches that count how often they are walked: PyHessian does so once per product."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.walks = 0

    def __iter__(self) -> Iterator[Any]:
        self.walks += 1
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
