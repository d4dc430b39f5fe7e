import builtins

import pytest
import torch

import sharpness
from sharpness.errors import ArgumentError, SharpnessError
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


def test_interpolation_has_a_line_per_data_set():
    result = sharpness.interpolate(
        PROBLEM.model, tanh_net(1).model, PROBLEM.loader, test_loader=PROBLEM.loader, alphas=[0.0, 0.5, 1.0]
    )
    lines = result.plot().lines
    assert lines[0].get_ydata().tolist() == result.train_loss.tolist()
    assert lines[1].get_ydata().tolist() == result.test_loss.tolist()


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


def test_a_number_and_a_report():
    norm = sharpness.fisher_rao_norm(PROBLEM.model, PROBLEM.loader)
    assert norm.plot().containers[0].lines[0].get_ydata()[0] == norm.value
    report = sharpness.report(PROBLEM.model, PROBLEM.loader, metrics=["top_eigenvalues", "fisher_rao_norm"])
    assert [bar.get_width() for bar in report.plot().patches] == [record.headline for record in report.values()]
