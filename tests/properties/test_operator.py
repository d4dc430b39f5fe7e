"""The operator is linear, symmetric, and the same however the data are split, ordered and the parameters grouped."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sharpness
from sharpness import Objective
from tests.checks import contains
from tests.zoo import batches, rotated, tanh_net

PROBLEM = tanh_net()
X, Y = (torch.cat(parts) for parts in zip(*PROBLEM.loader, strict=True))
N = len(PROBLEM.hessian)
QUICK = settings(max_examples=25, deadline=None, derandomize=True)


def vector(seed):
    return torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def splits(draw):
    sizes, left = [], len(X)
    while left:
        sizes.append(draw(st.integers(1, left)))
        left -= sizes[-1]
    return tuple(sizes)


@QUICK
@given(
    sizes=splits(),
    order=st.permutations(range(len(X))),
    reduction=st.sampled_from(["mean", "sum"]),
    memory=st.sampled_from([0, "auto"]),
)
def test_unchanged_by_split_order_and_reduction(sizes, order, reduction, memory):
    order = torch.tensor(order)
    loader = batches(X[order], Y[order], sizes=sizes)
    objective = Objective(PROBLEM.model, loader, nn.CrossEntropyLoss(reduction=reduction), memory=memory)
    v = vector(0)
    torch.testing.assert_close(objective.hvp(v), PROBLEM.hessian @ v, rtol=1e-9, atol=1e-13)


@QUICK
@given(seed=st.integers(0, 10**6), a=st.floats(-5, 5), b=st.floats(-5, 5))
def test_linear_and_symmetric(seed, a, b):
    objective = Objective(PROBLEM.model, PROBLEM.loader)
    u, v = vector(seed), vector(seed + 1)
    torch.testing.assert_close(
        objective.hvp(a * u + b * v), a * objective.hvp(u) + b * objective.hvp(v), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(u @ objective.hvp(v), v @ objective.hvp(u), rtol=1e-9, atol=1e-12)


@QUICK
@given(cuts=st.sets(st.integers(1, 11), max_size=4))
def test_unchanged_by_how_parameters_are_grouped(cuts):
    """The same linear map as one matrix or as a stack of its rows has the same Hessian."""
    weight = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            edges = [0, *sorted(cuts), 12]
            pieces = [weight[a:b].clone() for a, b in itertools.pairwise(edges)]
            self.pieces = nn.ParameterList(nn.Parameter(piece) for piece in pieces)

        def forward(self, x):
            return torch.tanh(x @ torch.cat(list(self.pieces)).T)[:, :3]

    whole = nn.Linear(3, 12, bias=False).double()
    whole.weight.data.copy_(weight)
    reference = Objective(nn.Sequential(whole, nn.Tanh(), Narrow()), PROBLEM.loader)
    v = vector(3)[:36] if N >= 36 else torch.ones(36, dtype=torch.float64)
    torch.testing.assert_close(Objective(Stacked(), PROBLEM.loader).hvp(v), reference.hvp(v), rtol=1e-9, atol=1e-13)


class Narrow(nn.Module):
    def forward(self, x):
        return x[:, :3]


@QUICK
@given(scale=st.sampled_from([1e-6, 1e-2, 3.0, 1e4]))
def test_scales_with_the_loss(scale):
    def scaled(model, batch):
        x, y = batch
        return scale * nn.functional.cross_entropy(model(x), y), len(x)

    one = sharpness.top_eigenvalues(PROBLEM.model, PROBLEM.loader, k=2)
    other = sharpness.top_eigenvalues(PROBLEM.model, PROBLEM.loader, k=2, batch_loss=scaled)
    torch.testing.assert_close(other.eigenvalues, scale * one.eigenvalues, rtol=1e-5, atol=0)
    assert other.converged


@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=1, max_size=20), data=st.data())
def test_intervals_hold_an_eigenvalue_on_any_spectrum(values, data):
    spectrum = torch.tensor(values, dtype=torch.float64)
    k = data.draw(st.integers(1, len(values)))
    which = data.draw(st.sampled_from(["largest", "smallest", "magnitude", "both"]))
    result = sharpness.linalg.lanczos(
        sharpness.linalg.DenseOperator(rotated(spectrum)), k, which=which, on_failure="ignore"
    )
    for low, high in result.interval.tolist():
        assert ((low <= spectrum) & (spectrum <= high)).any()
    if result.converged and which == "largest" and k == len(values):
        assert contains(result.interval, spectrum.sort(descending=True).values)
