"""Layers on their own: the diagonal blocks of the exact Hessian, in as few passes as the slowest of them."""

import re

import pytest
import torch
from torch import nn

import sharpness
from sharpness import Objective
from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning
from tests.checks import assert_untouched
from tests.zoo import tanh_net

PROBLEM = tanh_net()
NAMES = [(name, p.numel()) for name, p in PROBLEM.model.named_parameters() if p.requires_grad]


def block(*wanted):
    """The exact Hessian's block of these parameters."""
    positions, start = [], 0
    for name, size in NAMES:
        if name in wanted:
            positions += range(start, start + size)
        start += size
    rows = torch.tensor(positions)
    return PROBLEM.hessian[rows][:, rows]


def top(*wanted):
    return torch.linalg.eigvalsh(block(*wanted)).max().item()


LAYERS = {
    "(model)": ("unused",),
    "core.first": ("core.first.weight", "core.first.bias"),
    "core.middle": ("core.middle.weight", "core.middle.bias"),
    "core.last": ("core.last.weight", "core.last.bias"),
}


@pytest.mark.parametrize("metric", ["top_eigenvalues", sharpness.top_eigenvalues])
@pytest.mark.parametrize("memory", [0, "auto"])
def test_eigenvalues_of_the_diagonal_blocks(metric, memory):
    # The tied middle weight is listed under the first of its two names, that of the wrapper.
    owner = {name.replace("again", "core.middle.weight"): name for name, _ in NAMES}
    exact = {layer: top(*(owner.get(n, n) for n in names)) for layer, names in LAYERS.items()}
    groups = {layer: [owner.get(n, n) for n in names] for layer, names in LAYERS.items()}
    with assert_untouched(PROBLEM.model):
        result = sharpness.per_layer(metric, PROBLEM.model, PROBLEM.loader, by=groups, tol=1e-8, memory=memory)
    assert {name: record.headline for name, record in result.items()} == pytest.approx(exact, rel=1e-6, abs=1e-12)
    assert list(result) == sorted(exact, key=lambda layer: -exact[layer])
    assert result.num_parameters == {layer: len(block(*groups[layer])) for layer in result}
    assert result.converged


def test_the_passes_are_those_of_the_slowest_layer():
    result = sharpness.per_layer("top_eigenvalues", PROBLEM.model, PROBLEM.loader, k=2, memory=0)
    slowest = max(record.num_matvecs for record in result.values())
    assert result.num_passes == slowest + 1  # and one look whether the loss stays the same
    assert sum(record.num_matvecs for record in result.values()) > 2 * slowest


def test_each_layer_gets_what_a_run_on_its_own_gets():
    together = sharpness.per_layer("top_eigenvalues", PROBLEM.model, PROBLEM.loader, k=2, vectors=True, which="both")
    for layer, record in together.items():
        names = [name for name, _ in record.layout]
        alone = sharpness.top_eigenvalues(
            PROBLEM.model, PROBLEM.loader, k=min(2, result_size(record)), params=names, vectors=True, which="both"
        )
        torch.testing.assert_close(record.eigenvalues, alone.eigenvalues, rtol=1e-9, atol=1e-14)
        assert record.num_matvecs == alone.num_matvecs
        assert set(record.named_vector(0)) == set(names), layer


def result_size(record):
    return sum(torch.Size(shape).numel() for _, shape in record.layout)


def test_groups_by_module_parameter_mapping_and_callable():
    def names(**by):
        return list(sharpness.per_layer("top_eigenvalues", PROBLEM.model, PROBLEM.loader, **by))

    assert set(names()) == {name.rpartition(".")[0] or "(model)" for name, _ in NAMES}
    assert set(names(by="parameter")) == {name for name, _ in NAMES}
    assert set(names(by={"weights": "*weight", "first": re.compile("first"), "few": lambda n, p: p.ndim == 1})) == {
        "weights",
        "first",
        "few",
    }
    assert set(names(by=lambda name: "biases" if name.endswith("bias") else None)) == {"biases"}


@pytest.mark.parametrize("curvature", ["ggn", "fisher", "empirical_fisher"])
def test_blocks_of_other_curvatures(curvature):
    operator = {"ggn": sharpness.GGNOperator, "fisher": sharpness.FisherOperator}.get(
        curvature, sharpness.EmpiricalFisherOperator
    )
    matrix = operator(Objective(PROBLEM.model, PROBLEM.loader)).to_dense()
    result = sharpness.per_layer("top_eigenvalues", PROBLEM.model, PROBLEM.loader, by="parameter", curvature=curvature)
    start = 0
    for name, size in NAMES:
        exact = torch.linalg.eigvalsh(matrix[start : start + size, start : start + size]).max().item()
        assert result[name].headline == pytest.approx(exact, rel=1e-5, abs=1e-10)
        assert result[name].settings["curvature"] == curvature
        start += size


def test_float32_intervals_of_blocks_hold_an_eigenvalue():
    exact = {name: torch.linalg.eigvalsh(block(name)) for name, _ in NAMES}
    loader = [(x.float(), y) for x, y in PROBLEM.loader]
    single = tanh_net().model.float()
    result = sharpness.per_layer("top_eigenvalues", single, loader, by="parameter", k=2)
    for name, record in result.items():
        for low, high in record.interval.tolist():
            assert ((low <= exact[name]) & (exact[name] <= high)).any()


@pytest.mark.parametrize("method", ["power", "dense"])
def test_other_methods_run_one_layer_after_the_other(method):
    """Also where a layer has fewer parameters than are asked for, and where the loss does not use it."""
    ask = {"k": 3, "by": "parameter", "on_failure": "ignore"}
    one = sharpness.per_layer("top_eigenvalues", PROBLEM.model, PROBLEM.loader, method=method, **ask)
    two = sharpness.per_layer("top_eigenvalues", PROBLEM.model, PROBLEM.loader, **ask)
    assert one["unused"].headline == two["unused"].headline == 0
    for layer in one:
        assert one[layer].settings["method"] == method
        assert one[layer].layout == two[layer].layout
        torch.testing.assert_close(one[layer].eigenvalues, two[layer].eigenvalues, rtol=1e-3, atol=1e-5)
    assert one.num_passes == sum(record.num_passes for record in one.values()) + 1


def test_arpack_on_layers_that_are_large_enough():
    big = {"middle": "again", "first": "core.first.weight"}
    one = sharpness.per_layer("top_eigenvalues", PROBLEM.model, PROBLEM.loader, by=big, method="arpack")
    two = sharpness.per_layer("top_eigenvalues", PROBLEM.model, PROBLEM.loader, by=big)
    assert {name: one[name].headline for name in big} == pytest.approx(
        {name: two[name].headline for name in big}, rel=1e-3
    )


def test_the_bases_of_all_layers_share_the_memory():
    torch.manual_seed(0)
    x, y = sharpness.datasets.digits(num_train=100)[0].tensors
    model = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10))
    for memory, limited in ((0, True), (10**9, False)):
        result = sharpness.per_layer("top_eigenvalues", model, [(x, y)], memory=memory)
        assert all((record.settings["basis_rows"] == 20) == limited for record in result.values())
    with pytest.raises(
        ArgumentError, match=r"`memory` must be at least \d+ bytes, the least for the bases of all layers"
    ):
        sharpness.per_layer("top_eigenvalues", model, [(x, y)], memory=1000)
    narrow = sharpness.per_layer("top_eigenvalues", model, [(x, y)], basis_dtype=torch.bfloat16, on_failure="ignore")
    assert {record.settings["basis_dtype"] for record in narrow.values()} == {"torch.bfloat16"}
    assert narrow.num_passes < sum(record.num_matvecs for record in narrow.values())


def test_the_worst_layer_of_the_lower_end_is_the_most_negative():
    result = sharpness.per_layer("top_eigenvalues", PROBLEM.model, PROBLEM.loader, which="smallest", by="parameter")
    values = [record.headline for record in result.values()]
    assert values == sorted(values)


def test_epsilon_sharpness_of_layers():
    result = sharpness.per_layer("epsilon_sharpness", PROBLEM.model, PROBLEM.loader, epsilon=1e-2, on_failure="ignore")
    for layer, record in result.items():
        names = [name for name, _ in NAMES if (name.rpartition(".")[0] or "(model)") == layer]
        alone = sharpness.epsilon_sharpness(
            PROBLEM.model, PROBLEM.loader, epsilon=1e-2, params=names, on_failure="ignore"
        )
        assert record.value == alone.value
    assert result.num_passes == sum(record.num_passes for record in result.values())
    assert list(result) == sorted(result, key=lambda layer: -result[layer].value)


METRICS = {
    "worst_case_sharpness": {"num_steps": 3},
    "average_case_sharpness": {"num_samples": 2},
    "low_pass_sharpness": {"num_samples": 2},
    "pac_bayes_sharpness": {"num_samples": 2, "target": "loss", "deviation": 1e-3},
    "relative_flatness": {},
    "fisher_rao_norm": {"method": "parameters"},
}


@pytest.mark.parametrize("metric", METRICS)
def test_a_layer_is_measured_as_if_the_others_were_frozen(metric):
    by = {"first": "core.first.*", "last": "core.last.*"}
    result = sharpness.per_layer(metric, PROBLEM.model, PROBLEM.loader, by=by, **METRICS[metric])
    for name, chosen in by.items():
        alone = getattr(sharpness, metric)(PROBLEM.model, PROBLEM.loader, params=chosen, **METRICS[metric])
        assert result[name].value == pytest.approx(alone.value, rel=1e-12)
    assert list(result) == sorted(result, key=lambda layer: -result[layer].value)


def test_relative_flatness_is_that_of_each_matrix():
    result = sharpness.per_layer("relative_flatness", PROBLEM.model, PROBLEM.loader)
    matrices = {name for name, p in PROBLEM.model.named_parameters() if p.requires_grad and p.ndim > 1}
    assert {record.settings["layer"] for record in result.values()} == matrices
    whole = sharpness.relative_flatness(PROBLEM.model, PROBLEM.loader, layer="core.first")
    assert result["core.first"].value == pytest.approx(whole.value, rel=1e-9)


def test_metrics_that_a_layer_does_not_have():
    def ask(metric, **options):
        return sharpness.per_layer(metric, PROBLEM.model, PROBLEM.loader, **options)

    with pytest.raises(ArgumentError, match='method="outputs" is of the whole function, and has no layers'):
        ask("fisher_rao_norm")
    with pytest.raises(ArgumentError, match="`layer` names one layer, and per_layer measures each"):
        ask("relative_flatness", layer="core.first")
    with pytest.raises(ArgumentError, match="'all' holds 2 weight matrices, and relative flatness is that of one"):
        ask("relative_flatness", by={"all": ["core.first.weight", "core.last.weight"]})
    with pytest.raises(ArgumentError, match="`by`: no group holds a weight matrix"):
        ask("relative_flatness", by={"bias": "core.first.bias"})


def test_an_objective_in_place_of_a_model():
    objective = Objective(PROBLEM.model, PROBLEM.loader, params=["core.first.*", "core.last.*"])
    result = sharpness.per_layer("top_eigenvalues", objective)
    assert set(result) == {"core.first", "core.last"}
    assert "core.last" in str(result)
    assert result.settings["metric"] == "top_eigenvalues"


def test_layers_that_do_not_converge_are_named():
    ask = {"k": 2, "num_matvecs": 2, "by": "parameter"}
    with pytest.warns(ConvergenceWarning, match=r"of \d layers did not converge: .*weight"):
        sharpness.per_layer("top_eigenvalues", PROBLEM.model, PROBLEM.loader, **ask)
    with pytest.raises(ConvergenceError, match="layers did not converge") as caught:
        sharpness.per_layer("top_eigenvalues", PROBLEM.model, PROBLEM.loader, on_failure="raise", **ask)
    assert not caught.value.result.converged
    assert "NOT all converged" in repr(caught.value.result)
    sharpness.per_layer("top_eigenvalues", PROBLEM.model, PROBLEM.loader, on_failure="ignore", **ask)


def test_what_cannot_be_accepted():
    def ask(metric="top_eigenvalues", **options):
        return sharpness.per_layer(metric, PROBLEM.model, PROBLEM.loader, **options)

    with pytest.raises(ArgumentError, match=r"`metric` must be one of top_eigenvalues.*Did you mean 'top_eigenvalues'"):
        ask("top_eigenvalue")
    with pytest.raises(ArgumentError, match=r"`kk` is not an option of top_eigenvalues\.|`kk` is not an option"):
        ask(kk=2)
    with pytest.raises(ArgumentError, match="`by` must be one of 'module', 'parameter', got 'layer'"):
        ask(by="layer")
    with pytest.raises(ArgumentError, match="`by` is an empty mapping"):
        ask(by={})
    with pytest.raises(ArgumentError, match="`by`: 'head' holds none of the measured parameters"):
        ask(by={"head": "core.last.*"}, params="core.first.*")
    with pytest.raises(ArgumentError, match="matches no parameter"):
        ask(by={"head": "heads.*"})
    with pytest.raises(ArgumentError, match="`by` names '1' twice"):
        ask(by={1: "core.first.*", "1": "core.last.*"})
    with pytest.raises(ArgumentError, match="`confirm` is for method=\"lanczos\", got method='power'"):
        ask(method="power", confirm=True)
    with pytest.raises(ArgumentError, match="`by` left out every parameter"):
        ask(by=lambda name: None)
    with pytest.raises(ArgumentError, match="`checkpoint` and `sample_interval` are for the whole model"):
        ask(checkpoint="file")
    with pytest.raises(ArgumentError, match="`k` must be at least 1"):
        ask(k=0)


def test_a_group_that_matches_nothing_is_named():
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ArgumentError, match="`by`, group 'a': 'zzz' matches no parameter"):
        sharpness.per_layer("trace", model, [(torch.eye(2), torch.zeros(2, 1))], by={"a": "zzz"})
