import builtins
import math

import pytest

from sharpness.errors import SharpnessError
from sharpness.plotting import plot_sweep
from sharpness.results import Comparison, ComparisonRow, Spread

plt = pytest.importorskip("matplotlib.pyplot")
METRIC = "top_eigenvalues"


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def row(name, value=1.0, **fields):
    return ComparisonRow(
        name=name, train_loss=Spread.of([0.1, 0.3]), metrics={METRIC: Spread.of([value, value + 2])}, **fields
    )


def comparison(*rows):
    return Comparison(rows=rows, ratios={METRIC: tuple(r.metrics[METRIC] for r in rows)}, warnings=(), seconds=1.0)


def panels(figure):
    return {ax.get_title(): ax for ax in figure.axes}


def drawn(ax):
    (container,) = ax.containers
    line = container.lines[0]
    bars = [segment[1, 1] - segment[0, 1] for segment in container.lines[2][0].get_segments()]
    return list(map(float, line.get_xdata())), list(map(float, line.get_ydata())), [float(bar) / 2 for bar in bars]


def test_everything_is_drawn_against_the_batch_size():
    rows = [
        row(
            str(size),
            size,
            test_accuracy=Spread.of([0.9, 0.8]),
            **{name: Spread.of([size, size + i]) for i, name in enumerate(("epochs", "updates", "samples", "seconds"))},
        )
        for size in (64, 4, 16)  # in any order
    ]
    axes = panels(comparison(*rows).figure())
    assert list(axes) == [
        "test accuracy",
        "top eigenvalues",
        "epochs",
        "updates",
        "samples processed",
        "seconds of training",
    ]
    x, y, bars = drawn(axes["top eigenvalues"])
    assert (x, y) == ([4, 16, 64], [5, 17, 65])
    assert bars == pytest.approx([math.sqrt(2)] * 3)
    assert drawn(axes["samples processed"])[1] == [5, 17, 65]
    assert drawn(axes["test accuracy"])[1] == pytest.approx([0.85] * 3)
    for ax in axes.values():
        assert ax.get_xscale() == "log"
        assert [label.get_text() for label in ax.get_xticklabels()] == ["64", "4", "16"]
    assert axes["updates"].get_yscale() == "log"
    assert axes["top eigenvalues"].get_yscale() == "linear"


def test_names_without_test_data_or_costs():
    figure = comparison(row("small"), row("large", math.nan)).figure()
    (ax,) = figure.axes
    assert ax.get_xscale() == "linear"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["small", "large"]
    assert drawn(ax)[:2] == ([0], [2])


def test_nothing_but_the_loss_and_values_that_are_not_finite():
    bare = ComparisonRow(name="8", train_loss=Spread.of([0.5]), metrics={})
    figure = plot_sweep(Comparison(rows=(bare,), ratios={}, warnings=(), seconds=1.0), color="C3")
    (ax,) = figure.axes
    assert ax.get_title() == "training loss"
    assert drawn(ax)[1] == [0.5]
    assert ax.containers[0].lines[0].get_color() == "C3"
    nothing = comparison(row("4", math.inf), row("0", math.nan)).figure()  # no batch size is 0
    assert panels(nothing)["top eigenvalues"].get_xscale() == "linear"
    figure.canvas.draw()
    nothing.canvas.draw()


def test_zero_updates_are_not_on_a_logarithmic_axis():
    rows = [row("4", updates=Spread.of([0.0])), row("8", updates=Spread.of([3.0]))]
    assert panels(comparison(*rows).figure())["updates"].get_yscale() == "linear"


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(SharpnessError, match="plots need matplotlib"):
        comparison(row("4")).figure()


def test_the_table_has_what_a_sweep_wants():
    text = str(
        comparison(
            row("4", samples=Spread.of([60]), seconds=Spread.of([1.5]), learning_rate=Spread.of([0.05])), row("8")
        )
    )
    lines = [line.split() for line in text.splitlines()]
    for line in (["samples", "60"], ["seconds", "1.5"], ["learning", "rate", "0.05"]):
        assert line in lines
