"""A budget of products is a promise: never exceeded, and what was spent is reported."""

import pytest
import torch

import sharpness
from sharpness.errors import ArgumentError
from sharpness.linalg import FunctionOperator, arpack, dense, lanczos, lobpcg, power_iteration
from tests.zoo import rotated, spectra, tanh_net


class Counting:
    """An operator that counts its products."""

    def __init__(self, matrix):
        self.matrix, self.count = matrix, 0
        self.operator = FunctionOperator(self, len(matrix), dtype=matrix.dtype)

    def __call__(self, v):
        self.count += 1
        return self.matrix @ v


@pytest.mark.parametrize("method", [lanczos, power_iteration])
@pytest.mark.parametrize("name", spectra())
def test_spent_is_reported_and_within_the_budget(name, method):
    matrix = rotated(spectra()[name])
    k = min(2, len(matrix))
    for budget in (None, k, k + 1, 7 * k):
        counting = Counting(matrix)
        result = method(counting.operator, k, num_matvecs=budget, on_failure="ignore", vectors=True)
        assert result.num_matvecs == counting.count
        assert budget is None or counting.count <= budget
        if method is lanczos:
            assert counting.count <= len(matrix)


@pytest.mark.parametrize(
    "options",
    [{"memory": 0}, {"confirm": True}, {"basis_dtype": torch.float16}, {"method": lobpcg}, {"method": arpack}],
)
@pytest.mark.parametrize("name", spectra())
def test_every_option_and_method_keeps_the_budget_or_refuses_it_unspent(name, options):
    matrix = rotated(spectra()[name])
    method, options = options.get("method", lanczos), {o: v for o, v in options.items() if o != "method"}
    k = min(2, len(matrix))
    for budget in (None, k, k + 1, 7 * k, 20 * k):
        counting = Counting(matrix)
        try:
            result = method(counting.operator, k, num_matvecs=budget, on_failure="ignore", **options)
        except ArgumentError:
            assert counting.count == 0
            assert method is not lanczos or "basis_dtype" in options
            continue
        assert result.num_matvecs == counting.count
        assert budget is None or counting.count <= budget


def test_dense_spends_one_product_per_dimension():
    counting = Counting(rotated(spectra()["indefinite"]))
    assert dense(counting.operator).num_matvecs == counting.count == 24


@pytest.mark.parametrize("memory", ["auto", 0])
def test_passes_over_the_data_are_counted(memory):
    class Watched(list):
        walks = 0

        def __iter__(self):
            Watched.walks += 1
            return super().__iter__()

    problem = tanh_net()
    loader = Watched(problem.loader)
    result = sharpness.top_eigenvalues(problem.model, loader, memory=memory)
    assert result.num_passes == result.num_matvecs + 1
    assert Watched.walks == (2 if memory == "auto" else result.num_passes + 1)  # one more to see that they do not fit


@pytest.mark.parametrize("memory", ["auto", 0])
def test_blocks_of_products_share_their_passes(memory):
    problem = tanh_net()
    traced = sharpness.trace(problem.model, problem.loader, num_matvecs=12, memory=memory, on_failure="ignore")
    assert (traced.num_matvecs, traced.num_passes) == (12, 2 + 1)  # six vectors, their products, and the check
    density = sharpness.spectral_density(problem.model, problem.loader, num_draws=3, num_steps=5, memory=memory)
    assert (density.num_matvecs, density.num_passes) == (15, 5 + 1)
    layers = sharpness.per_layer("trace", problem.model, problem.loader, num_matvecs=12, on_failure="ignore")
    assert layers.num_passes == 2 + 1


def test_memory_zero_keeps_nothing_alive():
    problem = tanh_net()
    objective = sharpness.Objective(problem.model, problem.loader, memory=0)
    objective.hvp(torch.ones(objective.n, dtype=torch.float64))
    assert objective.provenance()["kept_graphs"] == 0
    assert not objective.batches.kept
