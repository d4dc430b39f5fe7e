"""The operator is the Hessian of the true mean over loss terms, whatever the criterion, its reduction and the batches.

PyTorch's own mean over all data in one batch, differentiated densely, is the truth; for sums it is the sum over the
same number of terms.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from sharpness import Objective
from sharpness.errors import DataError
from tests.objective.dense import D, by_products, double_backward_hessian
from tests.zoo import batches, features

X, K = features(3), 4
CLASSES = torch.arange(11) % K
PADDED = torch.where(torch.arange(11) % 5 == 3, 2, CLASSES)
NUMBERS = features(K, seed=9)
POSITIVE = NUMBERS.abs() + 0.1
PROBABILITIES = torch.softmax(NUMBERS, 1)
CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=D)
SPLITS = ((4, 4, 3), (1, 9, 1))


class Net(nn.Module):
    """Outputs of shape (N, K, *rest)."""

    def __init__(self, *rest, shape=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.rest, self.shape = rest, shape
        self.layer = nn.Linear(3, K * max(1, torch.Size(rest).numel()), dtype=D)

    def forward(self, x):
        return self.shape(torch.sin(self.layer(x)).unflatten(1, (K, *self.rest)))


def check(criterion, targets, model=None, loss_fn=None):
    """``criterion(reduction=...)`` over ragged batches has the Hessian of its mean over all data."""
    model = Net() if model is None else model
    exact = double_backward_hessian(model, lambda m: criterion(reduction="mean")(m(X), targets))
    assert exact.abs().max() > 1e-4
    for reduction, sizes in itertools.product(("mean", "sum"), SPLITS):
        found = by_products(model, batches(X, targets, sizes=sizes), criterion(reduction=reduction))
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


OPTIONS = {
    "ignore_index": [{}, {"ignore_index": 2}],
    "weight": [{}, {"weight": CLASS_WEIGHTS}],
    "label_smoothing": [{}, {"label_smoothing": 0.3}],
}


@pytest.mark.parametrize(
    "options", [a | b | c for a, b, c in itertools.product(*OPTIONS.values())], ids=lambda o: "+".join(o)
)
def test_cross_entropy_with_every_combination_of_options(options):
    def criterion(reduction):
        return nn.CrossEntropyLoss(reduction=reduction, **options)

    check(criterion, PADDED)
    if "ignore_index" not in options:
        check(criterion, PROBABILITIES)


def test_cross_entropy_over_further_dimensions_with_padding():
    targets = torch.stack([CLASSES, PADDED], 1)
    targets[3:6, 1] = -100  # one batch of a split has no padding, another much
    for options in ({}, {"weight": CLASS_WEIGHTS}, {"label_smoothing": 0.3, "weight": CLASS_WEIGHTS}):
        check(lambda reduction, o=options: nn.CrossEntropyLoss(reduction=reduction, **o), targets, Net(2))
    smooth = torch.softmax(torch.stack([NUMBERS, -NUMBERS], 2), 1)
    check(lambda reduction: nn.CrossEntropyLoss(reduction=reduction), smooth, Net(2))


def test_labels_of_any_integer_dtype_are_labels():
    exact = by_products(Net(), [(X, CLASSES)], nn.CrossEntropyLoss(weight=CLASS_WEIGHTS))
    for dtype in (torch.uint8, torch.int32):
        found = by_products(Net(), batches(X, CLASSES.to(dtype)), nn.CrossEntropyLoss(weight=CLASS_WEIGHTS))
        torch.testing.assert_close(found, exact)


def log_softmax(x):
    return functional.log_softmax(x, 1)


CRITERIA = {
    "nll": (nn.NLLLoss, {}, CLASSES, log_softmax),
    "nll, weights, ignored": (nn.NLLLoss, {"weight": CLASS_WEIGHTS, "ignore_index": 2}, PADDED, log_softmax),
    "mse": (nn.MSELoss, {}, NUMBERS, None),
    "l1": (nn.L1Loss, {}, NUMBERS, None),
    "huber": (nn.HuberLoss, {"delta": 0.5}, NUMBERS, None),
    "smooth l1": (nn.SmoothL1Loss, {"beta": 0.5}, NUMBERS, None),
    "poisson": (nn.PoissonNLLLoss, {}, POSITIVE, None),
    "binary, positive weights": (nn.BCEWithLogitsLoss, {"pos_weight": CLASS_WEIGHTS}, (NUMBERS > 0).double(), None),
    "binary, weights": (nn.BCEWithLogitsLoss, {"weight": CLASS_WEIGHTS}, PROBABILITIES, None),
    "kl, elements": (nn.KLDivLoss, {}, PROBABILITIES, log_softmax),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.parametrize("name", CRITERIA)
def test_criteria(name):
    kind, options, targets, shape = CRITERIA[name]
    check(lambda reduction: kind(reduction=reduction, **options), targets, Net(shape=shape or (lambda x: x)))


def test_kl_divergence_over_samples():
    model = Net(shape=log_softmax)
    loss = nn.KLDivLoss(reduction="batchmean")
    exact = double_backward_hessian(model, lambda m: loss(m(X), PROBABILITIES))
    for sizes in SPLITS:
        torch.testing.assert_close(by_products(model, batches(X, PROBABILITIES, sizes=sizes), loss), exact)


def test_mse_over_several_outputs_is_the_closed_form():
    """2 X'X / (N K) for each of the K outputs: every element is a term."""
    model = nn.Linear(3, K, bias=False, dtype=D)
    exact = torch.kron(torch.eye(K, dtype=D), 2 * X.T @ X / NUMBERS.numel())
    for reduction, sizes in itertools.product(("mean", "sum"), SPLITS):
        found = by_products(model, batches(X, NUMBERS, sizes=sizes), nn.MSELoss(reduction=reduction))
        torch.testing.assert_close(found, exact)


def test_class_weights_and_padding_are_the_closed_form():
    """Softmax regression at zero: (I - 1/K) / K times the weighted X'X over the total weight of what counts."""
    model = nn.Linear(3, K, bias=False, dtype=D)
    model.weight.data.zero_()
    counted = PADDED != 2
    w = CLASS_WEIGHTS[PADDED] * counted
    exact = torch.kron((torch.eye(K, dtype=D) - 1 / K) / K, X.T @ (w[:, None] * X) / w.sum())
    for reduction, sizes in itertools.product(("mean", "sum"), SPLITS):
        criterion = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=2, reduction=reduction)
        torch.testing.assert_close(by_products(model, batches(X, PADDED, sizes=sizes), criterion), exact)


def test_gaussian_likelihood_as_a_batch_loss():
    def loss(model, batch):
        x, y = batch
        out = model(x)
        return functional.gaussian_nll_loss(out[:, :2], y[:, :2], out[:, 2:].exp()), 2 * len(x)

    exact = double_backward_hessian(Net(), lambda m: loss(m, (X, NUMBERS))[0])
    for sizes in SPLITS:
        torch.testing.assert_close(by_products(Net(), batches(X, NUMBERS, sizes=sizes), batch_loss=loss), exact)


def test_ctc_as_a_batch_loss():
    """It has no second derivative in PyTorch; the same sum over alignments, written out, has."""

    def loss(model, batch):
        x, y = batch
        steps = log_softmax(model(x)).movedim(-1, 0)  # (3 steps, N, K)
        label = y[:, None] % (K - 1) + 1  # one label each, blank is 0
        blank, mark = steps[..., 0], steps.gather(2, label.expand(3, -1, -1))[..., 0]
        paths = [
            sum(mark[t] if first <= t <= end else blank[t] for t in range(3))
            for first in range(3)
            for end in range(first, 3)
        ]
        each = -torch.logsumexp(torch.stack(paths), 0)
        with torch.no_grad():
            size = torch.full((len(x),), 3), torch.ones(len(x), dtype=torch.long)
            torch.testing.assert_close(each, functional.ctc_loss(steps, label, *size, reduction="none"))
        return each.mean(), len(x)

    exact = double_backward_hessian(Net(3), lambda m: loss(m, (X, CLASSES))[0])
    for sizes in SPLITS:
        torch.testing.assert_close(by_products(Net(3), batches(X, CLASSES, sizes=sizes), batch_loss=loss), exact)


class Output(dict):
    """A model output as Hugging Face has it."""

    def __getattr__(self, name):
        return self[name]


class CausalOutput(Output):
    pass


class Tagger(nn.Module):
    """Averages its loss over the labels that are not -100."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(5, 3, dtype=D), nn.Linear(3, 5, dtype=D)

    def forward(self, input_ids, labels=None):
        logits = self.head(torch.tanh(self.embedding(input_ids)))
        return Output(loss=functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits=logits)


class Causal(Tagger):
    """Predicts each token from those before it."""

    def forward(self, input_ids, labels=None):
        logits = self.head(torch.tanh(self.embedding(input_ids)))
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("kind", [Tagger, Causal])
def test_padded_tokens_in_a_model_that_reports_its_loss(kind):
    ids = torch.randint(0, 5, (6, 7), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(7) >= torch.tensor([7, 2, 3, 7, 4, 5])[:, None], -100, ids)
    model = kind()
    exact = double_backward_hessian(model, lambda m: m(ids, labels).loss)
    for sizes in ((4, 2), (1, 5)):
        parts = [{"input_ids": i, "labels": y} for i, y in batches(ids, labels, sizes=sizes)]
        torch.testing.assert_close(by_products(model, parts), exact)


def test_a_batch_of_padding_only_weighs_nothing():
    nothing = torch.full((4,), -100)
    loader = [(X[:4], nothing), (X[4:], CLASSES[4:])]
    for reduction in ("mean", "sum"):
        found = by_products(Net(), loader, nn.CrossEntropyLoss(reduction=reduction))
        torch.testing.assert_close(found, by_products(Net(), loader[1:], nn.CrossEntropyLoss()))
    weightless = [(X[:4], CLASSES[:4] * 0), (X[4:], CLASSES[4:])]
    found = by_products(Net(), weightless, nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1, 1, 1])))
    kept = CLASSES[4:] != 0
    torch.testing.assert_close(found, by_products(Net(), [(X[4:][kept], CLASSES[4:][kept])]))
    by_hand = lambda m, b: (m(b[0]).square().mean(), 0 if len(b[0]) == 4 else 1)  # noqa: E731
    assert Objective(Net(), loader, batch_loss=by_hand).num_terms is None
    torch.testing.assert_close(
        by_products(Net(), loader, batch_loss=by_hand), by_products(Net(), loader[1:], batch_loss=by_hand)
    )
    for empty in ({"loss_fn": nn.CrossEntropyLoss()}, {"batch_loss": by_hand}):
        with pytest.raises(DataError, match="holds no loss term: every batch has weight 0"):
            Objective(Net(), loader[:1], **empty).value()
