"""What a method is, what it returns, and which methods there are for each quantity.

Every method gets the same model and the same batches, a guest its own copy of the model, since some leave it changed.
What `prepare` returns is timed, from the construction of an operator on; for single products it is constructed before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.models import Batch, Problem

TOL = 1e-3  # of residuals and eigenvalues
TRACE_TOL = 0.02
DRAWS, STEPS = 4, 90  # of a density
ITERATIONS = 10  # of epsilon-sharpness
CALLS = 5  # products in a row where single products are timed
WANTED = {"top1": 1, "top5": 5, "top20": 20}
QUANTITIES = ("product", "ggn", *WANTED, "trace", "density", "epsilon")


@dataclass(frozen=True)
class Pairs:
    """Eigenpairs: values ``(k,)``, vectors ``(k, n)`` in the order of ``named_parameters``."""

    values: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Rules:
    """Quadrature rules of a density, ``(draws, steps)`` each."""

    nodes: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Outcome:
    """What a run returned and what it cost.

    Attributes:
        answer: A product, `Pairs`, `Rules` or a number.
        products: Hessian-vector products over all the data, or evaluations of loss and gradient.
        passes: Walks over the data, also those on graphs that were kept.
        scale: By what the time has to be multiplied, where only a part was run.
        engine: How this library made its products, if it says so.
    """

    answer: Any
    products: int
    passes: int
    scale: float = 1.0
    engine: Any = None


Run: TypeAlias = Callable[[], Outcome]


@dataclass(frozen=True)
class Method:
    """A method under its name, and how it was told what to do.

    Attributes:
        name: Library and algorithm.
        told: The settings that matter, in words.
        prepare: ``(problem, seed) -> run``.
        ours: Whether it is this library's.
        peer: Whether it is another library's.
    """

    name: str
    told: str
    prepare: Callable[[Problem, int], Run]
    ours: bool = False
    peer: bool = False


class Counted:
    """Batches that count how often they are walked."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.walks = 0

    def __iter__(self) -> Iterator[Batch]:
        self.walks += 1
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def direction(problem: Problem, seed: int) -> Tensor:  # -> (n,)
    """Return the unit vector that all products are made with."""
    v = torch.randn(problem.num_parameters, generator=torch.Generator().manual_seed(seed))
    return (v / v.norm()).to(problem.device)


def several(product: Callable[[], Tensor], engine: Any = None) -> Outcome:
    """Return the last of `CALLS` products."""
    for _ in range(CALLS):
        answer = product()
    return Outcome(answer, CALLS, CALLS, engine=engine)
