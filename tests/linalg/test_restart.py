"""A basis that is compressed when it is full, and one that lives elsewhere or in fewer digits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpness.errors import ArgumentError, ConvergenceWarning
from sharpness.linalg import DenseOperator, FunctionOperator, lanczos
from sharpness.linalg.basis import Basis
from sharpness.linalg.krylov import KrylovSpace
from sharpness.linalg.search import Goal, Storage, kept_at_restart, search
from sharpness.linalg.steps import drive
from sharpness.linalg.which import WHICH, count, select
from tests.checks import contains
from tests.zoo import rotated, spectra

G = torch.Generator().manual_seed(2)
SPECTRA = spectra() | {
    "long uniform": torch.linspace(0, 1, 300, dtype=torch.float64),
    "long geometric": 0.95 ** torch.arange(300, dtype=torch.float64),
    "long random": torch.randn(300, generator=G, dtype=torch.float64),
    "long zero": torch.zeros(300, dtype=torch.float64),
    "long multiple": torch.cat([7 * torch.ones(30), 2 * torch.ones(270)]).double(),
}


def truth(values, which, k):
    ascending = values.sort().values
    return ascending[select(ascending.numpy(), which, k).copy()]


def found_in(rows, values, which, k, budget=600, tol=1e-3):
    goal = Goal(which=which, k=k, wanted=count(which, k, len(values)), tol=tol)
    operator = DenseOperator(rotated(values))
    steps = search(operator, goal, Storage(rows=rows), torch.Generator().manual_seed(0), budget, lambda residual: None)
    return drive(steps, operator)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SPECTRA)
def test_small_bases_find_the_ends_of_every_spectrum(name, which):
    """Bases smaller than the public door allows, so that small spectra restart too."""
    values = SPECTRA[name]
    for k in (1, 2, 4):
        wanted = count(which, min(k, len(values)), len(values))
        rows = wanted + 4
        if k > len(values) or (rows >= len(values) and rows > 8):
            continue
        found = found_in(min(rows, len(values)), values, which, k)
        theta, residuals = torch.from_numpy(found.theta[found.chosen]), torch.from_numpy(found.residuals[found.chosen])
        near = (theta[:, None] - values).abs().min(1).values
        assert (near <= residuals).all()
        if found.accurate(1e-3):
            expected = truth(values, which, k)
            off = (theta.abs() - expected.abs()).abs() if which == "magnitude" else (theta - expected).abs()
            assert (off <= residuals + 1e-3 * values.abs().max()).all()
        else:
            assert name in ("long uniform", "long geometric", "geometric"), "only where the end is a limit point"
            assert which in ("smallest", "both")


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", [name for name in SPECTRA if name.startswith("long")])
def test_memory_zero_is_the_least_basis_and_costs_at_most_half_as_many_products_more(name, which):
    values = SPECTRA[name]
    matrix = rotated(values)
    operator, row = DenseOperator(matrix), 8 * len(values)
    for k in (1, 3):
        wanted = count(which, k, len(values))
        free = lanczos(operator, k, which=which, tol=1e-2, on_failure="ignore")
        bound = lanczos(operator, k, which=which, tol=1e-2, on_failure="ignore", memory=0, num_matvecs=400)
        assert bound.settings["basis_rows"] == max(2 * wanted + 10, 20)
        near = (bound.eigenvalues[:, None] - values).abs().min(1).values
        assert (near <= bound.residuals).all()
        if free.converged and free.num_matvecs < 150:  # at half of the dimension an unbounded basis begins to know all
            assert bound.converged
            assert bound.num_matvecs <= 1.5 * free.num_matvecs
        twenty_more = lanczos(operator, k, which=which, tol=1e-2, on_failure="ignore", memory=row * 200)
        assert twenty_more.settings["basis_rows"] == 200


def test_a_basis_that_is_never_full_changes_nothing():
    operator = DenseOperator(rotated(SPECTRA["long random"]))
    free, bound = (lanczos(operator, 3, vectors=True, memory=memory) for memory in (None, 250 * 300 * 8))
    assert torch.equal(free.eigenvectors, bound.eigenvectors)
    assert torch.equal(free.residuals, bound.residuals)


def test_the_relation_holds_after_every_restart():
    """A Q' = Q' T + q b' + what was neglected, with Q orthonormal: the theorem that certifies the residuals."""
    for values in (SPECTRA["long random"], SPECTRA["multiple at the top"], SPECTRA["degenerate"]):
        matrix = rotated(values)
        goal = Goal(which="largest", k=2, wanted=2, tol=1e-3)
        space = KrylovSpace(
            DenseOperator(matrix),
            torch.Generator().manual_seed(0),
            rows=8,
            keep=lambda theta, goal=goal: kept_at_restart(theta, goal, 8),
        )
        for step in range(60):
            space.absorb(matrix @ space.request())
            assert space.size <= 8
            theta, s, bounds = space.ritz()
            rows = space.vectors(s)
            identity = torch.eye(len(theta), dtype=torch.float64)
            torch.testing.assert_close(rows @ rows.T, identity, rtol=0, atol=1e-11)
            true = torch.linalg.vector_norm(rows @ matrix - torch.from_numpy(theta)[:, None] * rows, dim=1)
            assert space.rounding <= 2 * space.floor, step  # nothing leaks: what was coupled has been subtracted
            assert (true <= torch.from_numpy(bounds) + space.floor).all(), step
            share = space.latest_share(s)
            assert ((share >= 0) & (share <= 1 + 1e-12)).all()
        assert space.num_products == 60


def test_a_coupling_that_was_neglected_counts_after_a_restart_as_before():
    """Neglected couplings are at the level of rounding; a large one is put in their place to see it survive."""
    values = torch.linspace(-1, 2, 40, dtype=torch.float64)
    goal = Goal(which="largest", k=1, wanted=1, tol=1e-3)
    operator = FunctionOperator(lambda v: values * v, 40, dtype=torch.float64)
    space = KrylovSpace(
        operator, torch.Generator().manual_seed(0), rows=6, keep=lambda theta: kept_at_restart(theta, goal, 6)
    )
    for _ in range(6):
        space.absorb(values * space.request())
    space._closed.append((2, 0.5))
    theta, s, _ = space.ritz()
    before = 0.5 * np.abs(s[2, kept_at_restart(theta, goal, 6)])
    for _ in range(2):
        space.absorb(values * space.request())
        kept = np.eye(space.size)[:, : len(before)]
        np.testing.assert_allclose(space.outside(kept), before, rtol=1e-12)


def test_the_polynomial_of_a_restarted_run_is_the_product_over_all_its_zeros():
    """The next vector is p(A) v / |p(A) v|, with the values left out at restarts among the zeros of p."""
    values = torch.linspace(-1, 2, 40, dtype=torch.float64)
    goal = Goal(which="largest", k=1, wanted=1, tol=1e-3)
    space = KrylovSpace(
        FunctionOperator(lambda v: values * v, 40, dtype=torch.float64),
        torch.Generator().manual_seed(0),
        rows=5,
        keep=lambda theta: kept_at_restart(theta, goal, 5),
    )
    start = space.request()
    space.absorb(values * start)
    for _ in range(11):
        space.absorb(values * space.request())
    theta, _, _ = space.ritz()
    factors = values[:, None] - torch.tensor([*theta, *space.discarded])
    assert len(space.discarded) >= 3
    assert factors.shape[1] == 12
    expected = start * factors.prod(1) / np.exp(space.log_norm)
    torch.testing.assert_close(space.request(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compression_in_place_is_the_rotation(dtype, monkeypatch):
    monkeypatch.setattr("sharpness.linalg.basis._PIECE", 64)
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(37, 101, generator=g, dtype=dtype)
    basis = Basis(101, dtype=dtype, device=torch.device("cpu"), rows=40)
    for row in rows:
        basis.append(row)
    s = torch.linalg.qr(torch.randn(37, 37, generator=g, dtype=torch.float64))[0][:, :20]
    blocks = [block.data_ptr() for block in basis._blocks]
    basis.compress(s.numpy())
    assert basis.size == 20
    assert [block.data_ptr() for block in basis._blocks] == blocks  # in place
    torch.testing.assert_close(basis.combine(np.eye(20)), (s.T @ rows.double()).to(dtype))
    basis.append(rows[0])
    torch.testing.assert_close(basis.row(20), rows[0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(-50, 50, allow_subnormal=False), min_size=12, max_size=40),
    k=st.integers(1, 3),
    which=st.sampled_from(WHICH),
    spare=st.integers(3, 6),
    repeats=st.integers(1, 4),
)
def test_intervals_of_restarted_runs_hold_an_eigenvalue(values, k, which, spare, repeats):
    spectrum = torch.tensor((values * repeats)[:40], dtype=torch.float64)
    found = found_in(min(count(which, k, len(spectrum)) + spare, len(spectrum)), spectrum, which, k, budget=80)
    theta, residuals = torch.from_numpy(found.theta), torch.from_numpy(found.residuals)
    assert ((theta[:, None] - spectrum).abs().min(1).values <= residuals).all()


def test_memory_below_the_least_is_refused_with_the_least():
    operator = DenseOperator(rotated(SPECTRA["long random"]))
    with pytest.raises(
        ArgumentError,
        match=r"`memory` must be at least 48000 bytes, a basis of 20 vectors, .* got 47999. Pass memory=4",
    ):
        lanczos(operator, memory=47999)
    assert lanczos(operator, memory=48000).settings["basis_rows"] == 20
    with pytest.raises(ArgumentError, match="`memory` must be an integer, got '2GiB'"):
        lanczos(operator, memory="2GiB")
    assert lanczos(DenseOperator(torch.eye(3)), memory=0).settings["basis_rows"] is None  # all of it fits


@pytest.mark.parametrize(
    ("dtype", "basis"),
    [
        (torch.float64, torch.float32),
        (torch.float64, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, torch.float32),
    ],
)
@pytest.mark.parametrize("memory", [None, 0])
def test_a_narrow_basis_reports_pairs_of_the_full_operator(dtype, basis, memory):
    values = SPECTRA["long random"]
    count, matrix = [0], rotated(values).to(dtype)

    def product(v):
        count[0] += 1
        return matrix @ v

    operator = FunctionOperator(product, 300, dtype=dtype)
    result = lanczos(operator, 3, basis_dtype=basis, basis_device="cpu", memory=memory, vectors=True)
    assert result.converged
    assert result.num_matvecs == count[0]
    assert contains(result.interval, values.sort(descending=True).values[:3])
    rows, theta = result.eigenvectors.double(), result.eigenvalues
    true = torch.linalg.vector_norm(rows @ matrix.double() - theta[:, None] * rows, dim=1)
    assert (true <= result.residuals).all()
    assert result.settings["basis_dtype"] == str(basis)


def test_a_narrow_basis_keeps_the_budget_and_says_what_missed():
    values = SPECTRA["long uniform"]
    count = [0]

    def product(v):
        count[0] += 1
        return values * v

    operator = FunctionOperator(product, 300, dtype=torch.float64)
    for budget in (4, 5, 11, 40):
        count[0] = 0
        with pytest.warns(ConvergenceWarning, match="2 of 2 eigenvalues missed the tolerance: worst relative residual"):
            result = lanczos(operator, 2, basis_dtype=torch.bfloat16, num_matvecs=budget, tol=1e-9)
        assert not result.converged
        assert result.num_matvecs == count[0] <= budget
        near = (result.eigenvalues[:, None] - values).abs().min(1).values
        assert (near <= result.residuals).all()
    with pytest.raises(ArgumentError, match="`num_matvecs` must be at least 4 to find 2 eigenvalues, got 3"):
        lanczos(operator, 2, basis_dtype=torch.bfloat16, num_matvecs=3)


def test_rows_that_are_converted_come_in_pieces(monkeypatch):
    monkeypatch.setattr("sharpness.linalg.basis._PIECE", 16 * 7)
    operator = DenseOperator(rotated(SPECTRA["long random"]))
    in_pieces = lanczos(operator, 2, basis_dtype=torch.float32)
    assert contains(in_pieces.interval, SPECTRA["long random"].sort(descending=True).values[:2])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"basis_dtype": torch.int8}, "`basis_dtype` must be a floating dtype, got torch.int8"),
        ({"basis_dtype": "float16"}, "`basis_dtype` must be a floating dtype, got 'float16'"),
        ({"basis_dtype": torch.float64}, "`basis_dtype` must be no wider than the operator's torch.float32"),
        ({"basis_device": "nowhere"}, "`basis_device` must be a device that is there, such as .* got 'nowhere'"),
        ({"confirm": 1}, "`confirm` must be True or False, got 1"),
    ],
)
def test_bad_storage_is_refused(options, match):
    with pytest.raises(ArgumentError, match=match):
        lanczos(DenseOperator(torch.eye(3)), **options)
