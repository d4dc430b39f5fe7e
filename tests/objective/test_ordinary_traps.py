"""Models, losses and loaders that people really have, each of which once gave a wrong number or a raw error."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import sharpness
from sharpness import Objective
from sharpness.errors import ArgumentError, DataError, ModelError
from tests.checks import assert_untouched
from tests.zoo import batches, dense_hessian, features, tanh_net

X, Y = features(3), torch.arange(11) % 3
LOADER = batches(X, Y)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def exact(model, loss):
    return dense_hessian(model, lambda m: loss(m(X), Y))


def product(model, loss_fn=None, loader=LOADER, **options):
    objective = Objective(model, loader, loss_fn, **options)
    v = torch.linspace(-1, 1, objective.n, dtype=torch.float64)
    return objective.hvp(v), v


def test_a_subclass_of_cross_entropy_computes_what_it_computes():
    class Focal(nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            each = functional.cross_entropy(outputs, targets, reduction="none")
            return ((1 - torch.exp(-each)) ** 2 * each).mean()

    found, v = product(net(), Focal())
    torch.testing.assert_close(found, exact(net(), Focal()) @ v)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.last = nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        return self.last(checkpoint(self.inner, x, use_reentrant=False))


def test_checkpointed_blocks_run_again_with_the_tensors_of_the_moment():
    torch.manual_seed(0)
    model = Checkpointed()
    plain = nn.Sequential(model.inner, model.last)
    at = Objective(plain, LOADER).vector() + 0.3
    for mode in ("eval", "train"):
        with assert_untouched(model):
            value, gradient = Objective(model, LOADER, mode=mode).value_and_gradient(at)
            found, _ = product(model, mode=mode)
        expected, slope = Objective(plain, LOADER, mode=mode).value_and_gradient(at)
        assert value == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(gradient, slope)
        torch.testing.assert_close(found, product(plain, mode=mode)[0])


def test_a_reentrant_checkpoint_is_explained():
    class Late(Checkpointed):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3).double()

        def forward(self, x):
            return self.last(checkpoint(self.inner, self.first(x), use_reentrant=True))

    with pytest.raises(ModelError, match="Pass use_reentrant=False"):
        product(Late())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        out = self.body(x)
        return out, out.square()


def test_containers_of_targets_and_outputs_count_their_samples():
    def both(outputs, targets):
        return functional.cross_entropy(outputs[0], targets[0]) + functional.mse_loss(outputs[1], targets[1])

    goal = features(3, seed=8)
    whole, _ = product(Two(), both, [(X, (Y, goal))])
    split, _ = product(Two(), both, [(x, (y, g)) for x, y, g in batches(X, Y, goal)])
    torch.testing.assert_close(split, whole)
    summed, _ = product(Two(), lambda o, t: functional.cross_entropy(o[0], t, reduction="sum"))
    torch.testing.assert_close(summed, product(net())[0])


def test_losses_that_weigh_or_ignore_targets_unseen_are_refused():
    weights = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    for loss in (
        lambda o, t: functional.cross_entropy(o, t, weight=weights),
        lambda o, t: functional.cross_entropy(o, t, ignore_index=0),
    ):
        with pytest.raises(ArgumentError, match="is no plain mean over samples: .* weighted or ignored"):
            product(net(), loss)
    known = functools.partial(functional.cross_entropy, weight=weights)
    found, v = product(net(), known)
    torch.testing.assert_close(found, exact(net(), known) @ v)


def test_classes_in_either_of_two_dimensions_are_not_guessed():
    model = nn.Sequential(nn.Embedding(7, 7)).double()
    words = torch.randint(0, 7, (5, 7))
    with pytest.raises(DataError, match="with the classes in either of the last two dimensions"):
        product(model, None, [(words, words)])


def test_a_loss_may_take_its_batch_apart():
    def taking(model, batch):
        labels = batch.pop("labels")
        return functional.cross_entropy(model(input=batch["input"]), labels), len(labels)

    loader = [{"input": x, "labels": y} for x, y in LOADER]
    objective = Objective(net(), loader, batch_loss=taking)
    v = torch.ones(objective.n, dtype=torch.float64)
    assert torch.equal(objective.hvp(v), objective.hvp(v))
    assert "labels" in loader[0]


def test_autocast_around_the_call_changes_nothing():
    model, loader = net().float(), [(x.float(), y) for x, y in LOADER]
    plain = sharpness.top_eigenvalues(model, loader)
    with torch.autocast("cpu"):
        inside = sharpness.top_eigenvalues(model, loader)
    assert torch.equal(inside.eigenvalues, plain.eigenvalues)


def test_a_forward_pass_may_take_derivatives_of_its_own():
    def residual(model, x):
        x = x.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.square().mean(), len(x)

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    assert sharpness.top_eigenvalues(model, batches(X), batch_loss=residual).converged
    assert sharpness.epsilon_sharpness(model, batches(X), batch_loss=residual).value > 0


def test_modules_that_write_to_their_weights_write_to_copies():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3)).double()
    model[0].weight.data.mul_(5)
    loader = [(torch.randint(0, 10, (6, 2)), torch.arange(6) % 3)]
    with assert_untouched(model):
        sharpness.top_eigenvalues(model, loader, on_failure="ignore")
        sharpness.epsilon_sharpness(model, loader, max_iter=2)


def test_weights_that_are_loaded_again_unchanged():
    model = net()
    objective = Objective(model, LOADER)
    v = torch.ones(objective.n, dtype=torch.float64)
    before = objective.hvp(v)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(objective.hvp(v), before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_tensors_that_modules_keep_as_attributes_are_restored():
    normed = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3))).double()
    normed(X)
    recurrent = nn.LSTM(3, 3, batch_first=True).double()
    objective = Objective(normed, LOADER)
    attribute = normed[0].weight
    objective.value(objective.vector() + 1)
    assert normed[0].weight is attribute
    weights = list(recurrent._flat_weights)
    lstm = Objective(recurrent, [(X[:, None], Y)], batch_loss=lambda m, b: (m(b[0])[0].square().mean(), len(b[0])))
    lstm.hvp(torch.ones(lstm.n, dtype=torch.float64))
    assert all(a is b for a, b in zip(recurrent._flat_weights, weights, strict=True))


def test_a_loader_that_can_be_walked_only_once_is_named():
    class Stored(IterableDataset):
        def __init__(self):
            self.stream = iter(list(zip(X, Y, strict=True)))

        def __iter__(self):
            return self.stream

    with pytest.raises(DataError, match="on the first walk and none on a later one: it can be walked only once"):
        sharpness.top_eigenvalues(net(), DataLoader(Stored(), batch_size=4))


def test_a_data_set_in_place_of_a_loader_is_named():
    with pytest.raises(DataError, match=r"is a data set \(TensorDataset\), .* Pass DataLoader"):
        Objective(net(), TensorDataset(X, Y))


def test_a_loss_with_parameters_of_its_own_must_still_depend_on_the_model():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, outputs, targets):
            return functional.cross_entropy(self.scale * outputs.detach(), targets)

    for call in (sharpness.top_eigenvalues, sharpness.epsilon_sharpness):
        with pytest.raises(ModelError, match="the loss does not depend on the parameters"):
            call(net(), LOADER, Head())


def test_vectors_of_another_size_are_refused():
    objective = Objective(net(), LOADER)
    for call in (objective.hvp, objective.value, objective.gradient):
        with pytest.raises(ArgumentError, match=rf"a vector of {objective.n} entries is needed"):
            call(torch.ones(3))


def test_an_interrupted_first_walk_is_no_excuse_to_keep_nothing_later():
    problem, calls = tanh_net(), [0]

    class Interrupted(list):
        def __iter__(self):
            calls[0] += 1
            yield from problem.loader[:1]
            if calls[0] == 1:
                raise KeyboardInterrupt
            yield from problem.loader[1:]

    objective = Objective(problem.model, Interrupted())
    with pytest.raises(KeyboardInterrupt):
        objective.value()
    assert objective.value() == Objective(problem.model, problem.loader).value()
    assert objective.batches.kept
