import math

import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError
from tests.checks import assert_untouched
from tests.zoo import Quadratic, batches, features, tanh_net

ROWS = torch.zeros(11, 2, dtype=torch.float64)
A, B = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([-1.0, 0.5], dtype=torch.float64)
H = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def walk(**options):
    a, b = Quadratic(H, A), Quadratic(H, B)
    with assert_untouched(a, b):
        return sharpness.interpolate(a, b, batches(ROWS), batch_loss=lambda m, x: (m(x), len(x)), **options)


@pytest.mark.parametrize("path", ["linear", "curved"])
def test_the_loss_of_a_quadratic_along_the_path(path):
    result = walk(path=path)
    assert len(result.alphas) == 25
    assert (result.alphas[0].item(), result.alphas[-1].item()) == (-1.0, 2.0)
    for alpha, loss in zip(result.alphas.tolist(), result.train_loss.tolist(), strict=True):
        angle = alpha * math.pi / 2
        point = (1 - alpha) * A + alpha * B if path == "linear" else math.cos(angle) * A + math.sin(angle) * B
        assert loss == pytest.approx((point @ H @ point).item() / 2, rel=1e-9)


def test_the_barrier_is_the_excess_over_the_straight_line():
    assert walk().barrier == 0.0  # a convex loss has none
    bump = sharpness.interpolate(
        Quadratic(-H, A), Quadratic(-H, B), [ROWS], batch_loss=lambda m, x: (m(x), 1), alphas=[0.25, 0.5]
    )
    middle = (A + B) / 2
    ends = (A @ -H @ A + B @ -H @ B).item() / 4
    assert bump.barrier == pytest.approx((middle @ -H @ middle).item() / 2 - ends, rel=1e-9)


@pytest.mark.parametrize("batch_norm", ["recompute", "interpolate", "keep"])
@pytest.mark.parametrize("path", ["linear", "curved"])
def test_the_ends_are_the_models_exactly(path, batch_norm):
    def net(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()
        for _ in range(3):
            model(torch.randn(16, 3, dtype=torch.float64))
        return model.eval()

    loader = batches(features(3), torch.arange(11) % 3)
    a, b = net(0), net(1)
    with assert_untouched(a, b):
        result = sharpness.interpolate(
            a, b, loader, test_loader=loader[:1], alphas=[0.0, 0.5, 1.0], path=path, batch_norm=batch_norm
        )
    for i, model in ((0, a), (2, b)):
        assert result.train_loss[i].item() == sharpness.Objective(model, loader).value()
        assert result.test_loss[i].item() == sharpness.Objective(model, loader[:1]).value()


def test_recomputed_statistics_are_those_of_the_activations_in_between():
    def net(shift):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
        nn.init.eye_(model[0].weight)
        nn.init.constant_(model[0].bias, shift)
        model[1].num_batches_tracked += 5
        return model.eval()  # running statistics (0, 1) are those of neither

    x, y = features(3), torch.arange(11) % 3
    middle = net(1.0)
    a, b = net(0.0), net(2.0)
    b[2].load_state_dict(a[2].state_dict())
    middle[2].load_state_dict(a[2].state_dict())
    result = sharpness.interpolate(a, b, [(x, y)], alphas=[0.5])
    expected = nn.functional.cross_entropy(
        middle[2]((x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()), y
    ).item()  # running variances are unbiased
    assert result.train_loss.item() == pytest.approx(expected, rel=1e-10)
    kept = sharpness.interpolate(a, b, [(x, y)], alphas=[0.5], batch_norm="keep")
    assert kept.train_loss.item() == pytest.approx(nn.functional.cross_entropy(middle(x), y).item(), rel=1e-4)


def test_accuracies_come_along():
    problem, other = tanh_net(0), tanh_net(1)
    result = sharpness.interpolate(problem.model, other.model, problem.loader, alphas=[0.0, 1.0])
    assert result.train_accuracy[0].item() == sharpness.Objective(problem.model, problem.loader).evaluate().accuracy
    assert result.test_accuracy is None


def test_bad_input():
    with pytest.raises(ArgumentError, match="`path` must be one of 'linear', 'curved'"):
        walk(path="straight")
    with pytest.raises(ArgumentError, match="`batch_norm` must be one of"):
        walk(batch_norm="reset")
    with pytest.raises(ArgumentError, match="`alphas` must be a list of finite numbers, at least one"):
        walk(alphas=[])
    with pytest.raises(ArgumentError, match="`alphas` must be a list of finite"):
        walk(alphas=[float("nan")])
    wide = Quadratic(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="differ in architecture, at 'w' first"):
        sharpness.interpolate(Quadratic(H, A), wide, [ROWS], batch_loss=lambda m, x: (m(x), 1))
    with pytest.raises(ArgumentError, match="`model_b` must be a torch.nn.Module"):
        sharpness.interpolate(Quadratic(H, A), 3, [ROWS], batch_loss=lambda m, x: (m(x), 1))


@pytest.mark.parametrize("batch_norm", ["recompute", "interpolate", "keep"])
def test_models_in_half_precision_are_walked_in_single(batch_norm):
    def net(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    loader = [(x.float(), y) for x, y in batches(features(3), torch.arange(11) % 3)]
    a, b = net(0), net(1)
    single = sharpness.interpolate(a, b, loader, alphas=[0, 0.5, 1], batch_norm=batch_norm)
    half = sharpness.interpolate(a.bfloat16(), b.bfloat16(), loader, alphas=[0, 0.5, 1], batch_norm=batch_norm)
    torch.testing.assert_close(half.train_loss, single.train_loss, rtol=0.05, atol=0)
