import copy

import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError
from tests.checks import assert_untouched
from tests.zoo import Quadratic, batches, features, tanh_net

ROWS = torch.zeros(11, 3, dtype=torch.float64)


def bowl(curvature, loss=0.01):
    zero = torch.zeros(3, dtype=torch.float64)
    return Quadratic(curvature * torch.diag(torch.tensor([3.0, 2, 1]).double()), zero, loss)


def compare(models, **options):
    return sharpness.compare(models, batches(ROWS), batch_loss=lambda m, b: (m(b), len(b)), **options)


def test_rows_ratios_and_records_of_known_minima():
    models = {"flat": bowl(1.0), "sharp": bowl(5.0)}
    with assert_untouched(*models.values()):
        comparison = compare(models)
    flat, sharp = comparison.rows
    assert flat.metrics["top_eigenvalues"].mean == pytest.approx(3.0)
    assert sharp.metrics["top_eigenvalues"].mean == pytest.approx(15.0)
    for key in ("top_eigenvalues", "epsilon_sharpness(epsilon=0.001)", "epsilon_sharpness(epsilon=0.0005)"):
        assert comparison.ratios[key][0].mean == 1.0
        assert comparison.ratios[key][1].mean == pytest.approx(5.0, rel=1e-6)
    assert flat.metrics["epsilon_sharpness(epsilon=0.001)"].mean == pytest.approx(50 * 1e-6 * 6 / 1.01, rel=1e-6)
    assert comparison.warnings == ()
    assert comparison["sharp"] is sharp
    assert sharp.records["top_eigenvalues"][0].converged
    with pytest.raises(KeyError, match="the rows are"):
        comparison["middle"]


def test_several_models_of_a_name_give_a_spread_and_paired_ratios():
    comparison = compare(
        {"a": [bowl(1.0), bowl(2.0)], "b": [bowl(3.0), bowl(4.0)]}, metrics=[("top_eigenvalues", {"k": 2})]
    )
    spread = comparison["a"].metrics["top_eigenvalues"]
    assert spread.values == pytest.approx((3.0, 6.0))
    assert spread.std == pytest.approx(4.5**0.5)
    assert comparison.ratios["top_eigenvalues"][1].values == pytest.approx((3.0, 2.0))
    unequal = compare({"a": [bowl(1.0), bowl(2.0)], "b": bowl(3.0)}, metrics=["top_eigenvalues"])
    assert unequal.ratios["top_eigenvalues"][1].values == pytest.approx((2.0,))


def test_training_losses_that_are_not_matched_are_named():
    comparison = compare({"low": bowl(1.0, 0.001), "high": bowl(1.0, 0.1)}, metrics=["top_eigenvalues"])
    assert comparison.warnings == (
        "the training losses are not matched: 0.001 (low) against 0.1 (high). Curvature falls with the loss; "
        "train to the same loss.",
    )
    assert "warning: the training losses" in str(comparison)


def test_eigenvalues_that_did_not_converge_are_named():
    problem = tanh_net()
    comparison = sharpness.compare(
        {"net": problem.model}, problem.loader, metrics=[("top_eigenvalues", {"k": 5, "num_matvecs": 5})]
    )
    assert "top_eigenvalues of net did not converge for 1 of 1 models." in comparison.warnings


def test_every_measure_may_be_compared_and_says_what_it_missed():
    models = {"flat": bowl(1.0), "sharp": bowl(5.0)}
    asked = ["worst_case_sharpness", "low_pass_sharpness", ("worst_case_sharpness", {"adaptive": "elementwise"})]
    comparison = compare(models, metrics=[*asked, ("average_case_sharpness", {"num_samples": 4})])
    assert comparison.ratios["worst_case_sharpness"][1].mean == pytest.approx(5.0, rel=1e-6)
    # The same directions for both: the ratio is exact where either value is known to a third.
    assert comparison.ratios["average_case_sharpness"][1].mean == pytest.approx(5.0, rel=1e-9)
    assert comparison["flat"].records["average_case_sharpness"][0].stderr > 0
    missed = "worst_case_sharpness(adaptive='elementwise')"  # all weights are zero
    assert comparison.warnings == tuple(f"{missed} of {name} did not converge for 1 of 1 models." for name in models)


def test_accuracy_and_test_data():
    problem = tanh_net()
    other = copy.deepcopy(problem.model)
    comparison = sharpness.compare(
        {"a": problem.model, "b": other}, problem.loader, test_loader=problem.loader[:1], metrics=["top_eigenvalues"]
    )
    x, y = problem.loader[0]
    hits = (problem.model(x).argmax(1) == y).double().mean().item()
    assert comparison["a"].test_accuracy.mean == pytest.approx(hits)
    loss = nn.functional.cross_entropy(problem.model(x), y).item()
    assert comparison["a"].test_loss.mean == pytest.approx(loss)
    assert comparison.ratios["top_eigenvalues"][1].mean == 1.0  # the same random numbers for both
    assert "test accuracy" in comparison.table()
    assert compare({"a": bowl(1.0)}, metrics=["top_eigenvalues"])["a"].test_accuracy is None


def test_bad_input():
    for models in ({}, bowl(1.0), [bowl(1.0)]):
        with pytest.raises(ArgumentError, match="`models` must map names to trained models"):
            compare(models)
    with pytest.raises(ArgumentError, match="'a' must be a torch.nn.Module or a list of them"):
        compare({"a": [3]})
    with pytest.raises(ArgumentError, match="'a' must be a torch.nn.Module or a list of them"):
        compare({"a": 3})
    with pytest.raises(ArgumentError, match="holds 'top_eigenvalue'; the names are .* Did you mean 'top_eigenvalues'"):
        compare({"a": bowl(1.0)}, metrics=["top_eigenvalue"])
    with pytest.raises(ArgumentError, match='`metrics` must be "default" or a list'):
        compare({"a": bowl(1.0)}, metrics="top_eigenvalues")
    with pytest.raises(ArgumentError, match="asks for top_eigenvalues twice"):
        compare({"a": bowl(1.0)}, metrics=["top_eigenvalues", "top_eigenvalues"])
    with pytest.raises(ArgumentError, match=r"a name, or a pair \(name, options\), is needed"):
        compare({"a": bowl(1.0)}, metrics=[3])


def test_every_model_is_checked_before_any_is_measured():
    measured = []

    def watched(model, batch):
        measured.append(model)
        return model(batch), 1

    frozen = bowl(1.0).requires_grad_(False)
    with pytest.raises(sharpness.ModelError, match="no trainable parameters"):
        sharpness.compare({"a": bowl(1.0), "b": frozen}, [features(3)], batch_loss=watched)
    assert not measured
