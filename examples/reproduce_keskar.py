"""Epsilon-sharpness of F1 on MNIST after training with small and large batches, beside Keskar et al. (2017).

Run ``python examples/reproduce_keskar.py --data DIR [--seeds N] [--samples N] [--json FILE]``, where ``DIR`` is what
``torchvision.datasets.MNIST`` was given. Each network is trained by Adam and measured several times: "matched",
when the loss over the training set is first at most each of ``--stop-losses``, and "converged", at the lowest loss that
was met before it had not fallen for ``--patience`` epochs (or ``--max-epochs`` were over). The file keeps every
finished measurement; a training that is in it to its end is not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mnist
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional

import sharpness

SMALL, LARGE = 256, 6000
SPACES = {"full": None, "p=100": 100}
EPSILONS = (1e-3, 5e-4)
# With running statistics of BatchNorm, and with those of the batch: of 5000 images, as in the authors' Keras code,
# whose layers use batch statistics also when they are evaluated.
MODES = {"eval": "running", "train": "batch"}
# arXiv 1609.04836v2, Tables 2 to 4, F1: (small, large), each mean and deviation.
PAPER_ACCURACY = {"train": ((99.66, 0.05), (99.92, 0.01)), "test": ((98.03, 0.07), (97.81, 0.07))}
PAPER = {
    ("full", 1e-3): ((1.23, 0.83), (205.14, 69.52)),
    ("full", 5e-4): ((0.61, 0.27), (42.90, 17.14)),
    ("p=100", 1e-3): ((0.11, 0.00), (9.22, 0.56)),
    ("p=100", 5e-4): ((0.05, 0.00), (9.17, 0.14)),
}
Data = tuple[Tensor, Tensor]


def f1() -> nn.Module:
    """Return F1 of the paper: 784 - 5 x [512, BatchNorm, ReLU] - 10."""
    layers: list[nn.Module] = []
    for fan_in in (784, 512, 512, 512, 512):
        layers += [nn.Linear(fan_in, 512), nn.BatchNorm1d(512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def matched(stop_loss: float) -> str:
    """Return the name of the protocol that measures at this training loss."""
    return f"matched at {stop_loss:g}"


def batches(data: Data, size: int = 5000) -> list[Data]:
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def solutions(
    train_set: Data, *, batch_size: int, seed: int, options: argparse.Namespace
) -> Iterator[tuple[str, nn.Module, int]]:
    """Train one network; yield it at the points where it is measured, with the epochs so far."""
    torch.manual_seed(seed)
    model = f1().to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    generator = torch.Generator().manual_seed(seed)
    objective = sharpness.Objective(model, batches(train_set), progress=False)
    best_loss, best, best_epoch, loss = math.inf, model, 0, math.inf
    wanted = sorted(options.stop_losses)  # the last one is met first
    for epoch in range(1, options.max_epochs + 1):
        chunks = torch.randperm(len(train_set[0]), generator=generator).to(options.device).split(batch_size)
        near = wanted and loss <= 4 * wanted[-1]  # a small batch gets far below within one epoch
        every = max(len(chunks) // 8, 1) if near else len(chunks)
        for i, chosen in enumerate(chunks, start=1):
            model.train()
            optimizer.zero_grad()
            functional.cross_entropy(model(train_set[0][chosen]), train_set[1][chosen]).backward()
            optimizer.step()
            if i % every == 0 or i == len(chunks):
                loss = objective.value()
                while wanted and loss <= wanted[-1]:
                    yield matched(wanted.pop()), model, epoch
        print(f"batch {batch_size}, seed {seed}, epoch {epoch}: loss {loss:.3e}", flush=True)
        if loss < best_loss:
            best_loss, best, best_epoch = loss, copy.deepcopy(model), epoch
        if epoch - best_epoch >= options.patience:
            break
    yield "converged", best, best_epoch


def measure(model: nn.Module, train_set: Data, test_set: Data, options: argparse.Namespace) -> dict[str, Any]:
    """Return losses and accuracies over all images, and the sharpness on the first of the training images."""
    row: dict[str, Any] = {}
    for name, data in (("train", train_set), ("test", test_set)):
        found = sharpness.Objective(model, batches(data), progress=False).evaluate()
        row |= {f"{name}_loss": found.loss, f"{name}_accuracy": found.accuracy}
    sample = (train_set[0][: options.samples], train_set[1][: options.samples])
    row["measurements"] = []
    for mode in MODES:
        objective = sharpness.Objective(model, batches(sample), mode=mode, progress=False)
        for space, dim in SPACES.items():
            for epsilon in EPSILONS:
                result = sharpness.epsilon_sharpness(
                    objective,
                    epsilon=epsilon,
                    subspace_dim=dim,
                    num_draws=1 if dim is None else options.draws,
                    num_starts=options.starts,
                    on_failure="ignore",
                )
                row["measurements"].append(
                    {
                        "statistics": MODES[mode],
                        "space": space,
                        "epsilon": epsilon,
                        "value": result.value,
                        "stderr": result.stderr,
                        "loss": result.loss,
                        "num_evaluations": result.num_evaluations,
                        "seconds": result.seconds,
                    }
                )
    return row


def tables(rows: list[dict[str, Any]]) -> str:
    """Return what was measured beside the paper: mean and deviation over seeds."""
    parts = []
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        mine = {
            size: [r for r in rows if (r["batch_size"], r["protocol"]) == (size, protocol)] for size in (SMALL, LARGE)
        }
        if not all(mine.values()):
            continue
        parts.append(f"{protocol}, {len(mine[SMALL])} and {len(mine[LARGE])} seeds\n")
        headers = ["batch", "epochs", "train loss", "train acc. %", "test acc. %", "paper: train acc. %", "test acc. %"]
        lines = []
        for i, size in enumerate((SMALL, LARGE)):
            lines.append(
                [
                    size,
                    " ".join(str(row["epochs"]) for row in mine[size]),
                    spread([row["train_loss"] for row in mine[size]], ".2e"),
                    spread([100 * row["train_accuracy"] for row in mine[size]], ".2f"),
                    spread([100 * row["test_accuracy"] for row in mine[size]], ".2f"),
                    *("{:.2f} ± {:.2f}".format(*PAPER_ACCURACY[part][i]) for part in ("train", "test")),
                ]
            )
        parts.append(tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True) + "\n")
        parts.append(
            tabulate(list(sharpness_lines(mine)), headers="keys", tablefmt="github", disable_numparse=True) + "\n"
        )
    return "\n".join(parts)


def sharpness_lines(mine: dict[int, list[dict[str, Any]]]) -> Iterator[dict[str, str]]:
    """Yield one row per kind of statistics, space and epsilon."""

    def found(size: int, kind: str, space: str, epsilon: float) -> list[float]:
        wanted = (kind, space, epsilon)
        each = [m for row in mine[size] for m in row["measurements"]]
        return [m["value"] for m in each if (m["statistics"], m["space"], m["epsilon"]) == wanted]

    for kind in MODES.values():
        for space in SPACES:
            for epsilon in EPSILONS:
                small, large = (found(size, kind, space, epsilon) for size in (SMALL, LARGE))
                paper = PAPER[space, epsilon]
                line = {
                    "statistics": kind,
                    "space": space,
                    "epsilon": f"{epsilon:g}",
                    f"batch {SMALL}": spread(small, ".3g"),
                    f"batch {LARGE}": spread(large, ".3g"),
                    "ratio": f"{statistics.mean(large) / statistics.mean(small):.3g}",
                    "at 1e-3 / at 5e-4": "",
                    "paper: small": "{:g} ± {:g}".format(*paper[0]),
                    "paper: large": "{:g} ± {:g}".format(*paper[1]),
                    "paper: ratio": f"{paper[1][0] / paper[0][0]:.3g}",
                }
                if epsilon == EPSILONS[0]:
                    halved = [statistics.mean(found(size, kind, space, EPSILONS[1])) for size in (SMALL, LARGE)]
                    scales = [statistics.mean(x) / y for x, y in zip((small, large), halved, strict=True)]
                    line["at 1e-3 / at 5e-4"] = "{:.2f}, {:.2f}".format(*scales)
                yield line


def spread(values: list[float], form: str) -> str:
    """Return the mean, and the deviation if there are several values."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Epsilon-sharpness of F1 on MNIST beside Keskar et al. (2017).")
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST")
    parser.add_argument("--seeds", type=int, default=5, help="trainings per batch size (default 5, as in the paper)")
    parser.add_argument("--samples", type=int, default=60000, help="training images to measure on (default all)")
    parser.add_argument("--device", default="cpu", help="where to train and measure (default cpu)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam (default 1e-3)")
    parser.add_argument(
        "--stop-losses",
        type=float,
        nargs="+",
        default=[1e-2, 1e-3],
        help="training losses to match (default 1e-2 1e-3)",
    )
    parser.add_argument("--patience", type=int, default=10, help="epochs without a lower loss (default 10)")
    parser.add_argument("--max-epochs", type=int, default=100, help="where to stop at the latest (default 100)")
    parser.add_argument("--starts", type=int, default=1, help="starting points of the search (default 1)")
    parser.add_argument("--draws", type=int, default=1, help="random subspaces per network (default 1)")
    parser.add_argument(
        "--json", type=Path, default=Path("reproduce_keskar.json"), help="what is done, kept and resumed"
    )
    options = parser.parse_args()
    train_set, test_set = (mnist.read(options.data, part, options.device) for part in ("train", "t10k"))
    rows = json.loads(options.json.read_text()) if options.json.is_file() else []
    names = ("samples", "lr", "stop_losses", "patience", "max_epochs", "starts", "draws")
    settings = {name: getattr(options, name) for name in names}

    def measured(**key: int) -> list[dict[str, Any]]:
        wanted = {**settings, **key}
        return [row for row in rows if all(row[name] == value for name, value in wanted.items())]

    for seed in range(options.seeds):
        for size in (SMALL, LARGE):
            key = {"batch_size": size, "seed": seed}
            done = {row["protocol"] for row in measured(**key)}
            if "converged" in done:  # the last one
                continue
            for protocol, model, epochs in solutions(train_set, batch_size=size, seed=seed, options=options):
                if protocol not in done:
                    found = measure(model, train_set, test_set, options)
                    rows.append({**key, **settings, "protocol": protocol, "epochs": epochs, **found})
                    options.json.write_text(json.dumps(rows, indent=1) + "\n")
                    print(json.dumps(rows[-1]), flush=True)
    print(tables(measured()))


if __name__ == "__main__":
    main()
