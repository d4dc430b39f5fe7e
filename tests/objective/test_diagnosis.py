"""An operation without a second derivative is named with its module, and so is what to do about it."""

import sys
import types

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sharpness import Objective
from sharpness.errors import ModelError
from sharpness.objective.diagnosis import explained, fault
from tests.checks import assert_untouched
from tests.zoo import batches, features

X, Y = features(3), torch.arange(11) % 3


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Unseen(torch.autograd.Function):
    """What a kernel in C++ or Triton does: autograd sees nothing of it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return 2 * x * g


class Seen(Unseen):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Refusing(Unseen):
    @staticmethod
    def backward(ctx, g):
        raise NotImplementedError("derivative for fused::kernel is not implemented")


class Using(nn.Module):
    """A module whose forward pass applies a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def nested(function):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), Using(function))
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), inner), nn.Linear(4, 3)).double()


def product(model, loss_fn=None, **options):
    objective = Objective(model, batches(X, Y), loss_fn, **options)
    return objective.hvp(torch.ones(objective.n, dtype=torch.float64))


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (Marked, "the custom autograd function .*Marked is marked once_differentiable, .* remove the mark"),
        (Unseen, "the backward of the custom autograd function .*Unseen runs unseen by autograd"),
        (Refusing, "derivative for fused::kernel is not implemented. Replace it"),
        (lambda x: functional.multi_margin_loss(x, torch.zeros(len(x), dtype=torch.long)) * x, "aten::multi_margin"),
    ],
)
def test_the_deepest_module_is_named_and_alternatives_are_offered(function, what):
    model = nested(getattr(function, "apply", function))
    pattern = rf"module '1.1.1' \(.*Using\) cannot be differentiated twice: .*{what}.*params=.*\"empirical_fisher\""
    with assert_untouched(model), pytest.raises(ModelError, match=pattern):
        product(model)
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_layers_after_it_can_be_measured():
    model = nested(Marked.apply)
    objective = Objective(model, batches(X, Y), params="2.*")
    tail = Objective(model[2], batches(model[:2](X).detach(), Y))
    v = torch.linspace(-1, 1, objective.n, dtype=torch.float64)
    torch.testing.assert_close(objective.hvp(v), tail.hvp(v))


def test_custom_functions_that_autograd_sees_are_fine():
    torch.testing.assert_close(product(nested(Seen.apply)), product(nested(torch.square)))


def test_a_function_that_is_unseen_in_the_loss_itself():
    with pytest.raises(ModelError, match="the loss, or what it does with the model's outputs, .*Unseen runs unseen"):
        product(nested(torch.tanh), lambda o, t: Unseen.apply(o).mean())
    with pytest.raises(ModelError, match=r"the loss \(torch.nn.modules.loss.MultiMarginLoss\) cannot .* aten::multi_m"):
        product(nested(torch.tanh), nn.MultiMarginLoss())
    with pytest.raises(ModelError, match="the model's outputs, cannot .* aten::multi_margin_loss"):
        product(nested(torch.tanh), batch_loss=lambda m, b: (functional.multi_margin_loss(m(b[0]), b[1]), len(b[0])))


def test_a_loss_that_refuses_to_be_differentiated():
    def refusing(outputs, targets):
        raise NotImplementedError("FusedLoss does not support backward")

    with pytest.raises(ModelError, match="^the loss, or what it does with the model's outputs, cannot .* FusedLoss"):
        product(nested(torch.tanh), refusing)
    whole = torch.ones(11, dtype=torch.long)
    ctc = lambda o, t: functional.ctc_loss(o.log_softmax(1)[None], t[:, None], whole, whole)  # noqa: E731
    with pytest.raises(ModelError, match="the loss, .* aten::_ctc_loss_backward is not implemented"):
        product(nested(torch.tanh), batch_loss=lambda m, b: (ctc(m(X), Y % 2 + 1), 1))


def test_the_gradient_explains_itself_too():
    with pytest.raises(ModelError, match="module '1.1.1' .* fused::kernel"):
        Objective(nested(Refusing.apply), batches(X, Y)).gradient()


@pytest.mark.parametrize("package", ["flash_attn", "xformers"])
def test_fused_attention_is_known_by_where_it_comes_from(package, monkeypatch):
    name = f"{package}.modules.mha"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    fused = type("SelfAttention", (Using,), {"__module__": name})
    model = nested(torch.tanh)
    model[1][1][1] = fused(Unseen.apply)
    with pytest.raises(
        ModelError, match=rf"\({name}.SelfAttention\) .* fused attention.*attn_implementation=\"eager\""
    ):
        product(model)


def test_flex_attention_is_named():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    class Flex(nn.Module):
        def forward(self, x):
            return flex.flex_attention(x, x, x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.attention, self.last = nn.Linear(4, 8), Flex(), nn.Linear(128, 3)

        def forward(self, x):
            return self.last(self.attention(self.first(x)[:, None]).flatten(1))

    objective = Objective(Net(), [(torch.randn(2, 16, 4), torch.tensor([0, 1]))])
    with pytest.raises(ModelError, match="module 'attention' .*Flex.*scaled_dot_product_attention"):
        objective.hvp(torch.ones(objective.n))


def test_reentrant_checkpoints_are_named():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=True)

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Block(), nn.Linear(4, 3)).double()
    with pytest.raises(ModelError, match="module '2' .*Block.* Pass use_reentrant=False"):
        product(model)


def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match="of its own"), explained():
        raise RuntimeError("of its own")
    with pytest.raises(ModelError, match="the model or the loss cannot .* before, or update PyTorch"), explained():
        raise RuntimeError("torch.compile with aot_autograd does not currently support double backward")


def test_what_has_no_derivative_or_an_error_of_another_kind_is_no_fault():
    x = torch.ones(2, requires_grad=True)
    assert fault([x.detach()], [x]) is None
    assert fault([x * 2], []) is None
    y = x * 2
    z = y.square()
    y.mul_(2)  # z cannot be differentiated any more, but not for want of a derivative
    assert fault([z], [x]) is None


def test_a_derivative_that_the_model_takes_of_itself_keeps_its_own_error():
    def residual(model, batch):
        x, other = batch[0].clone().requires_grad_(True), torch.ones(1, requires_grad=True)
        torch.autograd.grad(model(x).sum(), other)
        return model(x).mean(), len(x)

    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        product(nested(torch.tanh), batch_loss=residual)
