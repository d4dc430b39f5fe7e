"""Which matrix of second-order information is meant by the curvature of a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch

from sharpness._checks import check_choice, check_count
from sharpness.errors import ArgumentError

CurvatureName: TypeAlias = Literal["hessian", "ggn", "fisher", "empirical_fisher"]
TargetSampler: TypeAlias = Callable[[Any, torch.Generator], Any]
CURVATURES = ("hessian", "ggn", "fisher", "empirical_fisher")


@final
@dataclass(frozen=True)
class Curvature:
    """A curvature matrix of the mean loss, by name, and how targets are drawn where it is estimated.

    Attributes:
        name: One of `CURVATURES`.
        sample_targets: ``(outputs, generator) -> targets``, the user's own distribution for ``"fisher"``.
        num_samples: Targets drawn per sample where ``"fisher"`` has no closed form.
    """

    name: str = "hessian"
    sample_targets: TargetSampler | None = None
    num_samples: int = 16

    def __post_init__(self) -> None:
        check_choice("curvature", self.name, CURVATURES)
        check_count("num_samples", self.num_samples)
        if self.sample_targets is not None and not (callable(self.sample_targets) and _hashable(self.sample_targets)):
            raise ArgumentError(
                f"`sample_targets` must be a function (outputs, generator) -> targets, got {self.sample_targets!r}."
            )


def _hashable(value: Any) -> bool:
    return getattr(type(value), "__hash__", None) is not None


HESSIAN = Curvature()
