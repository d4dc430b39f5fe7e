"""Real trained models: products, symmetry, certified eigenvalues. See `tests.real.models` for how to get them."""

import copy

import pytest
import torch

import sharpness
from sharpness import HessianOperator, Objective
from sharpness.objective import compiler, replay
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


def test_all_engines_agree(trained, monkeypatch):
    """Graphs, tapes of them in the same bits, and programs for batches that are not kept, run as they are."""
    operator = HessianOperator(Objective(trained.model, trained.loader, memory=0, compile=False, **trained.options))
    v = torch.randn(operator.n, generator=torch.Generator().manual_seed(0))
    expected = operator @ v
    monkeypatch.setattr(replay, "_PER_NODE", 0.0)
    kept = HessianOperator(Objective(trained.model, trained.loader, compile=False, **trained.options))
    found = [kept @ v for _ in range(3)]
    assert all(torch.equal(product, found[0]) for product in found)
    monkeypatch.setattr(compiler, "_SUPPORTED", True)
    monkeypatch.setattr(compiler.Compiler, "run", lambda self, program, example: program.graph)
    streamed = HessianOperator(Objective(trained.model, trained.loader, memory=0, compile=True, **trained.options))
    with streamed.objective.session():
        found += [streamed @ v for _ in range(3)]
    told = [one.objective.provenance(one.curvature)["engine"] for one in (kept, streamed)]
    assert told == ["recorded", "compiled" if trained.streamed else "autograd"]
    for product in found:
        assert (product - expected).norm() <= 1e-5 * expected.norm()


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
