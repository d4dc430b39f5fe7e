"""The loss is the mean over all loss terms, however the criterion reduces and the data are split."""

import dataclasses
import functools
from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional

from sharpness import Objective
from sharpness.errors import ArgumentError, DataError, ModelError
from tests.zoo import batches, features

X, CLASSES = features(3), torch.arange(11) % 4
TARGETS = features(2, seed=9)


def hessian(loss_fn, loader, model=None, **options):
    model = fixed(4) if model is None else model
    objective = Objective(model, loader, loss_fn, **options)
    return torch.stack([objective.hvp(row) for row in torch.eye(objective.n, dtype=torch.float64)]), objective


def fixed(outputs):
    torch.manual_seed(0)
    return nn.Linear(3, outputs).double()


CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)
PADDED = torch.where(torch.arange(11) > 7, -100, CLASSES)
CASES = {
    "cross entropy": (nn.CrossEntropyLoss, CLASSES, 4),
    "label smoothing": (functools.partial(nn.CrossEntropyLoss, label_smoothing=0.2), CLASSES, 4),
    "class weights": (functools.partial(nn.CrossEntropyLoss, weight=CLASS_WEIGHTS), CLASSES, 4),
    "ignored targets": (nn.CrossEntropyLoss, PADDED, 4),
    "another ignored target": (functools.partial(nn.CrossEntropyLoss, ignore_index=2), CLASSES, 4),
    "class probabilities": (nn.CrossEntropyLoss, torch.softmax(features(4), 1), 4),
    "mean squared error": (nn.MSELoss, TARGETS, 2),
    "smooth l1": (nn.SmoothL1Loss, TARGETS, 2),
    "binary": (functools.partial(nn.BCEWithLogitsLoss, pos_weight=torch.tensor(3.0)), (TARGETS > 0).double(), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_any_split_and_reduction_gives_the_hessian_of_the_mean(name):
    make, targets, outputs = CASES[name]
    whole, _ = hessian(make(), [(X, targets)], fixed(outputs))
    assert whole.abs().max() > 1e-3
    for sizes in ((4, 4, 3), (10, 1), (1,) * 11):
        for reduction in ("mean", "sum"):
            split, objective = hessian(make(reduction=reduction), batches(X, targets, sizes=sizes), fixed(outputs))
            torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-14)
    assert objective.criterion.name.endswith("(sum)")


FUNCTIONS = {
    "function": lambda reduction: functools.partial(functional.cross_entropy, reduction=reduction),
    "plain function": lambda reduction: lambda o, t: functional.cross_entropy(o, t, reduction=reduction),
    "own module": lambda reduction: Own(reduction),
}


class Own(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, outputs, targets):
        return functional.cross_entropy(outputs, targets, reduction=self.how)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_probed_for_their_reduction(name):
    whole, _ = hessian(nn.CrossEntropyLoss(), [(X, CLASSES)])
    for reduction in ("mean", "sum"):
        split, objective = hessian(FUNCTIONS[name](reduction), batches(X, CLASSES))
        torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-14)
        assert objective.criterion.name.endswith(f"({reduction})")


def test_probing_works_at_an_exact_fit():
    model = nn.Linear(3, 2, bias=False).double()
    model.weight.data.zero_()
    loader = batches(X, torch.zeros(11, 2, dtype=torch.float64))
    whole, _ = hessian(nn.MSELoss(), loader, model)
    split, _ = hessian(lambda o, t: (o - t).square().sum() / 2, loader, model)  # a sum over samples, half the elements
    torch.testing.assert_close(split, whole / 2, rtol=1e-12, atol=0)


def test_losses_that_are_neither_mean_nor_sum_are_refused():
    with pytest.raises(ArgumentError, match=r"neither a mean nor a sum over samples: .* Pass batch_loss"):
        hessian(lambda o, t: o.square().sum().sqrt(), batches(X, CLASSES))


def test_unknown_losses_over_padded_targets_are_refused():
    with pytest.raises(ArgumentError, match=r"some targets are negative, .* Pass torch.nn.CrossEntropyLoss"):
        hessian(lambda o, t: functional.cross_entropy(o, t), batches(X, PADDED))


def test_a_batch_without_any_loss_term_is_left_out():
    nothing = (X[:2], torch.full((2,), -100))
    whole, _ = hessian(nn.CrossEntropyLoss(), [(X, CLASSES)])
    split, _ = hessian(nn.CrossEntropyLoss(), [nothing, *batches(X, CLASSES), nothing])
    torch.testing.assert_close(split, whole)
    with pytest.raises(DataError, match="holds no loss term: every batch has weight 0"):
        hessian(nn.CrossEntropyLoss(), [nothing])


def test_tokens_are_the_loss_terms_of_sequences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).double()
    words = torch.randint(0, 5, (6, 7))
    padded = torch.where(torch.rand(6, 7) < 0.4, -100, words)
    whole, _ = hessian(None, [(words, padded)], model)
    split, objective = hessian(None, [(words[:5], padded[:5]), (words[5:], padded[5:])], model)
    torch.testing.assert_close(split, whole, rtol=1e-10, atol=1e-15)
    assert objective.criterion.name == "cross-entropy over the last dimension (inferred)"
    assert objective.num_terms == (padded != -100).sum().item()


# --- inference -----------------------------------------------------------------------------------------------------


def test_the_loss_is_inferred_from_the_targets():
    for targets, outputs, name in (
        (CLASSES, 4, "cross-entropy (inferred)"),
        (CLASSES.to(torch.uint8), 4, "cross-entropy (inferred)"),
        (TARGETS, 2, "mean-squared error (inferred)"),
    ):
        explicit = nn.MSELoss() if targets.is_floating_point() else lambda o, t: functional.cross_entropy(o, t.long())
        inferred, objective = hessian(None, batches(X, targets), fixed(outputs))
        torch.testing.assert_close(inferred, hessian(explicit, batches(X, targets), fixed(outputs))[0])
        assert objective.criterion.name == name


@pytest.mark.parametrize(
    "targets", [TARGETS > 0, TARGETS[:, 0], TARGETS.to(torch.complex64), CLASSES[:, None, None], "abc" * 4, None]
)
def test_targets_for_which_no_loss_can_be_inferred(targets):
    with pytest.raises(DataError, match=r"no loss can be inferred|holds no targets"):
        Objective(fixed(2), [(X, targets)]).value()


def test_class_targets_with_a_single_output_are_refused():
    with pytest.raises(DataError, match="integer targets want one output per class"):
        Objective(fixed(1), [(X, CLASSES)]).value()


# --- batches -------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    note: str = "extra"


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = fixed(4)

    def forward(self, x):
        return self.layer(x)


class WithLoss(Named):
    def forward(self, x, labels=None):
        logits = self.layer(x)
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        Pair,
        Sample,
        lambda x, y: {"x": x, "labels": y, "extra": "field"},
        lambda x, y: UserDict(x=x, target=y),
    ],
    ids=["tuple", "list", "namedtuple", "dataclass", "dict", "mapping"],
)
def test_structures_of_batches(wrap):
    whole, _ = hessian(nn.CrossEntropyLoss(), [(X, CLASSES)])
    loader = [wrap(x, y) for x, y in batches(X, CLASSES)]
    for loss_fn in (None, nn.CrossEntropyLoss()):
        torch.testing.assert_close(hessian(loss_fn, loader, Named())[0], whole, rtol=1e-10, atol=1e-15)


def test_a_model_that_computes_its_own_loss():
    whole, _ = hessian(nn.CrossEntropyLoss(), [(X, CLASSES)])
    loader = [{"x": x, "labels": y} for x, y in batches(X, PADDED.clamp(min=-100))]
    expected, _ = hessian(nn.CrossEntropyLoss(), batches(X, PADDED))
    own, objective = hessian(None, loader, WithLoss())
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-15)
    assert objective.criterion.name == "the model's own loss"
    explicit, _ = hessian(nn.CrossEntropyLoss(), [{"x": X, "labels": CLASSES}], WithLoss())
    torch.testing.assert_close(explicit, whole)


def test_batches_whose_names_the_model_does_not_know():
    with pytest.raises(
        DataError, match=r"none of the batch's keys \['image', 'labels'\] is an argument of Named.forward \(x\)"
    ):
        Objective(Named(), [{"image": X, "labels": CLASSES}]).value()


def test_batch_loss_is_weighted_by_what_it_says():
    whole, _ = hessian(nn.CrossEntropyLoss(), [(X, CLASSES)])

    def own(model, batch):
        x, y = batch
        return functional.cross_entropy(model(x), y), len(x)

    torch.testing.assert_close(hessian(None, batches(X, CLASSES), batch_loss=own)[0], whole)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda m, b: m(b[0]).mean(), r"must return \(mean loss, weight\), got tensor"),
        (lambda m, b: (m(b[0]).mean(), -1), "returned the weight -1.0; it must be a finite number of at least 0"),
        (lambda m, b: (m(b[0]).mean(), float("nan")), "returned the weight nan"),
        (lambda m, b: (m(b[0]), 1), "the loss must be a real scalar"),
    ],
)
def test_batch_losses_that_return_something_else(answer, match):
    with pytest.raises(ModelError, match=match):
        Objective(fixed(4), batches(X, CLASSES), batch_loss=answer).value()


@pytest.mark.parametrize("size", [2, 5, 12])
@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(ignore_index=0),
        nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)),
    ],
)
def test_accuracy_is_that_of_the_targets_that_are_not_ignored_however_they_are_split(loss_fn, size):
    y, order = (torch.arange(12) % 3).sort()  # batches of one class, which has no weight
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[order]
    model = nn.Linear(4, 3).double()
    counted = y != loss_fn.ignore_index
    hits = (model(x).argmax(1) == y)[counted].double().mean().item()
    found = Objective(model, list(zip(x.split(size), y.split(size), strict=True)), loss_fn).evaluate()
    assert found.accuracy == pytest.approx(hits)


def test_accuracy_counts_what_is_classified():
    model = fixed(4)
    expected = (model(X).argmax(1) == CLASSES).double().mean().item()
    assert Objective(model, batches(X, CLASSES)).evaluate().accuracy == pytest.approx(expected)
    assert Objective(fixed(2), batches(X, TARGETS)).evaluate().accuracy is None
