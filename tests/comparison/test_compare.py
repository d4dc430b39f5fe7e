import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError, NonFiniteError
from sharpness.results.comparison_lines import least_certain
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
    with pytest.raises(ArgumentError, match=r"`metrics` must be 'default', 'scale-free', .* Pass \[\"top_eigenvalues"):
        compare({"a": bowl(1.0)}, metrics="top_eigenvalues")
    with pytest.raises(ArgumentError, match="got 'scalefree'. Did you mean 'scale-free'"):
        compare({"a": bowl(1.0)}, metrics="scalefree")
    model = bowl(1.0)
    with pytest.raises(ArgumentError, match="the list 'a' holds the same object twice"):
        compare({"a": [model, model]})
    with pytest.raises(ArgumentError, match="`models` has two names that read the same"):
        compare({16: bowl(1.0), "16": bowl(2.0)})
    for name in ("check_minimum", "progress"):
        with pytest.raises(ArgumentError, match=f"`{name}` must be True or False"):
            compare({"a": bowl(1.0)}, **{name: 1})
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


class Untouchable:
    """A loader that must not be walked."""

    def __iter__(self):
        raise AssertionError("data were touched")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (("epsilon_sharpness", {"epsilon": -1}), "`epsilon` must be a finite number above 0"),
        (("average_case_sharpness", {"adaptive": "layer"}), "`adaptive` must be None"),
        (("top_eigenvalues", {"which": "top"}), "`which` must be one of"),
        (("relative_flatness", {"layer": "third"}), "`layer`"),
    ],
)
def test_options_of_metrics_are_refused_before_data_are_touched(metric, message):
    with pytest.raises(ArgumentError, match=message):
        sharpness.compare({"a": nn.Linear(2, 2)}, Untouchable(), metrics=["top_eigenvalues", metric])
    with pytest.raises(AssertionError, match="data were touched"):
        sharpness.compare({"a": nn.Linear(2, 2)}, Untouchable(), metrics=["top_eigenvalues"])


class Bare(nn.Module):
    """A model without a matrix."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        return self.scale * x


def test_what_does_not_apply_is_left_out_of_a_preset_and_refused_by_name():
    problem = tanh_net()
    models = {"net": problem.model, "bare": Bare()}
    with assert_untouched(*models.values()):
        comparison = sharpness.compare(models, problem.loader, metrics="scale-free", check_minimum=False)
    assert "relative_flatness" in comparison["net"].metrics
    assert "relative_flatness" not in comparison["bare"].metrics
    assert math.isnan(comparison.ratios["relative_flatness"][1].mean)
    assert comparison.ratio_intervals["relative_flatness"][1] is None
    assert any(w.startswith("relative_flatness is left out for bare: `layer`: none") for w in comparison.warnings)
    assert len(comparison.plot(metric="relative_flatness").patches) == 1
    (line,) = [line for line in comparison.table().splitlines() if line.startswith("relative_flatness")]
    assert line.split()[1:] == [repr(comparison["net"].metrics["relative_flatness"])]
    with assert_untouched(*models.values()), pytest.raises(ArgumentError, match="none of the parameters measured is a"):
        sharpness.compare(models, problem.loader, metrics=["top_eigenvalues", "relative_flatness"])
    with pytest.raises(ArgumentError, match='`target`: "accuracy" needs a classification'):  # found on the data
        compare({"a": bowl(1.0)}, metrics=["top_eigenvalues", "pac_bayes_sharpness"])


def test_what_applies_to_no_model_is_a_note():
    comparison = compare({"a": bowl(1.0), "b": bowl(2.0)}, metrics="scale-free")  # a batch_loss hides the logits
    hidden = "average_case_sharpness(adaptive='elementwise', sigma=0.1, normalize_logits=True)"
    assert hidden not in comparison.ratios
    assert any(
        note.startswith(f"{hidden} is left out: `normalize_logits` acts on the outputs") for note in comparison.notes
    )
    assert not any("left out" in text for text in comparison.warnings)
    assert "average_case_sharpness(adaptive='elementwise', sigma=0.1)" in comparison.ratios


def at(*weights, loss=0.01):
    model = bowl(1.0, loss)
    with torch.no_grad():
        model.w.copy_(torch.tensor(weights))
    return model


def test_norms_and_distances_in_closed_form():
    models = {"a": [at(3.0, 4, 0), at(0.0, 0, 1)], "b": [at(3.0, 4, 12), at(0.0, 2, 1)], "c": at(0.0, 0, 0)}
    comparison = compare(models, metrics=["top_eigenvalues"], check_minimum=False)
    assert comparison["a"].weight_norm.values == pytest.approx((5.0, 1.0))
    assert comparison["b"].weight_norm.values == pytest.approx((13.0, 5**0.5))
    assert comparison.distances[0][1] == comparison.distances[1][0] == pytest.approx((12 + 2) / 2)
    assert comparison.distances[0][2] == pytest.approx((5 + 1) / 2)  # all pairs
    assert [comparison.distances[i][i] for i in range(3)] == [0.0, 0.0, 0.0]


def test_the_distance_from_where_training_started():
    models = {"a": [at(3.0, 4, 0), at(0.0, 0, 1)], "b": [at(0.0, 0, 2), at(0.0, 2, 1)]}
    one, other = at(0.0, 0, 0), at(0.0, 0, 1)

    def moved(initial):
        rows = compare(models, metrics=["top_eigenvalues"], check_minimum=False, initial=initial).rows
        return [row.distance_from_initial and row.distance_from_initial.values for row in rows]

    assert moved(None) == [None, None]
    assert moved(one) == moved(one.state_dict()) == [pytest.approx((5.0, 1.0)), pytest.approx((2.0, 5**0.5))]
    assert moved([one, other]) == [pytest.approx((5.0, 0.0)), pytest.approx((2.0, 2.0))]
    assert moved({"b": one}) == [None, pytest.approx((2.0, 5**0.5))]
    assert moved({"a": [one, other], "b": other}) == [pytest.approx((5.0, 0.0)), pytest.approx((1.0, 2.0))]
    with pytest.raises(ArgumentError, match="`initial` names 'c', which is none of the models: a, b"):
        moved({"c": one})
    for wrong in (3, [one], {"a": 3}, {"a": [one]}, {}):
        with pytest.raises(
            ArgumentError, match="`initial` for 'a' must be a module or a state dict, or a list with one"
        ):
            moved(wrong)
    comparison = compare(models, metrics=["top_eigenvalues"], initial=nn.Linear(2, 2), check_minimum=False)
    assert comparison["a"].distance_from_initial is None
    assert "the initial weights have other shapes than a: no distance from there." in comparison.notes


def test_gaps_are_taken_seed_by_seed():
    problem = tanh_net()
    models = {"a": [problem.model, tanh_net(1).model], "b": tanh_net(2).model}
    comparison = sharpness.compare(
        models, problem.loader, test_loader=problem.loader[:1], metrics=["top_eigenvalues"], check_minimum=False
    )
    row = comparison["a"]
    losses = zip(row.test_loss.values, row.train_loss.values, strict=True)
    assert row.loss_gap.values == pytest.approx([test - train for test, train in losses])
    accuracies = zip(row.train_accuracy.values, row.test_accuracy.values, strict=True)
    assert row.accuracy_gap.values == pytest.approx([train - test for train, test in accuracies])
    bare = compare({"a": bowl(1.0)}, metrics=["top_eigenvalues"], test_loader=[ROWS])["a"]
    assert (bare.loss_gap.mean, bare.accuracy_gap, bare.logit_norm) == (0.0, None, None)
    assert compare({"a": bowl(1.0)}, metrics=["top_eigenvalues"])["a"].loss_gap is None


def test_ratios_have_intervals_that_hold_the_truth():
    comparison = compare({"a": at(1.0, 1, 1), "b": bowl(5.0)}, metrics=["top_eigenvalues", "average_case_sharpness"])
    low, high = comparison.ratio_intervals["top_eigenvalues"][1]
    assert low <= 5.0 <= high
    assert high - low < 0.05
    low, high = comparison.ratio_intervals["average_case_sharpness"][1]  # the same directions: known to rounding
    assert high - low < 1e-6 < comparison["a"].records["average_case_sharpness"][0].stderr / 1e-4
    assert comparison.ratio_intervals["top_eigenvalues"][0] == (1.0, 1.0)
    bounds = compare({"a": bowl(1.0), "b": bowl(2.0)}, metrics=["epsilon_sharpness"])
    assert bounds.ratio_intervals["epsilon_sharpness"][1] is None
    assert compare({"a": bowl(1.0), "b": bowl(0.0)}, metrics=["top_eigenvalues"]).ratio_intervals[
        "top_eigenvalues"
    ] == ((1.0, 1.0), None)


def test_the_table_has_values_doubts_and_ratios():
    models = {"a": [bowl(1.0), bowl(1.1)], "b": [bowl(4.0), bowl(9.0)]}
    comparison = compare(models, metrics=["top_eigenvalues", "epsilon_sharpness"], initial=bowl(1.0))
    lines = comparison.table().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("top_eigenvalues"))
    assert lines[start].split()[1:] == ["3.15", "±", "0.21", "20", "±", "11"]
    assert "(for certain)" in lines[start + 1]
    assert lines[start + 2].startswith("(over a)")
    assert "x5.7 (0.061 to 540)" in lines[start + 2]  # the geometric mean of 4 and 9/1.1
    assert any("a lower bound" in line for line in lines)
    assert any(line.startswith("distance from initial") for line in lines)
    assert comparison["a"].doubts["epsilon_sharpness"] == "a lower bound"
    assert "<table>" in comparison.table(tablefmt="html")
    assert "test loss" not in comparison.table()
    assert "\n" not in repr(comparison)
    worst = compare({"a": [bowl(1.0), bowl(1.0)]}, metrics=[("top_eigenvalues", {"num_matvecs": 1})])
    assert "NOT converged" in worst.table()


def test_the_doubt_of_a_row_is_that_of_its_least_certain_measurement():
    sure, wide, missed = (
        compare({"a": at(1.0, 1, 1)}, metrics=[("top_eigenvalues", {"tol": tol, "num_matvecs": budget})])["a"]
        for tol, budget in ((1e-6, 3), (0.5, 2), (1e-6, 1))
    )
    records = [row.records["top_eigenvalues"][0] for row in (sure, wide, missed)]
    assert [record.converged for record in records] == [True, True, False]
    assert least_certain(records) is records[2]
    assert least_certain(records[:2]) is records[1]
    assert (
        least_certain([records[2], dataclasses.replace(records[1], interval=1e3 * records[1].interval)]) is records[2]
    )
    assert least_certain([]) is None


def test_one_model_and_the_same_model_twice():
    model = bowl(1.0)
    alone = compare({"a": model})
    assert alone.distances == ((0.0,),)
    assert "over" not in alone.table()
    twice = compare({"a": model, "again": model}, metrics=["top_eigenvalues"])
    assert twice.ratios["top_eigenvalues"][1].mean == 1.0
    assert twice.distances == ((0.0, 0.0), (0.0, 0.0))
    assert twice.warnings == ()


def test_models_are_untouched_after_an_exception_in_the_last_of_them():
    problem, broken = tanh_net(), tanh_net(1).model
    with torch.no_grad():
        broken.core.last.weight[0, 0] = float("inf")
    with assert_untouched(problem.model, broken), pytest.raises(NonFiniteError, match="model 'broken'"):
        sharpness.compare({"a": problem.model, "broken": broken}, problem.loader)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_initial_weights_may_be_those_of_a_wrapped_model(wrap):
    data, start, model = [(torch.ones(4, 3), torch.arange(4) % 2)], nn.Linear(3, 2), nn.Linear(3, 2)
    distance = compare_wrapped({"a": model}, data, start)
    assert compare_wrapped({"a": model}, data, wrap(start).state_dict()) == distance
    assert compare_wrapped({"a": model}, data, wrap(nn.DataParallel(start)).state_dict()) == distance
    own = nn.ModuleDict({"module": nn.Linear(3, 2)})  # a name that is no wrapper's
    own.forward = own["module"].forward
    assert compare_wrapped({"a": own}, data, own.state_dict()) == 0


def compare_wrapped(models, data, initial):
    options = {"metrics": ["fisher_rao_norm"], "check_minimum": False}
    return sharpness.compare(models, data, initial=initial, **options).rows[0].distance_from_initial.mean


def test_the_spectrum_is_compared_like_any_metric():
    metrics = ["trace", "diagonal", "frobenius_norm", "spectral_density"]
    models = {"flat": bowl(1.0), "sharp": [bowl(5.0)]}
    comparison = compare(models, metrics=metrics)
    for name in metrics:
        assert comparison.ratios[name][1].mean == pytest.approx(5.0, rel=1e-6)
        assert comparison.ratio_intervals[name][1] == pytest.approx((5.0, 5.0), rel=1e-6)
        assert comparison["flat"].doubts[name] in str(comparison) or "for certain" in str(comparison)
    assert comparison.to_csv().count("spectral_density") == 2
    assert "trace" in comparison.to_html()
