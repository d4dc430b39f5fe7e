"""Low-pass filtered loss (Bisla et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from sharpness._checks import check_count, check_flag, check_positive
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.metrics.average_case import noise_average
from sharpness.metrics.door import open_objective
from sharpness.metrics.perturbation import Adaptive, check_adaptive
from sharpness.objective import Objective
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.objective.variants import normalised
from sharpness.results import PerturbationResult


def low_pass_sharpness(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    sigma: float = 0.01,
    adaptive: Adaptive | None = None,
    num_samples: int = 50,
    normalize_logits: bool = False,
    batch_loss: BatchLoss | None = None,
    params: ParameterChoice | None = None,
    mode: str = "eval",
    max_batches: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    on_failure: OnFailure = "warn",
    memory: int | str = "auto",
    microbatch_size: int | None = None,
    precision: str = "exact",
    compile: bool | str = "auto",
) -> PerturbationResult:
    r"""Estimate the loss convolved with a Gaussian, the measure of Bisla et al. (2022).

    .. math:: (f * K)(\theta) = \mathbb{E}_{z \sim N(0, I)} \, f(\theta + \sigma T z)

    as published: the loss itself is *not* subtracted, and stands beside it as ``loss``. The difference of the two is
    `average_case_sharpness`. ``num_samples=50`` directions with both signs are the 100 draws of the paper.

    Invariant to: what `average_case_sharpness` is invariant to with the same ``adaptive``; for ``None``, the published
    form, nothing. It is multiplied by ``c`` with the loss.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        sigma: Standard deviation of the perturbation of a weight, relative to ``T``; the paper uses 0.01.
        adaptive: ``None``, ``"elementwise"`` or ``"filter"``: what a perturbation is relative to.
        num_samples: Directions, each evaluated with both signs.
        normalize_logits: Centre the logits of each sample and scale them to unit length before the loss.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the answer is then about this subset.
        seed: Same call, same bits; models with the same seed get the same random numbers.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` has no part here, since an average always has an answer.
        memory: Bytes (or ``"2GiB"``) of batches that may be kept between evaluations.
        microbatch_size: Cut each batch into pieces of at most so many samples.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Returns:
        The mean perturbed loss, its standard error, and the unperturbed loss.

    Raises:
        ArgumentError: If an option cannot be accepted.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If a loss or gradient is NaN or infinite; names the batch.

    Cost: ``2 num_samples + 2`` forward passes over the data, one of them to see whether the loss stays the same; about
    6 vectors.

    References:
        Bisla et al. (2022), arXiv 2201.08025.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.zero_()
        >>> data = [(torch.eye(2), torch.ones(2, 1))]
        >>> result = sharpness.low_pass_sharpness(model, data, sigma=0.1)
        >>> result.loss, abs(result.value - 1 - 0.1**2 / 2 * 2) < 4 * result.stderr  # tr(H) = 2
        (1.0, True)
    """
    sigma = check_positive("sigma", sigma)
    check_adaptive(adaptive)
    num_samples = check_count("num_samples", num_samples, low=2)
    check_flag("normalize_logits", normalize_logits)
    check_on_failure(on_failure)
    objective = open_objective(model, loader, loss_fn, locals())
    objective = normalised(objective) if normalize_logits else objective
    settings = {
        "metric": "low_pass_sharpness",
        "sigma": sigma,
        "adaptive": adaptive,
        "num_samples": num_samples,
        "distribution": "gaussian",
        "normalize_logits": normalize_logits,
    }
    return noise_average(objective, settings, subtract=False)
