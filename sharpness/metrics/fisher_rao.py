"""Fisher-Rao norm (Liang et al. 2019)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from sharpness._checks import check_choice, check_count
from sharpness.errors import ArgumentError
from sharpness.linalg.answer import OnFailure, check_on_failure
from sharpness.metrics.door import open_objective, provenance
from sharpness.metrics.perturbation import standard_error
from sharpness.objective import Objective
from sharpness.objective.curvature import Curvature
from sharpness.objective.losses import BatchLoss
from sharpness.objective.output_form import homogeneity, output_form
from sharpness.objective.parameters import ParameterChoice
from sharpness.objective.reduction import LossFn
from sharpness.results import ScalarResult

Labels: TypeAlias = Literal["data", "model"]
NormMethod: TypeAlias = Literal["outputs", "parameters"]
_DRAWS = 16


def fisher_rao_norm(
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    num_layers: int | None = None,
    labels: Labels = "data",
    method: NormMethod = "outputs",
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
) -> ScalarResult:
    r"""Compute the squared Fisher-Rao norm of the weights.

    .. math:: \langle \theta, F \theta \rangle = (L + 1)^2 \, \mathbb{E} \big[ \langle \partial \ell / \partial z, z
        \rangle^2 \big]

    with ``l`` the loss of one sample (the mean over its outputs where a target is not one class label), ``z`` the
    outputs, and ``L`` hidden layers, so ``L + 1`` layers with weights. The right-hand side is what ``method="outputs"``
    computes; it equals the left-hand side for networks that are linear or rectified and have no biases, where scaling
    all weights by ``c`` scales the outputs by ``c^(L+1)``. Whether that is so is seen on the first samples, and the
    record says where it is not. ``method="parameters"`` computes the left-hand side, for any network and the
    parameters that are measured.

    Invariant to: with ``method="outputs"``, everything that leaves the function as it is (rescaling of layers and of
    neurons, the scale of weights before a normalisation), since only the outputs enter; ``"parameters"`` to rescaling
    of whole layers and of neurons. It is multiplied by ``c^2`` with the loss for ``labels="data"``, and falls to zero
    as the samples are fitted.

    Args:
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        num_layers: ``L + 1``, the number of layers with weights; ``None`` takes the power by which the outputs grow
            with the weights, and where they do not the number of parameters that have two dimensions or more, frozen
            ones included.
        labels: ``"data"`` takes the targets in the data, as the paper; ``"model"`` the mean over the model's own
            predictions, the true Fisher matrix, in closed form for the criteria of PyTorch and else over 16 draws.
        method: ``"outputs"`` or ``"parameters"``.
        batch_loss: ``callable(model, batch) -> (loss, weight)`` in place of ``loss_fn``.
        params: Names, globs, a compiled regular expression, or a predicate that choose parameters.
        mode: ``"eval"``, ``"train"`` or ``"as_is"``.
        max_batches: Use only the first so many batches; the answer is then about this subset.
        seed: Same call, same bits; models with the same seed get the same random numbers.
        progress: Show a progress bar; ``None`` shows one on a terminal after two seconds.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` has no part here, since there always is an answer.
        memory: Bytes (or ``"2GiB"``) of batches that may be kept between evaluations.
        microbatch_size: Cut each batch into pieces of at most so many samples.
        precision: ``"exact"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"`` (see `Objective`).
        compile: ``"auto"``, ``True`` or ``False``: whether products are compiled (see `Objective`).

    Returns:
        The squared norm, exact up to rounding, and with ``method="outputs"`` whether it is that of the weights.

    Raises:
        ArgumentError: If an option cannot be accepted.
        DataError: If the loader or a batch cannot be used.
        NonFiniteError: If a loss or gradient is NaN or infinite; names the batch.
        ModelError: If the outputs do not depend on the parameters.

    Cost: three forward passes over the data, two of them to see whether the loss stays the same, and the derivatives of
    one by the outputs; 15 passes more where labels are drawn, and one product with the Fisher matrix for
    ``method="parameters"``.

    References:
        Liang et al. (2019), arXiv 1711.01530, theorem 3.1.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> sharpness.fisher_rao_norm(model, data).value  # mean of (2 z z)^2 with z = 1
        4.0
    """
    num_layers = None if num_layers is None else check_count("num_layers", num_layers)
    check_choice("labels", labels, ("data", "model"))
    check_choice("method", method, ("outputs", "parameters"))
    if method == "parameters" and num_layers is not None:
        raise ArgumentError('`num_layers` is for method="outputs", got method="parameters". Leave one of the two out.')
    check_on_failure(on_failure)
    objective = open_objective(model, loader, loss_fn, locals())
    if objective.criterion.hides_outputs:
        raise ArgumentError(
            "the Fisher-Rao norm is defined by the outputs of the model, and a `batch_loss` hides them. Pass "
            "loss_fn=callable(outputs, targets) in its place."
        )
    if method == "outputs":
        _require_all(objective)

    started, passes = time.perf_counter(), objective.num_passes
    curvature = Curvature("empirical_fisher" if labels == "data" else "fisher")
    depth, about = float(num_layers or 0), None
    with objective.session():
        form = output_form(objective, curvature)
        # The matrices sum the terms of a sample; a model's own target makes up for it by its variance.
        share = form.num_samples / form.num_terms if labels == "data" else 1.0
        forms = [form.total / form.num_terms * share]
        if method == "outputs":
            if form.drawn:
                more = [output_form(objective, curvature, draw) for draw in range(1, _DRAWS)]
                forms += [form.total / form.num_terms for form in more]
            degree = homogeneity(objective)
            if num_layers is None:
                depth = float(_count_layers(objective.model)) if degree is None else round(degree, 6)
            if degree is None or abs(degree - depth) > 1e-3:
                about = "not that of the weights: the outputs are not homogeneous"
            values = depth**2 * torch.tensor(forms, dtype=torch.float64)
        else:
            if form.drawn:
                raise ArgumentError(
                    '`labels`: "model" needs the distribution that the loss stands for, and '
                    f"{objective.criterion.name} tells none. Pass torch.nn.CrossEntropyLoss() or another criterion, or "
                    'method="outputs", which draws targets and gives a standard error.'
                )
            theta = objective.vector()
            product = objective.products([theta], curvature=curvature)[0]
            values = torch.sum(theta.double() * product.double())[None] * share
        objective.check()
        return ScalarResult(
            value=values.mean().item(),
            stderr=standard_error(values) if len(values) > 1 else None,
            samples=values if len(values) > 1 else None,
            about=about,
            num_evaluations=len(values),
            num_passes=objective.num_passes - passes,
            seconds=time.perf_counter() - started,
            settings=provenance(
                objective,
                {
                    "metric": "fisher_rao_norm",
                    "num_layers": depth if method == "outputs" else None,
                    "labels": labels,
                    "method": method,
                },
            ),
        )


def _require_all(objective: Objective) -> None:
    """Refuse a choice of parameters, which the outputs know nothing of."""
    chosen = set(objective.parameters.names)
    left = [name for name, p in objective.model.named_parameters() if p.requires_grad and name not in chosen]
    if left:
        raise ArgumentError(
            f'`params` leaves out {", ".join(left[:3])}{" ..." * (len(left) > 3)}, and method="outputs" is of the '
            'whole function. Pass method="parameters" for the form <w, F w> of some parameters, or leave params out.'
        )


def _count_layers(model: nn.Module) -> int:
    """Return the number of layers with weights."""
    depth = sum(p.ndim >= 2 for p in model.parameters())
    if not depth:
        raise ArgumentError("`num_layers` cannot be counted: no parameter is a matrix. Pass num_layers=...")
    return depth
