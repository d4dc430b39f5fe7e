"""The gradient noise scale: how large a batch still pays (McCandlish et al. 2018)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sharpness._checks import check_count
from sharpness._progress import progress_bar
from sharpness._warn import warn
from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning, DataError
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.metrics.door import open_objective, provenance
from sharpness.metrics.noise_moments import Blocks, Moments
from sharpness.objective import Objective
from sharpness.objective.losses import BatchLoss
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.objective.sample_gradients import GroupGradient, interaction, visit_groups, widened
from sharpness.results import NoiseResult


def gradient_noise_scale(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    batch_size: int | None = None,
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
) -> NoiseResult:
    r"""Estimate the noise of mini-batch gradients against the gradient itself.

    .. math:: B = \frac{\mathrm{tr}\,\Sigma}{|G|^2}

    with ``G`` the mean gradient and :math:`\Sigma` the covariance of the gradients of single samples, both of the
    distribution that the data are drawn from. The gradient of a batch of ``m`` samples is off by
    :math:`\sqrt{\mathrm{tr}\,\Sigma / m}`; at ``m = B`` that is the length of the gradient. Well below, twice the batch
    nearly halves the steps that training takes; well above, it hardly saves any.

    Numerator and denominator are unbiased each, :math:`\frac{1}{N-1} \sum_i |g_i - \bar g|^2` and
    :math:`|\bar g|^2 - \mathrm{tr}\,\Sigma / N` over all ``N`` samples, whatever the batches that the loader yields.
    Standard errors are those of the jackknife over samples, which come out too small with a few dozen of them.

    Near a minimum the gradient vanishes and the noise need not: then the estimate of :math:`|G|^2` cannot be told from
    zero, or is negative, the noise scale is infinite as far as the data tell, and the lower end of ``interval`` is what
    is known. Where every sample is fitted exactly there is neither, and the value is NaN.

    A *sample* is a row of the batches, as in a batch size. One with many loss terms (a long sentence) has a larger part
    in ``G`` than one with few, as in the loss itself: :math:`g_i - \bar g` then stands for
    :math:`(s_i - w_i G) / \bar w`, with ``s_i`` the gradient summed over the ``w_i`` terms of sample ``i``, which is
    what the gradient of a mini-batch varies by (the delta method for a ratio of means).

    Invariant to: the scale of the loss, and the split of the data into batches. Not to a change of parametrisation.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        batch_size: ``None`` takes the gradient of every sample; a number takes those of groups of so many, in the order
            of the data (which must be random then), for so many times fewer and less precise evaluations. Where the
            samples of a batch see each other (BatchNorm in train mode, contrastive losses) there are no gradients of
            single samples: that is refused, and groups are cut out of single batches of the loader; what is smaller
            than a group is left out, and the answer is about batches of this size.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the estimates are of the same quantities from fewer samples.
        seed: Same call, same bits; the global random state is left alone.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` when the gradient cannot be told from zero.
        memory: Bytes (or ``"2GiB"``) of batches that may be kept between passes.
        microbatch_size: Cut each batch into pieces of at most so many samples for the mean gradient.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Returns:
        The noise scale with its standard error and interval, both parts with theirs, and measured errors of the
        gradients of batches of consecutive samples.

    Raises:
        ArgumentError: If an option cannot be accepted, or single samples have no gradients.
        DataError: If the loader or a batch cannot be used, or there are fewer than three samples or groups.
        NonFiniteError: If a loss or gradient is NaN or infinite; names the sample.
        ModelError: If the loss does not depend on the parameters.
        ConvergenceError: If the gradient cannot be told from zero and ``on_failure="raise"``.

    Cost: one gradient of the whole data, and one backward pass per sample (or group); about
    :math:`4 + \log_4 N` vectors, whatever the batch size.

    References:
        McCandlish et al. (2018), arXiv 1812.06162, section 2.2 and appendix A; Goodfellow et al. (2016), Deep Learning,
        section 8.1.3; Fieller (1954).

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = [(torch.tensor([[1.0], [1.0], [1.0], [1.0]]), torch.tensor([[0.0], [0.0], [0.5], [0.5]]))]
        >>> result = sharpness.gradient_noise_scale(model, data, on_failure="ignore")  # gradients 2, 2, 1, 1
        >>> round(result.trace_covariance, 6), round(result.gradient_norm_squared, 6)  # 1/3 and 9/4 - 1/12
        (0.333333, 2.166667)
    """
    batch_size = None if batch_size is None else check_count("batch_size", batch_size)
    check_on_failure(on_failure)
    objective = open_objective(model, loader, loss_fn, locals())

    started, passes = time.perf_counter(), objective.num_passes
    with objective.session():
        found = interaction(objective)
        if found is not None and batch_size is None:
            raise ArgumentError(
                f'the gradients of single samples are not defined here: {found}. Use mode="eval" if that is why, or '
                "pass batch_size=... of at most that of the loader, to measure the gradients of such batches."
            )
        size, within = batch_size or 1, found is not None
        mean = _mean(objective, size) if within else widened(objective.gradient())
        moments, blocks = Moments(mean), Blocks(mean, size)
        with progress_bar(objective.progress, total=None, title="gradient noise scale", unit="gradient") as bar:

            def visit(group: GroupGradient) -> None:
                moments.add(group.total, group.weight, group.count)
                if group.count == size:
                    blocks.add(group.total, group.weight)
                bar.update()

            visit_groups(objective, size, visit, within=within)
        if not within:
            objective.check()
        if len(moments) < 3:
            raise DataError(
                f"the noise of groups of {size} sample{'s' * (size > 1)} is estimated from at least 3 of them, and the "
                f"data hold {len(moments)}. Pass more data, or a smaller batch_size."
            )
        estimate = moments.estimate()
        sizes, errors, errors_stderr = blocks.measured(moments.num_samples)
        result = NoiseResult(
            **estimate,
            batch_sizes=sizes,
            errors=errors,
            errors_stderr=errors_stderr,
            num_samples=moments.num_samples,
            num_evaluations=len(moments),
            num_passes=objective.num_passes - passes,
            seconds=time.perf_counter() - started,
            settings=provenance(
                objective,
                {
                    "metric": "gradient_noise_scale",
                    "batch_size": batch_size,
                    "groups": "within batches" if within else "across batches",
                    "why_within": found,
                },
            ),
        )
    if not result.converged and on_failure != "ignore":
        message = (
            f"the gradient cannot be told from zero: |G|^2 = {result.gradient_norm_squared:.3g} ± "
            f"{result.gradient_stderr:.2g} from {result.num_samples} samples. The noise scale is at least "
            f"{result.interval[0]:.3g}, and infinite as far as the data tell; measure more data, or earlier on."
        )
        if math.isnan(result.value):
            message = (
                "every sample has a gradient of zero, so the noise scale is 0 / 0. Measure before training has fitted "
                "the data exactly, or other data."
            )
        if on_failure == "raise":
            raise ConvergenceError(message, result)
        warn(message, ConvergenceWarning)
    return result


def _mean(objective: Objective, size: int) -> Tensor:
    """Return the mean gradient of the groups themselves, where it is not that of the data."""
    total, weight = widened(torch.zeros_like(objective.vector())), 0.0

    def add(group: GroupGradient) -> None:
        nonlocal total, weight
        total, weight = total + group.total, weight + group.weight

    visit_groups(objective, size, add, within=True)
    if not weight:
        raise ArgumentError(
            f"`batch_size` is {size}, and no batch of the loader has so many samples, which see each other and cannot "
            "be put together from several batches. Pass a smaller batch_size, or a loader with larger batches."
        )
    return total / weight
