"""The Fisher-Rao norm from the outputs, from the parameters, and by hand."""

import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError
from tests.metrics.neighbours import DTYPES, LeastSquares, data, relu_net

norm = sharpness.fisher_rao_norm


@pytest.mark.parametrize("labels", ["data", "model"])
def test_for_rectified_nets_both_sides_agree(labels):
    net = relu_net()
    outputs, parameters = (norm(net, data(), labels=labels, method=m).value for m in ("outputs", "parameters"))
    assert outputs == pytest.approx(parameters, rel=1e-9)


def test_cross_entropy_by_hand():
    net = relu_net()
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    z = net(x).detach()
    p = z.softmax(1)
    inner = (p * z).sum(1) - z[torch.arange(24), y]
    assert norm(net, data()).value == pytest.approx(9 * inner.square().mean().item(), rel=1e-9)
    variance = (p * z * z).sum(1) - (p * z).sum(1) ** 2  # of z over the model's own labels
    assert norm(net, data(), labels="model").value == pytest.approx(9 * variance.mean().item(), rel=1e-9)
    assert norm(net, data(), num_layers=5).value == pytest.approx(25 * inner.square().mean().item(), rel=1e-9)


@pytest.mark.parametrize(("dtype", "tol"), DTYPES.items())
def test_linear_regression_by_hand(dtype, tol):
    p = LeastSquares(exact=False, dtype=dtype)
    expected = (2 * p.residuals * (p.a @ p.w)).square().mean().item()
    assert norm(p.model, p.loader()).value == pytest.approx(expected, rel=tol)


@pytest.mark.parametrize("method", ["outputs", "parameters"])
def test_the_loss_of_a_sample_is_the_mean_over_its_outputs(method):
    net = relu_net()
    x, y = torch.cat([x for x, _ in data()]), torch.randn(24, 3, dtype=torch.float64)
    z = net(x).detach()
    inner = (2 / 3 * (z - y) * z).sum(1)  # of the derivative of mean (z - y)^2
    expected = pytest.approx(9 * inner.square().mean().item(), rel=1e-9)
    assert norm(net, [(x[:10], y[:10]), (x[10:], y[10:])], nn.MSELoss(), method=method).value == expected
    assert norm(net, [(x, y)], nn.MSELoss(reduction="sum"), method=method).value == expected
    # With its own labels, of variance 3/2 each where the mean over three is a negative log-likelihood.
    expected = pytest.approx(9 * (2 / 3 * z.square().sum(1)).mean().item(), rel=1e-9)
    assert norm(net, [(x, y)], nn.MSELoss(), method=method, labels="model").value == expected


def test_the_layers_are_counted_by_what_the_outputs_do():
    class Tied(nn.Module):
        def __init__(self, spare=False):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(3, 3, bias=False).double(), nn.Linear(3, 3, bias=False).double()
            self.b.weight = self.a.weight
            if spare:
                self.spare = nn.Linear(3, 3).double()

        def forward(self, x):
            return self.b(self.a(x).relu())

    for net in (Tied(), Tied(spare=True)):
        result = norm(net, data())
        assert result.settings["num_layers"] == 2
        assert result.about is None
        assert result.value == pytest.approx(norm(net, data(), method="parameters").value, rel=1e-9)
    assert norm(Tied(), data(), num_layers=3).about is not None
    frozen = relu_net()
    frozen[0].weight.requires_grad_(False)
    assert norm(frozen, data()).value == pytest.approx(norm(relu_net(), data()).value, rel=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_where_the_two_sides_differ_it_is_said(bias):
    torch.manual_seed(0)
    layers = [nn.Conv1d(1, 2, 2, bias=bias), nn.Flatten(), nn.ReLU(), nn.Linear(4, 3, bias=bias)]
    net = nn.Sequential(nn.Unflatten(1, (1, 3)), *layers).double()
    result = norm(net, data())
    assert result.settings["num_layers"] == 2  # a convolution is one
    same = result.value == pytest.approx(norm(net, data(), method="parameters").value, rel=1e-6)
    assert same is not bias
    assert ("not that of the weights" in repr(result)) is bias


def test_drawn_labels_have_a_standard_error():
    net = relu_net()

    def unknown(outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    found = [norm(net, data(), unknown, labels="model", seed=seed) for seed in range(20)]
    truth = norm(net, data(), labels="model").value
    z = torch.tensor([(result.value - truth) / result.stderr for result in found])
    assert abs(z.mean().item()) < 4 / 20**0.5
    assert 0.6 < z.std().item() < 1.6  # 19 degrees of freedom
    with pytest.raises(ArgumentError, match='`labels`: "model" needs the distribution that the loss stands for'):
        norm(net, data(), unknown, labels="model", method="parameters")


def test_a_choice_of_parameters_is_for_the_other_method():
    net = relu_net()
    with pytest.raises(ArgumentError, match='`params` leaves out 2.weight, 4.weight, and method="outputs" is of the'):
        norm(net, data(), params="0.weight")
    parts = [norm(net, data(), params=f"{i}.weight", method="parameters").value for i in (0, 2, 4)]
    whole = norm(net, data()).value
    assert parts == pytest.approx([whole / 9] * 3, rel=1e-9)


def test_bad_input():
    with pytest.raises(ArgumentError, match="defined by the outputs of the model, and a `batch_loss` hides them"):
        norm(relu_net(), data(), batch_loss=lambda m, b: (m(b[0]).sum(), 1))
    with pytest.raises(ArgumentError, match='`num_layers` is for method="outputs"'):
        norm(relu_net(), data(), num_layers=2, method="parameters")
    with pytest.raises(ArgumentError, match="`labels` must be one of 'data', 'model'"):
        norm(relu_net(), data(), labels="true")

    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return x + self.gain

    with pytest.raises(ArgumentError, match="`num_layers` cannot be counted: no parameter is a matrix"):
        norm(Gain(), data())
