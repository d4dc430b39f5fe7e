"""Same call, same bits; another seed, other random numbers; the global generators are left alone."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sharpness
from tests.checks import assert_untouched
from tests.zoo import tanh_net

PROBLEM = tanh_net()


def tracked(**options):
    tracker = sharpness.SharpnessTracker(LOADER, metrics=["top_eigenvalues", "average_case_sharpness"], **options)
    tracker.step(PROBLEM.model)
    return tracker.result


CALLS = {
    "lanczos": lambda **o: sharpness.top_eigenvalues(PROBLEM.model, LOADER, k=2, vectors=True, **o),
    "power": lambda **o: sharpness.top_eigenvalues(PROBLEM.model, LOADER, method="power", vectors=True, **o),
    "epsilon": lambda **o: sharpness.epsilon_sharpness(PROBLEM.model, LOADER, **o),
    "worst": lambda **o: sharpness.worst_case_sharpness(PROBLEM.model, LOADER, group_size=3, num_steps=3, **o),
    "average": lambda **o: sharpness.average_case_sharpness(PROBLEM.model, LOADER, num_samples=2, **o),
    "low-pass": lambda **o: sharpness.low_pass_sharpness(PROBLEM.model, LOADER, num_samples=2, **o),
    "pac-bayes": lambda **o: sharpness.pac_bayes_sharpness(PROBLEM.model, LOADER, num_samples=2, target="loss", **o),
    "flatness": lambda **o: sharpness.relative_flatness(PROBLEM.model, LOADER, method="hutchinson", num_samples=2, **o),
    "trace": lambda **o: sharpness.trace(PROBLEM.model, LOADER, num_matvecs=6, on_failure="ignore", **o),
    "diagonal": lambda **o: sharpness.diagonal(PROBLEM.model, LOADER, num_matvecs=6, **o),
    "frobenius": lambda **o: sharpness.frobenius_norm(PROBLEM.model, LOADER, num_matvecs=6, on_failure="ignore", **o),
    "density": lambda **o: sharpness.spectral_density(PROBLEM.model, LOADER, num_draws=2, num_steps=3, **o),
    "noise": lambda **o: sharpness.gradient_noise_scale(PROBLEM.model, LOADER, batch_size=2, on_failure="ignore", **o),
    "limit": lambda **o: sharpness.learning_rate_limit(PROBLEM.model, LOADER, **o),
    "critical": lambda **o: sharpness.critical_sharpness(PROBLEM.model, LOADER, **o),
    "landscape": lambda **o: sharpness.landscape(PROBLEM.model, LOADER, steps=3, **o),
    "track": lambda **o: tracked(**o),
    "compare": lambda **o: sharpness.compare({"a": PROBLEM.model}, LOADER, **o),
    "batch sizes": lambda **o: sharpness.compare_batch_sizes(
        small_net, (x, y), (x, y), batch_sizes=(4, 8), seeds=1, epochs=1, metrics=["fisher_rao_norm"], **o
    ),
}


def small_net():
    return nn.Linear(x.shape[1], 3, dtype=x.dtype)


x, y = (torch.cat(parts) for parts in zip(*PROBLEM.loader, strict=True))
LOADER = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)


def timeless(plain):
    kept = {name: value for name, value in plain.items() if name not in ("seconds", "rows")}
    return {name: timeless(value) if isinstance(value, dict) else value for name, value in kept.items()}


def numbers(record):
    plain = record.to_dict(vectors=True) if hasattr(record, "eigenvectors") else record.to_dict()
    return timeless(plain), (
        [row.metrics[m].values for row in record.rows for m in row.metrics] if hasattr(record, "rows") else None
    )


@pytest.mark.parametrize("call", CALLS)
def test_same_seed_same_bits_whatever_the_global_state(call):
    with assert_untouched(PROBLEM.model):
        first = CALLS[call](seed=3)
    torch.rand(7)
    assert numbers(CALLS[call](seed=3)) == numbers(first)


@pytest.mark.parametrize("call", ["lanczos", "power"])
def test_another_seed_is_another_start(call):
    assert not torch.equal(CALLS[call](seed=0).eigenvectors, CALLS[call](seed=1).eigenvectors)


@pytest.mark.parametrize("seed", [-1, 1.5, None, "x", 2**64])
def test_seeds_are_integers(seed):
    with pytest.raises(sharpness.ArgumentError, match="`seed`"):
        CALLS["lanczos"](seed=seed)
