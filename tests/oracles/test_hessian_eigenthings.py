"""hessian-eigenthings agrees where it is right: batches of one size, every parameter used, few eigenvalues."""

import pytest
import torch
from torch import nn

import sharpness
from sharpness import HessianOperator, Objective
from tests.zoo import features

theirs = pytest.importorskip("hessian_eigenthings", minversion="1.0.0a1")


@pytest.mark.filterwarnings("ignore")
def test_products_and_the_top_eigenvalues_are_those_of_hessian_eigenthings():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = features(3)[:10], torch.arange(10) % 3
    loader = [(x[:5], y[:5]), (x[5:], y[5:])]
    operator = theirs.HessianOperator(model, loader, theirs.supervised_loss(nn.functional.cross_entropy))
    ours = HessianOperator(Objective(model, loader))
    v = torch.linspace(-1, 1, ours.n, dtype=torch.float64)
    torch.testing.assert_close(ours @ v, operator.matvec(v))
    found = theirs.lanczos(operator, k=2, max_iter=30, which="LA", tol=1e-10, seed=0)
    result = sharpness.top_eigenvalues(model, loader, k=2)
    for value, (low, high) in zip(found.eigenvalues.tolist(), result.interval.tolist(), strict=True):
        assert low <= value <= high
