"""The gradient noise scale against the closed form of the linear model, for every split of the data."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning, DataError, NonFiniteError
from sharpness.metrics.noise_moments import Moments, _ratio_interval
from tests.checks import assert_untouched
from tests.zoo import batches, features, tanh_net

D, NOISE = 3, 0.5


def half_square(outputs, targets):
    return 0.5 * (outputs - targets).square().mean()


def linear_model(n, *, seed=0, offset=1.0, noise=NOISE):
    """``x ~ N(0, I)``, ``y = noise``, loss ``(x'w - y)^2 / 2``: tr(Sigma) = (d + 1) |e|^2 + d noise^2, G = e = w."""
    g = torch.Generator().manual_seed(seed)
    x, z = torch.randn(n, D, generator=g, dtype=torch.float64), torch.randn(n, 1, generator=g, dtype=torch.float64)
    model = nn.Linear(D, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(offset * torch.tensor([[1.0, -1.0, 0.5]]))
    return model, x, noise * z


def by_hand(gradients):
    """Trace, squared length and their ratio from the gradients of single samples, ``(N, n)``."""
    n, mean = len(gradients), gradients.mean(0)
    trace = (gradients - mean).square().sum().item() / (n - 1)
    squared = mean.square().sum().item() - trace / n
    return trace, squared, trace / squared


def linear_gradients(model, x, y):
    return (x @ model.weight.detach().T - y) * x


@pytest.mark.parametrize("size", [1, 7, 64, 400])
def test_the_linear_model_for_every_batch_size_of_the_loader(size):
    model, x, y = linear_model(400)
    with assert_untouched(model):
        result = sharpness.gradient_noise_scale(
            model, list(zip(x.split(size), y.split(size), strict=True)), half_square
        )
    e2 = model.weight.square().sum().item()
    trace = (D + 1) * e2 + D * NOISE**2
    assert abs(result.trace_covariance - trace) < 4 * result.trace_stderr
    assert abs(result.gradient_norm_squared - e2) < 4 * result.gradient_stderr
    assert abs(result.value - trace / e2) < 4 * result.stderr
    assert result.interval[0] < trace / e2 < result.interval[1]
    assert result.stderr < 0.2 * result.value
    exact = by_hand(linear_gradients(model, x, y))
    found = (result.trace_covariance, result.gradient_norm_squared, result.value)
    assert found == pytest.approx(exact, rel=1e-10)  # the same number for every split
    assert (result.num_samples, result.num_evaluations, result.converged) == (400, 400, True)


@pytest.mark.parametrize("size", [1, 5, 30])
def test_groups_go_on_from_batch_to_batch(size):
    model, x, y = linear_model(30)
    loader = list(zip(x.split(size), y.split(size), strict=True))
    result = sharpness.gradient_noise_scale(model, loader, half_square, batch_size=4, on_failure="ignore")
    each = linear_gradients(model, x, y)
    mean = each.mean(0)
    groups = each.split(4)  # the last one has 2 samples
    trace = sum(len(g) * (g.mean(0) - mean).square().sum().item() for g in groups) / (len(groups) - 1)
    assert result.trace_covariance == pytest.approx(trace, rel=1e-10)
    assert result.gradient_norm_squared == pytest.approx(mean.square().sum().item() - trace / 30, rel=1e-10)
    assert (result.num_samples, result.num_evaluations) == (30, 8)


def test_the_jackknife_is_what_leaving_out_each_sample_gives():
    model, x, y = linear_model(40)
    each = linear_gradients(model, x, y)
    result = sharpness.gradient_noise_scale(model, [(x, y)], half_square)
    left = np.array([by_hand(torch.cat([each[:j], each[j + 1 :]])) for j in range(40)])
    errors = np.sqrt(39 * left.var(axis=0))
    assert (result.trace_stderr, result.gradient_stderr, result.stderr) == pytest.approx(tuple(errors), rel=1e-9)


def test_standard_errors_and_intervals_are_calibrated_over_seeds():
    z, inside = {"trace_covariance": [], "gradient_norm_squared": [], "value": []}, 0
    for seed in range(300):
        model, x, y = linear_model(150, seed=seed, offset=0.8)
        each = linear_gradients(model, x, y)
        moments = Moments(each.mean(0))
        for gradient in each:
            moments.add(gradient, 1.0, 1)
        found = moments.estimate()
        e2 = model.weight.square().sum().item()
        truth = {"trace_covariance": (D + 1) * e2 + D * NOISE**2, "gradient_norm_squared": e2}
        truth["value"] = truth["trace_covariance"] / e2
        for name, error in (("trace_covariance", "trace"), ("gradient_norm_squared", "gradient")):
            z[name].append((found[name] - truth[name]) / found[f"{error}_stderr"])
        z["value"].append((found["value"] - truth["value"]) / found["stderr"])
        inside += found["interval"][0] <= truth["value"] <= found["interval"][1]
    for name, values in z.items():
        assert 0.8 < np.std(values) < 1.25, name
    assert np.mean(z["gradient_norm_squared"]) == pytest.approx(0, abs=0.25)
    assert 0.90 < inside / 300 < 0.99


@pytest.mark.parametrize(
    ("over", "under", "errors", "correlation"),
    [
        *((5, 1, (0.5, 0.1), 0.3), (5, 1, (0.5, 0.1), -0.9), (5, 0.2, (0.5, 0.3), 0.5)),
        *((0.5, 0.2, (0.5, 0.3), 0.9), (5, -0.3, (0.5, 0.2), 0.0), (0.5, 3, (0.5, 0.1), 0.0)),
    ],
)
def test_the_interval_holds_the_ratios_that_the_data_do_not_exclude(over, under, errors, correlation):
    covariance = np.array([[1, correlation], [correlation, 1]]) * np.outer(errors, errors)
    low, high = _ratio_interval(over, under, covariance, 2.0)
    ratios = np.linspace(0, 200, 200_001)
    variance = covariance[0, 0] - 2 * ratios * covariance[0, 1] + ratios**2 * covariance[1, 1]
    kept = ratios[(over - ratios * max(under, 0.0)) ** 2 <= 4 * variance]
    assert low == pytest.approx(kept[0], abs=2e-3)
    assert high == pytest.approx(kept[-1], abs=2e-3) if under > 2 * errors[1] else high == math.inf


def test_both_moments_are_unbiased():
    found = []
    for seed in range(2000):
        each = linear_gradients(*linear_model(5, seed=seed, offset=0.3))
        moments = Moments(each.mean(0))
        for gradient in each:
            moments.add(gradient, 1.0, 1)
        estimate = moments.estimate()
        found.append((estimate["trace_covariance"], estimate["gradient_norm_squared"]))
    means, errors = np.mean(found, axis=0), np.std(found, axis=0) / math.sqrt(2000)
    e2 = 0.3**2 * 2.25
    assert (abs(means - ((D + 1) * e2 + D * NOISE**2, e2)) < 4 * errors).all()


def test_near_a_minimum_the_scale_is_infinite_and_says_so():
    model, x, y = linear_model(100)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)  # the minimum of the data: the mean gradient is zero
    with pytest.warns(ConvergenceWarning, match=r"cannot be told from zero: \|G\|\^2 = -\d"):
        result = sharpness.gradient_noise_scale(model, [(x, y)], half_square)
    assert (result.value, result.stderr, result.converged) == (math.inf, math.inf, False)
    assert result.gradient_norm_squared == pytest.approx(-result.trace_covariance / 100, rel=1e-6)
    assert result.interval[1] == math.inf
    assert result.interval[0] > 10
    assert "cannot be told from zero" in repr(result)
    assert "at least" in repr(result)
    with pytest.raises(ConvergenceError, match="cannot be told from zero") as caught:
        sharpness.gradient_noise_scale(model, [(x, y)], half_square, on_failure="raise")
    assert caught.value.result.value == math.inf
    assert result.to_dict()["value"] is None


def test_a_gradient_within_its_error_is_not_divided_by():
    model, x, y = linear_model(100, offset=0.05)  # |G|^2 = 0.0056, its standard error about 0.01
    result = sharpness.gradient_noise_scale(model, [(x, y)], half_square, on_failure="ignore")
    assert abs(result.gradient_norm_squared) < 2 * result.gradient_stderr
    assert (result.value, result.converged) == (math.inf, False)
    truth = (D + 1) + D * NOISE**2 / model.weight.square().sum().item()
    assert result.interval[0] < truth


def test_exact_interpolation_is_zero_over_zero_and_equal_samples_have_no_noise():
    model, x, _ = linear_model(10)
    fitted = model(x).detach()
    with pytest.warns(ConvergenceWarning, match="every sample has a gradient of zero"):
        result = sharpness.gradient_noise_scale(model, [(x, fitted)], half_square)
    assert math.isnan(result.value)
    assert math.isnan(result.stderr)
    assert "no gradient and no noise" in repr(result)
    equal = sharpness.gradient_noise_scale(model, [(torch.ones(4, D).double(), torch.zeros(4, 1).double())])
    assert (equal.value, equal.trace_covariance, equal.converged) == (0.0, 0.0, True)


def test_samples_with_several_terms_weigh_by_them():
    """Padded sequences: a batch's gradient is a ratio of sums, and varies by ``(s - w G) / mean(w)``."""
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 5, (9, 4)), torch.randint(0, 3, (9, 4))
    labels[::2, 2:] = -100
    labels[8] = -100  # no terms at all
    model = nn.Sequential(nn.Embedding(5, 3)).double()

    def summed(rows):
        model.zero_grad()
        nn.functional.cross_entropy(
            model(tokens[rows]).flatten(0, 1), labels[rows].flatten(), reduction="sum"
        ).backward()
        return model[0].weight.grad.reshape(-1).clone()

    sums = torch.stack([summed([i]) for i in range(9)])
    weights = (labels != -100).sum(1).double()
    mean = sums.sum(0) / weights.sum()
    off = (sums - weights[:, None] * mean) / weights.mean()
    trace = off.square().sum().item() / 8
    model.zero_grad()
    for sizes in ((9,), (2, 7), (1,) * 9):
        loader = list(zip(tokens.split(sizes), labels.split(sizes), strict=True))
        result = sharpness.gradient_noise_scale(model, loader, nn.CrossEntropyLoss(), on_failure="ignore")
        assert result.trace_covariance == pytest.approx(trace, rel=1e-6)
        assert result.gradient_norm_squared == pytest.approx(mean.square().sum().item() - trace / 9, rel=1e-6)


def test_the_error_of_mini_batches_falls_as_the_formula_says():
    model, x, y = linear_model(2000)
    result = sharpness.gradient_noise_scale(model, [(x, y)], half_square)
    assert result.batch_sizes.tolist() == [1, 4, 16, 64]
    expected = torch.tensor([result.standard_error(m) for m in result.batch_sizes.tolist()])
    assert ((result.errors - expected).abs() < 4 * result.errors_stderr).all()
    assert result.errors[0].item() == pytest.approx(result.standard_error(1), rel=1e-9)
    each = linear_gradients(model, x, y)
    off = (each[: 2000 // 16 * 16].view(-1, 16, D).mean(1) - each.mean(0)).square().sum(1) / (1 - 16 / 2000)
    assert result.errors[2].item() == pytest.approx(off.mean().sqrt().item(), rel=1e-9)
    root = off.std() / len(off) ** 0.5 / (2 * off.mean().sqrt())  # of a square root, by the delta method
    assert result.errors_stderr[2].item() == pytest.approx(root.item(), rel=1e-9)
    assert result.standard_error(100) == pytest.approx(math.sqrt(result.trace_covariance) / 10)
    assert result.standard_error(np.int64(100)) == result.standard_error(100)
    for wrong in (0, 1.5, True, "8"):
        with pytest.raises(ArgumentError, match="`batch_size` must be a whole number of at least 1"):
            result.standard_error(wrong)


def test_without_replacement_the_error_is_smaller_by_the_factor_that_is_documented():
    model, x, y = linear_model(6)
    result = sharpness.gradient_noise_scale(model, [(x, y)], half_square, on_failure="ignore")
    each = linear_gradients(model, x, y)
    for m in (1, 2, 5):
        off = [(each[list(rows)].mean(0) - each.mean(0)).square().sum() for rows in itertools.combinations(range(6), m)]
        error = torch.stack(off).mean().sqrt().item()
        assert error == pytest.approx(result.standard_error(m) * math.sqrt(1 - m / 6), rel=1e-9)


def test_at_the_noise_scale_the_error_is_as_long_as_the_gradient():
    model, x, y = linear_model(400)
    result = sharpness.gradient_noise_scale(model, [(x, y)], half_square)
    error = math.sqrt(result.trace_covariance / result.value)
    assert error == pytest.approx(math.sqrt(result.gradient_norm_squared))


def test_the_scale_of_the_loss_does_not_matter():
    model, x, y = linear_model(60)
    half = sharpness.gradient_noise_scale(model, [(x, y)], half_square)
    whole = sharpness.gradient_noise_scale(model, [(x, y)], nn.MSELoss())
    summed = sharpness.gradient_noise_scale(model, [(x, y)], nn.MSELoss(reduction="sum"))
    assert whole.value == pytest.approx(half.value, rel=1e-10)
    assert summed.value == pytest.approx(half.value, rel=1e-10)
    assert whole.trace_covariance == pytest.approx(4 * half.trace_covariance, rel=1e-10)


def net_with_batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()


def test_batch_norm_in_train_mode_is_refused_or_measured_by_batches():
    model = net_with_batch_norm()
    x, y = torch.randn(22, 3, dtype=torch.float64), torch.arange(22) % 3
    loader = list(zip(x.split(8), y.split(8), strict=True))
    with pytest.raises(ArgumentError, match=r"gradients of single samples are not defined here: '1' \(BatchNorm1d\)"):
        sharpness.gradient_noise_scale(model, loader, mode="train")
    with pytest.raises(ArgumentError, match="`batch_size` is 9, and no batch of the loader has so many samples"):
        sharpness.gradient_noise_scale(model, loader, mode="train", batch_size=9)
    with assert_untouched(model):
        result = sharpness.gradient_noise_scale(model, loader, mode="train", batch_size=4, on_failure="ignore")
    assert (result.num_samples, result.num_evaluations) == (20, 5)  # the last two samples make no group
    assert result.settings["groups"] == "within batches"
    model.train()
    each = []
    for rows in torch.arange(20).split(4):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        each.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    trace, squared, _ = by_hand(torch.stack(each))
    assert result.trace_covariance == pytest.approx(4 * trace, rel=1e-8)
    assert result.gradient_norm_squared == pytest.approx(squared, rel=1e-8)
    evaluated = sharpness.gradient_noise_scale(model, loader, on_failure="ignore")  # running statistics
    assert evaluated.num_samples == 22


def test_a_loss_between_samples_is_refused_or_measured_by_batches():
    model, x, _ = linear_model(24)

    def spread(m, rows):
        return -m(rows).var(unbiased=False) + 1.0, len(rows)

    with pytest.raises(ArgumentError, match=r"not defined here: the loss of 4 samples is .* together and 1 one by one"):
        sharpness.gradient_noise_scale(model, [x], batch_loss=spread)
    result = sharpness.gradient_noise_scale(model, [x], batch_loss=spread, batch_size=6, on_failure="ignore")
    assert (result.settings["groups"], result.num_evaluations) == ("within batches", 4)

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, rows):
            return self.inner(rows.view(4, -1).view(-1, 3) if len(rows) % 4 == 0 else rows.view(4, 3))

    labels = torch.arange(24) % 3
    with pytest.raises(ArgumentError, match=r"not defined here: the model cannot take a single sample \("):
        sharpness.gradient_noise_scale(Fixed(), [(x.float(), labels)])


def test_too_few_samples_and_bad_data_are_named():
    model, x, y = linear_model(2)
    with pytest.raises(DataError, match="groups of 1 sample is estimated from at least 3 of them, and the data hold 2"):
        sharpness.gradient_noise_scale(model, [(x, y)], half_square)
    model, x, y = linear_model(6)

    def rooted(outputs, targets):
        return (outputs - targets).abs().sqrt().mean()

    y[4] = model(x[4]).detach()  # a square root at zero
    with pytest.raises(NonFiniteError, match="gradient of batch 0"):
        sharpness.gradient_noise_scale(model, [(x, y)], rooted)
    scalar = [{"x": torch.tensor(1.0)} for _ in range(3)]
    with pytest.raises(ArgumentError, match="not defined here: the batches hold no tensor with a dimension"):
        sharpness.gradient_noise_scale(model, scalar, batch_loss=lambda m, b: (m.weight.sum() * b["x"], 1))


def test_a_gradient_that_is_not_finite_names_its_sample():
    from sharpness.objective.sample_gradients import visit_groups

    model, x, y = linear_model(6)
    y[4] = model(x[4]).detach()
    objective = sharpness.Objective(model, [(x, y)], lambda o, t: (o - t).abs().sqrt().mean())
    for size, name in ((1, "sample 4"), (2, "group 2 of 2 samples")):
        with objective.session(), pytest.raises(NonFiniteError, match=f"gradient of {name} .counted from 0. holds NaN"):
            visit_groups(objective, size, lambda group: None)
    empty = sharpness.Objective(model, [{"x": torch.tensor(1.0)}], batch_loss=lambda m, b: (m.weight.sum(), 1))
    with empty.session(), pytest.raises(ArgumentError, match="need batches that can be cut into samples"):
        visit_groups(empty, 1, lambda group: None)


def test_nets_with_shared_frozen_and_unused_parameters_whatever_is_kept():
    problem = tanh_net()
    found = sharpness.gradient_noise_scale(problem.model, problem.loader, on_failure="ignore")
    x, y = features(3), torch.arange(11) % 3
    for loader, options in ((batches(x, y, sizes=(11,)), {}), (problem.loader, {"memory": 0, "microbatch_size": 2})):
        other = sharpness.gradient_noise_scale(problem.model, loader, on_failure="ignore", **options)
        assert other.trace_covariance == pytest.approx(found.trace_covariance, rel=1e-10)
        assert other.gradient_norm_squared == pytest.approx(found.gradient_norm_squared, rel=1e-10)
    layer = sharpness.per_layer("gradient_noise_scale", problem.model, problem.loader, on_failure="ignore")
    parts = [record.trace_covariance for record in layer.values()]
    assert sum(parts) == pytest.approx(found.trace_covariance, rel=1e-10)


def test_dropout_in_train_mode_is_measured_by_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 3))
    loader = [(torch.randn(8, 3), torch.arange(8) % 3) for _ in range(3)]
    with pytest.raises(ArgumentError, match="not defined here: the loss of 4 samples"):
        sharpness.gradient_noise_scale(model, loader, mode="train")
    result = sharpness.gradient_noise_scale(model, loader, mode="train", batch_size=4, on_failure="ignore")
    assert result.num_evaluations == 6


def test_models_are_compared_also_where_the_scale_is_infinite():
    far, x, y = linear_model(60)
    near, *_ = linear_model(60)
    with torch.no_grad():
        near.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    found = sharpness.compare(
        {"far": [far, near], "near": [near, copy.deepcopy(near)]}, [(x, y)], metrics=["gradient_noise_scale"]
    )
    assert found["near"].metrics["gradient_noise_scale"].mean == math.inf
    assert math.isnan(found["near"].metrics["gradient_noise_scale"].std)
    assert "inf" in found.table()
