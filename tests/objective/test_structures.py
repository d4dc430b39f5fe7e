"""What models return and what loaders yield."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_sequence

from sharpness import Objective
from sharpness.errors import DataError
from sharpness.objective.data import tensors_in
from tests.objective.dense import D, by_products
from tests.zoo import batches, features

X, Y = features(3), torch.arange(11) % 3
GOAL = features(2, seed=8)
LOADER = batches(X, Y)


class Net(nn.Module):
    """A net with two heads whose outputs are put together by a function."""

    def __init__(self, pack=lambda classes, numbers: classes):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classes, self.numbers = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.pack = pack
        self.double()

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return self.pack(self.classes(x), self.numbers(x))


class ModelOutput(OrderedDict):
    """As Hugging Face has it: a mapping whose entries are attributes and that is indexed by position too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def product(model, loader=LOADER, loss_fn=None, **options):
    objective = Objective(model, loader, loss_fn, **options)
    return objective.hvp(torch.linspace(-1, 2, objective.n, dtype=D))


# --- outputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pack",
    [
        lambda c, n: (c,),
        lambda c, n: [c],
        lambda c, n: {"logits": c, "hidden": n},
        lambda c, n: ModelOutput(logits=c, hidden=n),
        lambda c, n: namedtuple("Out", "hidden logits")(n, c),
        lambda c, n: {"loss": None, "logits": c},
    ],
    ids=["1-tuple", "1-list", "dict", "ModelOutput", "namedtuple", "no loss"],
)
def test_outputs_whose_prediction_is_plain(pack):
    torch.testing.assert_close(product(Net(pack)), product(Net()))


@pytest.mark.parametrize(
    ("pack", "what"),
    [
        (lambda c, n: (c, n), r"tuple\(tensor\[4, 3\] float64, tensor\[4, 2\] float64\)"),
        (lambda c, n: [c, n], r"list\(tensor.*\)"),
        (lambda c, n: {"classes": c}, r"\{'classes': tensor\[4, 3\] float64\}"),
    ],
)
def test_outputs_whose_prediction_cannot_be_told(pack, what):
    pattern = rf"for outputs {what} and targets .* cannot be told. .* pass loss_fn=lambda outputs, targets: "
    with pytest.raises(DataError, match=pattern):
        product(Net(pack))
    torch.testing.assert_close(
        product(
            Net(pack), loss_fn=lambda o, t: functional.cross_entropy(next(iter(getattr(o, "values", o.__iter__)())), t)
        ),
        product(Net()),
    )


@pytest.mark.parametrize("logits", ["logits", "classes"])
def test_several_heads_with_a_loss_of_the_users(logits):
    """With targets in a container the loss gets all outputs, also where one of them is called logits."""

    def both(outputs, targets):
        return functional.cross_entropy(outputs[logits], targets["y"]) + functional.mse_loss(
            outputs["n"], targets["goal"]
        )

    def apart(model, batch):
        (x, targets), out = batch, model(batch[0])
        return both(out, targets), len(x)

    pack = lambda c, n: {logits: c, "n": n}  # noqa: E731
    loader = [(x, {"y": y, "goal": g}) for x, y, g in batches(X, Y, GOAL)]
    whole = [(X, {"y": Y, "goal": GOAL})]
    expected = product(Net(pack), whole, batch_loss=apart)
    torch.testing.assert_close(product(Net(pack), loader, both), expected)
    named = [{"x": x, "targets": targets} for x, targets in loader]
    torch.testing.assert_close(product(Net(pack), named, both), expected)


def test_a_model_that_reports_its_loss():
    class Own(Net):
        def forward(self, x, labels=None):
            logits = super().forward(x)
            loss = functional.cross_entropy(logits, labels)
            return ModelOutput(loss=loss, logits=logits)

    loader = [{"x": x, "labels": y} for x, y in LOADER]
    torch.testing.assert_close(product(Own(), loader), product(Net()))


# --- batches -------------------------------------------------------------------------------------------------------


class Nested(Net):
    def forward(self, inputs, mask=None, names=()):
        x = inputs["x"][0]
        return super().forward(x if mask is None else x * mask)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x, y: ({"x": [x]}, y),
        lambda x, y: ({"x": [x]}, None, y),
        lambda x, y: {"inputs": {"x": (x, "extra")}, "labels": y, "names": ["a"] * len(x), "mask": None},
        lambda x, y: UserDict(inputs={"x": [x]}, labels=y, ids=list(range(len(x)))),
        lambda x, y: dataclasses.make_dataclass("Batch", ["inputs", "label"])({"x": [x]}, y),
        lambda x, y: namedtuple("Batch", "inputs y")({"x": [x]}, y),
    ],
    ids=["nested", "None", "strings", "BatchEncoding", "dataclass", "namedtuple"],
)
def test_structures_of_batches(wrap):
    torch.testing.assert_close(product(Nested(), [wrap(x, y) for x, y in LOADER]), product(Net()))


Small = namedtuple("Small", "x y")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor


P = pack_sequence([X[:2], X[2:3]])


@pytest.mark.parametrize(
    ("first", "other", "one", "two"),
    [
        ((X, Y), [X, Y], r"tuple\(floating tensor, integer tensor\)", r"list\(floating tensor, integer tensor\)"),
        ((X, Y), (X, X, Y), "tuple", r"tuple\(floating tensor, floating tensor, integer tensor\)"),
        ((X, Y), {"x": X, "y": Y}, "tuple", r"\{'x': floating tensor, 'y': integer tensor\}"),
        ({"x": X, "y": Y}, {"x": X, "z": Y}, r"\{'x'.*'y'", r"\{'x'.*'z'"),
        ((X, Y), (X, Y.double()), "tuple", r"tuple\(floating tensor, floating tensor\)"),
        ((X, Y), (X, Y > 0), "tuple", r"tuple\(floating tensor, bool tensor\)"),
        ((X, Y), (X.to(torch.complex128), Y), "tuple", r"tuple\(complex tensor"),
        (({"x": X}, Y), ([X], Y), r"tuple\(mapping", r"tuple\(sequence"),
        ((X, Y), Small(X, Y), "tuple", "Small"),
        ((P, Y), (X, Y), r"tuple\(packed sequence", "tuple"),
        ((X, Y), X, "tuple", "floating tensor"),
        (Record(X, Y), Record(X, None), r"\{'x'", r"\{'x': floating tensor, 'y': other\}"),
        ("ab", (X, Y), "other", "tuple"),
    ],
)
def test_batches_that_disagree_are_named(first, other, one, two):
    pattern = rf"disagree in structure: batch 0 is {one}.*, batch 2 is {two}.* \(counted from 0\)"
    loader = [first, first, other]
    with pytest.raises(DataError, match=pattern):
        list(Objective(Net(), loader).batches.walk())
    assert Objective(Net(), loader, batch_loss=lambda m, b: (m(X).square().mean(), 1)).value() > 0


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ((X, Y), (X[:2], Y[:2])),
        ((X, Y), (X.float(), Y.int())),
        (([X, X], Y), ([X], Y)),
        ({"x": X, "y": Y}, {"y": Y, "x": X}),
        ({"x": X, "y": Y}, UserDict(x=X, y=Y)),
        ((X, "a"), (X, None)),
    ],
)
def test_batches_may_differ_in_shape_and_below_the_top(first, other):
    assert len(list(Objective(Net(), [first, other]).batches.walk())) == 2


def test_an_inferred_loss_never_changes():
    """The same container each time, but shapes that another loss would fit."""

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=D))

        def forward(self, x):
            return self.scale * x

    labels = lambda *shape: torch.zeros(shape, dtype=torch.long)  # noqa: E731
    last, first, both = (torch.randn(2, 5, 3, dtype=D), torch.randn(2, 3, 5, dtype=D), torch.randn(2, 5, 5, dtype=D))
    with pytest.raises(DataError, match="the loss of the first batch is cross-entropy over the last .* does not fit"):
        Objective(Words(), [(last, labels(2, 5)), (first, labels(2, 5))]).value()
    objective = Objective(Words(), [(last, labels(2, 5)), (both, labels(2, 5))])  # fits either, and so the first one
    terms = [functional.cross_entropy(x.movedim(-1, 1), labels(2, 5), reduction="sum") for x in (last, both)]
    assert objective.value() == pytest.approx(sum(terms).item() / 20, rel=1e-12)

    class Sometimes(Words):
        def forward(self, x):
            loss = x.mean() if len(x) == 2 else None
            return {"loss": loss, "logits": self.scale * x}

    with pytest.raises(DataError, match="the loss of the first batch is the model's own loss, which does not fit"):
        Objective(Sometimes(), [(X[:2], Y[:2]), (X[:3], Y[:3])]).value()
    with pytest.raises(DataError, match="the loss of the first batch is cross-entropy"):
        Objective(Sometimes(), [(X[:3], Y[:3]), (X[:2], Y[:2])]).value()


def test_a_packed_sequence_keeps_its_batch_sizes():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3, dtype=D)

        def forward(self, packed):
            padded, lengths = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
            return self.linear(padded.sum(1) / lengths[:, None])

    packed = pack_sequence([X[:1], X[1:4], X[4:6]], enforce_sorted=False)
    means = torch.stack([part.mean(0) for part in (X[:1], X[1:4], X[4:6])])
    assert not any(tensor is packed.batch_sizes for tensor in tensors_in(packed))  # they stay on the CPU
    assert len(tensors_in(packed)) == 3
    model = Sum()
    torch.testing.assert_close(by_products(model, [(packed, Y[:3])]), by_products(model.linear, [(means, Y[:3])]))
