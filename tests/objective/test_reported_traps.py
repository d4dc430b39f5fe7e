"""Traps that a tester set, each of which once gave a wrong number, a broken certificate or a raw error."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import sharpness
from sharpness import HessianOperator, Objective
from sharpness.errors import ArgumentError, ModelError
from sharpness.linalg import DenseOperator, dense, lanczos, power_iteration
from tests.objective.dense import double_backward_hessian
from tests.zoo import batches, features, rotated, tanh_net

X, Y = features(3), torch.arange(11) % 3
LOADER = batches(X, Y)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


# --- models --------------------------------------------------------------------------------------------------------


class ByHand(nn.Module):
    """Weight normalisation by its formula."""

    def __init__(self, normed):
        super().__init__()
        direction, size = normed.weight_v, normed.weight_g
        self.v, self.g = nn.Parameter(direction.detach().clone()), nn.Parameter(size.detach().clone())
        self.bias = nn.Parameter(normed.bias.detach().clone())

    def forward(self, x):
        weight = self.v * (self.g / self.v.square().sum(1, keepdim=True).sqrt())
        return functional.linear(x, weight, self.bias)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_weight_normalisation_is_differentiated_by_its_formula(method):
    torch.manual_seed(0)
    old = nn.utils.weight_norm(nn.Linear(3, 3)).double()
    new = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)).double()
    with torch.no_grad():
        new.parametrizations.weight.original0.copy_(old.weight_g)
        new.parametrizations.weight.original1.copy_(old.weight_v)
        new.bias.copy_(old.bias)
    last = nn.Linear(3, 3).double()
    models = [nn.Sequential(first, nn.Tanh(), last) for first in (ByHand(old), old, new)]
    hand, *normed = (
        sharpness.top_eigenvalues(model, LOADER, method=method, k=2, tol=1e-6, num_matvecs=4000) for model in models
    )
    for result in normed:
        assert result.converged
        torch.testing.assert_close(result.eigenvalues, hand.eigenvalues, rtol=1e-6, atol=0)
    for model in models:
        matrix = HessianOperator(Objective(model, LOADER)).to_dense()
        torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-12)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return self.inner[2](checkpoint(lambda z: self.inner[1](self.inner[0](z)), x, use_reentrant=True))


def test_a_reentrant_checkpoint_on_plain_inputs_is_found_out():
    for call in (sharpness.top_eigenvalues, sharpness.epsilon_sharpness):
        with pytest.raises(ModelError, match="on inputs that need no gradient, .* Pass use_reentrant=False"):
            call(Checkpointed(), LOADER)
    with pytest.raises(ModelError, match="on inputs that need no gradient"):
        sharpness.per_layer("top_eigenvalues", Checkpointed(), LOADER)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_tensors_in_a_batch():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, edges, x):
            return self.inner(edges @ x)

    edges = torch.eye(11, dtype=torch.float64) + torch.eye(11, dtype=torch.float64).flip(0)
    whole = sharpness.top_eigenvalues(Graph(), [(edges, X, Y)]).eigenvalues
    for sparse in (edges.to_sparse(), edges.to_sparse_csr()):
        for memory in (0, "auto", 10**6):
            found = sharpness.top_eigenvalues(Graph(), [(sparse, X, Y)], memory=memory).eigenvalues
            torch.testing.assert_close(found, whole)


# --- losses --------------------------------------------------------------------------------------------------------


def test_ignored_targets_of_an_unknown_loss_are_found_in_any_batch():
    first = torch.tensor([1, 2, 1, 2, 1, 2, 1, 2, 0, 0, 1])  # the third batch ignores
    with pytest.raises(ArgumentError, match="is no plain mean over samples"):
        sharpness.top_eigenvalues(net(), batches(X, first), lambda o, t: functional.cross_entropy(o, t, ignore_index=0))


def test_a_batch_without_a_term_does_not_spoil_the_intervals():
    single = [(x.float(), y) for x, y in LOADER]
    model = net().float()
    plain = sharpness.top_eigenvalues(model, single)
    empty = (torch.ones(4, 3), torch.full((4,), -100))
    found = sharpness.top_eigenvalues(model, [empty, *single], nn.CrossEntropyLoss())
    assert torch.isfinite(found.interval).all()
    torch.testing.assert_close(found.eigenvalues, plain.eigenvalues)

    def masked(model, batch):
        x, y, mask = batch
        each = functional.cross_entropy(model(x), y, reduction="none")
        return (each * mask).sum() / mask.sum(), mask.sum()

    loader = [(x, y, torch.full((len(y),), keep)) for keep, (x, y) in zip((0.0, 1.0, 1.0), single, strict=True)]
    assert torch.isfinite(sharpness.top_eigenvalues(model, loader, batch_loss=masked).interval).all()


def test_a_criterion_and_a_model_that_returns_more_are_told_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            return self.inner(x), x

    with pytest.raises(ModelError, match=r"the model returns tuple\(.*and CrossEntropyLoss takes one tensor\. Pass"):
        sharpness.top_eigenvalues(Two(), LOADER, nn.CrossEntropyLoss())


def test_a_criterion_takes_the_classes_of_a_language_model_where_they_are():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 10).double()

        def forward(self, x):
            return self.layer(x).view(-1, 2, 5)

    labels = torch.stack([Y, Y.flip(0)], dim=1)
    found = sharpness.top_eigenvalues(Tokens(), batches(X, labels), nn.CrossEntropyLoss(), curvature="fisher")
    plain = sharpness.top_eigenvalues(Tokens(), batches(X, labels))
    torch.testing.assert_close(found.eigenvalues, plain.eigenvalues, rtol=1e-6, atol=0)  # linear: they are one matrix


# --- options and arguments -----------------------------------------------------------------------------------------


def test_criteria_that_changed_are_measured_as_they_are_now():
    criterion = nn.CrossEntropyLoss(weight=torch.ones(3, dtype=torch.float64))
    objective = Objective(net(), LOADER, criterion)
    v = torch.ones(objective.n, dtype=torch.float64)
    before = objective.hvp(v)
    criterion.weight[0] = 10.0
    after = objective.hvp(v)
    assert torch.equal(after, Objective(net(), LOADER, criterion).hvp(v))
    assert not torch.equal(after, before)


def test_a_model_that_was_moved_is_refused():
    model = net()
    objective = Objective(model, LOADER)
    model.float()
    with pytest.raises(ArgumentError, match="was moved to another device or dtype after this Objective was made"):
        objective.value()


def test_half_precision_that_would_change_nothing_is_refused():
    with pytest.raises(ArgumentError, match="`precision` is 'bfloat16', and autocast leaves a float64 model"):
        Objective(net(), LOADER, precision="bfloat16")


class Stubborn(nn.Module):
    """Sizes and dtypes written into a model."""

    def __init__(self, error):
        super().__init__()
        self.inner, self.error = net().float(), error

    def forward(self, x):
        if x.shape[0] not in (4, 3) or x.dtype != torch.float32:
            raise self.error("not what I was made for")
        return self.inner(x)


@pytest.mark.parametrize("error", [AssertionError, KeyError, AttributeError])
def test_a_look_at_a_few_samples_breaks_no_run(error):
    single = [(x.float(), y) for x, y in LOADER]
    assert sharpness.top_eigenvalues(Stubborn(error), single).converged
    assert Objective(Stubborn(error), single).graph_size() is None
    with pytest.raises(ArgumentError, match="into pieces that the model cannot take"):
        sharpness.top_eigenvalues(Stubborn(error), single, microbatch_size=2)


def test_batches_that_begin_with_a_single_number():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net().float()

        def forward(self, t, x):
            return self.inner(x) / t

    loader = [{"t": torch.tensor(2.0), "x": x.float(), "labels": y} for x, y in LOADER]
    assert sharpness.top_eigenvalues(Tempered(), loader).converged


def test_pieces_are_checked_on_the_first_batch_that_is_cut():
    class Seeing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            return self.inner(x - x.mean(dim=0))

    with pytest.raises(ArgumentError, match="changes the loss of a batch"):
        sharpness.top_eigenvalues(Seeing(), batches(X, Y, sizes=(2, 9)), microbatch_size=2)


def test_numbers_of_numpy_fit_into_a_checkpoint(tmp_path):
    options = {"seed": np.int64(0), "max_batches": np.int64(2), "k": np.int64(2)}
    first = sharpness.top_eigenvalues(net(), LOADER, checkpoint=tmp_path / "products", **options)
    again = sharpness.top_eigenvalues(net(), LOADER, checkpoint=tmp_path / "products", seed=0, max_batches=2, k=2)
    assert torch.equal(first.eigenvalues, again.eigenvalues)


def test_what_is_no_operator_is_refused():
    for algorithm in (lanczos, power_iteration, dense):
        with pytest.raises(ArgumentError, match="`operator` must be a LinearOperator, got Tensor"):
            algorithm(torch.eye(3))
    with pytest.raises(ArgumentError, match="`objective` must be an Objective, got Sequential"):
        HessianOperator(net())
    with pytest.raises(ArgumentError, match="the operator multiplies a vector of 3 entries, got list"):
        DenseOperator(torch.eye(3)) @ [1.0, 2.0, 3.0]


class Untouchable:
    def __iter__(self):
        raise AssertionError("data were touched")


@pytest.mark.parametrize(
    "options", [{"num_matvecs": 1, "k": 2}, {"memory": 10}, {"basis_device": "nowhere"}, {"basis_dtype": torch.int8}]
)
def test_lanczos_refuses_before_data_are_touched(options, tmp_path):
    with pytest.raises(ArgumentError):
        sharpness.top_eigenvalues(net(), Untouchable(), checkpoint=tmp_path / "products", **options)


# --- certificates --------------------------------------------------------------------------------------------------


def test_power_iteration_at_the_wrong_end_is_not_called_converged():
    spectrum = torch.tensor([1e-9, 4.6e-7, 2.15e-4, 0.1], dtype=torch.float64)
    wrong = 0
    for seed in range(40):
        operator = DenseOperator(rotated(spectrum, seed))
        result = power_iteration(operator, 2, which="smallest", tol=1e-4, num_matvecs=5, seed=seed, on_failure="ignore")
        off = (result.eigenvalues - spectrum[:2]).abs() > 1e-6
        wrong += bool(off.any())
        assert not (result.converged and off.any())
    assert wrong > 10


def test_a_subset_that_is_not_converged_has_no_bracket():
    problem = tanh_net()
    ask = {"max_batches": 6, "sample_interval": True}
    rough = sharpness.top_eigenvalues(problem.model, problem.loader * 4, num_matvecs=1, on_failure="ignore", **ask)
    assert rough.sample_interval is None
    pieces = sharpness.top_eigenvalues(problem.model, problem.loader * 4, microbatch_size=2, **ask).sample_interval
    assert (pieces.num_batches, pieces.num_held_out) == (6, 6)
    assert pieces.low < pieces.inner < pieces.high


def test_the_oracle_of_these_tests_agrees():
    exact = double_backward_hessian(net(), lambda m: functional.cross_entropy(m(X), Y))
    torch.testing.assert_close(HessianOperator(Objective(net(), LOADER)).to_dense(), exact, rtol=1e-9, atol=1e-12)
