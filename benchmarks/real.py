"""Two more trained networks: a small character GPT, and the ResNet-20 for CIFAR-10 that the tests of real models read.

The GPT learns the topics of Python's own help, unless a text file is given: nothing is downloaded.
"""

from __future__ import annotations

import gzip
import math
import pydoc_data.topics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models import Problem
from tests.real.models import resnet20

_CONTEXT, _WIDTH, _HEADS = 32, 32, 4


class Attention(nn.Module):
    """Causal self-attention, written out, so that every library can differentiate it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.register_buffer("later", torch.ones(_CONTEXT, _CONTEXT, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        """Return what each token takes from those before it."""
        batch, tokens, _ = x.shape
        q, k, v = (t.view(batch, tokens, _HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        scores = (q @ k.mT / math.sqrt(_WIDTH / _HEADS)).masked_fill(self.later[:tokens, :tokens], -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, _WIDTH))


class Layer(nn.Module):
    """A layer of a transformer that normalises first."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the stream and what attention and the network add."""
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class GPT(nn.Module):
    """A character model of two layers; its logits are ``(batch, characters, tokens)``, as cross-entropy wants them."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(characters, _WIDTH), nn.Embedding(_CONTEXT, _WIDTH)
        self.layers = nn.Sequential(Layer(), Layer(), nn.LayerNorm(_WIDTH))
        self.head = nn.Linear(_WIDTH, characters, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next character after each token."""
        return self.head(self.layers(self.characters(tokens) + self.positions.weight[: tokens.shape[1]])).mT


def gpt(path: Path | None = None, *, sequences: int = 64, steps: int = 4000, weights: Path | None = None) -> Problem:
    """Train a GPT on a text, or read its weights if there are some, and measure the text's first sequences."""
    text = _read(path) if path is not None else "\n".join(pydoc_data.topics.topics.values())
    text = text[:1_000_000]
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    data = torch.tensor([index[character] for character in text])
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(len(index))
        if weights is not None and weights.exists():
            model.load_state_dict(torch.load(weights, weights_only=True))
        else:
            _train(model, data, steps)
            if weights is not None:
                torch.save(model.state_dict(), weights)
    seconds = time.perf_counter() - started
    inputs, targets = _windows(data, torch.arange(sequences) * _CONTEXT)
    return _problem("gpt", model, inputs, targets, max(1, 3 * sequences // 8), seconds)


def _train(model: GPT, data: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        inputs, targets = _windows(data, torch.randint(len(data) - _CONTEXT - 1, (32,)))
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        schedule.step()


def cifar(images: int = 128) -> Problem:
    """Return the ResNet-20 of the PyHessian repository on the first images of CIFAR-10."""
    trained = resnet20(images, images)
    inputs, targets = trained.loader[0]
    return _problem("cifar", trained.model, inputs, targets, max(1, 3 * images // 8), 0.0)


REAL: dict[str, Callable[..., Problem]] = {"gpt": gpt, "cifar": cifar}


def _read(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()


def _windows(data: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    where = starts.unsqueeze(1) + torch.arange(_CONTEXT + 1)
    rows = data[where]
    return rows[:, :-1], rows[:, 1:]


def _problem(name: str, model: nn.Module, inputs: Tensor, targets: Tensor, size: int, seconds: float) -> Problem:
    model.eval().zero_grad(set_to_none=True)
    with torch.no_grad():
        outputs = model(inputs)
    return Problem(
        name=name,
        model=model,
        loader=list(zip(inputs.split(size), targets.split(size), strict=True)),
        loss=functional.cross_entropy(outputs, targets).item(),
        accuracy=(outputs.argmax(1) == targets).double().mean().item(),
        seconds=seconds,
    )
