"""Real trained models: products, symmetry, certified eigenvalues. See `tests.real.models` for how to get them."""

import copy

import pytest
import torch

import sharpness
from sharpness import HessianOperator, Objective
from sharpness.objective.data import map_tensors
from tests.checks import assert_untouched
from tests.plain import Plain
from tests.real.models import MODELS, resnet20


@pytest.fixture(scope="module", params=MODELS)
def trained(request):
    return MODELS[request.param]()


def in_double(trained):
    """A float64 copy of the model and the data, and the plain oracle for them."""
    model = copy.deepcopy(trained.model).double().eval()
    loader = map_tensors(lambda t: t.double() if t.is_floating_point() else t, trained.loader)

    def loss(model):
        pairs = [trained.terms(model, batch) for batch in loader]
        return sum(total for total, _ in pairs) / sum(count for _, count in pairs)

    return Plain(model, loss), loader


def test_it_is_trained(trained):
    with torch.no_grad():
        assert trained.quality(copy.deepcopy(trained.model).eval()) >= 0.9


def test_products_are_symmetric_and_those_of_the_gradient(trained):
    plain, loader = in_double(trained)
    operator = HessianOperator(Objective(plain.model, loader, **trained.options))
    g = torch.Generator().manual_seed(0)
    u, v = (torch.randn(operator.n, generator=g, dtype=torch.float64) for _ in "uv")
    u, v = u / u.norm(), v / v.norm()
    hu, hv = operator @ u, operator @ v
    assert hv.norm() > 0
    assert (u @ hv - v @ hu).abs() <= 1e-10 * hv.norm()
    assert (hv - plain.difference(v, trained.h)).norm() <= trained.close * hv.norm()


def test_top_eigenvalues_are_certified(trained):
    with assert_untouched(trained.model):
        result = sharpness.top_eigenvalues(trained.model, trained.loader, vectors=True, **trained.options)
    assert result.converged
    assert tuple(result.settings["unused_parameters"]) == trained.unused
    ((low, high),) = result.interval.tolist()
    assert high - low <= 0.01 * result.eigenvalues[0]
    plain, _ = in_double(trained)
    start, basis = (result.eigenvectors[0], 5) if plain.n > 250_000 else (None, None)
    (value,) = plain.top(1, start=start, basis=basis)
    assert low <= value <= high


def test_the_known_top_eigenvalue_of_the_resnet():
    """296.28 on the first 200 training images, found with another program."""
    trained = resnet20(count=200, batch_size=128)
    result = sharpness.top_eigenvalues(trained.model, trained.loader, tol=1e-2)
    assert result.converged
    assert result.eigenvalues[0] == pytest.approx(296.28, abs=0.02)
