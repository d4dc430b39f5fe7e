import builtins
import dataclasses
import math

import pytest
import torch

import sharpness
from sharpness.errors import ArgumentError, SharpnessError
from sharpness.results import Comparison, ComparisonRow, LayerwiseResult, Report, ScalarResult, Spread
from tests.zoo import tanh_net

plt = pytest.importorskip("matplotlib.pyplot")
PROBLEM = tanh_net()


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def eigen():
    return sharpness.top_eigenvalues(PROBLEM.model, PROBLEM.loader, k=3)


def test_eigenvalues_are_drawn_where_they_are():
    result = eigen()
    axes = result.plot()
    line = axes.containers[0].lines[0]
    torch.testing.assert_close(
        torch.tensor(list(map(float, line.get_ydata())), dtype=torch.float64), result.eigenvalues
    )
    assert axes.get_ylabel() == "eigenvalue"


def test_the_given_axes_are_used_and_returned():
    figure, axes = plt.subplots()
    assert eigen().plot(axes) is axes
    assert plt.get_fignums() == [figure.number]


def test_epsilon_sharpness_has_a_bar_per_start():
    result = sharpness.epsilon_sharpness(PROBLEM.model, PROBLEM.loader, num_starts=3)
    bars = result.plot().patches
    assert [bar.get_height() for bar in bars] == [start["value"] for start in result.starts]


def test_epsilon_sharpness_over_several_subspaces_has_a_colour_for_each_and_their_mean():
    result = sharpness.epsilon_sharpness(PROBLEM.model, PROBLEM.loader, subspace_dim=2, num_draws=3, max_iter=2)
    axes = result.plot()
    colours = [bar.get_facecolor() for bar in axes.patches if bar.get_height() in {s["value"] for s in result.starts}]
    assert len(set(colours)) == 3
    assert set(axes.lines[0].get_ydata()) == {result.value}


def test_comparison_has_a_bar_per_row_and_a_dot_per_seed():
    comparison = sharpness.compare({"a": [PROBLEM.model, tanh_net(1).model], "b": tanh_net(2).model}, PROBLEM.loader)
    axes = comparison.plot(metric="top_eigenvalues")
    assert [bar.get_height() for bar in axes.patches] == [
        row.metrics["top_eigenvalues"].mean for row in comparison.rows
    ]
    assert [len(line.get_ydata()) for line in axes.lines] == [2, 1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    with pytest.raises(ArgumentError, match="`metric` must be one of 'top_eigenvalues'"):
        comparison.plot(metric="trace")


def test_what_is_not_finite_has_no_bar_and_no_dot():
    """The noise scale is infinite near a minimum, and the limit of the learning rate where nothing curves upwards."""
    values = {"a": [2.0, 4.0], "b": [1.0, math.inf], "c": [math.nan, math.inf]}
    rows = tuple(
        ComparisonRow(name=name, train_loss=Spread.of([0.1]), metrics={"gradient_noise_scale": Spread.of(each)})
        for name, each in values.items()
    )
    ratios = {"gradient_noise_scale": (Spread.of([1.0]),) * 3}
    axes = Comparison(rows=rows, ratios=ratios, warnings=(), seconds=0.0).plot()
    axes.figure.canvas.draw()
    assert [bar.get_height() for bar in axes.patches] == [3.0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[2.0, 4.0], [1.0], []]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "b", "c"]


def test_reports_and_layers_have_no_bar_for_what_is_not_finite():
    records = {
        name: ScalarResult(value=value, num_evaluations=1, num_passes=1, seconds=0.0)
        for name, value in (("finite", 2.0), ("infinite", math.inf), ("unknown", math.nan), ("negative", -1.0))
    }
    axes = Report(records=records, skipped={}, loss=0.1, num_passes=1, seconds=0.0).plot()
    axes.figure.canvas.draw()
    assert [bar.get_width() for bar in axes.patches] == [2.0, 0.0, 0.0, 0.0]
    layers = LayerwiseResult(
        records=records, num_parameters=dict.fromkeys(records, 1), num_passes=1, seconds=0.0, settings={"metric": "m"}
    ).plot()
    layers.figure.canvas.draw()
    assert [bar.get_width() for bar in layers.patches] == [2.0, 0.0, 0.0, -1.0]


def test_interpolation_has_a_line_per_data_set():
    result = sharpness.interpolate(
        PROBLEM.model, tanh_net(1).model, PROBLEM.loader, test_loader=PROBLEM.loader, alphas=[0.0, 0.5, 1.0]
    )
    lines = result.plot().lines
    assert lines[0].get_ydata().tolist() == result.train_loss.tolist()
    assert lines[1].get_ydata().tolist() == result.test_loss.tolist()


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        *(([math.nan] * 3, "linear"), ([-1.0, 2.0, 3.0], "linear"), ([0.0] * 3, "linear")),
        *(([1.0, math.inf, math.nan], "log"), ([1.0, 2.0, 3.0], "log")),
    ],
)
def test_interpolation_draws_any_losses(losses, scale):
    result = sharpness.interpolate(PROBLEM.model, tanh_net(1).model, PROBLEM.loader, alphas=[0.0, 0.5, 1.0])
    axes = dataclasses.replace(result, train_loss=torch.tensor(losses, dtype=torch.float64)).plot()
    axes.figure.canvas.draw()
    assert axes.get_yscale() == scale


def test_a_decrease_that_overflows_is_drawn():
    result = sharpness.learning_rate_limit(PROBLEM.model, PROBLEM.loader)
    endless = torch.full_like(result.steps, math.inf)
    axes = dataclasses.replace(result, linear_decrease=endless, quadratic_decrease=-endless, decrease=-endless).plot()
    axes.figure.canvas.draw()
    assert axes.get_xscale() == "log"


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    result = eigen()
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        SharpnessError, match=r'plots need matplotlib. Install it with: pip install "sharpness\[plot\]"'
    ):
        result.plot()


def test_perturbations_are_drawn_as_dots_and_a_maximum_as_two_bars():
    average = sharpness.average_case_sharpness(PROBLEM.model, PROBLEM.loader, num_samples=4)
    assert average.plot().lines[0].get_ydata().tolist() == average.samples.tolist()
    worst = sharpness.worst_case_sharpness(PROBLEM.model, PROBLEM.loader)
    assert [bar.get_height() for bar in worst.plot().patches] == [worst.loss, worst.max_loss]


def test_noise_is_drawn_as_measured_and_by_the_formula_with_the_batch_size_at_which_returns_diminish():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=g)
    model = torch.nn.Linear(3, 1)
    result = sharpness.gradient_noise_scale(model, [(x, torch.full((64, 1), 3.0))])
    axes = result.plot()
    formula, across, down = axes.lines[0], axes.lines[-2], axes.lines[-1]
    assert list(formula.get_ydata()) == [
        result.standard_error(1),
        (result.trace_covariance / formula.get_xdata()[1]) ** 0.5,
    ]
    measured = axes.containers[0].lines[0]
    assert list(map(float, measured.get_ydata())) == result.errors.tolist()
    assert set(across.get_ydata()) == {result.gradient_norm_squared**0.5}
    assert set(down.get_xdata()) == {result.value}
    assert axes.get_xscale() == axes.get_yscale() == "log"
    zero = sharpness.gradient_noise_scale(model, [(x[:3], model(x[:3]).detach())], on_failure="ignore")
    assert len(zero.plot().lines) == 2  # neither a length of the gradient nor a noise scale


def test_the_learning_rate_limit_is_drawn_with_the_decrease_actual_and_predicted():
    result = sharpness.learning_rate_limit(PROBLEM.model, PROBLEM.loader)
    axes = result.plot()
    for line, values in zip(
        axes.lines, (result.linear_decrease, result.quadratic_decrease, result.decrease), strict=False
    ):
        assert line.get_xdata().tolist() == result.steps.tolist()
        assert line.get_ydata().tolist() == values.tolist()
    assert [line.get_xdata()[0] for line in axes.lines[3:5]] == [result.value, result.breakdown]
    assert axes.get_ylim()[1] == pytest.approx(1.5 * result.quadratic_decrease.max().item())


def test_critical_sharpness_is_drawn_with_the_losses_it_was_read_off():
    result = sharpness.critical_sharpness(PROBLEM.model, PROBLEM.loader)
    axes = result.plot()
    assert axes.lines[0].get_xdata().tolist() == result.steps.tolist()
    assert axes.lines[0].get_ydata().tolist() == result.losses.tolist()
    assert set(axes.lines[-1].get_xdata()) == {result.critical_step}


def test_a_landscape_is_a_curve_or_contours_with_holes_where_it_is_not_finite():
    line = sharpness.landscape(PROBLEM.model, PROBLEM.loader, steps=5)
    curve = line.plot().lines[0]
    assert curve.get_ydata().tolist() == line.loss.tolist()
    assert curve.get_xdata().tolist() == line.coordinates.tolist()

    class Walled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.where(self.weight[0, 0] > 1, float("nan"), 0.0)

    model = Walled(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    along = [[torch.tensor([[1.0, 0.0]])], [torch.tensor([[0.0, 1.0]])]]
    data = [(torch.eye(2), torch.ones(2, 1))]
    plane = sharpness.landscape(model, data, directions=along, dims=2, extent=2.0, steps=5)
    axes = plane.plot()
    holes = axes.lines[0]
    assert set(zip(holes.get_xdata().tolist(), holes.get_ydata().tolist(), strict=True)) == {
        (2.0, y) for y in range(-2, 3)
    }
    assert axes.collections  # the contours
    assert axes.get_xlabel() == "direction 1 (length 1)"


def test_a_number_and_a_report():
    norm = sharpness.fisher_rao_norm(PROBLEM.model, PROBLEM.loader)
    assert norm.plot().containers[0].lines[0].get_ydata()[0] == norm.value
    report = sharpness.report(PROBLEM.model, PROBLEM.loader, metrics=["top_eigenvalues", "fisher_rao_norm"])
    assert [bar.get_width() for bar in report.plot().patches] == [record.headline for record in report.values()]


def test_what_is_infinite_has_no_bar():
    model, data = torch.nn.Linear(2, 1, bias=False), [(torch.eye(2), torch.zeros(2, 1))]

    def downwards(outputs, targets):
        return -(outputs**2).mean()

    metrics = ["learning_rate_limit", "top_eigenvalues"]
    report = sharpness.report(model, data, downwards, metrics=metrics, on_failure="ignore")
    comparison = sharpness.compare({"a": model, "b": model}, data, downwards, metrics=metrics)
    layers = sharpness.per_layer("learning_rate_limit", model, data, downwards)
    assert report["learning_rate_limit"].value == math.inf
    assert not any(map(math.isfinite, (bar.get_height() for bar in comparison.plot().patches)))
    assert all(math.isfinite(bar.get_height()) for bar in comparison.plot(metric="top_eigenvalues").patches)
    for axes in (comparison.plot(), report.plot(), layers.plot()):
        axes.figure.canvas.draw()
    assert "Infinity" not in comparison.to_html()
    assert "<svg" in layers.to_html()
