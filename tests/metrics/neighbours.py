"""Problems and changes of scale that the tests of the neighbourhood measures share."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tests.zoo import Quadratic, batches, by_rows

DTYPES = {torch.float64: 1e-6, torch.float32: 1e-3}
SPECTRUM = torch.tensor([4.0, 1.5, 1.0, 0.3, 0.02, 1e-4], dtype=torch.float64)
AT = torch.tensor([0.8, -1.5, 2.0, -0.1, 3.0, -0.7], dtype=torch.float64)
ROWS = torch.zeros(11, 6, dtype=torch.float64)


def on_quadratic(metric, hessian: Tensor, at: Tensor, *, dtype=torch.float64, **options):
    """Measure ``f(w) = w'Hw / 2``."""
    model = Quadratic(hessian.to(dtype), at.to(dtype), options.pop("constant", 0.0))
    return metric(model, batches(ROWS.to(dtype)), batch_loss=by_rows, **options)


class LeastSquares:
    """Linear regression without bias: ``f(w) = mean (a_i w - b_i)^2``."""

    def __init__(self, *, exact: bool, dtype=torch.float64, seed: int = 0, rows: int = 12, columns: int = 5) -> None:
        g = torch.Generator().manual_seed(seed)
        self.a = torch.randn(rows, columns, generator=g, dtype=torch.float64)
        self.a *= torch.tensor([3.0, 1, 1, 1, 1], dtype=torch.float64)  # a gap at the top
        w = torch.randn(columns, generator=g, dtype=torch.float64)
        b = self.a @ w + (0 if exact else torch.randn(rows, generator=g, dtype=torch.float64))
        self.residuals, self.w = self.a @ w - b, w
        self.model = nn.Linear(columns, 1, bias=False).to(dtype)
        self.model.weight.data = w[None].to(dtype)
        self.pairs = (self.a.to(dtype), b[:, None].to(dtype))
        self.hessian = 2 * self.a.T @ self.a / rows

    def loader(self, size: int = 5):
        return list(zip(*(t.split(size) for t in self.pairs), strict=True))


class Valley(nn.Module):
    """Dinh's ``(w1 w2 - 1)^2 / 2``, as two linear layers of one weight each."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
        self.first.weight.data.fill_(a)
        self.second.weight.data.fill_(1 / a)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


ONE = [(torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))]


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean() / 2


def relu_net() -> nn.Sequential:
    g = torch.Generator().manual_seed(2)
    net = nn.Sequential(
        nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)
    ).double()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)
    return net


def layers_rescaled(net: nn.Sequential) -> nn.Sequential:
    """The same function: the first layer times 5, the last by 5."""
    other = copy.deepcopy(net)
    other[0].weight.data *= 5
    other[4].weight.data /= 5
    return other


def neurons_rescaled(net: nn.Sequential, layer: int) -> nn.Sequential:
    """The same function: each row of a layer times a factor of its own, the next layer's columns divided by it."""
    other = copy.deepcopy(net)
    factors = torch.linspace(0.3, 3, net[layer].weight.shape[0], dtype=torch.float64)
    other[layer].weight.data *= factors[:, None]
    other[layer + 2].weight.data /= factors
    return other


def data(by: nn.Module | None = None):
    """Inputs with arbitrary labels, or with those that a model predicts."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(24, 3, generator=g, dtype=torch.float64)
    y = torch.arange(24) % 3 if by is None else copy.deepcopy(by).eval()(x).argmax(1)
    return batches(x, y, sizes=(10, 10, 4))


def normalised_net(scale: float) -> nn.Sequential:
    """The same function for every scale of the weights before the normalisation."""
    torch.manual_seed(4)
    norm = nn.BatchNorm1d(4, eps=0.0, affine=False)
    net = nn.Sequential(nn.Linear(3, 4, bias=False), norm, nn.ReLU(), nn.Linear(4, 3)).double()
    net[0].weight.data *= scale
    norm.running_mean, norm.running_var = norm.running_mean * scale, norm.running_var * scale**2
    return net


def moved(metric, before: nn.Module, after: nn.Module, **options) -> float:
    """By what factor a measure changes between two models."""
    a, b = (metric(model, data(before), **options).headline for model in (before, after))
    return b / a
