"""No function changes a model or the global state: in the end, after an exception in the model, or in the loss."""

import pytest
import torch
from torch import nn

import sharpness
from tests.checks import assert_untouched
from tests.zoo import batches, features


class Fragile(nn.Module):
    """All that can be lost: gradients, statistics, flags of its own, a frozen and a shared parameter."""

    def __init__(self, fails_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop, self.last = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3)
        self.shared = self.first.weight
        self.last.bias.requires_grad_(False)
        self.calls, self.fails_at = [0], None
        self(torch.randn(5, 3)).square().mean().backward()
        self.norm.eval()
        self.calls, self.fails_at = [0], fails_at

    def forward(self, x):
        self.calls[0] += 1
        if self.fails_at and self.calls[0] >= self.fails_at:
            raise RuntimeError("broken model")
        return self.last(self.drop(self.norm(torch.tanh(self.first(x)))))


LOADER = [(x.float(), y) for x, y in batches(features(3), torch.arange(11) % 3)]


def track(model, loader, loss_fn):
    metrics = ["top_eigenvalues", "critical_sharpness"]
    tracker = sharpness.SharpnessTracker(loader, loss_fn, metrics=metrics, test_loader=loader, on_failure="ignore")
    tracker.step(model, torch.optim.SGD(model.parameters(), lr=0.1))


CALLS = {
    "top_eigenvalues": lambda m, data, f: sharpness.top_eigenvalues(m, data, f, k=2, on_failure="ignore"),
    "power": lambda m, data, f: sharpness.top_eigenvalues(m, data, f, method="power", on_failure="ignore"),
    "dense": lambda m, data, f: sharpness.top_eigenvalues(m, data, f, method="dense", on_failure="ignore"),
    "streamed": lambda m, data, f: sharpness.top_eigenvalues(m, data, f, memory=0, on_failure="ignore"),
    "epsilon_sharpness": lambda m, data, f: sharpness.epsilon_sharpness(m, data, f, max_iter=2),
    "worst_case_sharpness": lambda m, data, f: sharpness.worst_case_sharpness(m, data, f, group_size=3, num_steps=2),
    "average_case_sharpness": lambda m, data, f: sharpness.average_case_sharpness(m, data, f, num_samples=2),
    "low_pass_sharpness": lambda m, data, f: sharpness.low_pass_sharpness(m, data, f, num_samples=2),
    "pac_bayes_sharpness": lambda m, data, f: sharpness.pac_bayes_sharpness(
        m, data, f, num_samples=2, target="loss", on_failure="ignore"
    ),
    "relative_flatness": lambda m, data, f: sharpness.relative_flatness(m, data, f, layer="first"),
    "fisher_rao_norm": lambda m, data, f: sharpness.fisher_rao_norm(m, data, f),
    "trace": lambda m, data, f: sharpness.trace(m, data, f, num_matvecs=8, on_failure="ignore"),
    "diagonal": lambda m, data, f: sharpness.diagonal(m, data, f, num_matvecs=8),
    "frobenius_norm": lambda m, data, f: sharpness.frobenius_norm(m, data, f, num_matvecs=8, on_failure="ignore"),
    "spectral_density": lambda m, data, f: sharpness.spectral_density(m, data, f, num_draws=2, num_steps=4),
    "layers": lambda m, data, f: sharpness.per_layer("trace", m, data, f, num_matvecs=8, on_failure="ignore"),
    "gradient_noise_scale": lambda m, data, f: sharpness.gradient_noise_scale(m, data, f, on_failure="ignore"),
    "learning_rate_limit": lambda m, data, f: sharpness.learning_rate_limit(m, data, f, on_failure="ignore"),
    "critical_sharpness": lambda m, data, f: sharpness.critical_sharpness(m, data, f, on_failure="ignore"),
    "compare": lambda m, data, f: sharpness.compare({"a": m}, data, f),
    "landscape": lambda m, data, f: sharpness.landscape(m, data, f, dims=2, steps=3),
    "track": track,
    "interpolate": lambda m, data, f: sharpness.interpolate(m, Fragile(), data, f),
}


@pytest.mark.parametrize("call", CALLS)
def test_after_success(call):
    model = Fragile()
    with assert_untouched(model):
        CALLS[call](model, LOADER, None)


@pytest.mark.parametrize("fails_at", [1, 2, 5])
@pytest.mark.parametrize("call", CALLS)
def test_after_an_exception_in_the_model(call, fails_at):
    model = Fragile(fails_at)
    with assert_untouched(model), pytest.raises(RuntimeError, match="broken model"):
        CALLS[call](model, LOADER, None)


@pytest.mark.parametrize("call", CALLS)
def test_after_an_exception_in_the_loss(call):
    model, calls = Fragile(), [0]

    def loss(outputs, targets):
        calls[0] += 1
        if calls[0] == 6:
            raise RuntimeError("broken loss")
        return nn.functional.cross_entropy(outputs, targets)

    with assert_untouched(model), pytest.raises(RuntimeError, match="broken loss"):
        CALLS[call](model, LOADER, loss)


@pytest.mark.parametrize("mode", ["train", "as_is"])
def test_in_other_modes(mode):
    model = Fragile()
    with assert_untouched(model), pytest.warns(sharpness.DeterminismWarning):
        sharpness.top_eigenvalues(model, LOADER, mode=mode, on_failure="ignore")


def test_the_check_itself_sees_every_kind_of_change():
    changes = {
        "weight": lambda m: m.first.weight.data.add_(1e-7),
        "gradient": lambda m: setattr(m.first.weight, "grad", None),
        "gradient in place": lambda m: m.last.weight.grad.mul_(2),
        "buffer": lambda m: m.norm.running_mean.add_(1e-7),
        "flag": lambda m: m.drop.eval(),
        "frozen": lambda m: m.first.bias.requires_grad_(False),
        "hook": lambda m: m.first.register_forward_hook(lambda *a: None),
        "attribute": lambda m: setattr(m, "extra", 1),
        "generator": lambda m: torch.rand(1),
    }
    for change in changes.values():
        model = Fragile()
        with pytest.raises(AssertionError), assert_untouched(model):
            change(model)
