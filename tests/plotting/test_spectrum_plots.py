"""Pictures of traces, diagonals and densities show what the records say."""

import dataclasses
import math

import matplotlib
import pytest
import torch

matplotlib.use("agg")

import sharpness
from sharpness.errors import ArgumentError
from sharpness.linalg import DenseOperator, stochastic_lanczos_quadrature, xdiag, xtrace
from sharpness.results import LayerwiseResult

BULK = torch.linspace(-0.1, 0.1, 200, dtype=torch.float64)
OPERATOR = DenseOperator(torch.diag(torch.cat([torch.tensor([4.0, 3.0], dtype=torch.float64), BULK])))
DENSITY = stochastic_lanczos_quadrature(OPERATOR, num_steps=30)


def test_a_trace_is_dots_a_mean_and_a_band():
    result = xtrace(OPERATOR, num_matvecs=20, on_failure="ignore")
    axes = result.plot()
    assert axes.lines[0].get_ydata().tolist() == result.samples.tolist()
    assert len(axes.patches) == 1


def test_a_diagonal_is_in_ascending_order():
    result = xdiag(OPERATOR, num_matvecs=20)
    drawn = result.plot().lines[0].get_ydata().tolist()
    assert drawn == sorted(result.value.tolist())


@pytest.mark.parametrize("log", [True, False])
def test_a_density_marks_its_outliers_and_the_edge_of_stability(log):
    axes = DENSITY.plot(log=log, lr=0.5)
    assert axes.get_yscale() == ("log" if log else "linear")
    assert axes.lines[1].get_xdata().tolist() == DENSITY.outliers.tolist() == pytest.approx([4.0, 3.0])
    assert list(axes.lines[2].get_xdata()) == [4.0, 4.0]


def test_a_density_marks_what_it_is_given():
    eigen = sharpness.linalg.lanczos(OPERATOR, 3)
    for given in (eigen, eigen.eigenvalues.tolist()):
        axes = DENSITY.plot(eigenvalues=given)
        assert axes.lines[1].get_xdata().tolist() == eigen.eigenvalues.tolist()
    assert len(DENSITY.plot(eigenvalues=[]).lines) == 1
    with pytest.raises(ArgumentError, match="`lr` must be a finite number above 0, got 0"):
        DENSITY.plot(lr=0)


def test_a_logarithmic_axis_ends_above_the_density_and_below_one_eigenvalue():
    low, high = DENSITY.plot().get_ylim()
    assert low == pytest.approx(0.01 / (DENSITY.n * DENSITY.sigma))
    assert DENSITY.density.max().item() < high < 10 * DENSITY.density.max().item()


@pytest.mark.parametrize("given", [5.0, "ab", [None]])
def test_what_are_no_eigenvalues_is_refused(given):
    with pytest.raises(ArgumentError, match="`eigenvalues` must be an EigenResult or numbers"):
        DENSITY.plot(eigenvalues=given)
    with pytest.raises(ArgumentError, match="`lr` must be a finite number above 0"):
        DENSITY.plot(lr=given if isinstance(given, str) else float("nan"))


def test_layers_have_their_intervals_as_bars_and_none_where_they_are_infinite():
    result = xtrace(OPERATOR, num_matvecs=20, on_failure="ignore")
    wide = dataclasses.replace(result, interval=(-math.inf, math.inf), value=math.nan)
    layers = LayerwiseResult(
        records={"a": result, "b": wide}, num_parameters={"a": 1, "b": 1}, num_passes=1, seconds=0.0
    )
    bars = layers.plot().containers[0].lines[2][0].get_segments()
    assert bars[0][:, 0].tolist() == pytest.approx(result.interval)
    assert bars[1][:, 0].tolist() == [0.0, 0.0]
