"""Ten small architectures with data, each ready for ``sharpness.top_eigenvalues(model, loader)``.

Every model has a few thousand parameters at most and is trained for a few dozen steps, every loader ends in a smaller
batch. Run ``python examples/architectures.py`` for the table of the page "Will it work on my model?".
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import sharpness

TEXT = "the quick brown fox jumps over the lazy dog while five boxing wizards judge my vow and pack a liquor jug "
LETTERS = sorted(set(TEXT))
CODES = torch.tensor([LETTERS.index(letter) for letter in TEXT])


class ResidualBlock(nn.Module):
    """Two convolutions with batch normalisation, and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.body(x))


class EncoderClassifier(nn.Module):
    """`nn.TransformerEncoder` over the rows of an image."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.1 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, nhead=2, dim_feedforward=32, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(width, 10)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(rows) + self.position).mean(dim=1))


class CausalBlock(nn.Module):
    """Causal self-attention by the fused kernel, then a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class GPT(nn.Module):
    """A character-level language model."""

    def __init__(self, width: int = 16, context: int = 12) -> None:
        super().__init__()
        self.letters, self.positions = nn.Embedding(len(LETTERS), width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(CausalBlock(width, heads=2) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(LETTERS), bias=False)

    def forward(self, codes: Tensor) -> Tensor:
        places = torch.arange(codes.shape[1], device=codes.device)
        return self.head(self.norm(self.blocks(self.letters(codes) + self.positions(places))))


class Recurrent(nn.Module):
    """A recurrent layer, and a linear one on its last output."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size, outputs)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.layer(sequence)[0][:, -1])


class UNet(nn.Module):
    """One level down and up again, with a skip connection; one class per pixel."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU())
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.leave = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2, 1))

    def forward(self, image: Tensor) -> Tensor:
        fine = self.enter(image)
        return self.leave(torch.cat([fine, self.up(self.down(fine))], dim=1))


class GraphNet(nn.Module):
    """Two rounds of message passing, then the mean over the nodes of each graph."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 3)
        self.auxiliary = nn.Linear(width, 1)  # of a second task, not used here

    def forward(self, x: Tensor, edge_index: Tensor, graph: Tensor) -> Tensor:
        source, target = edge_index
        h = torch.tanh(self.first(x))
        heard = torch.zeros_like(h).index_add(0, target, h[source])
        h = torch.tanh(self.second(torch.cat([h, heard], dim=1)))
        nodes = torch.bincount(graph).to(h.dtype)
        return self.head(h.new_zeros(len(nodes), h.shape[1]).index_add(0, graph, h) / nodes[:, None])


class TiedWordModel(nn.Module):
    """Predict a letter from those around it; input and output embeddings are one matrix."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), width)
        self.mix = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, len(LETTERS), bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, around: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(around).flatten(1))))


def train(model: nn.Module, loader: Any, loss: Callable[[Any, Any], Tensor] | None = None, epochs: int = 20) -> None:
    """Train for a few epochs; without ``loss``, on the model's own one."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            if loss is None:
                value = model(**batch).loss
            elif isinstance(batch, dict):
                value = loss(model(**{key: item for key, item in batch.items() if key != "labels"}), batch["labels"])
            else:
                value = loss(model(batch[0]), batch[1])
            value.backward()
            optimizer.step()
    optimizer.zero_grad()


def images(*shape: int) -> DataLoader[Any]:
    """Return 90 digits in batches of 32, 32 and 26."""
    pixels, labels = sharpness.datasets.digits(num_train=90)[0].tensors
    return DataLoader(TensorDataset(pixels.reshape(-1, *shape), labels), batch_size=32)


def mlp() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Dropout(0.1), nn.Linear(24, 10))
    train(model, loader := images(64), functional.cross_entropy)
    return model, loader


def resnet() -> tuple[nn.Module, Any]:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        ResidualBlock(8),
        ResidualBlock(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    train(model, loader := images(1, 8, 8), functional.cross_entropy)
    return model, loader


def transformer_encoder() -> tuple[nn.Module, Any]:
    train(model := EncoderClassifier(), loader := images(8, 8), functional.cross_entropy)
    return model, loader


def gpt() -> tuple[nn.Module, Any]:
    windows = CODES.unfold(0, 13, 3)
    loader = DataLoader(TensorDataset(windows[:, :-1], windows[:, 1:]), batch_size=12)
    train(model := GPT(), loader, lambda logits, letters: functional.cross_entropy(logits.movedim(-1, 1), letters))
    return model, loader


def lstm() -> tuple[nn.Module, Any]:
    train(model := Recurrent(nn.LSTM(8, 16, batch_first=True), 10), loader := images(8, 8), functional.cross_entropy)
    return model, loader


def gru() -> tuple[nn.Module, Any]:
    wave = torch.sin(0.4 * torch.arange(75.0)) + 0.05 * torch.randn(75)
    windows = wave.unfold(0, 13, 1)
    loader = DataLoader(TensorDataset(windows[:, :-1, None], windows[:, -1:]), batch_size=24)
    train(model := Recurrent(nn.GRU(1, 12, num_layers=2, batch_first=True), 1), loader, functional.mse_loss)
    return model, loader


def unet() -> tuple[nn.Module, Any]:
    clean = sharpness.datasets.digits(num_train=60)[0].tensors[0].reshape(-1, 1, 8, 8)
    noisy, ink = clean + 0.2 * torch.randn_like(clean), (clean[:, 0] > 0.5).long()
    loader = DataLoader(TensorDataset(noisy, ink), batch_size=25)
    train(model := UNet(), loader, functional.cross_entropy)
    return model, loader


def graph_net() -> tuple[nn.Module, Any]:
    def batch(first: int, last: int) -> dict[str, Tensor]:
        """Cycles, paths and stars of different sizes, as one graph of disconnected parts."""
        edges, graph, labels = [], [], []
        for number, which in enumerate(range(first, last)):
            nodes, start = 4 + which % 5, len(graph)
            kind = which % 3
            if kind < 2:
                pairs = [(i, (i + 1) % nodes) for i in range(nodes - kind)]
            else:
                pairs = [(0, i) for i in range(1, nodes)]
            edges += [(start + i, start + j) for a, b in pairs for i, j in ((a, b), (b, a))]
            graph += [number] * nodes
            labels.append(kind)
        x = torch.cat([torch.ones(len(graph), 1), torch.randn(len(graph), 1)], dim=1)
        return {
            "x": x,
            "edge_index": torch.tensor(edges).T,
            "graph": torch.tensor(graph),
            "labels": torch.tensor(labels),
        }

    loader = [batch(0, 12), batch(12, 24), batch(24, 31)]
    model = GraphNet()
    train(model, loader, functional.cross_entropy)
    return model, loader


def tied() -> tuple[nn.Module, Any]:
    windows = CODES.unfold(0, 5, 1)
    loader = DataLoader(TensorDataset(windows[:, [0, 1, 3, 4]], windows[:, 2]), batch_size=40)
    train(model := TiedWordModel(), loader, functional.cross_entropy)
    return model, loader


def bert() -> tuple[nn.Module, Any]:
    from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=len(LETTERS) + 1,  # 0 is padding
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=2,
    )
    model = BertForSequenceClassification(config)
    words = TEXT.split() * 2
    loader = []
    for group in (words[:16], words[16:32], words[32:]):
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor([LETTERS.index(letter) + 1 for letter in word]) for word in group], batch_first=True
        )
        vowels = torch.tensor([int(word[-1] in "aeiou") for word in group])
        loader.append(BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": vowels}))
    train(model, loader, epochs=10)
    return model, loader


def gpt2() -> tuple[nn.Module, Any]:
    from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(LETTERS) + 1,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    words = TEXT.split()
    loader = []
    for group in (words[:8], words[8:16], words[16:]):
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor([LETTERS.index(letter) + 1 for letter in word] + [0]) for word in group],
            batch_first=True,
            padding_value=-100,
        )
        inputs = {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long(), "labels": ids}
        loader.append(BatchEncoding(inputs))
    train(model, loader, epochs=10)
    return model, loader


MAKERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "MLP": mlp,
    "ResNet with BatchNorm": resnet,
    "transformer encoder": transformer_encoder,
    "GPT": gpt,
    "LSTM": lstm,
    "GRU": gru,
    "U-Net": unet,
    "graph network, dict batches": graph_net,
    "tied embeddings": tied,
}
if importlib.util.find_spec("transformers"):
    MAKERS |= {"Hugging Face BERT": bert, "Hugging Face GPT-2": gpt2}


def make(name: str) -> tuple[nn.Module, Any]:
    """Return one model, trained for a few steps, and its loader; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MAKERS[name]()


def build() -> Iterator[tuple[str, nn.Module, Any]]:
    """Yield the name, the model and the loader of each architecture."""
    for name in MAKERS:
        yield name, *make(name)


def done_for(model: nn.Module, loader: Any, result: sharpness.EigenResult) -> list[str]:
    """Find out what `sharpness` had to do for a model that a plain double backward does not."""
    found = []
    if needs_other_attention(model, loader):
        found.append("attention by the math kernel")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        found.append("running statistics kept as they are")
    if model.training and any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        found.append("dropout off")
    if unused := result.settings["unused_parameters"]:
        found.append(f"zero rows for {', '.join(unused)}")
    if len(list(model.named_parameters())) < len(list(model.named_parameters(remove_duplicate=False))):
        found.append("the tied matrix counted once")
    return found


def needs_other_attention(model: nn.Module, loader: Any) -> bool:
    """Return whether PyTorch's own double backward fails on the model's attention."""
    model = copy.deepcopy(model).eval()
    batch = next(iter(loader))
    inputs = batch if hasattr(batch, "keys") else {}
    if "labels" in inputs and not hasattr(model, "config"):
        inputs = {key: item for key, item in inputs.items() if key != "labels"}
    outputs = model(**inputs) if inputs else model(batch[0])
    total = getattr(outputs, "logits", outputs).square().sum()
    used = [p for p in model.parameters() if p.requires_grad]
    try:
        slopes = torch.autograd.grad(total, used, create_graph=True, allow_unused=True)
        torch.autograd.grad(sum(s.square().sum() for s in slopes if s is not None), used, allow_unused=True)
    except RuntimeError as error:
        if "attention" not in str(error):
            raise
        return True
    return False


def rows() -> Iterator[dict[str, Any]]:
    """Measure all architectures and yield one row of the table for each."""
    for name, model, loader in build():
        result = sharpness.top_eigenvalues(model, loader)
        low, high = result.interval[0].tolist()
        yield {
            "architecture": name,
            "parameters": result.settings["n"],
            "loss chosen": result.settings["loss"],
            "loss terms": int(result.settings["num_terms"]),
            "top eigenvalue": f"{result.eigenvalues[0]:.4g} ± {(high - low) / 2:.0e}",
            "products": result.num_matvecs,
            "done for it": "; ".join(done_for(model, loader, result)) or "nothing special",
        }


if __name__ == "__main__":
    from tabulate import tabulate

    print(tabulate(rows(), headers="keys", tablefmt="github"))
