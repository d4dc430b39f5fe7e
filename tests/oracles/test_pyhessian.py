"""PyHessian agrees where it is right: one batch, a mean loss, every parameter used, a dominant positive end."""

import warnings

import pytest
import torch
from torch import nn

import sharpness
from tests.zoo import features

pyhessian = pytest.importorskip("pyhessian")


@pytest.mark.parametrize("seed", [0, 1])
def test_the_top_eigenvalue_is_that_of_pyhessian(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = features(3).float(), torch.arange(11) % 3
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    ours = sharpness.top_eigenvalues(model, [(x, y)], k=1)
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, _ = pyhessian.hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False).eigenvalues(
            maxIter=1000, tol=1e-7
        )
    assert ours.converged
    assert theirs[0] == pytest.approx(ours.eigenvalues[0].item(), rel=1e-3)
