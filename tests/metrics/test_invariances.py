"""What each measure is invariant to, and what it is not, as its docstring says."""

import pytest
from torch import nn

import sharpness
from tests.metrics.neighbours import data, layers_rescaled, moved, neurons_rescaled, normalised_net, relu_net

worst, average, low_pass, pac_bayes, flatness, fisher_rao = (
    sharpness.worst_case_sharpness,
    sharpness.average_case_sharpness,
    sharpness.low_pass_sharpness,
    sharpness.pac_bayes_sharpness,
    sharpness.relative_flatness,
    sharpness.fisher_rao_norm,
)
NET = relu_net()
CHANGES = {
    "layers": layers_rescaled(NET),
    "rows": neurons_rescaled(NET, 2),  # the neurons of the middle layer
    "columns": neurons_rescaled(NET, 0),  # the neurons before it
}
few = {"num_samples": 6}
CASES = {
    "eigenvalue": (sharpness.top_eigenvalues, {}, set()),
    "epsilon": (sharpness.epsilon_sharpness, {"epsilon": 1e-2}, set()),
    "worst": (worst, {}, set()),
    "worst, elementwise": (worst, {"adaptive": "elementwise", "rho": 0.2}, {"layers", "rows", "columns"}),
    "worst, by filter": (worst, {"adaptive": "filter", "rho": 0.05}, {"layers"}),
    "average": (average, few, set()),
    "average, elementwise": (average, {**few, "adaptive": "elementwise"}, {"layers", "rows", "columns"}),
    "average, by filter": (average, {**few, "adaptive": "filter"}, {"layers"}),
    "low-pass": (low_pass, {**few, "sigma": 0.1}, set()),
    "low-pass, elementwise": (
        low_pass,
        {**few, "sigma": 0.1, "adaptive": "elementwise"},
        {"layers", "rows", "columns"},
    ),
    "PAC-Bayes": (pac_bayes, few, set()),
    "PAC-Bayes, elementwise": (pac_bayes, {**few, "adaptive": "elementwise"}, {"layers", "rows", "columns"}),
    "PAC-Bayes, by filter": (pac_bayes, {**few, "adaptive": "filter"}, {"layers"}),
    "relative flatness": (flatness, {"layer": "2"}, {"layers", "rows"}),
    "Fisher-Rao": (fisher_rao, {}, {"layers", "rows", "columns"}),
    "Fisher-Rao of the parameters": (fisher_rao, {"method": "parameters"}, {"layers", "rows", "columns"}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", CASES)
def test_rescaling_that_leaves_the_function_as_it_is(case, change):
    metric, options, invariant = CASES[case]
    factor = moved(metric, NET, CHANGES[change], **options)
    if change in invariant:
        assert factor == pytest.approx(1, rel=1e-6)
    else:
        assert abs(factor - 1) > 1e-4


@pytest.mark.parametrize(
    ("case", "power"),
    [(case, {"Fisher-Rao": 2, "Fisher-Rao of the parameters": 2}.get(case, 1)) for case in CASES if case != "epsilon"],
)
def test_the_scale_of_the_loss(case, power):
    metric, options, _ = CASES[case]
    if metric is pac_bayes:
        power = 0  # the accuracy does not know the loss

    def scaled(outputs, targets):
        return 3 * nn.functional.cross_entropy(outputs, targets)

    plain, thrice = (metric(NET, data(NET), f, **options).headline for f in (nn.functional.cross_entropy, scaled))
    assert thrice / plain == pytest.approx(3**power, rel=1e-5)


def test_pac_bayes_by_the_loss_knows_its_scale():
    def scaled(outputs, targets):
        return 3 * nn.functional.cross_entropy(outputs, targets)

    plain, thrice = (
        pac_bayes(NET, data(NET), f, target="loss", **few).value for f in (nn.functional.cross_entropy, scaled)
    )
    assert thrice > 1.5 * plain


@pytest.mark.parametrize(
    ("case", "power"),
    [
        ("eigenvalue", -2),
        ("worst, elementwise", 0),
        ("worst, by filter", 0),
        ("average, elementwise", 0),
        ("average, by filter", 0),
        ("PAC-Bayes, elementwise", 0),
        ("PAC-Bayes, by filter", 0),
        ("Fisher-Rao of the parameters", 0),
    ],
)
def test_the_scale_of_weights_before_a_normalisation(case, power):
    """With respect to these weights the eigenvalue falls with the square of their norm."""
    metric, options, _ = CASES[case]
    options = {**options, "target": "loss"} if metric is pac_bayes else options  # these weights alone move no label
    factor = moved(metric, normalised_net(1.0), normalised_net(10.0), params="0.weight", **options)
    assert factor == pytest.approx(10.0**power, rel=1e-5)


def test_fisher_rao_norm_with_weights_before_a_normalisation():
    assert moved(fisher_rao, normalised_net(1.0), normalised_net(10.0)) == pytest.approx(1, rel=1e-6)


def test_relative_flatness_of_weights_before_a_normalisation():
    assert moved(flatness, normalised_net(1.0), normalised_net(10.0), layer="0") == pytest.approx(1, rel=1e-6)


def test_epsilon_sharpness_feels_the_scale_of_the_loss_through_one_plus_the_loss():
    def scaled(outputs, targets):
        return 3 * nn.functional.cross_entropy(outputs, targets)

    plain, thrice = (
        sharpness.epsilon_sharpness(NET, data(NET), f, epsilon=1e-2) for f in (nn.functional.cross_entropy, scaled)
    )
    expected = 3 * (1 + plain.loss) / (1 + 3 * plain.loss)
    assert thrice.value / plain.value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", ["epsilon", "worst", "average", "low-pass", "PAC-Bayes"])
def test_plain_measures_feel_the_scale_of_weights_before_a_normalisation(case):
    metric, options, _ = CASES[case]
    options = {**options, "target": "loss"} if metric is pac_bayes else options  # these weights alone move no label
    factor = moved(metric, normalised_net(1.0), normalised_net(10.0), params="0.weight", **options)
    assert abs(factor - 1) > 1e-4
