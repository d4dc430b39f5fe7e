"""Perturbations of the weights: how large in which direction, and random ones that are the same for every model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from sharpness._warn import warn
from sharpness.errors import ArgumentError, NonFiniteError, PrecisionWarning
from sharpness.metrics.rows import Rows
from sharpness.objective import Objective
from sharpness.objective.evaluation import Evaluation
from sharpness.objective.guard import derived_seed

Adaptive: TypeAlias = Literal["elementwise", "filter"]
Distribution: TypeAlias = Literal["gaussian", "sphere"]
DISTRIBUTIONS = ("gaussian", "sphere")
_LARGE = 1000  # how many times its rounding a rise should be


def check_adaptive(value: Any) -> str | None:
    """Return ``value`` if it is None or a known scaling of perturbations."""
    if value is not None and value not in ("elementwise", "filter"):
        raise ArgumentError(f'`adaptive` must be None, "elementwise" or "filter", got {value!r}. Pass one of these.')
    return None if value is None else str(value)


def scales(objective: Objective, adaptive: str | None) -> Tensor:  # -> (n,) or ()
    """Return the scale of a perturbation in each coordinate: 1, ``|w_i|``, or the norm of the filter ``i`` is in.

    A filter is what feeds one output unit; entries of vectors (biases, gains of a normalisation) are their own. Zero
    weights, and filters that are zero, have the scale zero: they do not move.
    """
    center = objective.vector()
    if adaptive is None:
        return torch.ones((), dtype=center.dtype, device=center.device)
    if adaptive == "elementwise":
        return center.abs()
    names, pieces = objective.parameters.names, objective.parameters.split(center)
    return objective.parameters.flatten(
        _filter_norms(objective.model, name, piece) for name, piece in zip(names, pieces, strict=True)
    )


def _filter_norms(model: nn.Module, name: str, weights: Tensor) -> Tensor:
    if weights.ndim < 2:
        return weights.abs()
    rows = Rows(model, name, weights.shape)
    matrix = rows.of(weights)
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
    return rows.back(norms.expand(matrix.shape))


def normal(objective: Objective, i: int) -> Tensor:  # -> (n,)
    """Return standard normal direction ``i``: the same for every model of this size, dtype and device."""
    generator = torch.Generator().manual_seed(derived_seed(objective.seed, i))
    drawn = torch.randn(objective.n, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(objective.device, objective.dtype)


@contextmanager
def perturbed(by: str) -> Iterator[None]:
    """Name the perturbation, ``rho=0.05`` say, where a loss or gradient is not finite."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(
            f"perturbed within {by}, the model overflows: {error} If the model as it is has a finite loss, pass a "
            "smaller perturbation."
        ) from error


@final
class Noise:
    """Random perturbations of the weights, each evaluated with both signs.

    Their mean is free of the first-order term, whose variance dominates away from a minimum; the pairs are independent
    of each other, so the standard error over them is that of the mean.
    """

    def __init__(self, objective: Objective, num_samples: int, distribution: str, bar: Any) -> None:
        self._objective = objective
        self._center = objective.vector()
        self._num_samples = num_samples
        self._distribution = distribution
        self._bar = bar
        self.num_evaluations = 0

    def evaluate(self, size: Tensor) -> Sequence[tuple[Evaluation, Evaluation]]:
        """Return loss and accuracy at each pair of points, with perturbations of this size, ``(n,)`` or ``()``."""
        found = []
        for i in range(self._num_samples):
            direction = normal(self._objective, i)
            if self._distribution == "sphere":
                direction /= torch.linalg.vector_norm(direction)
            direction *= size
            self.num_evaluations += 2
            pair = [self._objective.evaluate(torch.add(self._center, direction, alpha=sign)) for sign in (1, -1)]
            self._bar.update(2)
            found.append((pair[0], pair[1]))
        return found


def mean_losses(pairs: Sequence[tuple[Evaluation, Evaluation]]) -> Tensor:  # -> (num_samples,)
    """Return the mean loss of each pair."""
    return torch.tensor([(a.loss + b.loss) / 2 for a, b in pairs], dtype=torch.float64)


def standard_error(samples: Tensor) -> float:
    """Return the standard error of the mean of independent samples."""
    return float(samples.std().item() / len(samples) ** 0.5)


def rounding(objective: Objective, loss: float) -> float:
    """Return the error of a loss by rounding, which the differences of many losses to one have in common."""
    return torch.finfo(objective.dtype).eps * abs(loss)


def warn_of_rounding(objective: Objective, loss: float, highest: float) -> None:
    """Warn where a rise of the loss is not large against its rounding."""
    rise, error = highest - loss, max(rounding(objective, loss), rounding(objective, highest))
    if 0 < rise < _LARGE * error:
        warn(
            f"the loss rises by {rise:.3g} from {loss:.6g}, and in {str(objective.dtype).removeprefix('torch.')} it is "
            f"rounded by about {error:.1g}: the value is good to {100 * error / rise:.1g} %, and may lie above the "
            "maximum by that. Convert the model and the data to float64, or take a larger neighbourhood.",
            PrecisionWarning,
        )
