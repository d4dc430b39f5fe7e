import math
import random

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sharpness import Objective
from sharpness.errors import (
    ArgumentError,
    DataError,
    DeterminismWarning,
    ModelError,
    NonFiniteError,
)
from tests.checks import assert_untouched
from tests.zoo import Dressed, batches, features, tanh_net


def test_value_and_gradient_are_those_of_the_whole_data_at_any_point():
    problem = tanh_net()
    x, y = (torch.cat(parts) for parts in zip(*problem.loader, strict=True))
    objective = Objective(problem.model, problem.loader)
    loss = nn.functional.cross_entropy(problem.model(x), y)
    named = [p for p in problem.model.parameters() if p.requires_grad]
    exact = torch.autograd.grad(loss, named, allow_unused=True)
    flat = torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(named, exact, strict=True)])
    value, gradient = objective.value_and_gradient()
    assert value == pytest.approx(loss.item(), rel=1e-14)
    torch.testing.assert_close(gradient, flat, rtol=1e-12, atol=1e-15)

    step = torch.linspace(-1e-3, 2e-3, objective.n, dtype=torch.float64)
    at = objective.vector() + step
    ahead, slope = objective.value_and_gradient(at)
    assert ahead == pytest.approx(objective.value(at), rel=1e-14)
    trapezium = (gradient + slope) @ step / 2
    assert ahead - value == pytest.approx(trapezium.item(), rel=1e-4)


def test_float32_and_half_precision_are_measured_in_float32():
    problem = tanh_net()
    loader = [(x.float(), y) for x, y in problem.loader]
    single = Objective(problem.model.float(), loader)
    v = torch.linspace(-1, 1, single.n)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.hvp(v).double(), problem.hessian @ v.double(), rtol=1e-4, atol=1e-5)

    half = problem.model.bfloat16()
    with assert_untouched(half):
        product = Objective(half, [(x.bfloat16(), y) for x, y in loader]).hvp(v)
    assert product.dtype == torch.float32
    assert (product.double() - problem.hessian @ v.double()).norm() < 0.05 * (problem.hessian @ v.double()).norm()


def test_graphs_are_kept_only_while_the_memory_lasts():
    problem = tanh_net()
    v = torch.ones(len(problem.hessian), dtype=torch.float64)
    kept = {}
    for memory in (0, "1MiB", "auto"):
        objective = Objective(problem.model, problem.loader, memory=memory)
        products = [objective.hvp(v) for _ in range(3)]
        assert torch.equal(products[0], products[1])
        assert torch.equal(products[0], products[2])
        assert objective.num_passes == 3
        kept[memory] = objective.provenance()["kept_graphs"]
    assert kept == {0: 0, "1MiB": 3, "auto": 3}


def test_some_graphs_are_kept_where_not_all_fit():
    problem = tanh_net()
    v = torch.ones(len(problem.hessian), dtype=torch.float64)
    found = set()
    for memory in range(200, 12_000, 50):
        objective = Objective(problem.model, problem.loader, memory=memory)
        torch.testing.assert_close(objective.hvp(v), problem.hessian @ v)
        torch.testing.assert_close(objective.hvp(v), problem.hessian @ v)
        found.add(objective.provenance()["kept_graphs"])
    assert found == {0, 1, 2, 3}


def test_a_changed_model_is_measured_as_it_is_now():
    problem = tanh_net()
    objective = Objective(problem.model, problem.loader)
    v = torch.ones(objective.n, dtype=torch.float64)
    before, value = objective.hvp(v), objective.value()
    for change in (
        lambda: problem.model.core.first.weight.data.mul_(1.5),  # no version counter moves
        lambda: problem.model.frozen.data.mul_(1.5),
        lambda: problem.model.one.mul_(1.5),
        lambda: setattr(problem.model.core.last.bias, "data", torch.ones(3, dtype=torch.float64)),
    ):
        change()
        fresh = Objective(problem.model, problem.loader)
        assert torch.equal(objective.hvp(v), fresh.hvp(v))
        assert objective.value() == fresh.value() != value
        assert not torch.equal(objective.hvp(v), before)


def test_unused_parameters_are_zero_rows_and_named():
    problem = tanh_net()
    objective = Objective(problem.model, problem.loader)
    product = objective.hvp(torch.ones(objective.n, dtype=torch.float64))
    assert torch.equal(product[:2], torch.zeros(2, dtype=torch.float64))
    assert objective.provenance()["unused_parameters"] == ["unused"]


def test_a_parameter_that_enters_linearly_has_zero_curvature():
    model = nn.Linear(3, 1, bias=False).double()
    objective = Objective(model, batches(features(3)), batch_loss=lambda m, x: (m(x).mean(), len(x)))
    assert torch.equal(objective.hvp(torch.ones(3, dtype=torch.float64)), torch.zeros(3, dtype=torch.float64))


# --- state ---------------------------------------------------------------------------------------------------------


class Raises(nn.Module):
    """Raises in the second forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()
        self.calls = [0]
        self.drop.eval()  # flags differ between submodules

    def forward(self, x):
        self.calls[0] += 1
        if self.calls[0] == 2:
            raise KeyboardInterrupt
        return self.drop(self.norm(self.layer(x)))


def test_a_derivative_that_is_not_implemented_is_explained():
    model = nn.Linear(3, 3)
    loader = [(torch.ones(2, 3), torch.tensor([0, 1]))]
    with pytest.raises(ModelError, match=r"cannot be differentiated twice: derivative for aten::multi_margin_loss"):
        Objective(model, loader, nn.MultiMarginLoss()).hvp(torch.ones(12))


@pytest.mark.parametrize("mode", ["eval", "train", "as_is"])
@pytest.mark.parametrize("call", ["hvp", "value", "value_and_gradient", "check"])
def test_nothing_is_left_changed_after_an_interruption(mode, call):
    model = Raises()
    model(torch.randn(4, 3)).sum().backward()  # gradients and statistics are there to be lost
    model.calls[0] = 0
    loader = [(torch.randn(4, 3), torch.arange(3).repeat(2)[:4])] * 3
    objective = Objective(model, loader, mode=mode)
    with assert_untouched(model), pytest.raises(KeyboardInterrupt):
        getattr(objective, call)(*([torch.ones(objective.n)] if call == "hvp" else []))


def test_batch_statistics_in_train_mode_change_the_loss_but_not_the_buffers():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    model[1].running_var.mul_(9)
    loader = batches(features(3), torch.arange(11) % 3)
    with assert_untouched(model):
        losses = {mode: Objective(model, loader, mode=mode).value() for mode in ("eval", "train")}
    x, y = loader[0]
    alone = nn.functional.cross_entropy(model.train()(x), y).item()
    assert losses["train"] != pytest.approx(losses["eval"])
    assert Objective(model, loader[:1], mode="as_is").value() == pytest.approx(alone, rel=1e-12)


def test_dropout_in_train_mode_is_one_fixed_draw_and_said_to_be():
    model = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    for memory in ("auto", 0):
        objective = Objective(model, batches(features(3), torch.arange(11) % 3), mode="train", memory=memory)
        v = torch.ones(objective.n, dtype=torch.float64)
        assert torch.equal(objective.hvp(v), objective.hvp(v))
        with pytest.warns(DeterminismWarning, match=r"the loss changes from pass to pass: .* then .* \(difference "):
            objective.check()


# --- loaders -------------------------------------------------------------------------------------------------------


class Augmented(Dataset):
    """Adds noise to each image, anew each time it is asked."""

    def __init__(self, x, y, noise):
        self.x, self.y, self.noise = x, y, noise

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + self.noise * torch.randn(self.x.shape[1], dtype=self.x.dtype), self.y[i]


@pytest.mark.parametrize("generator", [None, 7])
def test_full_shuffling_is_fine_and_does_not_warn(generator):
    problem = tanh_net()
    x, y = (torch.cat(parts) for parts in zip(*problem.loader, strict=True))
    own = None if generator is None else torch.Generator().manual_seed(generator)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=own)
    state = None if own is None else own.get_state()
    v = torch.ones(len(problem.hessian), dtype=torch.float64)
    for memory in ("auto", 0):
        objective = Objective(problem.model, loader, memory=memory)
        torch.testing.assert_close(objective.hvp(v), problem.hessian @ v)
        objective.check()
    assert own is None or torch.equal(own.get_state(), state)


def test_augmentation_and_shuffled_subsets_warn_and_are_one_fixed_draw():
    problem = tanh_net()
    x, y = (torch.cat(parts) for parts in zip(*problem.loader, strict=True))
    v = torch.ones(len(problem.hessian), dtype=torch.float64)
    for loader, options in (
        (DataLoader(Augmented(x, y, 0.5), batch_size=4), {}),
        (DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True), {"max_batches": 1}),
        (
            DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=torch.Generator()),
            {"max_batches": 1},
        ),
    ):
        for memory in ("auto", 0):
            objective = Objective(problem.model, loader, memory=memory, **options)
            assert torch.equal(objective.hvp(v), objective.hvp(v))
            with pytest.warns(DeterminismWarning, match="Turn off augmentation"):
                objective.check()
            objective.check()  # once is enough


def test_graphs_are_never_mixed_with_batches_of_another_order():
    """A loader whose order nobody can fix, with batches too large to keep but graphs that would fit."""
    problem = tanh_net()
    x, y = (torch.cat(parts) for parts in zip(*problem.loader, strict=True))

    class Wild:
        order = random.Random(3)

        def __iter__(self):
            positions = torch.tensor(self.order.sample(range(len(x)), len(x)))
            for part in positions.split(4):
                yield {"x": x[part], "labels": y[part], "large": torch.zeros(10**5)}

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = problem.model

        def forward(self, x):
            return self.inner(x)

    objective = Objective(Named(), Wild(), memory=10**6)
    v = torch.ones(objective.n, dtype=torch.float64)
    for _ in range(3):
        torch.testing.assert_close(objective.hvp(v), problem.hessian @ v)
    assert objective.provenance()["kept_graphs"] == 0


def test_loaders_that_cannot_be_used():
    model = nn.Linear(3, 3)
    batch = (torch.ones(2, 3), torch.tensor([0, 1]))
    with pytest.raises(DataError, match=r"one-shot iterator \(generator\); .* Pass the DataLoader itself, or list"):
        Objective(model, (b for b in [batch]))
    with pytest.raises(DataError, match="looks like one batch"):
        Objective(model, batch)
    with pytest.raises(DataError, match="a single tensor"):
        Objective(model, batch[0])
    with pytest.raises(DataError, match="is a mapping"):
        Objective(model, {"x": batch[0]})
    with pytest.raises(DataError, match="must yield batches, got int"):
        Objective(model, 3)
    with pytest.raises(DataError, match="the loader yields no batch"):
        Objective(model, []).value()
    with pytest.raises(DataError, match=r"a batch of type str has no known structure. Yield \(inputs, targets\)"):
        Objective(model, ["abc"]).value()
    with pytest.raises(DataError, match="holds no targets: tensor"):
        Objective(model, [batch[0]]).value()


# --- models and losses ---------------------------------------------------------------------------------------------


def test_models_that_have_nothing_to_measure():
    loader = [(torch.ones(2, 3), torch.tensor([0, 1]))]
    with pytest.raises(ArgumentError, match="`model` must be a torch.nn.Module, got function"):
        Objective(lambda x: x, loader)
    with pytest.raises(ModelError, match=r"Linear has no trainable parameters; .* model.requires_grad_\(True\)"):
        Objective(nn.Linear(3, 3).requires_grad_(False), loader)
    with pytest.raises(ModelError, match="Run one forward pass to initialise lazy layers"):
        Objective(nn.LazyLinear(3), loader)
    complex_model = nn.Linear(3, 3, dtype=torch.complex64)
    with pytest.raises(ModelError, match="parameter 'weight' is torch.complex64; only real floating point"):
        Objective(complex_model, loader)


def test_losses_that_cannot_be_differentiated():
    model = nn.Linear(3, 3)
    loader = [(torch.ones(2, 3), torch.tensor([0, 1]))]
    with pytest.raises(ModelError, match="the loss must be a real scalar tensor, got tensor"):
        Objective(model, loader, lambda o, t: o.sum(1)).value()
    with pytest.raises(ArgumentError, match='reduction="none"'):
        Objective(model, loader, nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ModelError, match="the loss does not depend on the parameters that are measured"):
        Objective(model, loader, lambda o, t: o.detach().mean()).gradient()
    with pytest.raises(ArgumentError, match=r"must be a callable .* Pass an instance, CrossEntropyLoss\(\)"):
        Objective(model, loader, nn.CrossEntropyLoss)
    with pytest.raises(ArgumentError, match="exclude each other"):
        Objective(model, loader, nn.CrossEntropyLoss(), batch_loss=lambda m, b: (m(b[0]).mean(), 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_batch(bad):
    x = torch.ones(2, 3)
    loader = [(x, torch.zeros(2, 1)), (x * bad, torch.zeros(2, 1))]
    model = nn.Linear(3, 1)
    for call in ("value", "gradient", "check"):
        with pytest.raises(NonFiniteError, match=r"the loss of batch 1 \(counted from 0\) is"):
            getattr(Objective(model, loader), call)()
    with pytest.raises(NonFiniteError, match="the loss of batch 1"):
        Objective(model, loader).hvp(torch.ones(4))


def test_a_gradient_or_product_that_is_not_finite_names_the_batch():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    root = lambda m, x: (m(x).clamp(min=0).sqrt().mean(), len(x))  # noqa: E731 - no derivative at zero
    loader = [torch.ones(2, 1), torch.zeros(2, 1)]
    with pytest.raises(NonFiniteError, match=r"the gradient of batch 1 \(counted from 0\) holds NaN or infinity"):
        Objective(model, loader, batch_loss=root).gradient()
    with pytest.raises(NonFiniteError, match=r"the Hessian-vector product of batch 1 .* square roots and logarithms"):
        Objective(model, loader, batch_loss=root).hvp(torch.ones(1))


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


def test_an_operation_without_a_second_derivative_is_explained():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return Rounded.apply(self.layer(x))

    loader = [(torch.ones(2, 3), torch.tensor([0, 1]))]
    with pytest.raises(ModelError, match="marked once_differentiable, so it has no second derivative"):
        Objective(Fused(), loader).hvp(torch.ones(12))


def test_attention_is_differentiated_twice():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3, dtype=torch.float64))
    loader = [(torch.randn(4, 3, 8, dtype=torch.float64), torch.arange(4) % 3)]
    objective = Objective(model, loader)
    v = torch.randn(objective.n, dtype=torch.float64)
    with assert_untouched(model):
        product = objective.hvp(v)
    step = 1e-5
    ahead, behind = (objective.gradient(objective.vector() + sign * step * v) for sign in (1, -1))
    torch.testing.assert_close(product, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)


def test_wrappers_are_looked_through():
    problem = tanh_net()
    v = torch.ones(len(problem.hessian), dtype=torch.float64)
    for wrap in (nn.DataParallel, torch.compile):
        torch.testing.assert_close(Objective(wrap(problem.model), problem.loader).hvp(v), problem.hessian @ v)


def test_inside_no_grad_and_inference_mode():
    problem = tanh_net()
    v = torch.ones(len(problem.hessian), dtype=torch.float64)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            product = Objective(problem.model, problem.loader).hvp(v)
        torch.testing.assert_close(product.clone(), problem.hessian @ v)


def test_dressed_models_really_have_what_real_ones_have():
    model = tanh_net().model
    assert isinstance(model, Dressed)
    assert len(list(model.named_parameters(remove_duplicate=False))) == len(list(model.parameters())) + 1
    assert any(not p.requires_grad for p in model.parameters())
    assert list(model.buffers())


def test_gradients_are_kept_by_their_graphs_alone_or_whole_with_the_same_products(monkeypatch):
    problem = tanh_net()
    v = torch.linspace(-1, 1, len(problem.hessian), dtype=torch.float64)
    slim = Objective(problem.model, problem.loader)
    monkeypatch.setattr("sharpness.objective.roots._EDGES", False)  # as before PyTorch 2.6
    whole = Objective(problem.model, problem.loader)
    for objective in (slim, whole):
        torch.testing.assert_close(objective.hvp(v), problem.hessian @ v)
    assert torch.equal(slim.hvp(v), whole.hvp(v))
