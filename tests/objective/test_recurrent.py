"""Recurrent networks: products against dense double backward, and no cuDNN, which has no second derivative."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_sequence

from sharpness import Objective
from tests.checks import assert_untouched
from tests.objective.dense import D, by_products, double_backward_hessian

G = torch.Generator().manual_seed(3)
X = torch.randn(5, 4, 2, generator=G, dtype=D)  # (batch, time, features)
Y = torch.arange(5) % 3
LOADER = [(X[:3], Y[:3]), (X[3:], Y[3:])]


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = kind(2, 2, batch_first=True, dtype=D, **options)
        self.last = nn.Linear(4 if options.get("bidirectional") else 2, 3, dtype=D)

    def forward(self, x):
        out, _ = self.body(x)
        return self.last(out[:, -1])


def exact(model):
    return double_backward_hessian(model, lambda m: functional.cross_entropy(m(X), Y))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}], ids=str)
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers(kind, options):
    model = Recurrent(kind, **options)
    with assert_untouched(model):
        hessian = by_products(model, LOADER)
    torch.testing.assert_close(hessian, exact(model))
    assert hessian.abs().max() > 1e-2


class Cells(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.last = kind(2, 3, dtype=D), nn.Linear(3, 3, dtype=D)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.last(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_recurrent_cells(kind):
    torch.testing.assert_close(by_products(Cells(kind), LOADER), exact(Cells(kind)))


class Packed(Recurrent):
    def forward(self, sequences):
        return self.last(self.body(sequences)[1][0][-1])


def test_packed_sequences():
    """Batches of sequences of different lengths, against the sequences one by one."""
    lengths = [2, 4, 1, 3, 4]
    sequences = [x[:length] for x, length in zip(X, lengths, strict=True)]
    packed = [pack_sequence(part, enforce_sorted=False) for part in (sequences[:3], sequences[3:])]
    loader = list(zip(packed, Y.split(3), strict=True))
    one_by_one = Recurrent(nn.LSTM)

    def loss(model):
        return functional.cross_entropy(torch.cat([model(s[None]) for s in sequences]), Y)

    torch.testing.assert_close(by_products(Packed(nn.LSTM), loader), double_backward_hessian(one_by_one, loss))
    single = Objective(Packed(nn.LSTM).float(), [(p.float(), y) for p, y in loader])
    assert 0 < single.product_error(torch.ones(1, single.n)) < 1e-5


def test_cudnn_is_off_inside_and_restored():
    seen = []

    class Watching(Recurrent):
        def forward(self, x):
            seen.append(torch.backends.cudnn.enabled)
            if len(seen) == 3:
                raise KeyboardInterrupt
            return super().forward(x)

    objective = Objective(Watching(nn.GRU), LOADER)
    assert torch.backends.cudnn.enabled
    objective.hvp(torch.ones(objective.n, dtype=D))
    assert torch.backends.cudnn.enabled
    with pytest.raises(KeyboardInterrupt):
        objective.value()
    assert torch.backends.cudnn.enabled
    assert seen == [False, False, False]

    plain = nn.Sequential(nn.Flatten(), nn.Linear(8, 3, dtype=D))
    plain.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    Objective(plain, LOADER).value()
    assert seen[3:] == [True, True]  # convolutions need not be slow
