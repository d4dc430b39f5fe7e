"""One small network, wrapped, converted and changed in the ways people do: what works, and what is refused.

Run ``python examples/variants.py`` for the two tables of the page "Will it work on my model?".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import sharpness


def net() -> nn.Sequential:
    """Return the network that all variants are made from, with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


PIXELS, LABELS = sharpness.datasets.digits(num_train=100)[0].tensors
LOADER = [(PIXELS[:60], LABELS[:60]), (PIXELS[60:], LABELS[60:])]
TOKENS = [((16 * pixels).long(), labels) for pixels, labels in LOADER]


class Wrapped(nn.Module):
    """The network behind a forward pass of one's own."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Any], model: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.call = model or net(), forward

    def forward(self, x: Tensor) -> Any:
        return self.call(self.inner, x)


def frozen() -> nn.Module:
    model = net()
    model[0].requires_grad_(False)
    return model


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(net())


class Attention(nn.Module):
    """`nn.MultiheadAttention` over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.attend, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.unflatten(1, (8, 8))
        return self.head(self.attend(rows, rows, rows, need_weights=False)[0].mean(dim=1))


class Fused(torch.autograd.Function):
    """A kernel whose backward pass, like that of many fused ones, cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * slope


def under_autocast() -> sharpness.EigenResult:
    with torch.autocast("cpu"):
        return sharpness.top_eigenvalues(net(), LOADER)


WORKS: dict[str, Callable[[], sharpness.EigenResult]] = {
    "as it is": lambda: sharpness.top_eigenvalues(net(), LOADER),
    "`torch.compile`": lambda: sharpness.top_eigenvalues(torch.compile(net(), backend="eager"), LOADER),
    "`nn.DataParallel`": lambda: sharpness.top_eigenvalues(nn.DataParallel(net()), LOADER),
    "`torch.jit.script`": lambda: sharpness.top_eigenvalues(scripted(), LOADER),
    "`checkpoint(..., use_reentrant=False)`": lambda: sharpness.top_eigenvalues(
        Wrapped(lambda inner, x: checkpoint(inner, x, use_reentrant=False)), LOADER
    ),
    "weights in bfloat16": lambda: sharpness.top_eigenvalues(net().bfloat16(), LOADER),
    "weights in float64": lambda: sharpness.top_eigenvalues(
        net().double(), [(pixels.double(), labels) for pixels, labels in LOADER]
    ),
    "under autocast": under_autocast,
    "output with `logits`": lambda: sharpness.top_eigenvalues(Wrapped(lambda m, x: {"logits": m(x)}), LOADER),
    "tuple output, own loss": lambda: sharpness.top_eigenvalues(
        Wrapped(lambda m, x: (m(x), x)), LOADER, lambda outputs, labels: functional.cross_entropy(outputs[0], labels)
    ),
    "first layer frozen": lambda: sharpness.top_eigenvalues(frozen(), LOADER),
    "some parameters": lambda: sharpness.top_eigenvalues(net(), LOADER, params="2.*"),
    "`nn.MultiheadAttention`": lambda: sharpness.top_eigenvalues(Attention(), LOADER),
    "`nn.Embedding(sparse=True)`": lambda: sharpness.top_eigenvalues(
        Wrapped(lambda m, x: m(x).mean(dim=1), nn.Embedding(17, 10, sparse=True)), TOKENS
    ),
    "`nn.EmbeddingBag` (mean)": lambda: sharpness.top_eigenvalues(nn.Sequential(nn.EmbeddingBag(17, 10)), TOKENS),
}


REFUSED: dict[str, Callable[[], sharpness.EigenResult]] = {
    "`checkpoint(..., use_reentrant=True)`": lambda: sharpness.top_eigenvalues(
        nn.Sequential(nn.Linear(64, 64), Wrapped(lambda inner, x: checkpoint(inner, x, use_reentrant=True))), LOADER
    ),
    "kernel without a second derivative": lambda: sharpness.top_eigenvalues(
        Wrapped(lambda inner, x: Fused.apply(inner(x))), LOADER
    ),
    "complex parameters": lambda: sharpness.top_eigenvalues(
        Wrapped(lambda m, x: m(x.to(torch.complex64)).abs(), nn.Linear(64, 10, dtype=torch.complex64)), LOADER
    ),
    "lazy layers before a first pass": lambda: sharpness.top_eigenvalues(nn.LazyLinear(10), LOADER),
    "everything frozen": lambda: sharpness.top_eigenvalues(net().requires_grad_(False), LOADER),
    "outputs detached": lambda: sharpness.top_eigenvalues(Wrapped(lambda m, x: m(x).detach()), LOADER),
    "tuple output, no loss": lambda: sharpness.top_eigenvalues(Wrapped(lambda m, x: (m(x), x)), LOADER),
    "one output, integer targets": lambda: sharpness.top_eigenvalues(nn.Linear(64, 1), LOADER),
    "batches without targets": lambda: sharpness.top_eigenvalues(net(), [PIXELS]),
    "an iterator": lambda: sharpness.top_eigenvalues(net(), iter(LOADER)),
    "a loss that weighs its terms unseen": lambda: sharpness.top_eigenvalues(
        net(), LOADER, lambda outputs, labels: functional.cross_entropy(outputs, labels, ignore_index=0)
    ),
}


def works() -> Iterator[dict[str, Any]]:
    """Yield one row for each variant that works."""
    for name, call in WORKS.items():
        result = call()
        low, high = result.interval[0].tolist()
        yield {
            "variant": name,
            "measured parameters": result.settings["n"],
            "top eigenvalue": f"{result.eigenvalues[0]:.4g} ± {(high - low) / 2:.0e}",
        }


def refused() -> Iterator[dict[str, Any]]:
    """Yield one row for each variant that is refused, with the words of the error."""
    for name, call in REFUSED.items():
        try:
            call()
        except sharpness.SharpnessError as error:
            yield {"variant": name, "error": f"`{type(error).__name__}`", "what it says": str(error)}
        else:
            raise AssertionError(f"{name} was not refused")


if __name__ == "__main__":
    from tabulate import tabulate

    print(tabulate(works(), headers="keys", tablefmt="github"))
    print(tabulate(refused(), headers="keys", tablefmt="github"))
