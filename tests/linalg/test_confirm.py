"""What a search in the complement adds and excludes."""

import numpy as np
import pytest
import torch

from sharpness.errors import ConvergenceError, ConvergenceWarning
from sharpness.linalg import DenseOperator, FunctionOperator, lanczos
from sharpness.linalg.confirm import PROBABILITY, extreme_bound
from sharpness.linalg.krylov import KrylovSpace
from sharpness.linalg.which import WHICH, select
from tests.checks import contains
from tests.zoo import rotated, spectra

SPECTRA = spectra()
BULK = 6 * 0.8 ** torch.arange(398, dtype=torch.float64)


def truth(values, which, k):
    ascending = values.sort().values
    return ascending[select(ascending.numpy(), which, k).copy()]


def exact(result, values, which, k):
    expected = truth(values, which, k)
    if which == "magnitude":
        return bool(((result.eigenvalues.abs() - expected.abs()).abs() <= result.residuals).all())
    return contains(result.interval, expected, slack=1e-15 * values.abs().max().item())


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SPECTRA)
def test_every_multiplicity_of_the_zoo(name, which, memory):
    values = SPECTRA[name]
    for k in {1, min(3, len(values)), min(6, len(values)), len(values)}:
        operator = DenseOperator(rotated(values))
        result = lanczos(operator, k, which=which, confirm=True, memory=memory, on_failure="ignore")
        if not result.converged:  # its small end is a limit point
            assert (name, memory, which in ("smallest", "both")) == ("geometric", 0, True)
            assert result.confirmation is None
            continue
        assert exact(result, values, which, k)
        check_exclusion(result, values)


def check_exclusion(result, values):
    """No eigenvalue beyond the excluded values but those found."""
    confirmation = result.confirmation
    assert set(confirmation) == {"num_matvecs", "added", "probability", "excluded_above", "excluded_below"}
    assert confirmation["probability"] == PROBABILITY == 0.999
    for side, sign in (("excluded_above", 1), ("excluded_below", -1)):
        if confirmation[side] is not None:
            outside = (sign * values > sign * confirmation[side]).sum()
            found = (sign * (result.eigenvalues + sign * result.residuals) > sign * confirmation[side]).sum()
            assert outside <= found


@pytest.mark.parametrize("options", [{}, {"memory": 0}, {"basis_dtype": torch.float32}, {"basis_dtype": torch.float16}])
@pytest.mark.parametrize("copies", [2, 3, 6])
def test_a_repeated_eigenvalue_that_lanczos_misses_is_added(copies, options):
    values = torch.cat([7 * torch.ones(copies), BULK]).double()
    operator = DenseOperator(rotated(values))
    plain = lanczos(operator, 3)
    assert plain.converged
    assert plain.confirmation is None
    assert plain.eigenvalues[1] < 6.5  # the trap
    result = lanczos(operator, 3, confirm=True, vectors=True, **options)
    assert result.converged
    assert exact(result, values, "largest", 3)
    # The rounding of a basis of 11 bits is a random start of its own, and may have shown a copy before.
    seen = 1 if options.get("basis_dtype") is torch.float16 else 0
    assert result.confirmation["added"] >= min(copies, 3) - 1 - seen
    rows, theta = result.eigenvectors, result.eigenvalues
    torch.testing.assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    true = torch.linalg.vector_norm(rows @ operator.matrix - theta[:, None] * rows, dim=1)
    assert (true <= result.residuals).all()
    check_exclusion(result, values)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_repeated_eigenvalues_at_both_ends(which, dtype):
    values = torch.cat([7 * torch.ones(3), -6.5 * torch.ones(3), BULK, -0.9 * BULK]).double()
    result = lanczos(DenseOperator(rotated(values).to(dtype)), 3, which=which, confirm=True)
    assert result.converged
    assert exact(result, values, which, 3)
    assert result.confirmation["added"] >= 2
    above, below = result.confirmation["excluded_above"], result.confirmation["excluded_below"]
    assert (above is None, below is None) == {"largest": (False, True), "smallest": (True, False)}.get(
        which, (False, False)
    )
    check_exclusion(result, values)


def test_products_are_counted_and_the_budget_is_kept():
    values = torch.cat([7 * torch.ones(3), BULK]).double()
    matrix, spent = rotated(values), [0]

    def product(v):
        spent[0] += 1
        return matrix @ v

    operator = FunctionOperator(product, len(values), dtype=torch.float64)
    alone = lanczos(operator, 3).num_matvecs
    spent[0] = 0
    full = lanczos(operator, 3, confirm=True)
    assert full.num_matvecs == spent[0] > full.confirmation["num_matvecs"] > 0
    for budget in (alone, alone + 1, alone + 8, full.num_matvecs - 1):
        spent[0] = 0
        with pytest.warns(ConvergenceWarning, match=rf"converged after {alone} products.* pass num_matvecs=\d+"):
            result = lanczos(operator, 3, confirm=True, num_matvecs=budget)
        assert result.converged
        assert result.confirmation is None
        assert result.num_matvecs == spent[0] <= budget
    with pytest.raises(ConvergenceError, match="did not suffice to confirm"):
        lanczos(operator, 3, confirm=True, num_matvecs=alone, on_failure="raise")
    assert lanczos(operator, 3, confirm=True, num_matvecs=alone, on_failure="ignore").confirmation is None
    assert lanczos(operator, 3, confirm=True, num_matvecs=full.num_matvecs).confirmation == full.confirmation


def test_nothing_is_confirmed_of_what_has_not_converged():
    operator = DenseOperator(rotated(BULK))
    with pytest.warns(ConvergenceWarning, match="missed the tolerance"):
        result = lanczos(operator, 3, num_matvecs=6, confirm=True)
    assert result.confirmation is None


def test_the_confirmation_survives_a_file(tmp_path):
    result = lanczos(DenseOperator(torch.diag(torch.tensor([3.0, 2.0, 1.0]))), confirm=True)
    result.save(tmp_path / "result.npz")
    assert type(result).load(tmp_path / "result.npz").confirmation == result.confirmation
    assert result.to_dict()["confirmation"]["added"] == 0


@pytest.mark.parametrize(
    ("kind", "sign", "rows"), [("uniform", 1, None), ("gap", -1, None), ("cluster", 1, None), ("uniform", -1, 6)]
)
def test_the_bound_fails_no_more_often_than_it_says(kind, sign, rows):
    """Over 200 random starts and three of their steps at once, at risks large enough to see failures."""
    n, steps, trials = 60, 9, 200
    values = {
        "uniform": torch.linspace(0, 1, n),
        "gap": torch.cat([torch.tensor([3.0]), torch.linspace(0, 1, n - 1)]),
        "cluster": torch.cat(
            [1 - 1e-3 * torch.rand(5, generator=torch.Generator().manual_seed(0)), torch.zeros(n - 5)]
        ),
    }[kind].double() * sign
    operator = FunctionOperator(lambda v: values * v, n, dtype=torch.float64)
    edge = sign * (sign * values).max().item()
    failures = dict.fromkeys((0.05, 0.3, 0.9), 0)
    for seed in range(trials):
        space = KrylovSpace(
            operator,
            torch.Generator().manual_seed(seed),
            rows=rows,
            keep=lambda theta: np.arange(3) + (len(theta) - 3 if sign == 1 else 0),
        )
        broken = dict.fromkeys(failures, False)
        for step in range(1, steps + 1):
            space.absorb(operator.matvec(space.request()))
            if step % 3:
                continue
            theta, _, _ = space.ritz()
            for risk in failures:
                bound = extreme_bound(theta, np.r_[theta, space.discarded], space.log_norm, n, risk, sign)
                assert sign * bound >= (sign * theta).max()
                broken[risk] |= sign * bound < sign * edge - 1e-12
        for risk in failures:
            failures[risk] += broken[risk]
    for risk, count in failures.items():
        assert count <= trials * risk + 4 * np.sqrt(trials * risk * (1 - risk)), risk
    assert failures[0.9] > 0  # the bound is not vacuous


def test_the_bound_is_sharper_than_the_one_for_the_worst_spectrum():
    """Kuczynski & Wozniakowski (1992): (l1 - theta) / (l1 - ln) <= eps, but for 1.648 sqrt(n) exp(-sqrt(eps)(2s-1))."""
    n, risk, steps = 2000, 1e-3, 40
    values = torch.linspace(0, 1, n, dtype=torch.float64)
    space = KrylovSpace(
        FunctionOperator(lambda v: values * v, n, dtype=torch.float64), torch.Generator().manual_seed(0)
    )
    for _ in range(steps):
        space.absorb(values * space.request())
    theta, _, _ = space.ritz()
    ours = extreme_bound(theta, theta, space.log_norm, n, risk)
    eps = (np.log(1.648 * np.sqrt(n) / risk) / (2 * steps - 1)) ** 2
    theirs = theta.max() / (1 - eps)  # with the smallest eigenvalue known to be 0
    assert 1.0 <= ours < theirs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rounded_basis_and_a_short_budget_certify_nothing_that_is_not_so(dtype):
    """What the products left cannot check is not reported from the basis alone."""
    sure = 0
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        spectrum = torch.randn(40, generator=g, dtype=torch.float64).sort().values
        spectrum[-3:] = spectrum[-1]
        matrix = rotated(spectrum, seed).float()
        budget = (45, 60)[seed % 2]
        result = lanczos(
            DenseOperator(matrix),
            4,
            which="both",
            confirm=True,
            num_matvecs=budget,
            basis_dtype=dtype,
            vectors=True,
            tol=1e-2,
            seed=seed,
            on_failure="ignore",
        )
        v = result.eigenvectors.double()
        true = torch.linalg.vector_norm(v @ matrix.double() - result.eigenvalues[:, None] * v, dim=1)
        assert (true <= result.residuals + 1e-5 * spectrum.abs().max()).all()
        assert result.num_matvecs <= budget
        sure += result.converged
    assert sure > 0
