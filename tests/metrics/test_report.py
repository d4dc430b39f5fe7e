"""All measures in one call."""

import pytest
import torch

import sharpness
from sharpness.errors import ArgumentError, ConvergenceWarning, ModelError
from tests.metrics.neighbours import LeastSquares, data, relu_net

FAST = [("average_case_sharpness", {"num_samples": 2}), "fisher_rao_norm"]


class Counting(list):
    walks = 0

    def __iter__(self):
        Counting.walks += 1
        return super().__iter__()


@pytest.fixture(scope="module")
def full():
    net = relu_net()
    return sharpness.report(net, Counting(data(net)), on_failure="ignore")


def test_every_measure_is_there_with_its_doubt(full):
    table = repr(full)
    assert str(full) == table
    for name, record in full.items():
        line = next(line for line in table.splitlines() if line.startswith(name + " "))
        assert f"{record.headline:.4g}" in line
    on_request = {
        "gradient_noise_scale",
        "learning_rate_limit",
        "critical_sharpness",
        "trace",
        "diagonal",
        "frobenius_norm",
        "spectral_density",
    }  # the first three are about the training, not the minimum; the others about the whole spectrum
    assert {name.partition("(")[0] for name in full} == set(sharpness.metrics.registry.METRICS) - on_request
    assert table.count("a lower bound") == 3
    assert table.count("±") == 5
    assert not full.skipped
    assert full.accuracy == 1.0


def test_the_spectrum_is_there_on_request():
    net = relu_net()
    found = sharpness.report(net, data(net), metrics=["trace", "diagonal", "frobenius_norm", "spectral_density"])
    assert "at 95 %" in str(found) or "exact" in str(found)
    assert f"{found['trace'].headline:.4g}" in str(found)
    assert "4 draws x" in str(found)


def test_the_metrics_share_one_objective(full):
    assert Counting.walks <= 4  # once to keep, once to see whether the loss stays the same
    assert full.num_passes >= sum(record.num_passes for record in full.values())


def test_the_records_are_those_of_the_functions():
    net = relu_net()
    found = sharpness.report(net, data(), metrics=FAST)
    assert found["fisher_rao_norm"].value == sharpness.fisher_rao_norm(net, data()).value
    alone = sharpness.average_case_sharpness(net, data(), num_samples=2)
    assert torch.equal(found["average_case_sharpness"].samples, alone.samples)
    assert list(found) == ["average_case_sharpness", "fisher_rao_norm"]
    assert len(found) == 2


def test_what_does_not_apply_is_said_by_default_and_refused_by_name():
    p = LeastSquares(exact=False)
    found = sharpness.report(p.model, p.loader())
    assert set(found.skipped) == {"pac_bayes_sharpness"}
    assert 'skipped pac_bayes_sharpness: `target`: "accuracy" needs a classification' in str(found)
    with pytest.raises(ArgumentError, match='`target`: "accuracy" needs a classification'):
        sharpness.report(p.model, p.loader(), metrics=["pac_bayes_sharpness"])


def test_a_loss_that_one_measure_cannot_take_leaves_the_others():
    p = LeastSquares(exact=False)

    def low(outputs, targets):
        return (outputs - targets).square().mean() - 50

    found = sharpness.report(p.model, p.loader(), low)
    assert set(found.skipped) == {"pac_bayes_sharpness", "epsilon_sharpness"}
    assert "epsilon-sharpness divides by 1 + loss" in found.skipped["epsilon_sharpness"]
    with pytest.raises(ModelError, match=r"epsilon-sharpness divides by 1 \+ loss"):
        sharpness.report(p.model, p.loader(), low, metrics=["epsilon_sharpness"])


def test_an_overflow_near_the_weights_leaves_the_other_measures():
    net = torch.nn.Linear(3, 1, bias=False).double()
    net.weight.data.zero_()
    rows = [(torch.ones(4, 3, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64))]

    def steep(outputs, targets):
        return (1e5 * (outputs - targets)).exp().mean()

    found = sharpness.report(net, rows, steep, on_failure="ignore")
    assert "perturbed within rho=0.05, the model overflows" in found.skipped["worst_case_sharpness"]
    assert "top_eigenvalues" in found


def test_an_error_of_the_user_is_his_own():
    net, calls = relu_net(), []

    def fails(outputs, targets):
        calls.append(1)
        if len(calls) > 30:
            raise RuntimeError("of the user")
        return torch.nn.functional.cross_entropy(outputs, targets)

    with pytest.raises(RuntimeError, match="of the user"):
        sharpness.report(net, data(), fails)


def test_a_notebook_shows_the_table(full):
    shown = full._repr_html_()
    assert shown.count("<tr>") == 1 + len(full)
    assert shown in full.to_html()


def test_a_page_stands_alone_and_escapes(full, tmp_path):
    path = tmp_path / "report.html"
    page = full.to_html(path)
    assert path.read_text(encoding="utf-8") == page
    assert page.startswith("<!DOCTYPE html>")
    assert "src=" not in page
    assert "http" not in page
    assert all(name.partition("(")[0] in page.replace("<wbr>", "") for name in full)

    def f(outputs, targets):
        return (outputs - targets).square().mean()

    f.__name__ = "<script>"
    p = LeastSquares(exact=False)
    page = sharpness.report(p.model, p.loader(), f, metrics=["fisher_rao_norm"]).to_html()
    assert "<script>" not in page


def test_failures_are_told_as_asked():
    net = torch.nn.Linear(3, 3, bias=False).double()
    net.weight.data.zero_()
    with pytest.warns(ConvergenceWarning, match="no loss above"):
        sharpness.report(net, data(), metrics=[("worst_case_sharpness", {"adaptive": "elementwise"})])


def test_bad_input():
    with pytest.raises(ArgumentError, match="`metrics` holds 'sharp'; the names are"):
        sharpness.report(relu_net(), data(), metrics=["sharp"])
    with pytest.raises(ArgumentError, match=r"`metrics` holds \{\}; the names are"):
        sharpness.report(relu_net(), data(), metrics=[({}, {})])
    with pytest.raises(ArgumentError, match="`metrics` asks fisher_rao_norm for 'rho'"):
        sharpness.report(relu_net(), data(), metrics=[("fisher_rao_norm", {"rho": 1})])
