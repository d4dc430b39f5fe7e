"""What a forward pass over the whole data tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy over the whole data.

    Attributes:
        loss: Mean over all loss terms.
        accuracy: Fraction classified correctly; ``None`` where there are no classes.
    """

    loss: float
    accuracy: float | None
