"""Running statistics of normalisations, estimated anew for other weights."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sharpness.errors import DataError
from sharpness.objective.data import num_samples
from sharpness.objective.guard import reseed
from sharpness.objective.objective import Objective
from sharpness.objective.surface import single


def fixed_norms(model: nn.Module, mode: str) -> list[_NormBase]:
    """Return the layers that normalise by their running statistics in this mode."""
    norms = (m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None)
    return [norm for norm in norms if not (norm.training if mode == "as_is" else mode == "train")]


@final
class RunningStatistics:
    """Running statistics of the activations of other weights.

    They are averaged over the whole loader, each batch weighed by its number of samples.
    """

    def __init__(self, objective: Objective, norms: list[_NormBase]) -> None:
        self._objective = objective
        self._norms = norms

    def at(self, point: dict[str, Tensor]) -> dict[str, Tensor]:  # within a session, which restores the flags
        """Return ``point`` with the running statistics of its own activations; its tensors are written to."""
        objective, before = self._objective, [norm.momentum for norm in self._norms]
        objective.batches.settle(objective.passes.room())
        objective.passes.count += 1
        places = {f"model.{name}": single(tensor) for name, tensor in point.items()}
        try:
            for norm in self._norms:
                norm.train()
            return objective.functional.inside(places, self._walked)
        finally:
            for norm, momentum in zip(self._norms, before, strict=True):
                norm.momentum = momentum
                norm.eval()

    def _walked(self) -> dict[str, Tensor]:
        """Walk the data, and return parameters and buffers as they are then."""
        objective, seen = self._objective, 0
        for norm in self._norms:
            norm.reset_running_stats()
        for i, batch in objective.batches.walk(cut=objective.batches.piece is None):
            count = num_samples(batch) or 1
            seen += count
            for norm in self._norms:
                norm.momentum = count / seen
            reseed(objective.seed, 0, i)
            try:
                objective.functional.terms_here(batch)
            except ValueError as error:
                if "Expected more than 1" not in str(error):
                    raise
                raise DataError(
                    f"batch {i} (counted from 0) has one value per channel, and a layer of batch normalisation no "
                    "variance to estimate from it. Use drop_last=True or another batch size, or pass "
                    'batch_norm="interpolate".'
                ) from error
        model = objective.model
        return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
