"""Curvature matrices of an objective as linear operators, known by their products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from sharpness.errors import ArgumentError
from sharpness.linalg.operator import LinearOperator
from sharpness.objective import Objective
from sharpness.objective.curvature import Curvature, TargetSampler


class CurvatureOperator(LinearOperator):
    """A curvature matrix of the mean loss of an objective.

    Args:
        objective: Model, loss and data.
        curvature: Which matrix.
        before: Called once, before the first product.
        expected: About how many products there will be, if that is known: it decides what is worth preparing.

    Raises:
        ArgumentError: If the loss does not define this curvature.
    """

    def __init__(
        self,
        objective: Objective,
        curvature: Curvature,
        *,
        before: Callable[[], None] | None = None,
        expected: int | None = None,
    ) -> None:
        if not isinstance(objective, Objective):
            raise ArgumentError(
                f"`objective` must be an Objective, got {type(objective).__name__}. Pass Objective(model, loader)."
            )
        objective.require(curvature)
        super().__init__(objective.n, dtype=objective.dtype, device=objective.device)
        self.objective = objective
        self.curvature = curvature
        self._before = before
        self._expected = expected

    def product_error(self, rows: Tensor) -> float | None:
        """Return the rounding error of products with the rows, measured against float64 on the first samples."""
        return self.objective.product_error(rows, curvature=self.curvature)

    def _matvec(self, v: Tensor) -> Tensor:
        return self._products([v])[0]

    def _matmat(self, V: Tensor) -> Tensor:
        return torch.stack(self._products(V.unbind(1)), dim=1)

    def _products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        if self._before is not None:
            before, self._before = self._before, None
            before()
        found = self.objective.products(vectors, curvature=self.curvature, expected=self._expected)
        if self._expected is not None:
            self._expected = max(self._expected - len(vectors), 0)
        return found


@final
class HessianOperator(CurvatureOperator):
    r"""The Hessian :math:`\nabla^2 f(\theta)` of an objective, known by its products.

    Args:
        objective: Model, loss and data.

    Cost: one pass over the data per product, or per block of products.

    Example:
        >>> import torch
        >>> from sharpness import HessianOperator, Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> HessianOperator(Objective(model, [(torch.eye(2), torch.zeros(2, 1))])).to_dense()
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective, Curvature("hessian"))


@final
class GGNOperator(CurvatureOperator):
    r"""The generalised Gauss-Newton matrix of an objective, known by its products.

    .. math:: G = \frac{1}{T} \sum_t J_t^\top \, \nabla^2_{z} \ell_t(z_t) \, J_t

    with ``J_t`` the Jacobian of the model's outputs ``z_t``: the part of the Hessian that is positive semi-definite for
    a loss that is convex in the outputs. At a minimum that fits every sample the two agree.

    Args:
        objective: Model, loss and data; the loss has the form ``(outputs, targets)`` or is the model's own.

    Raises:
        ArgumentError: If a ``batch_loss`` hides the outputs.

    Cost: one pass over the data per product, or per block of products; a product costs about as much as one with the
    Hessian.

    References:
        Schraudolph (2002), doi:10.1162/08997660260028683; Martens (2020), arXiv 1412.1193.

    Example:
        >>> import torch
        >>> from sharpness import GGNOperator, Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> GGNOperator(Objective(model, [(torch.eye(2), torch.zeros(2, 1))])).to_dense()
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective, Curvature("ggn"))


@final
class FisherOperator(CurvatureOperator):
    r"""The Fisher information matrix of the model's predictions, known by its products.

    .. math:: F = \frac{1}{T} \sum_t \mathbb{E}_{y \sim p(y | x_t)}
        \big[ \nabla_\theta \ell(x_t, y) \, \nabla_\theta \ell(x_t, y)^\top \big]

    for a loss that is a negative log-likelihood. It is exact for cross-entropy (over logits or log-probabilities),
    binary cross-entropy, mean-squared error (a Gaussian of variance 1/2 per element), absolute error and the Poisson
    loss; class weights weigh the terms. For other losses over class labels, ``num_samples`` labels are drawn for each
    term from the softmax of the outputs; for anything else pass ``sample_targets``. The draws are the same at each
    product, so the operator is one fixed matrix.

    Args:
        objective: Model, loss and data; the loss has the form ``(outputs, targets)``.
        sample_targets: ``(outputs, generator) -> targets``, to draw from a distribution of your own; the generator is
            one of the CPU.
        num_samples: Targets drawn per term where there is no closed form.

    Raises:
        ArgumentError: If a ``batch_loss`` hides the outputs; at the first product, if the loss tells no distribution.

    Cost: one pass over the data per product, or per block of products.

    References:
        Martens (2020), arXiv 1412.1193, sections 5 and 9.

    Example:
        >>> import torch
        >>> from sharpness import FisherOperator, Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> FisherOperator(Objective(model, [(torch.eye(2), torch.zeros(2, 1))])).to_dense()
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(
        self, objective: Objective, *, sample_targets: TargetSampler | None = None, num_samples: int = 16
    ) -> None:
        super().__init__(objective, Curvature("fisher", sample_targets, num_samples))


@final
class EmpiricalFisherOperator(CurvatureOperator):
    r"""The empirical Fisher matrix of an objective: the second moment of the gradients of single terms.

    .. math:: \hat F = \frac{1}{T} \sum_t \nabla_\theta \ell_t \, \nabla_\theta \ell_t^\top

    with the targets that are in the data. ``l_t`` is the loss of one class label (a token, say), or the sum of the
    losses of one row of any other target, and ``T`` counts the loss terms.
    It vanishes where every sample is fitted, however curved the loss is there; it is neither the Hessian nor an
    estimate of the Fisher matrix (Kunstner et al. 2019).

    Args:
        objective: Model, loss and data; the loss has the form ``(outputs, targets)`` or is the model's own.

    Raises:
        ArgumentError: If a ``batch_loss`` hides the outputs.

    Cost: one pass over the data per product, or per block of products.

    References:
        Kunstner, Balles, Hennig (2019), arXiv 1905.12558.

    Example:
        >>> import torch
        >>> from sharpness import EmpiricalFisherOperator, Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> EmpiricalFisherOperator(Objective(model, [(torch.eye(2), torch.zeros(2, 1))])).to_dense()
        tensor([[2., 0.],
                [0., 2.]])
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective, Curvature("empirical_fisher"))
