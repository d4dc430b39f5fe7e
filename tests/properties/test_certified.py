"""On random problems of every kind, by every method: intervals hold an eigenvalue, and converged means converged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpness.errors import ArgumentError
from sharpness.linalg import DenseOperator, arpack, dense, lanczos, lobpcg, power_iteration
from sharpness.linalg.which import WHICH
from tests.zoo import rotated

METHODS = {
    "lanczos": lanczos,
    "lanczos, small basis": lambda a, k, **o: lanczos(a, k, memory=0, **o),
    "lanczos, confirmed": lambda a, k, **o: lanczos(a, k, confirm=True, **o),
    "lanczos, small basis, confirmed": lambda a, k, **o: lanczos(a, k, memory=0, confirm=True, **o),
    "lanczos, narrow basis": lambda a, k, **o: lanczos(a, k, basis_dtype=torch.float16, **o),
    "lanczos, narrow small basis, confirmed": lambda a, k, **o: lanczos(
        a, k, basis_dtype=torch.bfloat16, memory=0, confirm=True, **o
    ),
    "power": power_iteration,
    "lobpcg": lobpcg,
    "arpack": arpack,
    "dense": dense,
}
KINDS = ("normal", "clustered", "repeated", "graded", "indefinite", "low rank", "outliers", "zero")
EXAMPLES = 300


@st.composite
def problems(draw):
    """A symmetric matrix as an operator, k and which."""
    kind = draw(st.sampled_from(KINDS))
    n = draw(st.integers(1, 64))
    seed = draw(st.integers(0, 2**31))
    scale = draw(st.sampled_from([1.0, 1.0, 1e-8, 1e8, 1e-3]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=g, dtype=torch.float64)
    centres = torch.randn(3, generator=g, dtype=torch.float64)
    values = {
        "normal": normal,
        "clustered": centres[torch.arange(n) % 3] + 1e-6 * normal,
        "repeated": torch.round(normal),
        "graded": torch.sign(normal) * 10.0 ** torch.linspace(0, -8, n, dtype=torch.float64),
        "indefinite": torch.cat([5 + normal[: n // 2], -5 - normal[n // 2 :]]),
        "low rank": torch.where(torch.arange(n) < 3, normal, torch.zeros(())),
        "outliers": torch.where(torch.arange(n) < 4, 20 * normal.abs(), 0.01 * normal),
        "zero": torch.zeros(n, dtype=torch.float64),
    }[kind]
    operator = DenseOperator((rotated(values, seed) * scale).to(dtype))
    return operator, draw(st.integers(1, min(n, 4))), draw(st.sampled_from(WHICH))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(problem=problems(), tol=st.sampled_from([1e-2, 1e-3, 1e-5]), seed=st.integers(0, 5))
def test_certified_on_random_problems(method, problem, tol, seed):
    operator, k, which = problem
    options = {} if method == "dense" else {"seed": seed}
    try:
        result = METHODS[method](operator, k, which=which, tol=tol, vectors=True, on_failure="ignore", **options)
    except ArgumentError:
        assert method in ("lobpcg", "arpack")  # too small for them
        return
    matrix = operator.matrix.double()
    truth = torch.linalg.eigvalsh(matrix)
    slack = 1e-13 * truth.abs().max()  # of the dense method
    low, high = result.interval[:, :1] - slack, result.interval[:, 1:] + slack
    assert ((low <= truth) & (truth <= high)).any(1).all()

    delivered = ~result.eigenvalues.isnan()
    rows, theta = result.eigenvectors.double()[delivered], result.eigenvalues[delivered]
    assert ((torch.linalg.vector_norm(rows, dim=1) - 1).abs() < 1e-4).all()
    true = torch.linalg.vector_norm(rows @ matrix - theta[:, None] * rows, dim=1)
    eps = torch.finfo(operator.dtype).eps
    level = 64 * eps * truth.abs().max()  # rounding, of the vectors too
    assert (true <= result.residuals[delivered] + level).all()
    if result.converged:
        assert delivered.all()
        assert (true <= tol * theta.abs() + 3 * level).all()
    for side, sign in (("excluded_above", 1), ("excluded_below", -1)):
        edge = (result.confirmation or {}).get(side)
        if edge is not None:
            found = sign * theta + result.residuals[delivered] + slack
            assert (sign * truth > sign * edge + slack).sum() <= (found > sign * edge).sum()
