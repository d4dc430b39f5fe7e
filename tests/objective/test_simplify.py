"""Graphs of operations that are stated otherwise compute the same."""

import copy

import pytest
import torch
from torch.nn import functional

from sharpness.objective.simplify import restate, simplify
from sharpness.objective.tape import Recorder

aten = torch.ops.aten
CASES = {
    "plain": {"padding": 1},
    "strided": {"padding": 1, "stride": 2},
    "dilated": {"padding": 2, "dilation": 2},
    "grouped": {"padding": 1, "groups": 2},
    "both": {"padding": (1, 2), "stride": (2, 3), "dilation": (2, 1)},
}


def product(groups=1, size=40, **options):
    """The program of a Hessian-vector product of a convolution, and its arguments."""
    g = torch.Generator().manual_seed(0)
    images = torch.randn(3, 2, size, size, dtype=torch.float64, generator=g, requires_grad=True)
    kernel = torch.randn(4, 2 // groups, 3, 3, dtype=torch.float64, generator=g, requires_grad=True)
    loss = functional.conv2d(images, kernel, groups=groups, **options).tanh().square().sum()
    gradients = torch.autograd.grad(loss, (images, kernel), create_graph=True)
    v = [torch.randn(t.shape, dtype=torch.float64, generator=g) for t in gradients]
    with Recorder(v) as recorder:
        found = torch.autograd.grad(gradients, (images, kernel), v)
    tape = recorder.tape(found, {})
    return tape.program.graph, [*tape.residuals, *v]


def targets(graph):
    return [node.target for node in graph.graph.nodes]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_convolution_of_images_with_images_is_the_gradient_of_a_kernel(options):
    graph, inputs = product(**options)
    restated = copy.deepcopy(graph)
    restate(restated.graph)
    restated.recompile()
    groups = options.get("groups", 1)  # each is a convolution of its own
    before, after = (targets(g).count(aten.convolution_backward.default) for g in (graph, restated))
    assert after == before + groups
    assert targets(restated).count(aten.convolution.default) == targets(graph).count(aten.convolution.default) - groups
    with torch.no_grad():
        for found, expected in zip(restated(*inputs), graph(*inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)
            assert found.stride() == expected.stride()


def test_small_images_are_left_alone():
    graph, _ = product(padding=1, size=12)
    restated = copy.deepcopy(graph)
    restate(restated.graph)
    assert targets(restated) == targets(graph)


def test_sums_with_zeros_are_left_out():
    def function(x):
        return (torch.zeros_like(x) + x.exp()) + torch.zeros_like(x)

    x = torch.randn(5)
    with Recorder([x]) as recorder:
        y = function(x)
    tape = recorder.tape([y], {})
    assert targets(tape.program.graph).count(aten.add.Tensor) == 0
    assert torch.equal(tape.program.graph(x)[0], x.exp())
    before = targets(tape.program.graph)
    simplify(tape.program.graph.graph)
    assert targets(tape.program.graph) == before
