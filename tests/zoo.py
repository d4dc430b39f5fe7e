"""Small problems whose Hessians are known exactly, by a formula or by dense autograd on an independent path.

Every model has a buffer, a frozen parameter, a shared one and an unused one; every loader ends in a ragged batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SIZES = (4, 4, 3)  # samples per batch, the last one ragged


@dataclass
class Problem:
    """A model with data, and its Hessian with respect to the trainable parameters."""

    name: str
    model: nn.Module
    loader: list[Any]
    hessian: Tensor  # (n, n)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def eigenvalues(self) -> Tensor:
        """Descending."""
        return torch.linalg.eigvalsh(self.hessian).flip(0)


class Dressed(nn.Module):
    """A module with all that real models have: a buffer, a frozen, a shared and an unused parameter."""

    def __init__(self, core: nn.Module, shared: str) -> None:
        super().__init__()
        self.core = core
        self.frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.again = core.get_parameter(shared)  # a second name for one parameter
        self.register_buffer("one", torch.ones((), dtype=torch.float64))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.core(*inputs) * self.one * self.frozen.prod()


class Quadratic(nn.Module):
    """``0.5 w'Hw + mean(rows) w + c`` over the rows of a batch: the Hessian is ``H``, whatever the data."""

    def __init__(self, hessian: Tensor, at: Tensor | None = None, constant: float = 0.0) -> None:
        super().__init__()
        at = torch.linspace(-1, 1, len(hessian), dtype=hessian.dtype) if at is None else at
        self.w = nn.Parameter(at.clone())
        self.register_buffer("h", hessian)
        self.constant = constant

    def forward(self, rows: Tensor) -> Tensor:
        return 0.5 * self.w @ self.h @ self.w + rows.mean(0) @ self.w + self.constant


def by_rows(model: nn.Module, rows: Tensor) -> tuple[Tensor, float]:
    """The ``batch_loss`` of a quadratic."""
    return model(rows), len(rows)


def batches(*tensors: Tensor, sizes: tuple[int, ...] = SIZES) -> list[Any]:
    """Split tensors into batches of the given sizes; a single tensor gives bare batches."""
    pieces = list(zip(*(tensor.split(sizes) for tensor in tensors), strict=True))
    return pieces if len(tensors) > 1 else [piece[0] for piece in pieces]


def with_unused(hessian: Tensor) -> Tensor:
    """Put the zero rows of the unused parameter first, as ``named_parameters`` lists it before the core's."""
    return torch.block_diag(torch.zeros(2, 2, dtype=hessian.dtype), hessian)


def rotated(spectrum: Tensor, seed: int = 0) -> Tensor:
    """A dense symmetric matrix with this spectrum."""
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=g, dtype=torch.float64))
    matrix = (q * spectrum) @ q.T
    return (matrix + matrix.T) / 2


def quadratic(name: str, hessian: Tensor, *, bare: bool = False) -> Problem:
    g = torch.Generator().manual_seed(5)
    rows = torch.randn(sum(SIZES), len(hessian), generator=g, dtype=hessian.dtype) * hessian.abs().max()
    core = Quadratic(hessian)
    model = core if bare else Dressed(core, "w")
    exact = hessian if bare else with_unused(hessian)
    return Problem(name, model, batches(rows), exact, {"batch_loss": by_rows})


def features(columns: int, seed: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(sum(SIZES), columns, generator=g, dtype=torch.float64)


def linear_regression() -> Problem:
    """Mean-squared error over two outputs: 2 X'X / (N C) for each output."""
    x, y = features(3), features(2, seed=4)
    model = Dressed(nn.Linear(3, 2, bias=False).double(), "weight")
    hessian = torch.kron(torch.eye(2, dtype=torch.float64), 2 * x.T @ x / y.numel())
    return Problem("linear regression", model, batches(x, y), with_unused(hessian), {"loss_fn": nn.MSELoss()})


def logistic_regression() -> Problem:
    """Binary cross-entropy: X' diag(p (1 - p)) X / N."""
    x = features(3)
    y = (features(1, seed=6) > 0).double()
    model = Dressed(nn.Linear(3, 1, bias=False).double(), "weight")
    p = torch.sigmoid(x @ model.core.weight.detach().T)
    hessian = x.T @ (p * (1 - p) * x) / len(x)
    return Problem(
        "logistic regression", model, batches(x, y), with_unused(hessian), {"loss_fn": nn.BCEWithLogitsLoss()}
    )


def softmax_regression() -> Problem:
    """Cross-entropy at zero weights: (I - 1/K) / K times X'X / N."""
    x, k = features(3), 4
    y = torch.arange(len(x)) % k
    core = nn.Linear(3, k, bias=False).double()
    core.weight.data.zero_()
    classes = (torch.eye(k, dtype=torch.float64) - 1 / k) / k
    hessian = torch.kron(classes, x.T @ x / len(x))
    return Problem("softmax regression at zero", Dressed(core, "weight"), batches(x, y), with_unused(hessian))


class TiedNet(nn.Module):
    """A tanh net whose middle layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.middle(torch.tanh(self.middle(x)))))


def tanh_net(seed: int = 0) -> Problem:
    """Cross-entropy of a small net; the Hessian by `torch.func.hessian` on all data at once."""
    torch.manual_seed(seed)
    x = features(3)
    y = torch.arange(len(x)) % 3
    model = Dressed(TiedNet().double(), "middle.weight")
    return Problem(
        "tanh net", model, batches(x, y), dense_hessian(model, lambda m: nn.functional.cross_entropy(m(x), y))
    )


def dense_hessian(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """The Hessian by forward-over-reverse differentiation of one flat function, batches unknown to it."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> Tensor:
            return loss(self.inner)

    def f(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in named.values()])
        shaped = {f"inner.{name}": v.view(p.shape) for (name, p), v in zip(named.items(), pieces, strict=True)}
        return torch.func.functional_call(Whole(), shaped, ())

    return torch.func.hessian(f)(flat)


def spectra() -> dict[str, Tensor]:
    """Spectra of quadratics, each a trap of its own."""
    t = lambda *values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    g = torch.Generator().manual_seed(11)
    generic = torch.randn(24, generator=g, dtype=torch.float64)
    return {
        "definite": torch.linspace(0.5, 9, 12, dtype=torch.float64),
        "indefinite": generic,
        "plus and minus five": torch.cat([t(5, -5), torch.ones(20, dtype=torch.float64)]),
        "degenerate": t(3, 3, 3, 1, 1, 0, 0, 0, 0, 0),
        "rank two": torch.cat([t(3, 1), torch.zeros(48, dtype=torch.float64)]),
        "zero": torch.zeros(6, dtype=torch.float64),
        "one dimension": t(-2),
        "tiny": 1e-8 * generic,
        "huge": 1e8 * generic,
        "geometric": 0.7 ** torch.arange(40, dtype=torch.float64),
        "multiple at the top": torch.cat(
            [7 * torch.ones(5, dtype=torch.float64), 2 * torch.ones(45, dtype=torch.float64)]
        ),
    }


def quadratics() -> list[Problem]:
    diagonal = quadratic("diagonal", torch.diag(torch.tensor([4.0, -1.0, 2.5, 0.5], dtype=torch.float64)))
    return [diagonal, *(quadratic(name, rotated(values), bare=True) for name, values in spectra().items())]


def networks() -> list[Problem]:
    return [linear_regression(), logistic_regression(), softmax_regression(), tanh_net()]


def problems() -> list[Problem]:
    return [*quadratics(), *networks()]
