r"""The curvature of the loss in the space of the model's outputs: the middle factor of :math:`J^\top M J`.

With the terms ``l_t`` of the loss, ``a_t`` the derivative of one with respect to the outputs, and everything summed
over the terms of a batch:

* Gauss-Newton: ``M`` is the Hessian of the loss with respect to the outputs (Schraudolph 2002).
* Fisher: ``M`` is the mean of ``a_t a_t'`` over targets drawn from the distribution that the loss is the negative
  log-likelihood of. For cross-entropy, mean-squared error and a few others it is known in closed form and equals the
  Gauss-Newton matrix (Martens 2020, section 9); elsewhere targets are drawn.
* Empirical Fisher: ``M`` is ``a_t a_t'`` with the targets that are in the data.

``l_t`` is the loss of one class label, or the sum of the losses of one row (dimension 0) of any other target. Class
weights weigh the terms. What enters the loss past the outputs, a penalty on the weights say, has no part in these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sharpness.errors import ArgumentError, ModelError
from sharpness.objective.curvature import Curvature
from sharpness.objective.data import describe, map_tensors, tensors_in
from sharpness.objective.losses import Terms
from sharpness.objective.output_matrices import Diagonal, LossHessian, OuterProducts, OutputCurvature
from sharpness.objective.reduction import criterion_of
from sharpness.objective.softmax import Softmax

# Where the loss is the negative log-likelihood of an exponential family in its natural parameters, the Hessian with
# respect to the outputs depends on the targets by their weights at most, and the Fisher matrix is the Gauss-Newton one.
_NATURAL: tuple[Any, ...] = (
    nn.CrossEntropyLoss,
    functional.cross_entropy,
    nn.BCEWithLogitsLoss,
    functional.binary_cross_entropy_with_logits,
    nn.MSELoss,  # a Gaussian of variance 1/2 per element
    functional.mse_loss,
)
_CROSS_ENTROPY: tuple[Any, ...] = (nn.CrossEntropyLoss, functional.cross_entropy)
_LOG_PROBABILITIES: tuple[Any, ...] = (nn.NLLLoss, functional.nll_loss)
_PROBABILITIES: tuple[Any, ...] = (nn.BCELoss, functional.binary_cross_entropy)
_COUNTS: tuple[Any, ...] = (nn.PoissonNLLLoss, functional.poisson_nll_loss)
_LAPLACE: tuple[Any, ...] = (nn.L1Loss, functional.l1_loss)


def output_curvature(curvature: Curvature, terms: Terms, generator: torch.Generator) -> OutputCurvature:
    """Return the middle factor of a curvature matrix for one batch.

    Raises:
        ArgumentError: If the loss tells too little for this curvature.
    """
    outputs = [t for t in tensors_in(terms.outputs) if t.requires_grad]
    if not outputs:
        raise ModelError(
            "the outputs of the model do not depend on the parameters that are measured. Look for .detach() and "
            "torch.no_grad() in the model, and at params=..."
        )
    found = torch.autograd.grad(terms.total, outputs, retain_graph=True, allow_unused=True)
    if all(slope is None for slope in found):
        raise ModelError(
            "the loss is not computed from the outputs that the model returns, which this curvature is defined by. "
            "Return what the loss is computed from, or pass loss_fn=callable(outputs, targets)."
        )
    if curvature.name == "empirical_fisher":
        slopes = [torch.zeros_like(out) if a is None else a for a, out in zip(found, outputs, strict=True)]
        return _outer(outputs, [slopes], terms)
    if curvature.name == "ggn":
        return _loss_hessian(terms, outputs)
    return _fisher(curvature, terms, outputs, generator)


def _loss_hessian(terms: Terms, outputs: Sequence[Tensor]) -> OutputCurvature:
    """Return the Hessian of the loss with respect to the outputs, in closed form for cross-entropy of class labels."""
    kind, options = criterion_of(terms.loss_fn)
    dim = _class_dim(terms)
    smoothed_by_class = options.get("label_smoothing", 0.0) > 0 and isinstance(options.get("weight"), Tensor)
    if kind in _CROSS_ENTROPY and dim is not None and outputs[0] is terms.outputs and not smoothed_by_class:
        return Softmax(outputs[0], dim, _class_weights(terms, options))
    return LossHessian(outputs, terms.total)


def _fisher(
    curvature: Curvature, terms: Terms, outputs: Sequence[Tensor], generator: torch.Generator
) -> OutputCurvature:
    """Return the closed form where there is one, else outer products with targets that are drawn."""
    kind, options = criterion_of(terms.loss_fn)
    if curvature.sample_targets is None and len(outputs) == 1:
        f = outputs[0].detach()
        if kind in _NATURAL or (kind in _COUNTS and options.get("log_input", True)):
            return _loss_hessian(terms, outputs)
        if kind in _LOG_PROBABILITIES and _class_dim(terms) is not None:
            return Diagonal(outputs[0], f.exp() * _class_weights(terms, options))
        if kind in _PROBABILITIES:
            weight = options.get("weight")
            variance = (f * (1 - f)).clamp(min=torch.finfo(f.dtype).tiny)
            return Diagonal(outputs[0], (torch.ones_like(f) if weight is None else weight.to(f)) / variance)
        if kind in _COUNTS:
            return Diagonal(outputs[0], 1 / (f + options.get("eps", 1e-8)))
        if kind in _LAPLACE:
            return Diagonal(outputs[0], torch.ones_like(f))
    sampler = curvature.sample_targets
    if terms.resum is None or (sampler is None and _class_dim(terms) is None):
        raise ArgumentError(
            f'curvature="fisher" needs the distribution that the loss stands for, and {terms.loss_name} tells none. '
            "Pass torch.nn.CrossEntropyLoss(), MSELoss() or another criterion as loss_fn, or use "
            'FisherOperator(objective, sample_targets=...), curvature="ggn" or curvature="empirical_fisher".'
        )
    if isinstance(options.get("weight"), Tensor) or options.get("ignore_index", -100) >= 0:
        raise ArgumentError(
            f'curvature="fisher" draws targets for {terms.loss_name}, whose class weights, or an ignored class, leave '
            'open what a drawn target counts. Pass torch.nn.CrossEntropyLoss itself, or use curvature="ggn".'
        )
    draws = []
    for _ in range(curvature.num_samples):
        leaf = map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad), terms.outputs)
        leaves = [t for t in tensors_in(leaf) if t.requires_grad]
        with torch.no_grad():
            targets = _drawn_classes(terms, generator) if sampler is None else sampler(terms.outputs, generator)
        found = torch.autograd.grad(terms.resum(leaf, targets), leaves, allow_unused=True)
        draws.append([torch.zeros_like(t) if a is None else a for a, t in zip(found, leaves, strict=True)])
    return _outer(outputs, draws, terms)


def _outer(outputs: Sequence[Tensor], draws: Sequence[Sequence[Tensor]], terms: Terms) -> OuterProducts:
    """Return outer products of the derivatives of single terms, each weighed once."""
    class_dim = _class_dim(terms) if len(outputs) == 1 else None
    if class_dim is not None and terms.loss_fn is not None:
        _, options = criterion_of(terms.loss_fn)
        weights = _class_weights(terms, options).reshape(-1)
        return OuterProducts(outputs, draws, class_dim, torch.where(weights > 0, 1 / weights, weights))
    if class_dim is None and len({out.shape[0] if out.ndim else 1 for out in outputs}) != 1:
        raise ArgumentError(
            f"the outputs {describe(terms.outputs)} differ in their number of rows, so the gradient of a single sample "
            'is not defined. Use curvature="ggn" or "hessian".'
        )
    # The derivatives of a model's own loss are zero where a label does not count, wherever that label stands.
    return OuterProducts(outputs, draws, class_dim, 1.0)


def _class_dim(terms: Terms) -> int | None:
    """Return the dimension of the outputs that counts classes, if the targets are class labels."""
    f, y = terms.outputs, terms.targets
    if not (isinstance(f, Tensor) and isinstance(y, Tensor)) or y.is_floating_point() or f.ndim != y.ndim + 1:
        return None
    if terms.loss_fn is None:  # a model's own loss: classes come last there
        return f.ndim - 1 if f.shape[:-1] == y.shape else None
    if f.ndim == 1:
        return 0
    return 1 if f.shape[:1] + f.shape[2:] == y.shape else None


def count_samples(terms: Terms) -> float:
    """Return how many samples the terms are of: class labels by their weights, else rows of the outputs."""
    if _class_dim(terms) is not None:
        return terms.weight
    rows = {out.shape[0] if out.ndim else 1 for out in tensors_in(terms.outputs)}
    return float(min(rows))


def _class_weights(terms: Terms, options: dict[str, Any]) -> Tensor:
    """Return the weight of each term, 0 where it is ignored, with a dimension for the classes."""
    f: Tensor = terms.outputs
    y: Tensor = terms.targets
    dim = _class_dim(terms)
    counted = y != options.get("ignore_index", -100)
    weights = options.get("weight")
    each: Tensor = counted.to(f.dtype)
    if isinstance(weights, Tensor):
        each = weights.to(f)[y.long().where(counted, 0)] * counted
    return each.unsqueeze(0 if dim is None else dim)


def _drawn_classes(terms: Terms, generator: torch.Generator) -> Tensor:
    """Draw a class for each label that counts, from the softmax of the outputs."""
    f, dim = terms.outputs, _class_dim(terms)
    y: Tensor = terms.targets
    probabilities = functional.softmax(f.detach().double().cpu().movedim(0 if dim is None else dim, -1), dim=-1)
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    drawn = torch.multinomial(flat, 1, generator=generator).view(y.shape).to(y)
    return torch.where(torch.lt(y, 0), y, drawn)
