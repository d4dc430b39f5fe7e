"""curvlinops agrees where it is right: a criterion with a ``reduction``, every parameter used, no attention."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

import sharpness
from sharpness import HessianOperator, Objective
from tests.zoo import batches, features

curvlinops = pytest.importorskip("curvlinops")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_products_and_the_top_eigenvalue_are_those_of_curvlinops(reduction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    loader = batches(features(3), torch.arange(11) % 3)
    parameters = list(model.parameters())
    loss = nn.CrossEntropyLoss(reduction=reduction)
    theirs = curvlinops.HessianLinearOperator(model, loss, parameters, loader)
    scale = 11 if reduction == "sum" else 1  # theirs is the sum then, ours the mean over all terms
    ours = HessianOperator(Objective(model, loader, loss))
    v = torch.linspace(-1, 1, ours.n, dtype=torch.float64)
    product = theirs @ v
    torch.testing.assert_close(ours @ v, torch.as_tensor(product) / scale)
    top = eigsh(theirs.to_scipy(), k=1, which="LA", tol=1e-10, return_eigenvectors=False)[0] / scale
    ((low, high),) = sharpness.top_eigenvalues(model, loader, loss).interval.tolist()
    assert low <= np.float64(top) <= high
