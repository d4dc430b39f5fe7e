"""Ten architectures, each passed straight to `top_eigenvalues`, against a double backward that owes us nothing.

The models are those of ``examples/architectures.py``. The oracle is a float64 copy, `tests.plain`, and the loss terms
of each batch summed and counted by hand.
"""

import copy

import architectures
import pytest
import torch
from torch.nn import functional

import sharpness
from sharpness import HessianOperator, Objective
from tests.checks import assert_untouched
from tests.plain import Plain

HUGGING_FACE = ("Hugging Face BERT", "Hugging Face GPT-2")
NAMES = tuple(dict.fromkeys([*architectures.MAKERS, *HUGGING_FACE]))
KINKED = ("ResNet with BatchNorm", "U-Net")  # ReLU: only a step that crosses no kink shows the derivative

# What should be found, written down by hand: the loss, and the number of its terms.
EXPECTED = {
    "MLP": ("cross-entropy (inferred)", 90),
    "ResNet with BatchNorm": ("cross-entropy (inferred)", 90),
    "transformer encoder": ("cross-entropy (inferred)", 90),
    "GPT": ("cross-entropy over the last dimension (inferred)", 31 * 12),
    "LSTM": ("cross-entropy (inferred)", 90),
    "GRU": ("mean-squared error (inferred)", 63),
    "U-Net": ("cross-entropy (inferred)", 60 * 64),
    "graph network, dict batches": ("cross-entropy (inferred)", 31),
    "tied embeddings": ("cross-entropy (inferred)", len(architectures.TEXT) - 4),
    "Hugging Face BERT": ("the model's own loss", 2 * len(architectures.TEXT.split())),
    "Hugging Face GPT-2": ("the model's own loss", len(architectures.TEXT.replace(" ", ""))),
}


def terms(name, model, batch):
    """The sum of a batch's loss terms and their number, by hand."""
    if name in HUGGING_FACE:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"]
        if name == "Hugging Face GPT-2":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        counted = labels != -100
        return functional.cross_entropy(logits[counted], labels[counted], reduction="sum"), int(counted.sum())
    if isinstance(batch, dict):
        outputs = model(batch["x"], batch["edge_index"], batch["graph"])
        return functional.cross_entropy(outputs, batch["labels"], reduction="sum"), len(batch["labels"])
    outputs, targets = model(batch[0]), batch[1]
    if name == "GRU":
        return (outputs - targets).square().sum(), targets.numel()
    if name == "GPT":
        outputs = outputs.movedim(-1, 1)
    return functional.cross_entropy(outputs, targets, reduction="sum"), targets.numel()


def in_double(batch):
    wide = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    if isinstance(batch, (list, tuple)):
        return [wide(item) for item in batch]
    return {key: wide(item) for key, item in batch.items()}


def oracle(name, model, loader):
    batches = [in_double(batch) for batch in loader]

    def loss(model):
        pairs = [terms(name, model, batch) for batch in batches]
        return sum(total for total, _ in pairs) / sum(count for _, count in pairs)

    return Plain(copy.deepcopy(model).double().eval(), loss), batches


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    if request.param in HUGGING_FACE:
        pytest.importorskip("transformers")
    return request.param, *architectures.make(request.param)


def test_passed_straight_it_gets_a_certified_answer(case):
    name, model, loader = case
    with assert_untouched(model):
        result = sharpness.top_eigenvalues(model, loader, k=2)
    assert result.converged
    assert (result.settings["loss"], result.settings["num_terms"]) == EXPECTED[name]
    exact = oracle(name, model, loader)[0].top(2)
    for value, (low, high) in zip(exact, result.interval.tolist(), strict=True):
        assert low <= value <= high
        assert high - low <= 0.01 * value


def test_products_are_symmetric_and_those_of_the_gradient(case):
    name, model, loader = case
    plain, wide = oracle(name, model, loader)
    # Its own loss computes in float32, whatever the model does.
    loss = {} if name != "Hugging Face GPT-2" else {"batch_loss": mean_of_tokens}
    operator = HessianOperator(Objective(plain.model, wide, **loss))
    g = torch.Generator().manual_seed(0)
    u, v = (torch.randn(operator.n, generator=g, dtype=torch.float64) for _ in "uv")
    hu, hv = operator @ u, operator @ v
    assert (u @ hv - v @ hu).abs() <= 1e-10 * u.norm() * hv.norm()
    h, close = (1e-9, 1e-4) if name in KINKED else (1e-6, 1e-7)
    assert (hv - plain.difference(v, h)).norm() <= close * hv.norm()
    assert (HessianOperator(Objective(model, loader)) @ u.float() - hu).norm() <= 1e-3 * hu.norm()


def mean_of_tokens(model, batch):
    total, count = terms("Hugging Face GPT-2", model, batch)
    return total / count, count


def test_it_is_small_and_its_loader_ends_in_a_smaller_batch(case):
    _, model, loader = case
    sizes = [len(next(iter(batch.values())) if hasattr(batch, "keys") else batch[0]) for batch in loader]
    assert len(sizes) > 1
    assert sizes[-1] < sizes[0]
    assert sum(p.numel() for p in model.parameters()) < 10_000


def test_the_page_finds_out_what_is_done_for_a_model():
    done = {}
    for name in ("MLP", "transformer encoder", "GPT", "tied embeddings", "graph network, dict batches"):
        model, loader = architectures.make(name)
        done[name] = architectures.done_for(model, loader, sharpness.top_eigenvalues(model, loader))
    assert done == {
        "MLP": ["dropout off"],
        "transformer encoder": ["attention by the math kernel", "dropout off"],
        "GPT": ["attention by the math kernel"],
        "tied embeddings": ["the tied matrix counted once"],
        "graph network, dict batches": ["zero rows for auxiliary.weight, auxiliary.bias"],
    }
