"""Strong helpers that make each test a few lines."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from sharpness.linalg import LinearOperator


def check_operator(operator: LinearOperator, dense: Tensor) -> None:
    """The contract of every operator: it is the symmetric matrix ``dense``, in every way of asking."""
    n = len(dense)
    g = torch.Generator().manual_seed(0)
    u, v = (torch.randn(n, generator=g, dtype=torch.float64).to(operator.dtype) for _ in "uv")
    exact = dense.to(operator.dtype)
    close = (
        {"rtol": 1e-9, "atol": 1e-10 * dense.abs().max().item()}
        if operator.dtype == torch.float64
        else {"rtol": 1e-4, "atol": 1e-5}
    )
    assert operator.shape == (n, n)
    torch.testing.assert_close(operator.matvec(v), exact @ v, **close)
    torch.testing.assert_close(operator @ v, exact @ v, **close)
    torch.testing.assert_close(operator.matmat(torch.stack([u, v], 1)), exact @ torch.stack([u, v], 1), **close)
    torch.testing.assert_close(operator.to_dense(), exact, **close)
    torch.testing.assert_close(u @ operator.matvec(v), v @ operator.matvec(u), **close)
    torch.testing.assert_close(operator.matvec(2 * u - v), 2 * operator.matvec(u) - operator.matvec(v), **close)
    torch.testing.assert_close(torch.from_numpy(operator.to_scipy() @ v.numpy()), exact @ v, **close)


@contextlib.contextmanager
def assert_untouched(*models: nn.Module) -> Iterator[None]:
    """Nothing of the models, and no global state, is another after the block, even if it raises."""
    before = [_fingerprint(model) for model in models], _world()
    try:
        yield
    finally:
        after = [_fingerprint(model) for model in models], _world()
        assert after == before


def _fingerprint(model: nn.Module) -> list[object]:
    found: list[object] = []
    for name, p in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        found += [
            name,
            id(p),
            p.data_ptr(),
            p.requires_grad,
            p.dtype,
            _bits(p),
            None if p.grad is None else _bits(p.grad),
        ]
    for module in model.modules():
        found += [
            module.training,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
        ]
        found.append(sorted(module.__dict__))
    return found


def _world() -> list[object]:
    return [
        _bits(torch.get_rng_state()),
        random.getstate(),
        np.random.get_state()[1].tobytes(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    ]


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def contains(interval: Tensor, truth: Tensor, slack: float = 0.0) -> bool:
    """Whether each row of ``interval`` contains the entry of ``truth``."""
    return bool(((interval[:, 0] - slack <= truth) & (truth <= interval[:, 1] + slack)).all())
