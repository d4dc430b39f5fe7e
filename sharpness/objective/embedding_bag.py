"""Bags of embeddings by operations that can be differentiated twice; PyTorch's own kernel cannot."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def embedding_bag(
    module: nn.EmbeddingBag, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
) -> Tensor:  # (bags, d)
    """Return what ``module`` returns."""
    index = input.reshape(-1).long()
    if offsets is None:  # (bags, words)
        starts = torch.arange(len(input), device=input.device) * input.shape[1]
    else:
        starts = (offsets[:-1] if module.include_last_offset else offsets).long()
    bag = torch.searchsorted(starts, torch.arange(len(index), device=index.device), right=True) - 1
    rows = functional.embedding(index, module.weight, module.padding_idx, module.max_norm, module.norm_type)
    kept = torch.ones_like(index, dtype=torch.bool) if module.padding_idx is None else index != module.padding_idx
    index, bag, rows = index[kept], bag[kept], rows[kept]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1)[kept, None]
    if module.mode == "max":
        return _maxima(rows, bag, len(starts))
    sums = rows.new_zeros(len(starts), rows.shape[1]).index_add(0, bag, rows)
    if module.mode == "sum":
        return sums
    return sums / torch.bincount(bag, minlength=len(starts)).clamp(min=1)[:, None]


def _maxima(rows: Tensor, bag: Tensor, count: int) -> Tensor:
    """Return the largest entries of each bag: which ones they are has no derivative, they themselves have."""
    with torch.no_grad():
        where = bag[:, None].expand_as(rows)
        best = rows.new_full((count, rows.shape[1]), float("-inf")).scatter_reduce(0, where, rows, "amax")
        position = torch.arange(len(rows), device=rows.device)[:, None].expand_as(rows)
        position = torch.where(rows == best.gather(0, where), position, len(rows))
        first = position.new_full(best.shape, len(rows)).scatter_reduce(0, where, position, "amin")
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).gather(0, first)  # zeros for empty bags
