"""Average-case sharpness: the mean rise of the loss under random perturbations of the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from sharpness._checks import check_choice, check_count, check_flag, check_positive
from sharpness._progress import progress_bar
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.metrics.door import open_objective, provenance
from sharpness.metrics.perturbation import (
    DISTRIBUTIONS,
    Adaptive,
    Distribution,
    Noise,
    check_adaptive,
    mean_losses,
    perturbed,
    rounding,
    scales,
    standard_error,
)
from sharpness.objective import Objective
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.objective.variants import normalised
from sharpness.results import PerturbationResult


def average_case_sharpness(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    sigma: float = 0.01,
    adaptive: Adaptive | None = None,
    num_samples: int = 32,
    distribution: Distribution = "gaussian",
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
    r"""Estimate how far the loss rises on average when the weights are perturbed at random.

    .. math:: \mathbb{E}_{z} \, f(\theta + \sigma T z) - f(\theta)
        \; \approx \; \tfrac{\sigma^2}{2} \, \mathrm{tr}(T H T)

    with ``T`` the identity, ``diag|w|`` (``adaptive="elementwise"``) or the norms of the filters, and ``z`` standard
    normal. ``distribution="sphere"`` draws ``z`` on the unit sphere, so that ``sigma`` is the length of ``T^-1`` times
    the perturbation, and the limit is ``sigma^2 / (2 n) tr(T H T)``. Each direction is tried with both signs, which
    removes the first-order part of the variance; the standard error is that over directions, and of the rounding of
    the loss.

    Invariant to: with ``adaptive="elementwise"``, rescaling of layers and of neurons that leaves the function as it is,
    and the scale of weights before a normalisation; with ``"filter"``, rescaling of whole layers; with ``None``,
    nothing. It is multiplied by ``c`` with the loss. With one seed the directions are the same for every model of the
    same shape: a difference between models whose Hessians are alike is better known than either value.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        sigma: Standard deviation of the perturbation of a weight, relative to ``T``.
        adaptive: ``None``, ``"elementwise"`` or ``"filter"``: what a perturbation is relative to.
        num_samples: Directions, each evaluated twice.
        distribution: ``"gaussian"`` or ``"sphere"``.
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
        The mean rise, its standard error, and the rise for each direction.

    Raises:
        ArgumentError: If an option cannot be accepted.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If a loss is NaN or infinite; names the batch, and the perturbation.

    Cost: ``2 num_samples + 2`` forward passes over the data, one of them to see whether the loss stays the same; about
    6 vectors.

    References:
        Andriushchenko et al. (2023), arXiv 2302.07011.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.zero_()
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> result = sharpness.average_case_sharpness(model, data, sigma=0.1)
        >>> abs(result.value - 0.1**2 / 2 * 2) < 4 * result.stderr  # tr(H) = 2
        True
    """
    sigma = check_positive("sigma", sigma)
    check_adaptive(adaptive)
    num_samples = check_count("num_samples", num_samples, low=2)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    check_flag("normalize_logits", normalize_logits)
    check_on_failure(on_failure)
    objective = open_objective(model, loader, loss_fn, locals())
    objective = normalised(objective) if normalize_logits else objective
    settings = {
        "metric": "average_case_sharpness",
        "sigma": sigma,
        "adaptive": adaptive,
        "num_samples": num_samples,
        "distribution": distribution,
        "normalize_logits": normalize_logits,
    }
    return noise_average(objective, settings, subtract=True)


def noise_average(objective: Objective, settings: Mapping[str, Any], *, subtract: bool) -> PerturbationResult:
    """Return the mean loss under the perturbations that the settings describe, or its rise above the model's own."""
    sigma, num_samples = settings["sigma"], settings["num_samples"]
    title = settings["metric"].replace("_", " ")
    started, passes = time.perf_counter(), objective.num_passes
    with objective.session():
        loss = objective.value()
        with progress_bar(objective.progress, total=2 * num_samples, title=title, unit="evaluation") as bar:
            noise = Noise(objective, num_samples, settings["distribution"], bar)
            with perturbed(f"sigma={sigma:g}"):
                samples = mean_losses(noise.evaluate(sigma * scales(objective, settings["adaptive"])))
        objective.check()
        samples = samples - loss if subtract else samples
        return PerturbationResult(
            value=samples.mean().item(),
            loss=loss,
            stderr=math.hypot(standard_error(samples), rounding(objective, loss)),
            sigma=sigma,
            samples=samples,
            num_evaluations=1 + noise.num_evaluations,
            num_passes=objective.num_passes - passes,
            seconds=time.perf_counter() - started,
            settings=provenance(objective, settings),
        )
