r"""The Hessian of cross-entropy with respect to the logits, in closed form and a piece at a time.

For one term of weight :math:`s` with probabilities :math:`p` it is :math:`s\,(\operatorname{diag}(p) - p p^\top)`,
whatever the label (Martens 2020, section 9). So its product with :math:`u` is :math:`s\,p \odot (u - p^\top u)`, and no
more is kept than the logits, which the model's own graph holds, and one number per term.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from sharpness.objective.output_matrices import OutputCurvature

_PIECE = 2**21  # logits that are looked at together: a vocabulary times a few tokens


@final
class Softmax(OutputCurvature):
    """The Hessian of cross-entropy for class labels, with smoothing or without.

    Probabilities are computed in float64, where those near 1 leave something of their small differences, for a piece
    of the batch at a time, and dropped again.

    Args:
        logits: The outputs.
        class_dim: The dimension that counts classes.
        weights: The weight of each term, with a dimension for the classes; 0 where it is ignored.
    """

    def __init__(self, logits: Tensor, class_dim: int, weights: Tensor) -> None:
        super().__init__([logits])
        self._dim = class_dim
        self._logits = logits.detach()
        self._weights = weights.detach()
        self._wide = torch.float32 if logits.device.type == "mps" else torch.float64
        found = [f.to(self._wide).logsumexp(class_dim, keepdim=True) for f in self._pieces(self._logits)]
        self._normalisers = self._joined(found)

    def times(self, ahead: Sequence[Tensor]) -> list[Tensor]:
        """Return the product with one tensor per output."""
        tensors = (self._logits, self._normalisers, self._weights, ahead[0])
        found = []
        for f, z, s, u in zip(*map(self._pieces, tensors), strict=True):
            p = (f.to(self._wide) - z).exp()
            inner = (p * u).sum(self._dim, keepdim=True)
            found.append((p * (u - inner) * s).to(u.dtype))
            del p, inner
        return [self._joined(found)]

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that is kept alive between products."""
        yield from (self._logits, self._weights, self._normalisers)

    def _pieces(self, tensor: Tensor) -> Sequence[Tensor]:
        """Cut a tensor along the first dimension, unless that counts the classes."""
        if self._dim == 0:
            return (tensor,)
        each = self._logits[:1].numel()
        return list(torch.split(tensor, max(_PIECE // max(each, 1), 1)))

    def _joined(self, pieces: Sequence[Tensor]) -> Tensor:
        return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
