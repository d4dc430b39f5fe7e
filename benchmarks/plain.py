"""What one would write by hand: a gradient, the unit of all costs, a double backward, and a search in a box."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional

from benchmarks.methods import ITERATIONS, Method, Outcome, Run, direction, several
from benchmarks.models import Problem

_EPSILON = 1e-3


def methods(quantity: str) -> list[Method]:
    """Return what stands for a library where there is none, or for the least that memory allows."""
    if quantity == "product":
        return [Method("double backward by hand", "", double_backward)]
    if quantity == "epsilon":
        return [Method("SciPy's L-BFGS-B by hand", f"maxiter={ITERATIONS}", box_search)]
    return []


def gradient(problem: Problem) -> tuple[float, list[Tensor]]:
    """Return the mean loss and its gradient over all data, as a training loop would."""
    parameters, total = [p for p in problem.model.parameters() if p.requires_grad], 0.0
    sums = [torch.zeros_like(p) for p in parameters]
    for inputs, targets in problem.loader:
        loss = functional.cross_entropy(problem.model(inputs), targets) * (len(targets) / problem.num_samples)
        for sum_, piece in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            sum_ += piece
        total += loss.item()
    return total, sums


def double_backward(problem: Problem, seed: int) -> Run:
    parameters, v = [p for p in problem.model.parameters() if p.requires_grad], direction(problem, seed)
    pieces = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]

    def product() -> Tensor:
        sums = [torch.zeros_like(p) for p in parameters]
        for inputs, targets in problem.loader:
            loss = functional.cross_entropy(problem.model(inputs), targets) * (len(targets) / problem.num_samples)
            first = torch.autograd.grad(loss, parameters, create_graph=True)
            for sum_, piece in zip(sums, torch.autograd.grad(first, parameters, pieces), strict=True):
                sum_ += piece
            del loss, first
        return torch.cat([sum_.flatten() for sum_ in sums])

    return lambda: several(product)


def box_search(problem: Problem, seed: int) -> Run:
    """Maximise the loss in Keskar's box from one random start, as the authors' script does."""

    def run() -> Outcome:
        parameters = [p for p in problem.model.parameters() if p.requires_grad]
        start = torch.nn.utils.parameters_to_vector(parameters).detach().double().cpu().numpy()
        half = _EPSILON * (np.abs(start) + 1)
        before, evaluations = gradient(problem)[0], 1

        def negative(x: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal evaluations
            evaluations += 1
            torch.nn.utils.vector_to_parameters(torch.from_numpy(x).to(parameters[0]), parameters)
            loss, pieces = gradient(problem)
            return -loss, -torch.cat([piece.flatten() for piece in pieces]).double().cpu().numpy()

        first = start + np.random.default_rng(seed).uniform(-half, half)
        bounds = np.stack([start - half, start + half], axis=1)
        found = minimize(
            negative, first, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": ITERATIONS, "maxcor": 10}
        )
        return Outcome(100 * (-found.fun - before) / (1 + before), evaluations, evaluations)

    return run
