"""Averages over random perturbations: closed forms within their standard errors, and these calibrated."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning, DeterminismWarning
from sharpness.metrics.perturbation import normal, scales
from tests.metrics.neighbours import AT, DTYPES, ROWS, SPECTRUM, LeastSquares, data, on_quadratic, relu_net
from tests.zoo import Quadratic, batches, rotated, tanh_net

average, low_pass, pac_bayes = (
    sharpness.average_case_sharpness,
    sharpness.low_pass_sharpness,
    sharpness.pac_bayes_sharpness,
)
H = rotated(SPECTRUM)
SIGMA = 0.1


def directions(num_samples, n=6):
    """The standard normal directions of seed 0."""
    like = SimpleNamespace(seed=0, n=n, device=torch.device("cpu"), dtype=torch.float64)
    return torch.stack([normal(like, i) for i in range(num_samples)])


def forms(z, h):  # of each row
    return ((z @ h) * z).sum(1)


@pytest.mark.parametrize(("dtype", "tol"), DTYPES.items())
@pytest.mark.parametrize("adaptive", [None, "elementwise"])
@pytest.mark.parametrize("distribution", ["gaussian", "sphere"])
def test_the_rise_along_a_direction_is_a_quadratic_form(dtype, tol, adaptive, distribution):
    """The two signs of a direction cancel the slope, so that each sample is sigma^2/2 z'THTz exactly."""
    options = {"sigma": SIGMA, "adaptive": adaptive, "distribution": distribution}
    result = on_quadratic(average, H, AT, dtype=dtype, num_samples=8, **options)
    z = directions(8)
    z = z / z.norm(dim=1, keepdim=True) if distribution == "sphere" else z
    z = z * AT.abs() if adaptive else z
    expected = SIGMA**2 / 2 * forms(z, H)
    torch.testing.assert_close(result.samples, expected, rtol=tol, atol=1e-6 if dtype == torch.float32 else 1e-15)
    assert result.value == pytest.approx(result.samples.mean().item(), rel=1e-12)
    rounding = torch.finfo(dtype).eps * result.loss
    assert result.stderr == pytest.approx(math.hypot(result.samples.std().item() / 8**0.5, rounding), rel=1e-9)
    assert result.num_evaluations == 1 + 16
    assert result.num_passes == 2 + 16  # one look whether the loss stays the same


@pytest.mark.parametrize(("dtype", "tol"), DTYPES.items())
def test_the_low_pass_loss_along_a_direction(dtype, tol):
    result = on_quadratic(low_pass, H, AT, dtype=dtype, sigma=SIGMA, num_samples=8)
    expected = (AT @ H @ AT).item() / 2 + SIGMA**2 / 2 * forms(directions(8), H)
    torch.testing.assert_close(result.samples, expected, rtol=tol, atol=0)
    assert result.value == pytest.approx(result.samples.mean().item(), rel=1e-12)


def test_directions_are_standard_normal():
    z = directions(4000)
    assert z.mean(0).abs().max() < 4 / 4000**0.5
    assert (z.T @ z / 4000 - torch.eye(6)).abs().max() < 4 * (2 / 4000) ** 0.5


def test_a_sphere_of_equal_curvature_has_no_doubt():
    result = on_quadratic(average, 3 * torch.eye(6), AT, sigma=SIGMA, distribution="sphere", num_samples=2)
    assert result.value == pytest.approx(SIGMA**2 / 2 * 3, rel=1e-6)


def test_the_scale_of_a_filter_is_its_norm_and_of_a_bias_its_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(3, 2, bias=False)).double()
    batch = [(torch.randn(2, 2, 2, 2, dtype=torch.float64), torch.arange(2))]
    found = sharpness.Objective(net, batch)
    kernel, bias, last = (p.detach() for p in net.parameters())
    expected = [kernel.flatten(1).norm(dim=1).repeat_interleave(8), bias.abs(), last.norm(dim=1).repeat_interleave(3)]
    torch.testing.assert_close(scales(found, "filter"), torch.cat(expected))


def test_standard_errors_are_calibrated():
    """Over seeds, the error in units of its standard error has mean 0 and variance 1."""
    results = [on_quadratic(average, H, AT, sigma=SIGMA, num_samples=16, seed=seed) for seed in range(60)]
    truth = SIGMA**2 / 2 * H.trace().item()
    z = torch.tensor([(result.value - truth) / result.stderr for result in results])
    assert abs(z.mean().item()) < 0.5  # Student's t of a skew mean
    assert 0.7 < z.std().item() < 1.5


def test_the_published_low_pass_loss_is_not_a_difference():
    rise = on_quadratic(average, H, AT, sigma=SIGMA, num_samples=8)
    filtered = on_quadratic(low_pass, H, AT, sigma=SIGMA, num_samples=8)
    assert filtered.value - filtered.loss == pytest.approx(rise.value, rel=1e-9)
    assert filtered.loss == pytest.approx((AT @ H @ AT).item() / 2)
    assert filtered.stderr == pytest.approx(rise.stderr, rel=1e-9)


def test_directions_are_those_of_the_seed_for_every_model():
    first, twice = (on_quadratic(average, c * H, AT, sigma=SIGMA, num_samples=4).samples for c in (1, 2))
    torch.testing.assert_close(twice, 2 * first)
    more = on_quadratic(average, H, AT, sigma=SIGMA, num_samples=6).samples
    torch.testing.assert_close(more[:4], first, rtol=0, atol=0)
    assert not torch.equal(on_quadratic(average, H, AT, sigma=SIGMA, num_samples=4, seed=1).samples, first)


@pytest.mark.parametrize(("dtype", "tol"), DTYPES.items())
def test_the_sigma_that_moves_the_loss(dtype, tol):
    """sigma = sqrt(2 deviation / mean z'Hz) at a minimum."""
    options = {"target": "loss", "deviation": 0.05, "num_samples": 16}
    result = on_quadratic(pac_bayes, H, torch.zeros(6), dtype=dtype, **options)
    q = forms(directions(16), H)
    assert result.sigma == pytest.approx((0.1 / q.mean().item()) ** 0.5, rel=tol)
    assert result.value == pytest.approx(1 / result.sigma**2)
    assert result.samples.mean().item() == pytest.approx(0.05, rel=1e-3)
    # A finite difference over a factor of 1.2 to either side overestimates the slope of a square by 2.3 %.
    assert result.stderr == pytest.approx(result.value * (q.std() / q.mean() / 4).item(), rel=0.03)
    assert abs(result.value - H.trace().item() / 0.1) < 4 * result.stderr


class Margin(nn.Module):
    """A linear classifier whose samples all have the geometric margin ``gamma``: accuracy Phi(gamma / sigma)."""

    def __init__(self, gamma):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([gamma, 0.0], dtype=torch.float64))

    def forward(self, x):
        score = x @ self.w
        return torch.stack([-score, score], dim=1)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_sigma_that_moves_the_accuracy(gamma):
    """deviation 0.1 -> sigma = gamma / 1.28155, and for these directions where the 21st of 100 first turns a label."""
    x = torch.tensor([[1.0, 0.0]] * 6, dtype=torch.float64)
    result = pac_bayes(Margin(gamma), [(x, torch.ones(6).long())], num_samples=100)
    turned = directions(100, n=2)[:, 0].abs().sort(descending=True).values[20].item()
    assert result.sigma == pytest.approx(gamma / turned, rel=0.01)
    assert result.accuracy == 1.0
    assert abs(result.value - 1 / (0.780304 * gamma) ** 2) < 4 * result.stderr


@pytest.mark.parametrize("eps", [0.0, 0.03])
def test_the_magnitude_aware_form_with_and_without_a_floor(eps):
    p = LeastSquares(exact=True)
    options = {"target": "loss", "deviation": 0.05, "adaptive": "elementwise", "num_samples": 8}
    result = pac_bayes(p.model, p.loader(), eps=eps, **options)
    z = directions(8, n=5) * (result.sigma**2 * p.w**2 + eps**2).sqrt()
    assert (forms(z, p.hessian) / 2).mean().item() == pytest.approx(0.05, rel=1e-4)


METRICS = {
    sharpness.worst_case_sharpness: {"num_steps": 2},
    average: {"num_samples": 2},
    low_pass: {"num_samples": 2},
    pac_bayes: {"num_samples": 2, "target": "loss", "deviation": 0.01},
}


@pytest.mark.parametrize("metric", METRICS)
def test_every_measure_takes_normalised_logits(metric):
    net, z = relu_net(), []
    result = metric(net, data(), normalize_logits=True, **METRICS[metric])
    for x, _ in data():
        z.append(net(x) - net(x).mean(1, keepdim=True))
    z, y = torch.cat(z), torch.cat([y for _, y in data()])
    expected = nn.functional.cross_entropy(z / z.norm(dim=1, keepdim=True).clamp(min=1e-10), y).item()
    assert result.loss == pytest.approx(expected, rel=1e-9)
    assert result.settings["normalize_logits"] is True
    assert "normalised logits" in result.settings["loss"]


@pytest.mark.parametrize("metric", [*METRICS, sharpness.relative_flatness, sharpness.fisher_rao_norm])
def test_a_random_loss_is_measured_and_named(metric):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    with pytest.warns(DeterminismWarning, match=r"the loss changes from pass to pass: .* \(difference"):
        metric(net, data(), mode="train", **METRICS.get(metric, {}))


def test_a_deviation_out_of_reach_is_said():
    p = tanh_net()
    with pytest.warns(
        ConvergenceWarning, match="no sigma was found at which the accuracy moves by the deviation asked for, 0.99"
    ):
        result = pac_bayes(p.model, p.loader, deviation=0.99, num_samples=2)
    assert not result.converged
    assert "NOT converged" in repr(result)
    with pytest.raises(ConvergenceError, match="Pass another deviation, or a smaller eps"):
        pac_bayes(p.model, p.loader, target="loss", deviation=1e-9, eps=0.5, num_samples=2, on_failure="raise")


def walled(outputs, targets):
    """A loss that is infinite beyond a wall."""
    return (outputs.square() * 3).exp().mean() / (outputs.abs() < 0.9).all()


def test_an_overflow_counts_as_too_far():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 1, bias=False), nn.Tanh()).double()
    rows = [(ROWS + 1, ROWS[:, :1])]
    options = {"target": "loss", "num_samples": 2}
    result = pac_bayes(model, rows, walled, deviation=0.01, **options)
    assert result.converged
    assert math.isfinite(result.stderr)
    with pytest.warns(
        ConvergenceWarning, match=r"the deviation asked for, 1e\+06: at .*, and beyond the loss overflows"
    ):
        result = pac_bayes(model, rows, walled, deviation=1e6, **options)
    assert not result.converged
    assert math.isnan(result.stderr)
    assert torch.isfinite(result.samples).all()


def test_the_width_of_the_bisection_is_no_error():
    """With hardly any variance between directions, sigma is that of n / (2 deviation) beyond the tolerance."""
    options = {"target": "loss", "num_samples": 8}
    for deviation in (0.05, 0.11, 0.12):
        result = on_quadratic(pac_bayes, H, torch.zeros(6), deviation=deviation, **options)
        assert result.samples.mean().item() == pytest.approx(deviation, rel=1e-6)


def test_rounding_is_part_of_the_doubt():
    torch.manual_seed(0)
    model, rows = nn.Linear(8, 2), [(torch.randn(64, 8), torch.randn(64, 2))]
    hessian = (rows[0][0].T @ rows[0][0] / 64).double()  # of each of two outputs, a mean over both, and their biases
    trace = 2 * (hessian.trace().item() + 1)
    for sigma in (1e-3, 1e-4, 1e-5, 1e-7):
        result = average(model, rows, nn.MSELoss(), sigma=sigma)
        assert abs(result.value - sigma**2 / 2 * trace) < 4 * result.stderr
    assert result.stderr > 1e-8


@pytest.mark.parametrize("metric", [average, low_pass])
def test_bad_input(metric):
    p = tanh_net()
    for sigma in (0, -1, float("inf"), None):
        with pytest.raises(ArgumentError, match="`sigma` must be a finite number above 0"):
            metric(p.model, p.loader, sigma=sigma)
    with pytest.raises(ArgumentError, match="`num_samples` must be at least 2, got 1"):
        metric(p.model, p.loader, num_samples=1)
    with pytest.raises(ArgumentError, match="`distribution` must be one of 'gaussian', 'sphere'"):
        average(p.model, p.loader, distribution="cauchy")


def test_an_accuracy_moves_by_less_than_one():
    p = tanh_net()
    with pytest.raises(ArgumentError, match="`deviation` must be below 1 for an accuracy, which moves by no more, got"):
        pac_bayes(p.model, p.loader, deviation=1.0)


def test_accuracy_needs_classes():
    p = LeastSquares(exact=True)
    with pytest.raises(ArgumentError, match='`target`: "accuracy" needs a classification .*Pass target="loss"'):
        pac_bayes(p.model, p.loader())
    with pytest.raises(ArgumentError, match='`target`: "accuracy" needs a classification'):
        pac_bayes(Quadratic(H, AT), batches(ROWS), batch_loss=lambda m, b: (m(b), len(b)))
