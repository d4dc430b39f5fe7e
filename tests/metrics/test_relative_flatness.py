"""Relative flatness against the dense Hessian."""

import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError
from sharpness.metrics.perturbation import scales
from tests.metrics.neighbours import DTYPES, LeastSquares, data, relu_net
from tests.zoo import dense_hessian, tanh_net

flatness = sharpness.relative_flatness


def dense(net, position):
    """The definition, literally, from the dense Hessian."""
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    named = [(name, p.numel()) for name, p in net.named_parameters()]
    start = sum(size for _, size in named[:position])
    w = list(net.parameters())[position].detach()
    rows, columns = w.flatten(1).shape
    h = dense_hessian(net, lambda m: nn.functional.cross_entropy(m(x), y))
    h = h[start : start + w.numel(), start : start + w.numel()].view(rows, columns, rows, columns)
    traces = h.diagonal(dim1=1, dim2=3).sum(-1)
    return ((w.flatten(1) @ w.flatten(1).T) * traces).sum().item()


@pytest.mark.parametrize(("layer", "position"), [("0", 0), ("2.weight", 1), (None, 2)])
def test_every_layer_is_what_the_definition_says(layer, position):
    net = relu_net()
    result = flatness(net, data(), layer=layer)
    assert result.value == pytest.approx(dense(net, position), rel=1e-9)
    assert result.stderr is None
    estimate = flatness(net, data(), layer=layer, method="hutchinson", num_samples=400)
    assert abs(estimate.value - result.value) < 4 * estimate.stderr
    assert result.settings["layer"] == list(dict(net.named_parameters()))[position]


@pytest.mark.parametrize(("dtype", "tol"), DTYPES.items())
def test_one_row_of_least_squares(dtype, tol):
    p = LeastSquares(exact=False, dtype=dtype)
    expected = (p.w.norm() ** 2 * p.hessian.trace()).item()
    assert flatness(p.model, p.loader()).value == pytest.approx(expected, rel=tol)


def test_standard_errors_are_calibrated():
    net = relu_net()
    truth = flatness(net, data()).value
    found = [flatness(net, data(), method="hutchinson", num_samples=16, seed=seed) for seed in range(60)]
    z = torch.tensor([(result.value - truth) / result.stderr for result in found])
    assert abs(z.mean().item()) < 0.6
    assert 0.7 < z.std().item() < 1.5


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
@pytest.mark.parametrize("shape", [(3, 2), (2, 3)])
def test_tall_and_wide_layers_have_one_definition(shape, method):
    torch.manual_seed(0)
    rows, columns = shape
    net = nn.Sequential(nn.Linear(3, columns), nn.Tanh(), nn.Linear(columns, rows, bias=False), nn.Linear(rows, 3))
    net = net.double()
    result = flatness(net, data(), layer="2", method=method, num_samples=None if method == "exact" else 300)
    assert abs(result.value - dense(net, 2)) < (4 * result.stderr if result.stderr else 1e-9)
    assert result.num_evaluations == (2 * columns if method == "exact" else 300)


class Grouped(nn.Module):
    """A transposed convolution of two groups, whose weights have their inputs first."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 4, 2, groups=2, bias=False)
        self.head = nn.Linear(4 * 9, 3, bias=False)

    def forward(self, x):
        return self.head(self.up(x).relu().flatten(1))


def test_the_rows_of_a_transposed_convolution_are_its_outputs():
    torch.manual_seed(0)
    net, other = Grouped().double(), Grouped().double()
    factors = torch.tensor([2.0, 4.0, 0.5, 3.0]).double()
    by_group = factors.view(2, 2).repeat_interleave(1, dim=0)  # inputs of a group reach its own outputs
    other.up.weight.data = net.up.weight.data * by_group[:, :, None, None]
    other.head.weight.data = net.head.weight.data / factors.repeat_interleave(9)
    batch = [(torch.randn(5, 2, 2, 2, dtype=torch.float64), torch.arange(5) % 3)]
    torch.testing.assert_close(net(batch[0][0]), other(batch[0][0]))
    for options in ({"method": "exact"}, {"method": "hutchinson", "num_samples": 4}):
        one, two = (flatness(m, batch, layer="up", **options).value for m in (net, other))
        assert two == pytest.approx(one, rel=1e-9)
    rows = [net.up.weight[g, o].flatten() for g in range(2) for o in range(2)]
    scale = scales(sharpness.Objective(net, batch, params="up.weight"), "filter")
    expected = torch.stack([row.norm() for row in rows]).view(2, 2, 1, 1).expand(2, 2, 2, 2).reshape(-1)
    torch.testing.assert_close(scale, expected.detach())


def test_the_last_matrix_is_one_that_the_loss_depends_on():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

        def forward(self, x):
            return self.used(x)

    net = Spare()
    result = flatness(net, data())
    assert result.settings["layer"] == result.about == "used.weight"
    assert "used.weight" in repr(result)
    assert result.value == pytest.approx(flatness(net, data(), layer="used").value)
    assert flatness(net, data(), layer="spare").value == 0


def test_zero_weights_are_flat():
    net = relu_net()
    net[4].weight.data.zero_()
    assert flatness(net, data()).value == 0


def test_large_layers_are_estimated():
    p = LeastSquares(exact=True)
    assert flatness(p.model, p.loader(), num_samples=2).settings["method"] == "exact"  # 5 products
    assert flatness(relu_net(), data(), num_samples=2).settings["method"] == "hutchinson"


def test_a_tied_layer_goes_by_either_name():
    problem = tanh_net()
    first, again = (flatness(problem.model, problem.loader, layer=name).value for name in ("core.middle", "again"))
    assert first == again


def test_bad_input():
    net = nn.Sequential(nn.Linear(3, 3), nn.RNN(3, 3))
    with pytest.raises(ArgumentError, match="`layer`: '7' names no weight matrix that is measured"):
        flatness(net, data(), layer="7")
    with pytest.raises(ArgumentError, match="`layer`: '0.bias' is a vector"):
        flatness(net, data(), layer="0.bias")
    with pytest.raises(ArgumentError, match="`layer`: '1' names several weight matrices. Pass one of '1.weight_ih_l0'"):
        flatness(net, data(), layer="1")
    with pytest.raises(ArgumentError, match="`layer`: none of the parameters measured is a matrix"):
        flatness(net, data(), params="*bias*")
    with pytest.raises(ArgumentError, match="`layer` must be the name of a module or a parameter, got 3"):
        flatness(net, data(), layer=3)
    with pytest.raises(ArgumentError, match='`num_samples` is for the estimate, got 7 with method="exact"'):
        flatness(net, data(), layer="0", method="exact", num_samples=7)
