"""Dense Hessians by reverse-over-reverse differentiation, for models that forward mode cannot do or does wrong.

(In PyTorch 2.13 `torch.func.hessian` is not even symmetric in the weights of a layer norm.)
"""

import torch

from sharpness import Objective

D = torch.float64


def double_backward_hessian(model, loss):
    """The Hessian of ``loss(model)`` in the trainable parameters, one flat function, all data at once."""
    named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    flat = torch.cat([p.reshape(-1) for p in named.values()])

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self):
            return loss(self.inner)

    def f(vector):
        pieces = vector.split([p.numel() for p in named.values()])
        shaped = {f"inner.{name}": v.view(p.shape) for (name, p), v in zip(named.items(), pieces, strict=True)}
        return torch.func.functional_call(Whole(), shaped, ())

    return torch.autograd.functional.hessian(f, flat)


def by_products(model, loader, loss_fn=None, **options):
    """The Hessian row by row from products."""
    objective = Objective(model, loader, loss_fn, **options)
    return torch.stack([objective.hvp(row) for row in torch.eye(objective.n, dtype=objective.dtype)])
