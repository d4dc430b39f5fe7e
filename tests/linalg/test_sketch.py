"""Random vectors, and the basis of a range that is grown from their products."""

import pytest
import torch

from sharpness.errors import NonFiniteError
from sharpness.linalg import DenseOperator, FunctionOperator
from sharpness.linalg.budget import sizes
from sharpness.linalg.gram import gram, multiply
from sharpness.linalg.probes import Probes
from sharpness.linalg.sketch import Sketch
from tests.linalg.spectra_of_traces import TRACED
from tests.zoo import rotated


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
def test_vectors_are_white_and_each_has_a_seed_of_its_own(distribution):
    probes = Probes(DenseOperator(torch.zeros(6, 6, dtype=torch.float64)), 4, distribution)
    rows = probes.rows(0, 3000)
    torch.testing.assert_close(rows.T @ rows / 3000, torch.eye(6, dtype=torch.float64), rtol=0, atol=0.15)
    assert rows.mean(0).abs().max() < 0.1
    assert torch.equal(probes.rows(20, 23), rows[20:23])
    assert not torch.equal(Probes(DenseOperator(torch.zeros(6, 6).double()), 5, distribution).rows(0, 20), rows[:20])
    if distribution == "rademacher":
        assert torch.equal(rows.abs(), torch.ones_like(rows))
    else:
        assert len(torch.unique(rows, dim=0)) == 3000
    if distribution == "sphere":
        torch.testing.assert_close((rows**2).sum(1), torch.full((3000,), 6.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["fast", "slow", "pair"])
def test_a_basis_is_orthonormal_and_spans_the_products(name, dtype):
    matrix = rotated(TRACED[name]).to(dtype)
    sketch = Sketch(DenseOperator(matrix), Probes(DenseOperator(matrix), 0, "sphere"), keep_products=True)
    for number in (3, 21, 5):
        sketch.multiply(number, into_basis=True)
    q, images = (t.double() for t in sketch.columns(slice(0, 100)))
    eps, size = torch.finfo(dtype).eps, matrix.norm().item()
    torch.testing.assert_close(q @ q.T, torch.eye(sketch.rank, dtype=torch.float64), rtol=0, atol=20 * eps)
    w = sketch.probes.rows(0, 29).double()
    products = w @ matrix.double()
    left = torch.linalg.vector_norm(products - sketch.r.T @ q, dim=1)
    assert left.max() <= 100 * eps * torch.linalg.vector_norm(products, dim=1).max()
    torch.testing.assert_close(images, q @ matrix.double(), rtol=0, atol=20 * eps * size)
    torch.testing.assert_close(sketch.h, q @ matrix.double() @ q.T, rtol=0, atol=20 * eps * size)
    torch.testing.assert_close(sketch.w, q @ w.T, rtol=0, atol=200 * eps)


def test_one_entry_that_is_not_finite_is_enough():
    def product(v):
        w = torch.zeros_like(v)
        w[3] = float("inf")
        return w

    operator = FunctionOperator(product, 5)
    with pytest.raises(NonFiniteError, match="a product of the operator holds NaN or infinity"):
        multiply(operator, torch.eye(5), lambda number: None)


def test_inner_products_are_summed_piece_by_piece(monkeypatch):
    monkeypatch.setattr("sharpness.linalg.gram._PIECE", 20)
    a, b = torch.arange(21.0).reshape(3, 7), torch.ones(2, 7)
    torch.testing.assert_close(gram(a, b), (a @ b.T).double())


def test_looks_at_the_tolerance_end_with_the_budget():
    assert list(sizes(20, 8, adaptive=True)) == [8, 10, 13, 17, 20]
    assert list(sizes(6, 8, adaptive=True)) == [6]
    assert list(sizes(20, 8, adaptive=False)) == [20]


def test_new_vectors_beyond_the_basis_by_definition():
    matrix = rotated(TRACED["pair"])
    operator = DenseOperator(matrix)
    sketch = Sketch(operator, Probes(operator, 0, "sphere"))
    sketch.multiply(5, into_basis=True)
    q, _ = torch.linalg.qr((sketch.probes.rows(0, 5) @ matrix).T)
    rest = torch.eye(100, dtype=torch.float64) - q @ q.T
    forms, lengths = (torch.cat(parts) for parts in zip(sketch.beyond(3), sketch.beyond(2), strict=True))
    u = sketch.probes.rows(5, 10) @ rest
    u *= 95**0.5 / torch.linalg.vector_norm(u, dim=1, keepdim=True)
    torch.testing.assert_close(forms, (u @ matrix * u).sum(1))
    torch.testing.assert_close(lengths, (u @ matrix @ rest).square().sum(1))
    assert sketch.num_matvecs == 2 * 5 + 5
