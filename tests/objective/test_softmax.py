"""The Hessian of cross-entropy in closed form is that of autograd, and keeps nothing of the size of the logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from sharpness import Objective
from sharpness.objective import softmax
from sharpness.objective.curvature import Curvature
from sharpness.objective.memory import storages
from sharpness.objective.output_matrices import LossHessian
from sharpness.objective.softmax import Softmax

WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
SHAPES = {"rows": (5, 4), "one": (4,), "tokens": (3, 4, 6), "images": (2, 4, 3, 5)}
OPTIONS = {
    "plain": {},
    "ignored": {"ignore_index": 1},
    "weighted": {"weight": WEIGHT},
    "weighted, ignored": {"weight": WEIGHT, "ignore_index": 0},
    "smoothed": {"label_smoothing": 0.2},
}


@pytest.mark.parametrize("piece", [1, 30, 10**6])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_the_hessian_of_autograd(shape, options, piece, monkeypatch):
    monkeypatch.setattr(softmax, "_PIECE", piece)
    dim = 0 if len(shape) == 1 else 1
    g = torch.Generator().manual_seed(len(shape))
    logits = torch.randn(shape, dtype=torch.float64, generator=g, requires_grad=True)
    labels = torch.randint(4, [n for d, n in enumerate(shape) if d != dim], generator=g)
    loss = functional.cross_entropy(logits, labels, reduction="sum", **options)
    counted = (labels != options.get("ignore_index", -100)).double()
    weights = (counted * options["weight"][labels] if "weight" in options else counted).unsqueeze(dim)
    u = torch.randn(shape, dtype=torch.float64, generator=g)
    (expected,) = LossHessian([logits], loss).times([u])
    (found,) = Softmax(logits, dim, weights).times([u])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_near_certainty_keeps_its_curvature_in_single_precision():
    logits = torch.tensor([[20.0, 0.0, -1.0]], requires_grad=True)
    u = torch.tensor([[1.0, 0.0, 0.0]])
    exact = logits.double().softmax(1)
    (found,) = Softmax(logits, 1, torch.ones(1, 1)).times([u])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0, 0].double(), exact[0, 0] * exact[0, 1:].sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
@pytest.mark.parametrize("loss_fn", [None, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_a_language_model_keeps_its_logits_once(curvature, loss_fn):
    """Beside what its own graph holds, a batch keeps one number per token and the direction that is pulled back."""
    vocabulary, tokens = 3000, 40

    class Model(nn.Sequential):
        def forward(self, x):
            found = super().forward(x)  # (batch, tokens, vocabulary)
            return found if loss_fn is None else found.movedim(-1, 1)

    model = Model(nn.Embedding(vocabulary, 2), nn.Linear(2, vocabulary))
    batch = (torch.randint(vocabulary, (4, tokens)), torch.randint(vocabulary, (4, tokens)))
    objective = Objective(model, [batch], loss_fn, compile=False)
    with objective.session():
        objective.products([torch.ones(objective.n)], curvature=Curvature(curvature))
        (kept,) = objective._engines[Curvature(curvature)].kept.values()
        assert isinstance(kept.middle, Softmax)
        held = sum(storages(kept.tensors()).values())
    logits = 4 * 4 * tokens * vocabulary
    parameters = 4 * sum(p.numel() for p in model.parameters())
    assert held <= 2.1 * logits + 3 * parameters
