"""How much memory the graph of a batch takes, told from two small pieces of it before anything large is run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from sharpness.objective.curvature import Curvature
from sharpness.objective.data import Sample, samples
from sharpness.objective.functional import Functional
from sharpness.objective.guard import reseed
from sharpness.objective.memory import storages
from sharpness.objective.products import Products

_PROBES = (2, 4)  # samples; a single one is refused by batch statistics


@final
@dataclass(frozen=True)
class GraphSize:
    """Bytes that the graph of a batch takes: some in any case, the rest for each sample."""

    fixed: float
    per_sample: float
    samples: int

    @property
    def bytes(self) -> int:
        """Return the bytes for the whole batch."""
        return int(self.fixed + self.per_sample * self.samples)

    def fitting(self, room: float) -> int:
        """Return how many samples fit into ``room`` bytes, at least one."""
        return max(1, int((room - self.fixed) / max(self.per_sample, 1.0)))


def graph_size(functional: Functional, sample: Sample, curvature: Curvature, seed: int) -> GraphSize | None:
    """Return the size of the graph of a batch, from some of its samples; ``None`` if it cannot be cut."""
    few, more = (min(count, sample.count) for count in _PROBES)

    def size(count: int) -> int:
        reseed(seed, 0, 0)
        leaves = functional.leaves()
        terms = functional.terms(samples(sample.batch, 0, count), functional.places(leaves))
        return _bytes(Products(curvature, seed).linearise(0, terms, leaves).tensors())

    try:
        small, large = size(few), size(more)
    except Exception:  # whatever a model raises that has a batch size written into it, or takes graphs for data
        return None
    slope = (large - small) / (more - few) if more > few else small / few
    return GraphSize(fixed=max(small - slope * few, 0.0), per_sample=slope, samples=sample.count)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(storages(tensors).values())
