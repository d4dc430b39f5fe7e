"""Trace, diagonal, norm and density of models whose Hessians are known."""

import math

import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning
from tests.zoo import logistic_regression, quadratic, rotated, softmax_regression, tanh_net

PROBLEMS = [logistic_regression(), softmax_regression(), tanh_net()]
LARGE = quadratic("decaying", rotated(1 / torch.arange(1, 91, dtype=torch.float64)))
INDEFINITE = quadratic("indefinite", rotated(torch.linspace(-1, 2, 90, dtype=torch.float64) ** 3))


@pytest.mark.parametrize("method", ["xtrace", "hutchpp", "hutchinson"])
@pytest.mark.parametrize("problem", [*PROBLEMS, LARGE, INDEFINITE], ids=lambda p: p.name)
def test_the_trace(problem, method):
    exact, norm = problem.hessian.trace().item(), problem.hessian.norm().item()
    result = sharpness.trace(problem.model, problem.loader, method=method, tol=0.2, **problem.options)
    assert result.converged
    assert abs(result.value - exact) <= 4 * result.stderr + 1e-9 * norm
    low, high = result.interval
    assert high - low <= 2 * 0.2001 * max(abs(result.value), norm * 1.5)
    assert result.headline == result.value
    assert result.settings["curvature"] == "hessian"
    assert result.num_passes <= result.num_matvecs + 1


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("curvature", ["ggn", "fisher", "empirical_fisher"])
def test_every_curvature(problem, curvature):
    operator = {
        "ggn": sharpness.GGNOperator,
        "fisher": sharpness.FisherOperator,
        "empirical_fisher": sharpness.EmpiricalFisherOperator,
    }[curvature]
    objective = sharpness.Objective(problem.model, problem.loader, **problem.options)
    matrix = operator(objective).to_dense()
    size = len(matrix)
    assert sharpness.trace(objective, curvature=curvature, tol=1e-6).value == pytest.approx(matrix.trace().item())
    torch.testing.assert_close(
        sharpness.diagonal(objective, curvature=curvature, num_matvecs=size).value, matrix.diagonal()
    )
    norm = sharpness.frobenius_norm(objective, curvature=curvature, tol=1e-6)
    assert norm.value == pytest.approx(matrix.norm().item())
    density = sharpness.spectral_density(objective, curvature=curvature, num_draws=2)
    assert density.nodes.max().item() == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-6)


@pytest.mark.parametrize("method", ["xdiag", "hutchinson"])
@pytest.mark.parametrize("problem", [LARGE, INDEFINITE], ids=lambda p: p.name)
def test_the_diagonal_by_name(problem, method):
    result = sharpness.diagonal(problem.model, problem.loader, method=method, num_matvecs=30, **problem.options)
    exact = problem.hessian.diagonal()
    known = exact != 0
    z = ((result.value - exact) / result.stderr)[known]
    assert 0.5 < z.square().mean().sqrt() < 1.6
    assert result.value[~known].abs().max() < 1e-14  # the unused parameter
    assert result.trace == pytest.approx(result.value.sum().item())
    assert abs(result.trace - exact.sum().item()) < 5 * result.trace_stderr
    named, errors = result.named_value(), result.named_stderr()
    assert list(named) == [name for name, _ in result.layout]
    assert torch.equal(torch.cat([piece.flatten() for piece in named.values()]), result.value)
    assert torch.equal(torch.cat([piece.flatten() for piece in errors.values()]), result.stderr)
    assert {name: tuple(t.shape) for name, t in named.items()} == dict(result.layout)
    assert result.num_matvecs == 30


def test_the_frobenius_norm():
    for problem in (LARGE, INDEFINITE):
        result = sharpness.frobenius_norm(problem.model, problem.loader, tol=0.05, **problem.options)
        assert abs(result.value - problem.hessian.norm().item()) < 4 * result.stderr
        assert result.interval[0] < result.value < result.interval[1]
        assert result.converged
        half = (result.interval[1] - result.interval[0]) / 2
        assert result.doubt == f"± {half:.2g} at 95 %"
        assert f"frobenius_norm {result.value:.4g} ± {half:.2g} at 95 %;" in repr(result)
    with pytest.warns(ConvergenceWarning, match="frobenius_norm spent 6 products on a norm of"):
        result = sharpness.frobenius_norm(problem.model, problem.loader, num_matvecs=6, **problem.options)
    assert result.doubt.endswith("at 95 %, NOT converged")


def test_the_density_of_softmax_regression_at_zero():
    """Eigenvalues (1/K) eig(X'X/N), each K - 1 times, and zeros."""
    problem = softmax_regression()
    result = sharpness.spectral_density(problem.model, problem.loader, num_draws=20)
    exact = problem.eigenvalues
    assert result.n == len(exact)
    distinct = torch.unique((exact * 1e9).round()) / 1e9
    assert result.nodes.shape[1] <= len(distinct) + 1
    for level in exact[exact > 1e-6].unique():
        assert (result.nodes - level).abs().min() < 1e-8
    above = exact[0].item() * 0.99
    assert abs(result.mass_above(above) - 3 / len(exact)) < 4 * result.mass_above_stderr(above)
    assert abs(result.moment(1)[0] - exact.mean().item()) < 4 * result.moment(1)[1]


def test_num_steps_beyond_the_parameters_are_reduced_and_said():
    model = nn.Linear(3, 1, bias=False)
    result = sharpness.spectral_density(model, [(torch.eye(3), torch.zeros(3, 1))], num_draws=1, num_steps=50)
    assert "all that the spectrum has, of 50" in repr(result)
    assert result.num_matvecs <= 3


@pytest.mark.parametrize("metric", ["trace", "frobenius_norm"])
def test_a_tolerance_that_is_missed_warns_or_raises_with_the_record(metric):
    function = getattr(sharpness, metric)
    options = {"tol": 1e-5, "num_matvecs": 8, **INDEFINITE.options}
    with pytest.warns(ConvergenceWarning, match="spent 8 products"):
        result = function(INDEFINITE.model, INDEFINITE.loader, **options)
    with pytest.raises(ConvergenceError, match="spent 8 products") as caught:
        function(INDEFINITE.model, INDEFINITE.loader, on_failure="raise", **options)
    assert caught.value.result.value == result.value
    assert caught.value.result.num_passes == result.num_passes > 0


def test_bad_input():
    model, loader = nn.Linear(3, 30), [(torch.ones(2, 3), torch.ones(2, 30))]
    with pytest.raises(ArgumentError, match="`num_matvecs` must be at least 6 for xtrace"):
        sharpness.trace(model, loader, num_matvecs=3)
    with pytest.raises(ArgumentError, match="`method` must be one of 'xtrace', 'hutchpp', 'hutchinson'"):
        sharpness.trace(model, loader, method="hutch")
    with pytest.raises(ArgumentError, match=r"`memory` must be at least \d+ bytes for the basis of one draw"):
        sharpness.spectral_density(model, loader, memory=100)
    with pytest.raises(ArgumentError, match=r"`memory` must be at least \d+ bytes for \d+ random vectors"):
        sharpness.diagonal(model, loader, memory=100)
    with pytest.raises(ArgumentError, match="`method` must be one of 'xtrace', got 'hutchinson'"):
        sharpness.per_layer("trace", model, loader, method="hutchinson")


@pytest.mark.parametrize("memory", [0, "1MiB"])
def test_a_limit_on_memory_changes_nothing_but_rounding(memory):
    free, limited = (
        sharpness.spectral_density(LARGE.model, LARGE.loader, num_steps=10, memory=m, **LARGE.options)
        for m in ("auto", memory)
    )
    torch.testing.assert_close(limited.nodes, free.nodes, rtol=1e-8, atol=1e-10)


class Layers(nn.Module):
    """Two layers of one quadratic, so that the Hessian of the whole has blocks."""

    def __init__(self, hessian):
        super().__init__()
        self.first, self.last = nn.Module(), nn.Module()
        self.first.w, self.last.w = (nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (30, len(hessian) - 30))
        self.register_buffer("h", hessian)

    def forward(self, rows):
        w = torch.cat([self.first.w, self.last.w])
        return 0.5 * w @ self.h @ w + 0 * rows.sum()


BLOCKS = Layers(rotated(2 / torch.arange(1, 101, dtype=torch.float64) ** 0.8))
ROWS = [torch.ones(2, 1, dtype=torch.float64)]
OPTIONS = {"batch_loss": lambda model, rows: (model(rows), len(rows))}
EXACT = {"first": BLOCKS.h.diagonal()[:30], "last": BLOCKS.h.diagonal()[30:]}


def test_traces_of_layers_come_out_of_one_run_and_cover_the_truth():
    covered = {"first": 0, "last": 0}
    for seed in range(60):
        layers = sharpness.per_layer("trace", BLOCKS, ROWS, num_matvecs=16, seed=seed, on_failure="ignore", **OPTIONS)
        assert layers.num_passes == 3
        for name, record in layers.items():
            assert record.num_matvecs == 16
            covered[name] += record.interval[0] <= EXACT[name].sum().item() <= record.interval[1]
    assert min(covered.values()) >= 60 * (0.95 - 4 * (0.05 * 0.95 / 60) ** 0.5)
    assert list(layers) == sorted(layers, key=lambda name: -layers[name].value)


def test_traces_of_layers_stop_at_the_tolerance_of_their_sum():
    layers = sharpness.per_layer("trace", BLOCKS, ROWS, tol=0.05, **OPTIONS)
    total = sum(record.value for record in layers.values())
    assert layers.converged
    for name, record in layers.items():
        assert (record.interval[1] - record.interval[0]) / 2 <= 0.05 * total
        assert abs(record.value - EXACT[name].sum().item()) <= 0.1 * total
    axes = layers.plot()
    assert len(axes.patches) == 2
    with pytest.warns(ConvergenceWarning, match="2 of 2 layers did not converge"):
        sharpness.per_layer("trace", BLOCKS, ROWS, tol=1e-6, num_matvecs=8, **OPTIONS)


@pytest.mark.parametrize("method", ["xdiag", "hutchinson"])
def test_diagonals_of_layers_are_pieces_of_one(method):
    whole = sharpness.diagonal(BLOCKS, ROWS, method=method, num_matvecs=20, **OPTIONS)
    layers = sharpness.per_layer("diagonal", BLOCKS, ROWS, method=method, num_matvecs=20, by="parameter", **OPTIONS)
    assert torch.equal(layers["first.w"].value, whole.value[:30])
    assert torch.equal(layers["last.w"].stderr, whole.stderr[30:])
    assert list(layers["last.w"].named_value()) == ["last.w"]
    for name, record in layers.items():
        assert abs(record.trace - EXACT[name.removesuffix(".w")].sum().item()) < 4 * record.trace_stderr
        assert record.settings["metric"] == "diagonal"


def test_small_models_are_exact_layer_by_layer():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    loader = [(torch.eye(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64))]
    matrix = sharpness.HessianOperator(sharpness.Objective(model, loader)).to_dense()
    layers = sharpness.per_layer("trace", model, loader)
    assert layers["0"].value == pytest.approx(matrix.diagonal()[:4].sum().item())
    assert layers["1"].value == pytest.approx(matrix.diagonal()[4:].sum().item())
    assert layers["1"].stderr == 0.0
    assert layers.converged
    norms = sharpness.per_layer("frobenius_norm", model, loader)
    assert norms["0"].value == pytest.approx(matrix[:4, :4].norm().item())
    densities = sharpness.per_layer("spectral_density", model, loader)
    assert densities["1"].headline == pytest.approx(torch.linalg.eigvalsh(matrix[4:, 4:])[-1].item())


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher", "empirical_fisher"])
def test_layers_of_every_curvature_add_up_to_the_whole(curvature):
    problem = PROBLEMS[-1]
    objective = sharpness.Objective(problem.model, problem.loader, **problem.options)
    options = {"curvature": curvature, "num_matvecs": objective.n}
    whole = sharpness.diagonal(objective, **options)
    for metric in ("trace", "diagonal"):
        layers = sharpness.per_layer(metric, objective, by="parameter", **options)
        for name, piece in whole.named_value().items():
            assert layers[name].headline == pytest.approx(piece.sum().item(), abs=1e-12)
        assert layers.num_passes <= objective.n + 1  # those of one run


@pytest.mark.parametrize("memory", [0, "auto"])
def test_all_draws_share_a_pass(memory):
    options = {"num_draws": 4, "num_steps": 6, "memory": memory, **LARGE.options}
    result = sharpness.spectral_density(LARGE.model, LARGE.loader, **options)
    assert result.num_matvecs == 24
    assert result.num_passes == 7  # and one to see whether the loss has stayed the same


@pytest.mark.parametrize(("n", "slope"), [(1, 0.0), (1, 3.0), (80, 0.0)])
def test_one_parameter_and_no_curvature_at_all(n, slope):
    """The loss ``slope w'w / 2``: its Hessian is ``slope`` times the identity, and zero everywhere without it."""
    model = nn.Linear(n, 1, bias=False).double()
    rows = [torch.zeros(2, 1, dtype=torch.float64)]
    loss = {"batch_loss": lambda m, batch: ((m.weight.sum() + slope * m.weight.square().sum() / 2), len(batch))}
    exact = slope * n
    for method in ("xtrace", "hutchpp", "hutchinson"):
        found = sharpness.trace(model, rows, method=method, **loss)
        assert found.value == pytest.approx(exact)
        assert found.converged
    assert sharpness.frobenius_norm(model, rows, **loss).value == pytest.approx(exact)
    for method in ("xdiag", "hutchinson"):
        assert sharpness.diagonal(model, rows, method=method, **loss).value.tolist() == pytest.approx([slope] * n)
    density = sharpness.spectral_density(model, rows, **loss)
    assert density.nodes.unique().tolist() == pytest.approx([slope])
    assert density.num_outliers == 0
    assert density.moment(1)[0] == pytest.approx(slope)
    for record in (found, density, sharpness.per_layer("trace", model, rows, **loss)):
        assert record.plot() is not None


def trained_net():
    data, _ = sharpness.datasets.digits(num_train=500)
    inputs, targets = data.tensors
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model.double(), [(inputs.double(), targets)]


def test_outliers_of_a_net_with_ten_classes_are_its_largest_eigenvalues():
    model, loader = trained_net()
    objective = sharpness.Objective(model, loader)
    density = sharpness.spectral_density(objective)
    exact = torch.linalg.eigvalsh(sharpness.HessianOperator(objective).to_dense()).flip(0)
    assert 8 <= density.num_outliers <= 11
    assert density.certified.all()
    found = density.outliers
    assert (found - exact[: len(found)]).abs().max() < 1e-3 * exact[0]  # the largest, each once, none left out
    assert ((found - exact[: len(found)]).abs() <= density.outlier_residuals + 1e-12).all()
    gap = exact[len(found) - 1] - exact[len(found)]
    assert gap > 0.15 * exact[len(found) - 1]  # and then a gap


@pytest.mark.parametrize(
    ("metric", "method", "least"),
    [
        *(("trace", "xtrace", 6), ("trace", "hutchpp", 9), ("trace", "hutchinson", 3), ("frobenius_norm", None, 6)),
        *(("diagonal", "xdiag", 6), ("diagonal", "hutchinson", 2)),
    ],
)
def test_too_few_products_are_refused_with_the_number_that_is_needed(metric, method, least):
    options = {**({} if method is None else {"method": method}), **LARGE.options}
    with pytest.raises(ArgumentError, match=f"`num_matvecs` must be at least {least} for .*got {least - 1}"):
        getattr(sharpness, metric)(LARGE.model, LARGE.loader, num_matvecs=least - 1, **options)
    if method in ("xtrace", "xdiag"):
        with pytest.raises(ArgumentError, match=f"`num_matvecs` must be at least {least} for .*got {least - 1}"):
            sharpness.per_layer(metric, LARGE.model, LARGE.loader, num_matvecs=least - 1, **options)


def test_what_is_no_number_has_no_mass_above_it_and_no_moment():
    density = sharpness.spectral_density(LARGE.model, LARGE.loader, num_draws=1, num_steps=5, **LARGE.options)
    assert density.mass_above(float("inf")) == 0.0
    assert density.mass_above(-float("inf")) == pytest.approx(1.0)
    assert density.mass_above(density.headline) == 0.0
    assert math.isnan(density.mass_above_stderr(0.0))
    assert math.isnan(density.moment(1)[1])
    assert density.moment(0)[0] == pytest.approx(1.0)
    for x in (float("nan"), "0", None, True):
        with pytest.raises(ArgumentError, match="`x` must be a number, got"):
            density.mass_above(x)
    for power in (-1, 0.5):
        with pytest.raises(ArgumentError, match="`power` must be "):
            density.moment(power)


def test_the_doubt_is_about_the_value_of_a_table():
    density = sharpness.spectral_density(LARGE.model, LARGE.loader, num_steps=8, **LARGE.options)
    low, high = density.interval
    eigenvalues = torch.linalg.eigvalsh(LARGE.hessian)
    assert ((low <= eigenvalues) & (eigenvalues <= high)).any()
    assert density.doubt == f"± {(high - low) / 2:.1g} (for certain), 4 draws x 8 steps"
    diagonal = sharpness.diagonal(LARGE.model, LARGE.loader, num_matvecs=16, **LARGE.options)
    assert diagonal.doubt.startswith(f"± {diagonal.trace_stderr:.2g} (standard error), entries ± ")
    assert f"{len(diagonal.value)} entries of sum {diagonal.trace:.4g} ± " in repr(diagonal)


CANCELLING = Layers(rotated(torch.linspace(-1, 1, 100, dtype=torch.float64) ** 3))


def test_traces_of_layers_that_cancel_are_as_true_as_their_norms_allow():
    layers = sharpness.per_layer("trace", CANCELLING, ROWS, tol=0.05, **OPTIONS)
    assert layers.converged
    assert layers["first"].num_matvecs < 200
    blocks = {"first": CANCELLING.h[:30, :30], "last": CANCELLING.h[30:, 30:]}
    for name, block in blocks.items():
        low, high = layers[name].interval
        assert low <= block.trace().item() <= high
        assert (high - low) / 2 <= 0.05 * sum(b.norm().item() + b.trace().abs().item() for b in blocks.values())
    whole = sharpness.per_layer("trace", CANCELLING, ROWS, tol=0.05, by=lambda name: "all", **OPTIONS)
    assert whole.converged


def test_a_tolerance_for_few_layers_is_relative_to_these():
    """The rest of the matrix, a thousand times larger, has no part in it."""
    scale = torch.ones(100, dtype=torch.float64)
    scale[30:] = 1000**0.5
    model = Layers(BLOCKS.h * scale.outer(scale))
    layers = sharpness.per_layer(
        "trace", model, ROWS, tol=0.05, by={"first": "first.*"}, on_failure="ignore", **OPTIONS
    )
    low, high = layers["first"].interval
    assert not layers.converged or (high - low) / 2 <= 0.05 * 1.2 * EXACT["first"].sum().item()


def test_without_a_limit_on_memory_vectors_are_as_many_as_the_tolerance_takes():
    free, none = (
        sharpness.per_layer("trace", BLOCKS, ROWS, tol=1e-3, memory=memory, on_failure="ignore", **OPTIONS)
        for memory in ("auto", 0)
    )
    assert free["first"].num_matvecs == none["first"].num_matvecs > len(BLOCKS.h)


@pytest.mark.parametrize(("options", "vectors"), [({}, 3), ({"num_matvecs": 20}, 10)])
def test_vectors_that_do_not_fit_are_refused_with_the_bytes_that_they_need(options, vectors):
    need = vectors * 2 * 8 * len(BLOCKS.h)
    for metric in ("trace", "diagonal") if options else ("trace",):
        with pytest.raises(ArgumentError, match=f"`memory` must be at least {need} bytes for {vectors} random vectors"):
            sharpness.per_layer(metric, BLOCKS, ROWS, memory=need - 1, **options, **OPTIONS)
        layers = sharpness.per_layer(metric, BLOCKS, ROWS, memory=need, on_failure="ignore", **options, **OPTIONS)
        assert layers["first"].num_matvecs == 2 * vectors


def test_sums_of_diagonals_of_layers_have_the_error_of_their_traces():
    options = {"num_matvecs": 24, "on_failure": "ignore", **OPTIONS}
    traces, diagonals = (sharpness.per_layer(metric, BLOCKS, ROWS, **options) for metric in ("trace", "diagonal"))
    for name, record in diagonals.items():
        assert record.trace == pytest.approx(traces[name].value)
        assert record.trace_stderr == pytest.approx(traces[name].stderr)


def test_layers_that_miss_the_tolerance_are_named_with_their_numbers():
    with pytest.warns(ConvergenceWarning, match=r"2 of 2 layers did not converge: \w+ \(\S+ ± \S+ at 95 %\), \w+ \("):
        sharpness.per_layer("trace", BLOCKS, ROWS, tol=1e-6, num_matvecs=8, **OPTIONS)
