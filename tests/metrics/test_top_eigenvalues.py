import copy

import numpy as np
import pytest
import torch
from torch import nn

import sharpness
from sharpness import HessianOperator, Objective, linalg
from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning, DeterminismWarning, ModelError
from sharpness.linalg.which import WHICH, select
from tests.checks import assert_untouched, contains
from tests.zoo import batches, dense_hessian, features, networks, problems, tanh_net


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("problem", problems(), ids=lambda p: p.name)
def test_agrees_with_the_dense_hessian_on_every_problem(problem, which):
    n = len(problem.hessian)
    k = min(3, n)
    ascending = problem.eigenvalues.flip(0)
    expected = ascending[select(ascending.numpy(), which, k).copy()]
    with assert_untouched(problem.model):
        result = sharpness.top_eigenvalues(problem.model, problem.loader, k=k, which=which, **problem.options)
    assert result.converged
    assert result.num_matvecs <= n
    slack = 1e-12 * ascending.abs().max().item()
    found, interval = result.eigenvalues, result.interval
    if which == "magnitude":
        found, expected = found.abs(), expected.abs()
        interval = torch.stack([found - result.residuals, found + result.residuals], 1)
    assert contains(interval, expected, slack=slack)


@pytest.mark.parametrize("problem", networks(), ids=lambda p: p.name)
def test_methods_agree(problem):
    calls = {"lanczos": {}, "power": {"num_matvecs": 4000}, "dense": {}}
    for method, options in calls.items():
        result = sharpness.top_eigenvalues(
            problem.model, problem.loader, k=2, method=method, **options, **problem.options
        )
        assert result.converged
        assert contains(result.interval, problem.eigenvalues[:2], slack=1e-14)
        assert result.settings["method"] == method


def test_eigenvectors_are_rows_in_the_order_of_named_parameters():
    problem = tanh_net()
    result = sharpness.top_eigenvalues(problem.model, problem.loader, k=2, vectors=True, tol=1e-8)
    for value, row in zip(result.eigenvalues, result.eigenvectors, strict=True):
        torch.testing.assert_close(problem.hessian @ row, value * row, rtol=0, atol=1e-8)
    named = result.named_vector(1)
    trainable = {name: p.shape for name, p in problem.model.named_parameters() if p.requires_grad}
    assert {name: t.shape for name, t in named.items()} == trainable
    assert torch.equal(torch.cat([t.reshape(-1) for t in named.values()]), result.eigenvectors[1])
    with pytest.raises(ArgumentError, match=r"holds no named eigenvectors. Call top_eigenvalues\(..., vectors=True\)"):
        sharpness.top_eigenvalues(problem.model, problem.loader).named_vector(0)


def test_the_three_doors_give_the_same_bits():
    problem = tanh_net()
    one = sharpness.top_eigenvalues(problem.model, problem.loader, k=3)
    objective = Objective(problem.model, problem.loader)
    two = linalg.lanczos(HessianOperator(objective), k=3)
    shared = sharpness.top_eigenvalues(Objective(problem.model, problem.loader), k=3)
    for other in (two, shared):
        assert torch.equal(one.eigenvalues, other.eigenvalues)
        assert torch.equal(one.residuals, other.residuals)


def test_the_price_is_counted():
    problem = tanh_net()
    for memory in ("auto", 0):
        result = sharpness.top_eigenvalues(problem.model, problem.loader, k=2, memory=memory)
        assert result.num_passes == result.num_matvecs + 1  # and one look whether the loss stays the same
        assert result.seconds > 0
    assert result.settings["num_batches"] == 3
    assert result.settings["num_terms"] == 11
    assert result.settings["n"] == len(problem.hessian)
    assert result.settings["loss"] == "cross-entropy (inferred)"


def test_a_subset_is_said_to_be_one():
    problem = tanh_net()
    result = sharpness.top_eigenvalues(problem.model, problem.loader, max_batches=2)
    alone = sharpness.top_eigenvalues(problem.model, problem.loader[:2])
    assert torch.equal(result.eigenvalues, alone.eigenvalues)
    assert result.settings["max_batches"] == 2
    assert result.settings["num_terms"] == 8


def test_a_random_loss_warns():
    model = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    with pytest.warns(DeterminismWarning, match="changes from pass to pass"):
        sharpness.top_eigenvalues(model, batches(features(3), torch.arange(11) % 3), mode="train")


def test_not_converged_warns_or_raises():
    problem = tanh_net()
    with pytest.warns(ConvergenceWarning, match="lanczos spent 4 products"):
        sharpness.top_eigenvalues(problem.model, problem.loader, k=3, num_matvecs=4)
    with pytest.raises(ConvergenceError, match="lanczos spent 4 products") as caught:
        sharpness.top_eigenvalues(problem.model, problem.loader, k=3, num_matvecs=4, on_failure="raise")
    best = caught.value.result
    assert len(best.eigenvalues) == 3
    assert best.num_passes == 5
    assert best.settings["loss"] == "cross-entropy (inferred)"


def test_numpy_numbers_are_numbers(tmp_path):
    problem = tanh_net()
    result = sharpness.top_eigenvalues(problem.model, problem.loader, k=np.int64(2), tol=np.float32(1e-2))
    result.save(tmp_path / "a")
    assert sharpness.EigenResult.load(tmp_path / "a").settings["k"] == 2
    sharp = sharpness.epsilon_sharpness(problem.model, problem.loader, epsilon=np.float32(1e-3), max_iter=np.int64(2))
    sharp.save(tmp_path / "b")
    assert sharpness.EpsilonSharpnessResult.load(tmp_path / "b").settings["max_iter"] == 2


# --- rounding ------------------------------------------------------------------------------------------------------


def trained(target, seed):
    """A ReLU classifier of digits, trained until its float32 curvature is a small difference of large numbers."""
    torch.manual_seed(seed)
    x, y = sharpness.datasets.digits(num_train=300)[0].tensors
    model = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(4000):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if loss < target:
            break
    return model, x, y


@pytest.mark.parametrize("target", [1e-2, 1e-4, 1e-5])
@pytest.mark.parametrize("seed", [0, 1])
def test_float32_intervals_hold_an_eigenvalue_of_the_float64_hessian(target, seed):
    model, x, y = trained(target, seed)
    result = sharpness.top_eigenvalues(model, batches(x, y, sizes=(200, 100)), k=4)
    exact = sharpness.top_eigenvalues(copy.deepcopy(model).double(), [(x.double(), y)], k=30, tol=1e-7)
    for low, high in result.interval.tolist():
        assert ((low <= exact.eigenvalues) & (exact.eigenvalues <= high)).any()
    assert result.settings["rounding"] < 1e-3 * result.eigenvalues[0]


def test_intervals_of_200_random_float32_networks_hold_an_eigenvalue():
    missed = []
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        width, classes = (int(torch.randint(2, 7, (1,), generator=g)) for _ in "wc")
        activation = [nn.Tanh, nn.ReLU, nn.GELU][seed % 3]
        model = nn.Sequential(nn.Linear(3, width), activation(), nn.Linear(width, classes))
        for p in model.parameters():
            p.data.mul_(10 ** (2 * torch.rand(1, generator=g).item() - 0.5))
        x, y = torch.randn(17, 3, generator=g), torch.randint(0, classes, (17,), generator=g)
        wide = copy.deepcopy(model).double()
        hessian = dense_hessian(wide, lambda m, x=x, y=y: nn.functional.cross_entropy(m(x.double()), y))
        exact = torch.linalg.eigvalsh(hessian)
        loader = batches(x, y, sizes=(7, 7, 3))
        k = 1 + seed % 3
        for method in ("lanczos", "power"):
            result = sharpness.top_eigenvalues(
                model, loader, k=k, which=WHICH[seed % 4], method=method, num_matvecs=60, on_failure="ignore"
            )
            for low, high in result.interval.tolist():
                if not ((low <= exact) & (exact <= high)).any():
                    missed.append((seed, method, low, high))
    assert missed == []


def test_a_model_that_cannot_run_in_float64_gets_a_wider_allowance():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return torch.nn.functional.linear(x.float(), self.layer.weight, self.layer.bias)

    loader = [(x.float(), y) for x, y in batches(features(3), torch.arange(11) % 3)]
    torch.manual_seed(0)
    single = sharpness.top_eigenvalues(Single(), loader)
    torch.manual_seed(0)
    plain = sharpness.top_eigenvalues(nn.Linear(3, 3), loader)
    assert single.converged
    assert single.settings["rounding"] > plain.settings["rounding"]


def test_warnings_point_at_the_line_of_the_caller():
    problem = tanh_net()
    calls = [
        lambda: sharpness.top_eigenvalues(problem.model, problem.loader, k=3, num_matvecs=4),
        lambda: sharpness.top_eigenvalues(problem.model, problem.loader, k=3, num_matvecs=6, method="power"),
        lambda: linalg.lanczos(HessianOperator(Objective(problem.model, problem.loader)), 3, num_matvecs=4),
    ]
    for call in calls:
        with pytest.warns(ConvergenceWarning) as caught:
            call()
        assert caught[0].filename == __file__


def test_options_that_cannot_be_accepted():
    problem = tanh_net()
    n = len(problem.hessian)
    model, loader = problem.model, problem.loader
    with pytest.raises(
        ArgumentError, match=rf"`k` must be between 1 and {n} \(the number of parameters\), got {n + 1}"
    ):
        sharpness.top_eigenvalues(model, loader, k=n + 1)
    with pytest.raises(
        ArgumentError, match="`method` must be one of 'lanczos', 'power', 'lobpcg', 'arpack', 'dense', 'pyhessian', got"
    ):
        sharpness.top_eigenvalues(model, loader, method="qr")
    with pytest.raises(ArgumentError, match="Did you mean 'largest'"):
        sharpness.top_eigenvalues(model, loader, which="larges")
    with pytest.raises(ArgumentError, match=r"`loader` is missing. Pass \(model, loader\), or a single Objective"):
        sharpness.top_eigenvalues(model)
    with pytest.raises(ArgumentError, match="brings its own data and options, got mode, seed as well"):
        sharpness.top_eigenvalues(Objective(model, loader), seed=3, mode="train")
    with pytest.raises(ArgumentError, match='method="dense" would need'):
        sharpness.top_eigenvalues(model, loader, method="dense", memory=100)


# --- PyHessian -----------------------------------------------------------------------------------------------------


def used_only(seed=0):
    """A network that PyHessian can run on: every parameter is used."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_pyhessian_is_set_side_by_side_with_our_residuals():
    model, loader = used_only(), batches(features(3), torch.arange(11) % 3)
    model(loader[0][0]).square().sum().backward()  # gradients that are there to be lost
    exact = sharpness.top_eigenvalues(model, loader, k=2, which="magnitude", method="dense", vectors=True)
    with assert_untouched(model):
        result = sharpness.top_eigenvalues(
            model,
            loader,
            k=2,
            which="magnitude",
            method="pyhessian",
            tol=1e-8,
            num_matvecs=2000,
            vectors=True,
            on_failure="ignore",
        )
    torch.testing.assert_close(result.eigenvalues, exact.eigenvalues, rtol=1e-3, atol=0)
    operator = HessianOperator(Objective(model, loader))
    for value, row, residual in zip(result.eigenvalues, result.eigenvectors, result.residuals, strict=True):
        true = torch.linalg.vector_norm(operator @ row - value * row)
        assert true <= residual <= true + 1e-12
    assert 4 <= result.num_matvecs <= 2000
    assert result.num_passes >= result.num_matvecs


def test_pyhessian_that_stops_early_is_not_called_converged():
    model, loader = used_only(), batches(features(3), torch.arange(11) % 3)
    with pytest.warns(ConvergenceWarning, match="PyHessian stops when the value moves little, whatever the residual"):
        result = sharpness.top_eigenvalues(model, loader, k=3, method="pyhessian", tol=1e-3)
    assert not result.converged


def test_what_pyhessian_cannot_do_is_refused():
    model, loader = used_only(), batches(features(3), torch.arange(11) % 3)
    ask = {"method": "pyhessian"}
    with pytest.raises(ArgumentError, match="largest magnitude only, got which='smallest'"):
        sharpness.top_eigenvalues(model, loader, which="smallest", **ask)
    with pytest.raises(ArgumentError, match="eval mode only, got mode='train'"):
        sharpness.top_eigenvalues(model, loader, mode="train", **ask)
    with pytest.raises(ArgumentError, match=r"knows no precision='tf32'"):
        sharpness.top_eigenvalues(model, loader, precision="tf32", **ask)
    with pytest.raises(ModelError, match=r"needs a loss \(outputs, targets\)"):
        sharpness.top_eigenvalues(model, loader, batch_loss=lambda m, b: (m(b[0]).square().mean(), 1), **ask)
    problem = tanh_net()
    with assert_untouched(problem.model), pytest.raises(ModelError, match="PyHessian failed on this model"):
        sharpness.top_eigenvalues(problem.model, problem.loader, **ask)  # an unused parameter


def test_a_start_is_for_lanczos_and_not_for_a_file(tmp_path):
    model, data = nn.Linear(2, 1, bias=False), [(torch.eye(2), torch.zeros(2, 1))]
    near = sharpness.top_eigenvalues(model, data, vectors=True).eigenvectors
    assert sharpness.top_eigenvalues(model, data, start=near).settings["warm_start"]
    with pytest.raises(ArgumentError, match='`start` is for method="lanczos", got method=.power'):
        sharpness.top_eigenvalues(model, data, start=near, method="power")
    with pytest.raises(ArgumentError, match="`start` and `checkpoint` exclude each other"):
        sharpness.top_eigenvalues(model, data, start=near, checkpoint=tmp_path / "file")
    with pytest.raises(ArgumentError, match=r"`start` must be a tensor of shape \(2,\)"):
        sharpness.top_eigenvalues(model, data, start=torch.ones(3))
