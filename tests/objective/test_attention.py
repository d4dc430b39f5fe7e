"""Attention in every form that PyTorch offers, against attention written out and differentiated densely."""

import math
from fnmatch import fnmatch

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sharpness import Objective
from tests.checks import assert_untouched
from tests.objective.dense import D, by_products, double_backward_hessian

G = torch.Generator().manual_seed(3)
X = torch.randn(5, 4, 4, generator=G, dtype=D)  # (batch, time, features)
Y = torch.arange(5) % 3
PADDING = torch.arange(4) >= torch.tensor([4, 3, 2, 4, 1])[:, None]


def dense(model, **options):
    with assert_untouched(model):
        return by_products(model, [(X[:3], Y[:3]), (X[3:], Y[3:])], **options)


def exact(model):
    return double_backward_hessian(model, lambda m: functional.cross_entropy(m(X), Y))


def written_out(q, k, v, *, attn_mask=None, is_causal=False):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.softmax(scores, -1) @ v


class Head(nn.Module):
    def __init__(self, attend, **options):
        super().__init__()
        torch.manual_seed(0)
        self.inward, self.last = nn.Linear(4, 6, dtype=D), nn.Linear(8, 3, dtype=D)
        self.attend, self.options = attend, options

    def forward(self, x):
        q, k, v = self.inward(x).chunk(3, dim=-1)
        return self.last(self.attend(q, k, v, **self.options).flatten(1))


MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": MASK}, {"attn_mask": MASK.double()}])
def test_scaled_dot_product_attention(options):
    fused = Head(functional.scaled_dot_product_attention, **options)
    torch.testing.assert_close(dense(fused), exact(Head(written_out, **options)))


def test_dropout_in_attention_is_one_fixed_draw():
    model = Head(functional.scaled_dot_product_attention, dropout_p=0.5)
    hessian = dense(model)
    torch.testing.assert_close(hessian, hessian.T)
    objective = Objective(model, [(X[:3], Y[:3]), (X[3:], Y[3:])])
    v, step = torch.linspace(-1, 1, objective.n, dtype=D), 1e-5
    ahead, behind = (objective.gradient(objective.vector() + sign * step * v) for sign in (1, -1))
    torch.testing.assert_close(hessian @ v, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-8)
    assert (hessian - dense(Head(written_out))).norm() > 0.1 * hessian.norm()


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.mha, self.last = nn.MultiheadAttention(4, 2, batch_first=True, dtype=D), nn.Linear(16, 3, dtype=D)
        self.options = options

    def forward(self, x):
        return self.last(self.mha(x, x, x, **self.options)[0].flatten(1))


class WrittenOut(SelfAttention):
    def forward(self, x):
        q, k, v = (x @ self.mha.in_proj_weight.T + self.mha.in_proj_bias).chunk(3, dim=-1)
        split = [t.unflatten(-1, (2, 2)).transpose(1, 2) for t in (q, k, v)]
        return self.last(self.mha.out_proj(written_out(*split).transpose(1, 2).flatten(2)).flatten(1))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(need_weights, mode):
    hessian = dense(SelfAttention(need_weights=need_weights), mode=mode)
    torch.testing.assert_close(hessian, exact(WrittenOut()))


class Encoder(nn.Module):
    def __init__(self, nested=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4, dtype=D)
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, dtype=D)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested)
        self.last = nn.Linear(16, 3, dtype=D)

    def forward(self, x, padding=None):
        return self.last(self.body(self.first(x), src_key_padding_mask=padding).flatten(1))


class PlainEncoder(Encoder):
    """The same, written out."""

    def forward(self, x, padding=None):
        layer, x = self.body.layers[0], self.first(x)
        q, k, v = (x @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias).chunk(3, dim=-1)
        split = [t.unflatten(-1, (2, 2)).transpose(1, 2) for t in (q, k, v)]
        mask = None if padding is None else ~padding[:, None, None, :]
        attended = written_out(*split, attn_mask=mask).transpose(1, 2).flatten(2)
        x = layer.norm1(x + layer.self_attn.out_proj(attended))
        x = layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))
        return self.last(x.flatten(1))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_transformer_encoder_layers(mode):
    torch.testing.assert_close(dense(Encoder(), mode=mode), exact(PlainEncoder()))


@pytest.mark.parametrize("chosen", ["first.*", "last.*", "body.*linear1*"])
def test_the_fast_path_with_layers_frozen_or_left_out(chosen):
    """In eval mode PyTorch takes it wherever nothing of the layer itself requires grad."""
    frozen = Encoder()
    for name, p in frozen.named_parameters():
        p.requires_grad_(fnmatch(name, chosen))
    block = dense(PlainEncoder(), params=chosen)
    torch.testing.assert_close(dense(frozen), block)
    torch.testing.assert_close(dense(Encoder(), params=chosen), block)


def test_padded_places_hold_the_same_function_with_and_without_derivatives():
    """The fast path puts zeros there, so the loss that is evaluated would not be the one that is differentiated."""
    loader = [(X[:3], PADDING[:3], Y[:3]), (X[3:], PADDING[3:], Y[3:])]
    objective, plain = Objective(Encoder(nested=True), loader), Objective(PlainEncoder(), loader)
    value, gradient = objective.value_and_gradient()
    assert value == pytest.approx(plain.value(), rel=1e-12)
    assert objective.value() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(gradient, plain.gradient())
    assert torch.backends.mha.get_fastpath_enabled()


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True, dtype=D)
        self.last = nn.Linear(16, 3, dtype=D)

    def forward(self, x):
        causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=D)
        return self.last(self.layer(x, x.flip(1), tgt_mask=causal, tgt_is_causal=True).flatten(1))


class PlainDecoder(Decoder):
    def attend(self, mha, x, memory, **options):
        weights, biases = mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3)
        projected = [t @ w.T + b for t, w, b in zip((x, memory, memory), weights, biases, strict=True)]
        split = [t.unflatten(-1, (2, 2)).transpose(1, 2) for t in projected]
        return mha.out_proj(written_out(*split, **options).transpose(1, 2).flatten(2))

    def forward(self, x):
        layer, memory = self.layer, x.flip(1)
        x = layer.norm1(x + self.attend(layer.self_attn, x, x, is_causal=True))
        x = layer.norm2(x + self.attend(layer.multihead_attn, x, memory))
        x = layer.norm3(x + layer.linear2(torch.relu(layer.linear1(x))))
        return self.last(x.flatten(1))


def test_transformer_decoder_layers():
    hessian = exact(PlainDecoder())
    v = torch.linspace(-1, 1, len(hessian), dtype=D)
    for mode in ("eval", "train"):
        objective = Objective(Decoder(), [(X[:3], Y[:3]), (X[3:], Y[3:])], mode=mode)
        torch.testing.assert_close(objective.hvp(v), hessian @ v)


def test_attention_in_checkpointed_blocks_runs_again_with_the_same_kernels():
    class Checkpointed(Encoder):
        def forward(self, x):
            return self.last(checkpoint(self.body, self.first(x), use_reentrant=False).flatten(1))

    objective, plain = (Objective(kind(), [(X, Y)]) for kind in (Checkpointed, PlainEncoder))
    v = torch.linspace(-1, 1, plain.n, dtype=D)
    torch.testing.assert_close(objective.hvp(v), plain.hvp(v))
