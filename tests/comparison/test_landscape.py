"""Landscapes against closed forms: the grid is exact, the directions are those of Li et al., nothing is filled in."""

import math

import pytest
import torch
from torch import nn

import sharpness
from sharpness.comparison.directions import filter_normalised
from sharpness.errors import ArgumentError
from tests.checks import assert_untouched
from tests.zoo import Quadratic, batches, by_rows, features, rotated, tanh_net

SPECTRUM = torch.tensor([5.0, 2.0, 0.5], dtype=torch.float64)
H = rotated(SPECTRUM)
ROWS = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
B = ROWS.mean(0)


def loss_at(w):
    return (0.5 * w @ H @ w + B @ w).item()


class SumOfSquares(nn.Module):
    """``|theta|^2 / 2`` over a convolution, a linear layer and batch norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Linear(5, 6)
        self.double()

    def forward(self, rows):
        return sum(p.square().sum() for p in self.parameters()) / 2


def test_filters_are_as_long_as_those_of_the_weights_and_vectors_stay():
    model = SumOfSquares()
    with torch.no_grad():
        model.conv.weight[1] = 0
    objective = sharpness.Objective(model, [ROWS], batch_loss=by_rows)
    pieces = dict(
        zip(objective.parameters.names, objective.parameters.split(filter_normalised(objective, 0)), strict=True)
    )
    for name, weights in model.named_parameters():
        d = pieces[name]
        if weights.ndim < 2:
            assert not d.any()
        else:
            lengths = d.flatten(1).norm(dim=1)
            torch.testing.assert_close(lengths, weights.detach().flatten(1).norm(dim=1), rtol=1e-9, atol=0)
            assert not torch.allclose(
                d.flatten(1)[0] / lengths[0], weights.flatten(1)[0] / weights.flatten(1)[0].norm()
            )


def test_along_random_directions_the_loss_of_a_quadratic_is_known():
    """With ``f = |theta|^2 / 2``: ``f(a d) = f + a (theta, d) + a^2 / 2 |W|^2``, whatever is drawn."""
    model = SumOfSquares()
    with assert_untouched(model):
        result = sharpness.landscape(model, [ROWS], batch_loss=by_rows, steps=5, extent=2.0)
    squared = sum(p.square().sum().item() for p in model.parameters() if p.ndim > 1)
    assert result.direction_norms.item() == pytest.approx(math.sqrt(squared), rel=1e-9)
    for i, a in ((0, -2.0), (1, -1.0)):
        even = (result.loss[i] + result.loss[4 - i]).item() / 2 - result.center
        assert even == pytest.approx(a * a / 2 * squared, rel=1e-9)
    assert result.cosine is None


def test_many_draws_have_mean_zero_against_the_weights_and_each_other():
    model = SumOfSquares()
    objective = sharpness.Objective(model, [ROWS], batch_loss=by_rows)
    draws = torch.stack([filter_normalised(objective, i) for i in range(200)])
    weights = objective.vector()
    along = draws @ weights
    assert abs(along.mean()) < 4 * along.std() / math.sqrt(200)
    cosines = (draws[::2] * draws[1::2]).sum(1) / (draws[::2].norm(dim=1) * draws[1::2].norm(dim=1))
    assert abs(cosines.mean()) < 4 * cosines.std() / 10
    assert cosines.abs().max() < 0.6


@pytest.mark.parametrize("dims", [1, 2])
def test_the_grid_of_given_directions_is_exact(dims):
    model = Quadratic(H)
    w = model.w.detach()
    d = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.0, -1.0]], dtype=torch.float64)[:dims]
    with assert_untouched(model):
        result = sharpness.landscape(
            model, [ROWS], batch_loss=by_rows, directions=[[row] for row in d], dims=dims, steps=7, extent=1.5
        )
    assert result.coordinates.tolist() == pytest.approx([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5], abs=1e-15)
    assert result.loss.shape == (7,) * dims
    for index in torch.cartesian_prod(*[torch.arange(7)] * dims).view(-1, dims).tolist():
        point = w + sum(result.coordinates[i] * row for i, row in zip(index, d, strict=True))
        assert result.loss[tuple(index)].item() == pytest.approx(loss_at(point), rel=1e-12, abs=1e-12)
    assert (
        result.loss[(3,) * dims].item()
        == result.center
        == sharpness.Objective(model, [ROWS], batch_loss=by_rows).value()
    )
    torch.testing.assert_close(result.direction_norms, d.norm(dim=1))
    assert result.num_evaluations == 7**dims + 1
    if dims == 2:
        assert result.cosine == pytest.approx((d[0] @ d[1] / d[0].norm() / d[1].norm()).item())


def test_along_the_top_eigenvectors():
    model = Quadratic(H)
    result = sharpness.landscape(model, [ROWS], batch_loss=by_rows, directions="eigenvectors", dims=2, steps=3)
    assert result.eigenvalues.tolist() == pytest.approx([5.0, 2.0], rel=1e-5)
    assert result.direction_norms.tolist() == pytest.approx([1.0, 1.0])
    assert abs(result.cosine) < 1e-8
    even = (result.loss + result.loss.flip(0, 1)) / 2 - result.center  # the gradient drops out
    assert even[0, 1].item() == pytest.approx(5.0 / 2, rel=1e-5)
    assert even[1, 0].item() == pytest.approx(2.0 / 2, rel=1e-5)
    assert even[0, 0].item() == pytest.approx(7.0 / 2, rel=1e-5)


def net(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()
    model[3].bias.requires_grad_(False)
    for _ in range(seed + 1):
        model(torch.randn(16, 3, dtype=torch.float64))
    return model.eval()


def test_through_three_models_each_is_met_exactly():
    models = [net(seed) for seed in range(3)]
    with torch.no_grad():
        models[0][3].weight *= 1e12  # so that the way there and back again would round
    loader = batches(features(3), torch.arange(11) % 3)
    with assert_untouched(*models):
        result = sharpness.landscape(models[0], loader, directions=models[1:], dims=2, steps=5, extent=(-1.0, 1.0))
    zero, one = 2, 4
    for index, model in (((zero, zero), 0), ((one, zero), 1), ((zero, one), 2)):
        truth = sharpness.Objective(models[model], loader).evaluate()
        assert result.loss[index].item() == truth.loss
        assert result.accuracy[index].item() == truth.accuracy
    middle = net(0)
    with torch.no_grad():
        for name, tensor in [*middle.named_parameters(), *middle.named_buffers()]:
            if tensor.is_floating_point():
                a, b, c = (m.state_dict()[name] for m in models)
                tensor.copy_(a + 0.5 * (b - a) - 0.5 * (c - a))
    assert result.loss[3, 1].item() == pytest.approx(sharpness.Objective(middle, loader).value(), rel=1e-12)
    line = sharpness.landscape(models[0], loader, directions=[models[1]], extent=(0, 1), steps=2)
    assert line.loss.tolist() == [sharpness.Objective(m, loader).value() for m in models[:2]]
    path = sharpness.interpolate(*models[:2], loader, alphas=[0.5], batch_norm="interpolate")
    half = sharpness.landscape(models[0], loader, directions=[models[1]], extent=(0, 1), steps=3)
    assert half.loss[1].item() == pytest.approx(path.train_loss.item(), rel=1e-12)


def test_only_the_chosen_parameters_move():
    models = [net(seed) for seed in range(2)]
    loader = batches(features(3), torch.arange(11) % 3)
    result = sharpness.landscape(models[0], loader, directions=[models[1]], params="0.*", steps=3)
    mixed = net(0)
    mixed[0].load_state_dict(models[1][0].state_dict())
    mixed[1].load_state_dict({**models[0][1].state_dict(), **dict(models[1][1].named_buffers())})
    assert result.loss[2].item() == sharpness.Objective(mixed, loader).value()


def test_nan_and_infinity_are_shown_as_they_are():
    class Rooted(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, rows):
            return (self.w.sqrt() + 1 / torch.where(self.w > 2.5, 0.0, 1.0)).sum()  # NaN below 0, infinite above 2.5

    along = [[torch.ones(1, dtype=torch.float64)]]
    result = sharpness.landscape(Rooted(), [ROWS], batch_loss=by_rows, directions=along, extent=2.0, steps=5)
    assert result.loss[0].isnan()
    assert result.loss[1:].tolist() == [1.0, 2.0, 1 + math.sqrt(2), math.inf]
    assert "2 not finite" in repr(result)
    assert result.to_dict()["loss"][0] is None


def test_the_same_seed_gives_the_same_directions_whatever_the_scale_of_the_layers():
    """Rescaling a layer and its successor leaves function and landscape as they are (filters of whole layers)."""

    def relu(scale):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
        with torch.no_grad():
            model[0].weight.mul_(scale)
            model[2].weight.div_(scale)
        return model

    loader = batches(features(3), torch.arange(11) % 3)
    plain, scaled = (sharpness.landscape(relu(scale), loader, dims=2, steps=3) for scale in (1.0, 8.0))
    torch.testing.assert_close(scaled.loss, plain.loss, rtol=1e-9, atol=0)
    other = sharpness.landscape(relu(1.0), loader, dims=2, steps=3, seed=1)
    assert not torch.allclose(other.loss, plain.loss)


def test_single_and_half_precision():
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)) for _ in range(2))
    loader = [(x.float(), y) for x, y in batches(features(3), torch.arange(11) % 3)]
    for directions in ("filter", [b]):
        single = sharpness.landscape(a, loader, directions=directions, steps=3)
        other = [m.bfloat16() for m in (nn.Sequential(*a), nn.Sequential(*b))]
        half = sharpness.landscape(
            other[0], loader, directions=directions if directions == "filter" else [other[1]], steps=3
        )
        torch.testing.assert_close(half.loss, single.loss, rtol=0.05, atol=0)
        a, b = a.float(), b.float()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dims": 3}, r"`dims` must be between 1 and 2 \(a plane\)"),
        ({"steps": 4}, "`steps` must be odd, so that the model is on the grid, got 4. Pass 5"),
        ({"steps": 1}, "`steps` must be at least 2"),
        ({"extent": 0.0}, "`extent` must be a finite number above 0, or two numbers"),
        ({"extent": (1.0, -1.0)}, "`extent` must be"),
        ({"extent": math.nan}, "`extent` must be"),
        ({"directions": "random"}, "`directions` must be one of 'filter', 'eigenvectors'"),
        ({"directions": [torch.ones(3)], "dims": 2}, "`directions` must be .* a list of dims=2 .*, got 1 of them"),
        ({"directions": [torch.ones(2)]}, "`directions` must hold one tensor per parameter"),
        ({"directions": [Quadratic(H)]}, r"`directions`: model 0 .* has the weights of the model itself"),
        ({"directions": [Quadratic(torch.eye(2).double())]}, "differ in architecture, at 'w' first"),
        ({"directions": [Quadratic(H), torch.ones(3)], "dims": 2}, "`directions` must be a torch.nn.Module"),
        ({}, 'directions="filter" moves weights of two dimensions or more'),
    ],
)
def test_bad_input(options, text):
    with pytest.raises(ArgumentError, match=text):
        sharpness.landscape(Quadratic(H), [ROWS], batch_loss=by_rows, **options)


def test_an_objective_in_place_of_the_model():
    problem = tanh_net()
    objective = sharpness.Objective(problem.model, problem.loader)
    found = sharpness.landscape(objective, steps=3)
    assert torch.equal(found.loss, sharpness.landscape(problem.model, problem.loader, steps=3).loss)


def test_a_filter_is_what_makes_one_output_whatever_the_layout_of_the_weights():
    """Transposed convolutions and the ``Conv1D`` of GPT-2 keep their outputs in the second dimension."""

    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.nf, self.weight = 4, nn.Parameter(torch.randn(3, 4))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.flat = nn.ConvTranspose2d(4, 6, 2, groups=2), Conv1D()
            self.words, self.norm = nn.Embedding(5, 3), nn.LayerNorm([2, 3])
            self.double()

        def forward(self, rows):
            return sum(p.square().sum() for p in self.parameters())

    model = Net()
    objective = sharpness.Objective(model, [ROWS], batch_loss=by_rows)
    pieces = objective.parameters.split(filter_normalised(objective, 0))
    drawn = dict(zip(objective.parameters.names, pieces, strict=True))

    def lengths(tensor, name):
        if name == "up.weight":  # (2 groups, 2 inputs, 3 outputs, 2, 2)
            return torch.linalg.vector_norm(tensor.view(2, 2, 3, 2, 2), dim=(1, 3, 4))
        return torch.linalg.vector_norm(tensor, dim=0 if name == "flat.weight" else 1)

    for name in ("up.weight", "flat.weight", "words.weight"):
        wanted = lengths(model.get_parameter(name).detach(), name)
        torch.testing.assert_close(lengths(drawn[name], name), wanted, rtol=1e-9, atol=0)
    assert not drawn["norm.weight"].any()  # of two dimensions, and of a normalisation


def test_weights_of_several_dtypes_keep_them():
    def net(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3).double())
        model[2].register_forward_pre_hook(lambda module, args: (args[0].double(),))
        return model

    loader = [(x.float(), y) for x, y in batches(features(3), torch.arange(11) % 3)]
    found = sharpness.landscape(net(0), loader, steps=3)
    whole = sharpness.landscape(net(0).double(), batches(features(3), torch.arange(11) % 3), steps=3)
    assert found.loss[1].item() == sharpness.Objective(net(0), loader).value()
    torch.testing.assert_close(found.loss, whole.loss, rtol=1e-4, atol=0)
