"""Fewer and faster operations for the same result: differentiating twice leaves some over, and some are clumsy."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

_aten: Any = torch.ops.aten
_ZEROS = (_aten.zeros_like.default, _aten.zeros.default, _aten.new_zeros.default)


def simplify(graph: fx.Graph) -> None:
    """Leave out sums with zeros, and what nothing needs; the result has the same bits.

    Each node but the inputs carries the kind of its result in ``meta["kind"]``: dtype, shape, strides, device. Results
    keep their strides, since views of them were recorded as they were.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not _aten.add.Tensor or node.kwargs or len(node.args) != 2:
            continue
        if not all(isinstance(item, fx.Node) and item.meta.get("kind") == node.meta["kind"] for item in node.args):
            continue  # a number, or a result that is stretched or converted
        first, second = node.args
        if first.target in _ZEROS or second.target in _ZEROS:
            node.replace_all_uses_with(second if first.target in _ZEROS else first)
    graph.eliminate_dead_code()


_LARGE = 256  # entries of a kernel from which the other way is faster


def restate(graph: fx.Graph) -> None:
    """Take convolutions with kernels of the size of images for what they are: gradients of kernels.

    The second derivative of a convolution in its kernel is stated as a convolution of images with images, samples in
    the place of channels. Kernels for gradients compute the same sums in several times less time. Each node carries the
    kind of its result (see `simplify`).
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is _aten.convolution.default and _is_gradient(node):
            image, kernel, _, stride, padding, dilation = node.args[:6]
            dtype, (channels, outputs, *size), _, device = node.meta["kind"]
            with graph.inserting_before(node):
                swapped = [graph.call_function(_aten.transpose.int, (item, 0, 1)) for item in (kernel, image)]
                shape = graph.call_function(
                    _aten.empty.memory_format, ([outputs, channels, *size],), {"dtype": dtype, "device": device}
                )
                options = (None, dilation, padding, stride, False, [0] * len(size), 1, [False, True, False])
                found = graph.call_function(_aten.convolution_backward.default, (*swapped, shape, *options))
                gradient = graph.call_function(operator.getitem, (found, 1))
                turned = graph.call_function(_aten.transpose.int, (gradient, 0, 1))
                whole = graph.call_function(_aten.clone.default, (turned,), {"memory_format": torch.contiguous_format})
            whole.meta.update(node.meta)
            node.replace_all_uses_with(whole)
    graph.eliminate_dead_code()


def _is_gradient(node: fx.Node) -> bool:
    """Return whether a convolution has a large kernel, and is the gradient of one of the size of its result."""
    image, kernel, bias, stride, padding, dilation, transposed, _, groups = node.args
    size, given, window = (tuple(item.meta["kind"][1][2:]) for item in (node, image, kernel))  # type: ignore[union-attr]
    if bias is not None or transposed or groups != 1 or math.prod(window) < _LARGE:
        return False
    fitting = tuple(
        (n + 2 * p - step * (k - 1) - 1) // apart + 1
        for n, k, p, step, apart in zip(given, size, padding, stride, dilation, strict=True)  # type: ignore[arg-type]
    )
    return fitting == window
