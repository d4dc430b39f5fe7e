"""Eigenvalues, and how far to trust them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor

from sharpness._record import Record
from sharpness.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = 6  # eigenvalues in a repr


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SampleInterval(Record):
    """A two-sided bracket of the eigenvalue over all data, from a subset ``A`` and other batches ``B``.

    The extreme eigenvalue of the subset is biased outwards: over random subsets its mean is at least as extreme as the
    eigenvalue over all data, since the extreme eigenvalue is a convex (or concave) function of the matrix. The Rayleigh
    quotient, on batches that took no part in choosing the vector, is biased inwards: no quotient is more extreme than
    the eigenvalue. Both hold in the mean over batches that are exchangeable (drawn at random, as by a shuffling loader)
    from data large against the subset; the standard errors are those of a mean over independent batches.

    Attributes:
        low: Lower end: the inner or outer value, less the standard errors that ``confidence`` takes (Student's t).
        high: Upper end, likewise.
        outer: The eigenvalue over the subset ``A``.
        outer_stderr: Standard error of ``v'H_A v``, from its spread over the batches of ``A``.
        inner: Rayleigh quotient ``v'H_B v`` of the subset's eigenvector on ``B``.
        inner_stderr: Its standard error, from the spread over the batches of ``B``.
        confidence: Probability that an end holds, as far as the means over the batches are normally distributed.
        num_batches: Batches in ``A``.
        num_held_out: Batches in ``B``.
    """

    low: float
    high: float
    outer: float
    outer_stderr: float
    inner: float
    inner_stderr: float
    confidence: float
    num_batches: int
    num_held_out: int

    def __repr__(self) -> str:
        return (
            f"SampleInterval({self.low:.4g} to {self.high:.4g}; subset {self.outer:.4g} ± {self.outer_stderr:.2g}, "
            f"held-out batches {self.inner:.4g} ± {self.inner_stderr:.2g})"
        )


@final
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EigenResult(Record):
    """Eigenvalues of a symmetric operator and how far to trust them.

    Attributes:
        eigenvalues: ``(k,)`` in the order that ``which`` asks for, float64 on the CPU.
        residuals: ``(k,)`` upper bounds of ``|A v - lambda v|`` for the unit vectors found and the operator as it is
            computed, with an allowance for rounding of a few ``eps |A|``.
        interval: ``(k, 2)`` low and high; each row contains an eigenvalue of the operator *for certain*
            (every symmetric matrix has an eigenvalue within the residual of any pair). To each side it reaches as
            far as the residual or, for a float32 model, the rounding measured against float64 if that is more.
        kato_temple: ``(k, 2)`` tighter rows that hold if the eigenvalues found are all there are nearby:
            the residual squared over the gap to the neighbours found. NaN where the gap does not allow it.
        converged: Whether every residual is at most ``tol * abs(eigenvalue)``, or at the level of rounding.
        num_matvecs: Products spent with the operator.
        num_passes: Passes over the data, the products included; 0 for an operator without data.
        seconds: Wall time.
        eigenvectors: ``(k, n)`` unit rows in the order of ``named_parameters``, or ``None``.
        layout: Name and shape of each parameter in a row of ``eigenvectors``.
        confirmation: What a search in the complement of the eigenvectors found, or ``None`` if there was none:
            ``num_matvecs`` spent on it, ``added`` eigenvalues that had been missed, and ``excluded_above`` and
            ``excluded_below``, the values beyond which no further eigenvalue lies with ``probability`` over the random
            starts (``None`` where that end was not searched, or nothing is left to search).
        sample_interval: Bracket of the first eigenvalue over all data where a subset was measured, if asked for;
            ``None`` also where the subset's eigenvalues did not converge.
        settings: What the call resolved to.
    """

    eigenvalues: Tensor
    residuals: Tensor
    interval: Tensor
    kato_temple: Tensor
    converged: bool
    num_matvecs: int
    num_passes: int
    seconds: float
    eigenvectors: Tensor | None = None
    layout: tuple[tuple[str, tuple[int, ...]], ...] | None = None
    confirmation: dict[str, Any] | None = None
    sample_interval: SampleInterval | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    bulky: ClassVar[frozenset[str]] = frozenset({"eigenvectors", "layout"})

    @property
    def headline(self) -> float:
        """Return the first eigenvalue, the one number that stands for the record."""
        return self.eigenvalues[0].item()

    @property
    def doubt(self) -> str:
        """Return how far to trust the first eigenvalue, in a few words."""
        low, high = self.interval[0].tolist()
        return f"± {(high - low) / 2:.1g} (for certain){'' if self.converged else ', NOT converged'}"

    def __repr__(self) -> str:
        half = ((self.interval[:, 1] - self.interval[:, 0]) / 2).tolist()
        found = list(zip(self.eigenvalues.tolist(), half, strict=True))
        pairs = ", ".join(f"{value:.4g} ± {width:.1g}" for value, width in found[:_SHOWN])
        if len(found) > _SHOWN:
            pairs += f", ... {len(found)} in all"
        state = "converged" if self.converged else "NOT converged"
        return f"EigenResult([{pairs}], {state} in {self.num_matvecs} matvecs)"

    def named_vector(self, i: int) -> dict[str, Tensor]:
        """Return eigenvector ``i`` as a dict from parameter names to tensors of the parameters' shapes.

        Raises:
            ArgumentError: If the eigenvectors were not kept, or belong to an operator without named parameters.
        """
        if self.eigenvectors is None or self.layout is None:
            raise ArgumentError(
                "this result holds no named eigenvectors. Call top_eigenvalues(..., vectors=True) to keep them."
            )
        sizes = [math.prod(shape) for _, shape in self.layout]
        pieces = torch.split(self.eigenvectors[i], sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.layout, pieces, strict=True)}

    def plot(self, ax: Axes | None = None, **style: Any) -> Axes:
        """Draw the eigenvalues with their intervals on ``ax`` (a new one if ``None``) and return the axes."""
        from sharpness.plotting import plot_eigenvalues

        return plot_eigenvalues(self, ax=ax, **style)


def as_float64(values: Any) -> Tensor:
    """Return ``values`` as a float64 tensor on the CPU, the form of all small results."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")
