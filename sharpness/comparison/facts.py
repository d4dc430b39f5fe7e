"""What is found out about one model beside the metrics: all that tells whether a comparison is fair."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import nn

from sharpness.comparison.geometry import Place
from sharpness.errors import ModelError, NonFiniteError
from sharpness.metrics.minimum import NewtonDecrease, newton_check
from sharpness.objective import Objective
from sharpness.objective.evaluation import Evaluation
from sharpness.objective.outputs import evaluate_with_logits


@final
@dataclass(frozen=True)
class Facts:
    """What is known of one model."""

    place: Place
    train: Evaluation
    test: Evaluation | None
    logit_norm: float | None
    loss: str  # in words
    training: dict[str, bool]  # the flag of each module
    dtypes: str  # of the parameters measured
    unset: tuple[str, ...]  # normalisations whose running statistics are used, and were never updated
    newton: NewtonDecrease | None
    unchecked: str | None  # why the minimum was not checked, where it was to be

    @property
    def accuracy_gap(self) -> float | None:
        """Return training accuracy less test accuracy, where there are both."""
        if self.test is None or self.train.accuracy is None or self.test.accuracy is None:
            return None
        return self.train.accuracy - self.test.accuracy

    @property
    def gain(self) -> float | None:
        """Return what a Newton step gains, in units of the training loss; ``None`` where that means nothing."""
        return None if self.newton is None or self.train.loss <= 0 else self.newton.decrease / self.train.loss

    @property
    def shift(self) -> float:
        """Return how far that step moves the weights, in units of their length; 0 where it is not known."""
        if self.newton is None or not self.newton.step_norm:
            return 0.0
        length = self.place.norm()
        return self.newton.step_norm / length if length else math.inf


def find_facts(objective: Objective, test: Objective | None, *, check_minimum: bool) -> Facts:
    """Measure a model: a pass over each loader, and for the minimum a gradient and ten Hessian-vector products."""
    train, logit_norm = evaluate_with_logits(objective)
    newton, unchecked = None, None
    if check_minimum:
        try:
            newton = newton_check(objective)
        except (ModelError, NonFiniteError) as error:  # metrics that need no second derivative go on
            unchecked = str(error)
    return Facts(
        place=Place(objective),
        train=train,
        test=None if test is None else test.evaluate(),
        logit_norm=logit_norm,
        loss=objective.criterion.label,
        training={name or "the model": module.training for name, module in objective.model.named_modules()},
        dtypes=_dtypes(objective),
        unset=_unset_statistics(objective.model, objective.mode),
        newton=newton,
        unchecked=unchecked,
    )


def _dtypes(objective: Objective) -> str:
    named = dict(objective.model.named_parameters())
    found = {str(named[name].dtype).removeprefix("torch.") for name in objective.parameters.names}
    return " and ".join(sorted(found))


def _unset_statistics(model: nn.Module, mode: str) -> tuple[str, ...]:
    found = []
    for name, module in model.named_modules():
        seen = getattr(module, "num_batches_tracked", None)
        used = mode == "eval" or (mode == "as_is" and not module.training)
        if seen is not None and used and getattr(module, "running_mean", None) is not None and not int(seen):
            found.append(name)
    return tuple(found)
