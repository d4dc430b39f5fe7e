"""Random vectors to probe an operator with, drawn again whenever they are needed, so that none has to be kept."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from sharpness.linalg.steps import Domain

ProbeDistribution: TypeAlias = Literal["rademacher", "gaussian", "sphere"]
DISTRIBUTIONS = ("rademacher", "gaussian", "sphere")


@final
class Probes:
    """Random vectors ``w`` with ``E[w w'] = I``, each from a seed of its own: the same on every device.

    Args:
        domain: Size, dtype and device of the vectors.
        seed: Seed of all of them.
        distribution: ``"rademacher"``, independent signs; ``"gaussian"``, independent normal entries; ``"sphere"``,
            uniform on the sphere of radius ``sqrt(n)``.
    """

    def __init__(self, domain: Domain, seed: int, distribution: str) -> None:
        self._domain, self._seed, self._distribution = domain, seed, distribution

    def row(self, i: int) -> Tensor:  # (n,)
        """Return vector ``i``."""
        words = np.random.SeedSequence([self._seed, i]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
        n = self._domain.n
        if self._distribution == "rademacher":
            drawn = torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8, device="cpu")
            return drawn.to(dtype=self._domain.dtype, device=self._domain.device).mul_(2).sub_(1)
        v = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu")
        if self._distribution == "sphere":
            v *= math.sqrt(n) / torch.linalg.vector_norm(v)
        return v.to(dtype=self._domain.dtype, device=self._domain.device)

    def rows(self, first: int, last: int) -> Tensor:  # (last - first, n)
        """Return the vectors from ``first`` up to ``last``, which is not among them."""
        return torch.stack([self.row(i) for i in range(first, last)])
