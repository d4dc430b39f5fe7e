"""Physics: in full-batch training sharpness rises to the limit of stability and hovers there (Cohen et al. 2021)."""

import pytest
import torch
from torch import nn

import sharpness

STEPS = 900


def descend(**options):
    """Train a small tanh net by full-batch steps; return the trajectory and the loss at every step."""
    train_set, _ = sharpness.datasets.digits(num_train=50)
    inputs, labels = train_set.tensors
    inputs, targets = inputs - inputs.mean(0), nn.functional.one_hot(labels, 10).float()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))

    def loss_fn(outputs, targets):
        return 0.5 * (outputs - targets).square().sum(1).mean()

    optimizer = torch.optim.SGD(model.parameters(), **options)
    metrics = [("top_eigenvalues", {"tol": 1e-2})]
    tracker = sharpness.SharpnessTracker([(inputs, targets)], loss_fn, every=45, metrics=metrics)
    tracker.measure(model, optimizer)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        tracker.step(model, optimizer)
    return tracker.result, torch.tensor(losses)


@pytest.mark.parametrize("options", [{"lr": 0.6}, {"lr": 0.7}, {"lr": 0.8, "momentum": 0.5}], ids=str)
def test_sharpness_rises_to_the_limit_and_hovers_there(options):
    result, losses = descend(**options)
    limit = (2 + 2 * options.get("momentum", 0.0)) / options["lr"]
    share = result.metrics["top_eigenvalues"] / limit
    assert result.limits.tolist() == pytest.approx([limit] * 21)
    assert share[0] < 0.75
    assert 0.9 < share[11:].mean() < 1.25
    assert share.max() < 1.25
    assert (losses[1:] > losses[:-1]).sum() > 10  # it goes up again and again
    thirds = losses.reshape(3, -1).mean(1)
    assert (thirds[1:] < thirds[:-1]).all()  # and falls in the long run
    assert losses[-1] < 0.05 * losses[0]
