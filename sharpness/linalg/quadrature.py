"""The whole spectrum by stochastic Lanczos quadrature."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpness._checks import check_count, check_positive, check_seed
from sharpness._progress import check_progress, progress_bar
from sharpness.errors import ArgumentError
from sharpness.linalg.basis import Floats
from sharpness.linalg.krylov import KrylovSpace
from sharpness.linalg.operator import LinearOperator, check_operator
from sharpness.linalg.outliers import find_outliers
from sharpness.results import DensityResult
from sharpness.results.eigen import as_float64

_SIGMA_SQUARED = 1e-5  # of the width of the spectrum, by Ghorbani's rule
_PER_SIGMA = 3  # points of the grid
_POINTS = (1000, 50_000)
_FINEST = 2e-5  # of the width: the narrowest kernel that so many points can show, one spacing


def stochastic_lanczos_quadrature(
    operator: LinearOperator,
    *,
    num_draws: int = 4,
    num_steps: int = 90,
    sigma: float | None = None,
    memory: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> DensityResult:
    r"""Estimate the density of all eigenvalues by Lanczos from random vectors.

    .. math:: \frac{1}{n} \mathrm{tr} f(A) = \mathrm{E} [v^\top f(A) \, v]
        \approx \frac{1}{d} \sum_{\text{draws}} \sum_i w_i f(\theta_i)

    with ``v`` uniform on the unit sphere, :math:`\theta_i` the Ritz values of ``num_steps`` steps of Lanczos from it,
    and :math:`w_i` the squared first entries of their coefficients: the Gauss rule of ``v``, exact for polynomials of
    degree up to ``2 num_steps - 1``. The basis is fully reorthogonalised. All draws advance together, one block of
    products for each step.

    Outliers are Ritz values that have converged (to 1e-3 of the width of the spectrum), lie above nine tenths of all
    eigenvalues and above all nodes that have not converged, and lie above the last gap of at least a fifth of their own
    distance from the median and a hundredth of the width; and likewise at the lower end. A spectrum without such a gap
    has none.

    Args:
        operator: Symmetric operator of size ``n``.
        num_draws: Random vectors.
        num_steps: Steps of Lanczos for each, at most ``n``; more are reduced to ``n``, and the result says so.
        sigma: Standard deviation of the kernel that turns nodes into a density. ``None`` takes the rule of Ghorbani et
            al., ``sqrt(1e-5 width)`` for a spectrum of this width; where that is less than 1, ``sqrt(1e-5)`` times
            the width, so that the density does not depend on the unit of the loss. Either is raised to 2e-5 of the
            width, the narrowest that the grid of at most 50 000 points can show; the result says what it took.
        memory: Bytes that the bases may take; where they do not suffice for all draws at a time, fewer run together.
            ``None`` or 0 sets no limit.
        seed: Seed of the random vectors.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.

    Returns:
        Density, nodes and weights, and the outliers.

    Raises:
        ArgumentError: If an option cannot be accepted, or ``memory`` does not hold the basis of a single draw.
        NonFiniteError: If a product holds NaN or infinity.

    Cost: ``num_draws num_steps`` products; memory for as many vectors.

    References:
        Ghorbani, Krishnan & Xiao (2019), arXiv 1901.10159; Ubaru, Chen & Saad (2017), doi:10.1137/16M1104974.

    Example:
        >>> from sharpness.linalg import DenseOperator, stochastic_lanczos_quadrature
        >>> result = stochastic_lanczos_quadrature(DenseOperator([[2.0, 1.0], [1.0, 2.0]]))
        >>> [round(node, 4) for node in result.nodes[0].tolist()]  # two steps find both eigenvalues
        [1.0, 3.0]
    """
    n = check_operator(operator)
    num_draws = check_count("num_draws", num_draws)
    asked = check_count("num_steps", num_steps)
    sigma = None if sigma is None else check_positive("sigma", sigma)
    check_progress(progress)
    seed, steps = check_seed(seed), min(asked, n)
    together = _together(operator, num_draws, steps, memory)
    started = time.perf_counter()
    rules: list[tuple[Floats, Floats, Floats]] = []
    spent = 0
    with progress_bar(progress, total=num_draws * steps, title="density") as bar:
        for first in range(0, num_draws, together):
            more, products = _rules(operator, range(first, min(first + together, num_draws)), steps, seed, bar.update)
            rules, spent = rules + more, spent + products
    nodes, weights, residuals = _padded(rules)
    low, high = nodes.min(), nodes.max()
    sigma = max(_ghorbani(low, high) if sigma is None else sigma, _FINEST * float(high - low))
    grid, density = _smooth(nodes, weights, sigma)
    outliers, doubts, certified = find_outliers(nodes, weights, residuals)
    return DensityResult(
        grid=grid,
        density=density,
        nodes=as_float64(nodes),
        weights=as_float64(weights),
        residuals=as_float64(residuals),
        sigma=sigma,
        outliers=as_float64(outliers),
        outlier_residuals=as_float64(doubts),
        certified=torch.as_tensor(certified),
        n=n,
        num_matvecs=spent,
        num_passes=0,
        seconds=time.perf_counter() - started,
        settings={
            "method": "stochastic Lanczos quadrature",
            "num_draws": num_draws,
            "num_steps": asked,
            "steps_taken": [len(theta) for theta, _, _ in rules],
            "together": together,
            "seed": seed,
            "dtype": str(operator.dtype),
            "device": str(operator.device),
        },
    )


def _rules(
    operator: LinearOperator, draws: range, steps: int, seed: int, report: Callable[[int], object]
) -> tuple[list[tuple[Floats, Floats, Floats]], int]:
    """Return the Gauss rules of draws that advance together, and the products spent; no basis outlives the call."""
    spaces = [KrylovSpace(operator, _generator(seed, draw), rows=steps) for draw in draws]
    live, spent = list(spaces), 0
    while live:
        products = operator.matmat(torch.stack([space.request() for space in live], dim=1))
        for space, product in zip(live, products.unbind(1), strict=True):
            space.absorb(product.contiguous())
        spent += len(live)
        report(len(live))
        live = [space for space in live if not space.exhausted and space.size < steps]
    return [_rule(space) for space in spaces], spent


def _together(operator: LinearOperator, num_draws: int, steps: int, memory: Any) -> int:
    """Return how many draws run at a time."""
    if memory is None or (memory == 0 and memory is not False):
        return num_draws
    basis = steps * operator.n * operator.dtype.itemsize
    if check_count("memory", memory) < basis:
        raise ArgumentError(
            f"`memory` must be at least {basis} bytes for the basis of one draw of {steps} steps, got {memory}. "
            f"Pass memory={basis} or more, or fewer num_steps."
        )
    return min(num_draws, int(memory) // basis)


def _generator(seed: int, draw: int) -> torch.Generator:
    words = np.random.SeedSequence([seed, draw]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


def _rule(space: KrylovSpace) -> tuple[Floats, Floats, Floats]:
    """Return nodes, weights and residuals of the Gauss rule of a space's start."""
    theta, s, residuals = space.ritz()
    return theta, s[0] ** 2, residuals + space.rounding


def _padded(rules: list[tuple[Floats, Floats, Floats]]) -> tuple[Floats, Floats, Floats]:
    """Return the rules as arrays, ``(draws, steps)``; shorter ones end in nodes of weight 0."""
    longest = max(len(theta) for theta, _, _ in rules)
    nodes, weights, residuals = [], [], []
    for theta, weight, residual in rules:
        more = longest - len(theta)
        nodes.append(np.pad(theta, (0, more), mode="edge"))
        weights.append(np.pad(weight, (0, more)))
        residuals.append(np.pad(residual, (0, more), mode="edge"))
    return np.array(nodes), np.array(weights), np.array(residuals)


def _ghorbani(low: float, high: float) -> float:
    """Return the width of the kernel for a spectrum between these ends."""
    width = float(high - low) or max(abs(float(high)), np.finfo(float).tiny ** 0.25)
    return float(np.sqrt(_SIGMA_SQUARED * width * min(width, 1.0)))


def _smooth(nodes: Floats, weights: Floats, sigma: float) -> tuple[Tensor, Tensor]:
    """Return a grid and the density on it."""
    low, high = nodes.min() - 5 * sigma, nodes.max() + 5 * sigma
    points = int(np.clip(np.ceil(_PER_SIGMA * (high - low) / sigma), *_POINTS))
    grid = torch.linspace(low, high, points, dtype=torch.float64)
    density = torch.zeros_like(grid)
    for node, weight in zip(nodes.ravel(), weights.ravel(), strict=True):
        if weight:
            density += weight * torch.exp(-0.5 * ((grid - node) / sigma) ** 2)
    return grid, density / (len(nodes) * sigma * np.sqrt(2 * np.pi))
