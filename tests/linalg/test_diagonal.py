"""Diagonals: exact where they can be, and standard errors that are those of many runs."""

import pytest
import torch

from sharpness.errors import ArgumentError
from sharpness.linalg import DenseOperator, FunctionOperator, hutchinson_diagonal, xdiag
from sharpness.linalg.confidence import quantile
from sharpness.linalg.diagonal import diagonal_of
from sharpness.linalg.leave_one_out import leave_one_out
from sharpness.linalg.probes import Probes
from sharpness.linalg.sketch import Sketch
from tests.linalg.spectra_of_traces import TRACED
from tests.zoo import rotated

METHODS = [hutchinson_diagonal, xdiag]
MATRICES = {name: rotated(values) for name, values in TRACED.items()}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("flat", "slow", "step", "near zero", "pair")]


@pytest.mark.parametrize("budget", [16, 40])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["fast", "indefinite", "both ends", "classes", "outliers", *SLOW])
def test_the_standard_errors_are_those_of_many_runs(name, method, budget):
    matrix = MATRICES[name]
    runs = [method(DenseOperator(matrix), num_matvecs=budget, seed=seed) for seed in range(40)]
    errors = torch.stack([run.value for run in runs]) - matrix.diagonal()
    stderr = torch.stack([run.stderr for run in runs])
    ratio = (stderr.square().sum() / errors.square().sum()).sqrt().item()
    # Where the basis is about to hold all that stands out, a few runs hold most of the error, and others foresee it.
    edges = {("step", 16), ("fast", 40), ("outliers", 16), ("classes", 16), ("both ends", 40)}
    edge = method is xdiag and (name, budget) in edges
    assert ratio > 0.9
    assert edge or ratio < 1.2
    covered = (errors.abs() <= quantile(runs[0].num_samples - 1) * stderr).double().mean().item()
    assert 0.92 <= covered <= 0.98
    assert (
        abs(errors.mean(0) @ torch.ones(100, dtype=torch.float64))
        < 5 * torch.stack([torch.tensor(run.trace_stderr) for run in runs]).square().mean().sqrt() / 40**0.5
    )


def test_the_variance_of_an_entry_is_the_squares_beside_it():
    matrix = MATRICES["indefinite"]
    result = hutchinson_diagonal(DenseOperator(matrix), num_matvecs=4000)
    beside = (matrix**2).sum(1) - matrix.diagonal() ** 2
    torch.testing.assert_close(result.stderr, (beside / 4000).sqrt(), rtol=0.1, atol=0)
    z = (result.value - matrix.diagonal()) / result.stderr
    assert z.abs().max() < 5
    assert 0.8 < z.square().mean().sqrt() < 1.2


def test_signs_are_exact_for_a_diagonal_matrix():
    result = hutchinson_diagonal(DenseOperator(torch.diag(TRACED["slow"])), num_matvecs=2)
    torch.testing.assert_close(result.value, TRACED["slow"])
    assert not result.stderr.any()


def test_the_sum_of_squares_is_free_of_noise():
    matrix = MATRICES["outliers"]
    exact = matrix.diagonal().square().sum().item()
    found = torch.tensor(
        [hutchinson_diagonal(DenseOperator(matrix), num_matvecs=16, seed=seed).sum_of_squares for seed in range(200)]
    )
    assert abs(found.mean().item() - exact) < 4 * found.std().item() / 200**0.5
    naive = hutchinson_diagonal(DenseOperator(matrix), num_matvecs=16).value.square().sum().item()
    assert naive > 1.5 * exact


def entries_by_definition(matrix, omega, i, without=()):
    """The estimate of vector ``i``, by a projector from all vectors but its own and these."""
    kept = [k for k in range(omega.shape[1]) if k != i and k not in without]
    u, values, _ = torch.linalg.svd(matrix @ omega[:, kept], full_matrices=False)
    u = u[:, values > 1e-10 * values[0]]
    p, w, eye = u @ u.T, omega[:, i], torch.eye(len(matrix), dtype=matrix.dtype)
    return (p @ matrix + matrix @ p - p @ matrix @ p).diagonal() + w * ((eye - p) @ matrix @ (eye - p) @ w)


@pytest.mark.parametrize("m", [3, 17, 19])  # in one block of 16, with a single one beyond it, and with several
@pytest.mark.parametrize("rank", [40, 10])
def test_estimates_and_their_covariance_are_those_of_the_definition(rank, m, monkeypatch):
    monkeypatch.setattr("sharpness.linalg.sketch._PIECE", 13 * m)  # 40 entries by 13 at a time
    g = torch.Generator().manual_seed(2)
    a = torch.randn(40, rank, generator=g, dtype=torch.float64)
    matrix = (a * torch.where(torch.arange(rank) % 3 == 0, -1.0, 1.0)) @ a.T
    sketch = Sketch(DenseOperator(matrix), Probes(DenseOperator(matrix), 0, "rademacher"), keep_products=True)
    sketch.multiply(m, into_basis=True)
    assert sketch.rank == min(m, rank)
    found, variance = diagonal_of(sketch)
    omega = sketch.probes.rows(0, m).T
    samples = torch.stack([entries_by_definition(matrix, omega, i) for i in range(m)])
    torch.testing.assert_close(found.mean, samples.mean(0), rtol=1e-9, atol=1e-9)

    def owed(i, j):
        return samples[i] - entries_by_definition(matrix, omega, i, without=(j,))

    blocks = [list(range(low, min(low + 16, m))) for low in range(0, m, 16)]
    pairs = [(i, block[k - 1]) for block in blocks for k, i in enumerate(block) if len(block) > 1]
    covariance = sum((owed(i, j) * owed(j, i)).sum().item() for i, j in pairs) / len(pairs)
    independent = samples.var(0) / m
    inflation = 1 + max(covariance, 0.0) / independent.sum().item() if m <= rank else 1.0
    torch.testing.assert_close(found.variance, independent * inflation, rtol=1e-7, atol=1e-18)
    _, of_trace = leave_one_out(sketch.grams(), 40, sphere=False)
    assert variance == of_trace.item()


@pytest.mark.parametrize("n", [1, 3, 80])
@pytest.mark.parametrize("method", METHODS)
def test_the_zero_operator_and_one_dimension(method, n):
    result = method(DenseOperator(torch.zeros(n, n)), num_matvecs=12)
    assert not result.value.any()
    assert not result.stderr.any()
    assert "exact up to rounding" in repr(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_is_found_out(dtype):
    g = torch.Generator().manual_seed(1)
    a = torch.randn(100, 3, generator=g, dtype=torch.float64)
    matrix = ((a * torch.tensor([1.0, -2.0, 3.0])) @ a.T).to(dtype)
    result = xdiag(DenseOperator(matrix), num_matvecs=30)
    assert result.settings["rank"] == 3
    assert result.num_matvecs == 18
    torch.testing.assert_close(result.value, matrix.diagonal(), rtol=1e-4, atol=1e-4)


def test_as_many_products_as_dimensions_are_exact():
    matrix = MATRICES["slow"]
    result = xdiag(DenseOperator(matrix), num_matvecs=150)
    torch.testing.assert_close(result.value, matrix.diagonal(), rtol=0, atol=1e-14)
    assert result.num_matvecs == 100
    assert not result.stderr.any()
    assert result.sum_of_squares == pytest.approx(matrix.diagonal().square().sum().item())


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_is_spent_exactly(method):
    matrix, count = MATRICES["slow"], [0]

    def product(v):
        count[0] += 1
        return matrix @ v

    result = method(FunctionOperator(product, 100, dtype=torch.float64), num_matvecs=38)
    assert result.num_matvecs == count[0] == 38


def test_bad_options():
    operator = DenseOperator(MATRICES["slow"])
    with pytest.raises(ArgumentError, match="`num_matvecs` must be at least 6 for xdiag, two for each of three"):
        xdiag(operator, num_matvecs=5)
    with pytest.raises(ArgumentError, match="`num_matvecs` must be at least 2 for hutchinson_diagonal"):
        hutchinson_diagonal(operator, num_matvecs=1)
    with pytest.raises(
        ArgumentError, match=r"`memory` must be at least 16000 bytes for 10 random vectors, 2 to keep for each"
    ):
        xdiag(operator, num_matvecs=20, memory=8000)
    with pytest.raises(ArgumentError, match="without named parameters"):
        xdiag(operator, num_matvecs=6).named_value()
    for method in METHODS:
        with pytest.raises(ArgumentError, match="`seed`"):
            method(operator, seed=None)
