import re

import pytest
import torch
from torch import nn

from sharpness import Objective
from sharpness.errors import ArgumentError, ModelError
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


def test_parameters_on_several_devices_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    with pytest.raises(ModelError, match=r"several devices \(cpu, meta\)"):
        Objective(model, [(torch.ones(1, 3), torch.tensor([0]))])
