import re

import pytest
import torch
from torch import nn

from sharpness import Objective
from sharpness.errors import ArgumentError
from sharpness.objective.embedding_bag import embedding_bag
from tests.checks import assert_untouched
from tests.zoo import tanh_net

PROBLEM = tanh_net()
LAYOUT = [(name, p.numel()) for name, p in PROBLEM.model.named_parameters() if p.requires_grad]


def positions(*names):
    found, start = [], 0
    for name, size in LAYOUT:
        if name in names:
            found += range(start, start + size)
        start += size
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ("core.first.weight", ["core.first.weight"]),
        (["core.last.bias", "core.first.bias"], ["core.first.bias", "core.last.bias"]),
        ("core.*.bias", ["core.first.bias", "core.middle.bias", "core.last.bias"]),
        (re.compile(r"(first|last)\.weight$"), ["core.first.weight", "core.last.weight"]),
        (lambda name, p: p.ndim == 2, ["again", "core.first.weight", "core.middle.weight", "core.last.weight"]),
        ("core.middle.weight", ["again", "core.middle.weight"]),  # one tensor under either name
    ],
    ids=["name", "list", "glob", "regex", "predicate", "tied"],
)
def test_a_choice_is_a_block_of_the_hessian(params, names):
    objective = Objective(PROBLEM.model, PROBLEM.loader, params=params)
    rows = positions(*names)
    assert objective.n == len(rows)
    with assert_untouched(PROBLEM.model):
        block = torch.stack([objective.hvp(row) for row in torch.eye(objective.n, dtype=torch.float64)])
    torch.testing.assert_close(block, PROBLEM.hessian[rows][:, rows], rtol=1e-9, atol=1e-12)


def test_the_vector_is_in_the_order_of_named_parameters():
    flat = torch.cat([p.detach().reshape(-1) for p in PROBLEM.model.parameters() if p.requires_grad])
    assert torch.equal(Objective(PROBLEM.model, PROBLEM.loader).vector(), flat)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (
            "core.first.wieght",
            r"'core.first.wieght' matches no parameter of the model. Did you mean 'core.first.weight'",
        ),
        (re.compile("conv"), "'conv' matches no parameter"),
        ("frozen", r"'frozen' matches only parameters that do not require grad. Call requires_grad_\(True\)"),
        (lambda name, p: False, "the predicate was false for every trainable one"),
        ([], "must be a name, a glob"),
        (3, "must be a name, a glob"),
        ([3], r"must hold names, globs or compiled regular expressions, got 3 \(int\)"),
    ],
)
def test_choices_that_match_nothing(params, match):
    with pytest.raises(ArgumentError, match=match):
        Objective(PROBLEM.model, PROBLEM.loader, params=params)


def test_mixed_dtypes_are_measured_in_the_wider_one():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3).double()

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)).double())

    objective = Objective(Mixed(), [(torch.randn(5, 3), torch.arange(5) % 3)])
    assert objective.dtype == torch.float64
    u, v = torch.randn(2, objective.n, dtype=torch.float64)
    assert (u @ objective.hvp(v)).item() == pytest.approx((v @ objective.hvp(u)).item(), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_may_live_on_several_devices():
    class Split(nn.Module):
        def __init__(self, there):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.there = nn.Linear(3, 3), nn.Linear(3, 3), there
            self.b.to(there)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)).to(self.there))

    loader = [(torch.randn(5, 3), torch.arange(5) % 3)]
    for params in (None, "b.*"):
        here, split = (Objective(Split(device), loader, params=params) for device in ("cpu", "cuda"))
        v = torch.linspace(-1, 1, here.n)
        at = here.vector() + 0.1
        torch.testing.assert_close(split.hvp(v.to(split.device)).cpu(), here.hvp(v))
        torch.testing.assert_close(split.gradient(at.to(split.device)).cpu(), here.gradient(at))


def test_three_precisions_in_one_model():
    """Half precision is measured in single precision, and the vector is in the widest."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(3, 3).bfloat16(), nn.Linear(3, 3), nn.Linear(3, 3).double()

        def forward(self, x):
            x = torch.tanh(self.a(x.to(self.a.weight.dtype))).to(self.b.weight.dtype)
            return self.c(torch.tanh(self.b(x)).double())

    loader = [(torch.randn(5, 3), torch.arange(5) % 3)]
    mixed, wide = Mixed(), Mixed().double()
    with assert_untouched(mixed):
        objective = Objective(mixed, loader)
        v = torch.linspace(-1, 1, objective.n, dtype=torch.float64)
        found = objective.hvp(v)
    torch.testing.assert_close(found, Objective(wide, loader).hvp(v), rtol=1e-4, atol=1e-6)


def test_empty_and_zero_dimensional_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
            self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

        def forward(self, x):
            return (x * self.scale).exp() + self.empty.sum()

    x = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]
    objective = Objective(Odd(), [x], batch_loss=lambda m, b: (m(b).mean(), len(b)))
    assert objective.n == 1
    assert objective.parameters.layout == (("empty", (0, 3)), ("scale", ()))
    exact = (x.square() * (1.5 * x).exp()).mean()
    assert objective.hvp(torch.ones(1, dtype=torch.float64)).item() == pytest.approx(exact.item(), rel=1e-12)


def words(kind, **options):
    torch.manual_seed(0)
    return nn.Sequential(kind(7, 4, **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()


WORDS, LABELS = torch.randint(0, 7, (6, 2), generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def test_sparse_embeddings_are_dense_ones():
    found = []
    for sparse in (False, True):
        model = words(nn.Embedding, sparse=sparse, padding_idx=1)
        model(WORDS)
        with assert_untouched(model):
            objective = Objective(model, [(WORDS, LABELS)])
            v = torch.linspace(-1, 1, objective.n, dtype=torch.float64)
            found.append(objective.hvp(v))
        torch.testing.assert_close(found[-1], objective.hvp(v))
        assert model[0].sparse is sparse
        assert "forward" not in vars(model[0])
    assert torch.equal(*found)
    assert objective.gradient().abs().sum() > 0


@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings(mode, padding):
    """PyTorch's kernel for them has no second derivative."""
    for sparse in (False, True) if mode != "max" else (False,):
        model = words(nn.EmbeddingBag, mode=mode, padding_idx=padding, sparse=sparse)
        model(WORDS)
        objective = Objective(model, [(WORDS[:4], LABELS[:4]), (WORDS[4:], LABELS[4:])])
        assert objective.value() == pytest.approx(nn.functional.cross_entropy(model(WORDS), LABELS).item(), rel=1e-12)
        v, step = torch.linspace(-1, 1, objective.n, dtype=torch.float64), 1e-5
        ahead, behind = (objective.gradient(objective.vector() + sign * step * v) for sign in (1, -1))
        torch.testing.assert_close(objective.hvp(v), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("last", [False, True])
def test_bags_of_several_lengths_and_weights_are_those_of_pytorch(last):
    index, offsets = torch.tensor([1, 2, 1, 4, 5, 1]), torch.tensor([0, 2, 2, 5, *([6] if last else [])])
    weights = torch.linspace(-1, 1, 6)
    for mode in ("sum", "mean", "max"):
        module = nn.EmbeddingBag(7, 4, mode=mode, padding_idx=1, include_last_offset=last)
        torch.testing.assert_close(embedding_bag(module, index, offsets), module(index, offsets))
    module = nn.EmbeddingBag(7, 4, mode="sum")
    batch = (index.view(3, 2), None, weights.view(3, 2))
    torch.testing.assert_close(embedding_bag(module, *batch), module(*batch))


def test_embeddings_tied_to_the_head_count_once():
    class Tied(nn.Module):
        def __init__(self, shared):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(5, 3, dtype=torch.float64, sparse=True)
            self.head = nn.Linear(3, 5, bias=False, dtype=torch.float64)
            self.head.weight.data.copy_(self.embedding.weight.data)
            if shared:
                self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(torch.tanh(self.embedding(x)))

    x = torch.arange(5)
    objective = Objective(Tied(True), [(x, x.flip(0))])
    assert objective.parameters.names == ("embedding.weight",)
    apart = Objective(Tied(False), [(x, x.flip(0))])
    v = torch.linspace(-1, 1, 15, dtype=torch.float64)
    both = apart.hvp(torch.cat([v, v]))  # the chain rule: both blocks move together
    torch.testing.assert_close(objective.hvp(v), both[:15] + both[15:])
