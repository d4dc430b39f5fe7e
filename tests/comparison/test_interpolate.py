import math

import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError, DataError
from tests.checks import assert_untouched
from tests.zoo import Quadratic, batches, features, tanh_net

ROWS = torch.zeros(11, 2, dtype=torch.float64)
A, B = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([-1.0, 0.5], dtype=torch.float64)
H = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def walk(**options):
    a, b = Quadratic(H, A), Quadratic(H, B)
    with assert_untouched(a, b):
        return sharpness.interpolate(a, b, batches(ROWS), batch_loss=lambda m, x: (m(x), len(x)), **options)


@pytest.mark.parametrize("path", ["linear", "curved"])
def test_the_loss_of_a_quadratic_along_the_path(path):
    result = walk(path=path)
    assert len(result.alphas) == 25
    assert (result.alphas[0].item(), result.alphas[-1].item()) == (-1.0, 2.0)
    for alpha, loss in zip(result.alphas.tolist(), result.train_loss.tolist(), strict=True):
        angle = alpha * math.pi / 2
        point = (1 - alpha) * A + alpha * B if path == "linear" else math.cos(angle) * A + math.sin(angle) * B
        assert loss == pytest.approx((point @ H @ point).item() / 2, rel=1e-9)


def test_the_barrier_is_the_excess_over_the_straight_line():
    assert walk().barrier == 0.0  # a convex loss has none
    bump = sharpness.interpolate(
        Quadratic(-H, A), Quadratic(-H, B), [ROWS], batch_loss=lambda m, x: (m(x), 1), alphas=[0.25, 0.5]
    )
    middle = (A + B) / 2
    ends = (A @ -H @ A + B @ -H @ B).item() / 4
    assert bump.barrier == pytest.approx((middle @ -H @ middle).item() / 2 - ends, rel=1e-9)


def test_a_batch_without_weight_still_counts_for_the_accuracy():
    x, y = features(3), torch.arange(11) % 3
    order = torch.argsort((y > 0).int(), stable=True)  # the first batch holds nothing but class 0, whose weight is 0
    loader = [(x[order[:4]], y[order[:4]]), (x[order[4:]], y[order[4:]])]
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))
    torch.manual_seed(0)
    a, b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    found = sharpness.interpolate(a, b, loader, criterion, alphas=[0.0, 1.0])
    for model, accuracy in zip((a, b), found.train_accuracy.tolist(), strict=True):
        assert accuracy == pytest.approx((model(x).argmax(1) == y).double().mean().item(), abs=1e-12)
        assert accuracy == sharpness.Objective(model, loader, criterion).evaluate().accuracy
    parted = [(model(x[order[4:]]).argmax(1) == y[order[4:]]).double().mean().item() for model in (a, b)]
    assert found.train_accuracy.tolist() != parted  # which leaves the first batch out


@pytest.mark.parametrize("batch_norm", ["recompute", "interpolate", "keep"])
@pytest.mark.parametrize("path", ["linear", "curved"])
def test_the_ends_are_the_models_exactly(path, batch_norm):
    def net(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()
        for _ in range(3):
            model(torch.randn(16, 3, dtype=torch.float64))
        return model.eval()

    loader = batches(features(3), torch.arange(11) % 3)
    a, b = net(0), net(1)
    with assert_untouched(a, b):
        result = sharpness.interpolate(
            a, b, loader, test_loader=loader[:1], alphas=[0.0, 0.5, 1.0], path=path, batch_norm=batch_norm
        )
    for i, model in ((0, a), (2, b)):
        assert result.train_loss[i].item() == sharpness.Objective(model, loader).value()
        assert result.test_loss[i].item() == sharpness.Objective(model, loader[:1]).value()


def test_recomputed_statistics_are_those_of_the_activations_in_between():
    def net(shift):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
        nn.init.eye_(model[0].weight)
        nn.init.constant_(model[0].bias, shift)
        model[1].num_batches_tracked += 5
        return model.eval()  # running statistics (0, 1) are those of neither

    x, y = features(3), torch.arange(11) % 3
    middle = net(1.0)
    a, b = net(0.0), net(2.0)
    b[2].load_state_dict(a[2].state_dict())
    middle[2].load_state_dict(a[2].state_dict())
    result = sharpness.interpolate(a, b, [(x, y)], alphas=[0.5])
    expected = nn.functional.cross_entropy(
        middle[2]((x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()), y
    ).item()  # running variances are unbiased
    assert result.train_loss.item() == pytest.approx(expected, rel=1e-10)
    kept = sharpness.interpolate(a, b, [(x, y)], alphas=[0.5], batch_norm="keep")
    assert kept.train_loss.item() == pytest.approx(nn.functional.cross_entropy(middle(x), y).item(), rel=1e-4)


def test_accuracies_come_along():
    problem, other = tanh_net(0), tanh_net(1)
    result = sharpness.interpolate(problem.model, other.model, problem.loader, alphas=[0.0, 1.0])
    assert result.train_accuracy[0].item() == sharpness.Objective(problem.model, problem.loader).evaluate().accuracy
    assert result.test_accuracy is None


def test_bad_input():
    with pytest.raises(ArgumentError, match="`path` must be one of 'linear', 'curved'"):
        walk(path="straight")
    with pytest.raises(ArgumentError, match="`batch_norm` must be one of"):
        walk(batch_norm="reset")
    with pytest.raises(ArgumentError, match="`alphas` must be a list of finite numbers, at least one"):
        walk(alphas=[])
    with pytest.raises(ArgumentError, match="`alphas` must be a list of finite"):
        walk(alphas=[float("nan")])
    wide = Quadratic(torch.eye(3, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="differ in architecture, at 'w' first"):
        sharpness.interpolate(Quadratic(H, A), wide, [ROWS], batch_loss=lambda m, x: (m(x), 1))
    with pytest.raises(ArgumentError, match="`model_b` must be a torch.nn.Module"):
        sharpness.interpolate(Quadratic(H, A), 3, [ROWS], batch_loss=lambda m, x: (m(x), 1))


@pytest.mark.parametrize("batch_norm", ["recompute", "interpolate", "keep"])
def test_models_in_half_precision_are_walked_in_single(batch_norm):
    def net(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    loader = [(x.float(), y) for x, y in batches(features(3), torch.arange(11) % 3)]
    a, b = net(0), net(1)
    single = sharpness.interpolate(a, b, loader, alphas=[0, 0.5, 1], batch_norm=batch_norm)
    half = sharpness.interpolate(a.bfloat16(), b.bfloat16(), loader, alphas=[0, 0.5, 1], batch_norm=batch_norm)
    torch.testing.assert_close(half.train_loss, single.train_loss, rtol=0.05, atol=0)


def test_recomputed_means_weigh_every_sample_alike():
    """The mean of the first layer's activations is that of the data, whatever the split into batches."""

    def net(shift):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
        nn.init.eye_(model[0].weight)
        nn.init.constant_(model[0].bias, shift)
        return model.eval()

    x = features(3)
    x[8:] += 5  # the last batch, which has 3 samples
    a, b = net(0.0), net(2.0)
    b[2].load_state_dict(a[2].state_dict())
    loader = batches(x, torch.arange(11) % 3)
    variance = sum(len(part) * part.var(0) for part, _ in loader) / 11  # within batches
    middle = a[2]((x - x.mean(0)) / (variance + 1e-5).sqrt())
    expected = nn.functional.cross_entropy(middle, torch.arange(11) % 3).item()
    result = sharpness.interpolate(a, b, loader, alphas=[0.5])
    assert result.train_loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("batch_norm", "passes"), [("keep", 25), ("interpolate", 25), ("recompute", 25 + 23)])
def test_no_forward_pass_is_made_that_is_not_needed(batch_norm, passes):
    calls = []

    class Counting(nn.BatchNorm1d):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    a, b = (nn.Sequential(nn.Linear(3, 4), Counting(4), nn.Linear(4, 3)).double() for _ in range(2))
    loader = batches(features(3), torch.arange(11) % 3)
    result = sharpness.interpolate(a, b, loader, nn.CrossEntropyLoss(), batch_norm=batch_norm)
    assert result.num_passes == passes
    assert sum(calls) == 11 * passes
    calls.clear()
    both = sharpness.interpolate(a, b, loader, nn.CrossEntropyLoss(), test_loader=loader[:1], batch_norm=batch_norm)
    assert both.num_passes == passes + 25
    assert sum(calls) == 11 * passes + 4 * 25


def test_a_loss_that_is_not_finite_is_shown_as_what_it_is():
    class Rooted(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))

        def forward(self, rows):
            return (self.w.sqrt() + 1 / torch.where(self.w > 2.5, 0.0, 1.0)).sum()  # NaN below 0, infinite above 2.5

    def along(a, b, alphas):
        return sharpness.interpolate(Rooted(a), Rooted(b), [ROWS], batch_loss=lambda m, x: (m(x), 1), alphas=alphas)

    result = along(1.0, 2.0, [-2.0, 0.0, 1.0, 2.0])
    assert result.train_loss[0].isnan()
    assert result.train_loss[1:].tolist() == [2.0, 1 + math.sqrt(2), math.inf]
    assert result.barrier == 0.0  # what is beyond the models has no part in it
    assert math.isnan(along(1.0, -1.0, [0.5, 0.75]).barrier)


def test_data_without_a_loss_term_are_refused():
    a, b = tanh_net(0).model, tanh_net(1).model
    ignored = [(features(3), torch.full((11,), -100))]
    with pytest.raises(DataError, match="holds no loss term"):
        sharpness.interpolate(a, b, ignored, nn.CrossEntropyLoss())


def test_in_train_mode_batches_normalise_themselves():
    a, b = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double() for _ in range(2))
    loader = batches(features(3), torch.arange(11) % 3)
    with assert_untouched(a, b):
        found = [
            sharpness.interpolate(a, b, loader, alphas=[0.0, 0.5], mode="train", batch_norm=kind)
            for kind in ("recompute", "keep")
        ]
    assert found[0].train_loss.tolist() == found[1].train_loss.tolist()
    assert found[0].train_loss[0].item() == sharpness.Objective(a, loader, mode="train").value()
    assert found[0].num_passes == 3  # the end at 1 is needed for the barrier


def test_models_that_write_to_their_weights_are_untouched():
    """An embedding with ``max_norm`` shortens its own weights in the forward pass."""
    a, b = (nn.Sequential(nn.Embedding(6, 3, max_norm=0.1), nn.Linear(3, 3)).double() for _ in range(2))
    loader = [(torch.arange(6), torch.arange(6) % 3)]
    with assert_untouched(a, b):
        path = sharpness.interpolate(a, b, loader, alphas=[0.0, 0.5, 1.0])
        line = sharpness.landscape(a, loader, directions=[b], extent=(0, 1), steps=3)
    assert line.loss.tolist() == pytest.approx(path.train_loss.tolist(), rel=1e-12)
    for i, model in ((0, a), (2, b)):
        assert path.train_loss[i].item() == sharpness.Objective(model, loader).value()


def normed(seed, layer=nn.BatchNorm1d, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), layer(4, **options), nn.ReLU(), nn.Linear(4, 3)).double()
    model(torch.randn(16, 3, dtype=torch.float64) + seed)
    return model.eval()


LABELLED = batches(features(3), torch.arange(11) % 3)


def test_statistics_are_estimated_as_well_where_models_are_taken_as_they_are():
    a, b = normed(0), normed(1)
    found = sharpness.interpolate(a, b, LABELLED, alphas=[0.5], mode="as_is")
    assert torch.equal(found.train_loss, sharpness.interpolate(a, b, LABELLED, alphas=[0.5]).train_loss)
    assert found.train_loss != sharpness.interpolate(a, b, LABELLED, alphas=[0.5], batch_norm="keep").train_loss
    a[1].train(), b[1].train()  # these normalise by the batch
    assert sharpness.interpolate(a, b, LABELLED, alphas=[0.0], mode="as_is").num_passes == 2
    b[1].eval()
    with pytest.raises(ArgumentError, match=r'mode="as_is" takes the models in the modes they are in.*at \'1\' first'):
        sharpness.interpolate(a, b, LABELLED, mode="as_is")


def test_a_batch_that_has_no_variance_is_named():
    loader = batches(features(3)[:9], torch.arange(9) % 3, sizes=(4, 4, 1))
    a, b = normed(0), normed(1)
    with assert_untouched(a, b), pytest.raises(DataError, match=r"batch 2 \(counted from 0\) has one value per"):
        sharpness.interpolate(a, b, loader)
    assert sharpness.interpolate(a, b, loader, batch_norm="interpolate").num_passes == 25


def test_models_are_untouched_when_the_estimate_fails():
    class Failing(nn.Linear):
        def forward(self, x):
            if self.training is False and not torch.equal(self.weight, self.own):
                raise RuntimeError("broken on the way")
            return super().forward(x)

    a, b = normed(0), normed(1)
    for model in (a, b):
        model[3].__class__ = Failing
        model[3].own = model[3].weight.detach().clone()
    momentum = a[1].momentum
    with assert_untouched(a, b), pytest.raises(RuntimeError, match="broken on the way"):
        sharpness.interpolate(a, b, LABELLED, alphas=[0.5])
    assert a[1].momentum == momentum
    assert not a[1].training


def test_models_that_cannot_be_copied_are_walked_as_well():
    """The older weight normalisation keeps a tensor with a graph in an attribute, which `deepcopy` refuses."""

    def net(seed, old):
        model = normed(seed)
        if old:
            with pytest.warns(FutureWarning):
                nn.utils.weight_norm(model[0])
            model(features(3))
        else:
            nn.utils.parametrizations.weight_norm(model[0])
        return model

    old, new = (sharpness.interpolate(net(0, old), net(1, old), LABELLED).train_loss for old in (True, False))
    torch.testing.assert_close(old, new, rtol=1e-9, atol=0)


def test_parametrized_weights_move_in_their_own_coordinates():
    def net(seed):
        model = normed(seed)
        nn.utils.parametrizations.weight_norm(model[0])
        return model

    a, b, middle = net(0), net(1), net(2)
    with torch.no_grad():
        for p, q, r in zip(middle.parameters(), a.parameters(), b.parameters(), strict=True):
            p.copy_((q + r) / 2)
        middle[1].running_mean.copy_((a[1].running_mean + b[1].running_mean) / 2)
        middle[1].running_var.copy_((a[1].running_var + b[1].running_var) / 2)
    with assert_untouched(a, b):
        found = sharpness.interpolate(a, b, LABELLED, alphas=[0, 0.5, 1], batch_norm="interpolate")
    for i, model in enumerate((a, middle, b)):
        assert found.train_loss[i].item() == pytest.approx(sharpness.Objective(model, LABELLED).value(), rel=1e-12)


def test_statistics_of_instance_norm_are_estimated_as_well():
    def net(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv1d(1, 3, 2), nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten(), nn.Linear(6, 3)
        )
        return model.double().eval()  # running statistics (0, 1)

    a, b, middle = net(0), net(1), net(2)
    loader = [(x.unsqueeze(1), y) for x, y in LABELLED]
    with torch.no_grad():
        for p, q, r in zip(middle.parameters(), a.parameters(), b.parameters(), strict=True):
            p.copy_((q + r) / 2)
        means, variances = [], []
        for x, _ in loader:
            inside = middle[0](x)
            means += [*inside.mean(2)]
            variances += [*inside.var(2)]
        middle[1].running_mean.copy_(torch.stack(means).mean(0))
        middle[1].running_var.copy_(torch.stack(variances).mean(0))
    found = sharpness.interpolate(a, b, loader, alphas=[0.5])
    assert found.train_loss.item() == pytest.approx(sharpness.Objective(middle, loader).value(), rel=1e-10)


def test_pieces_and_precision():
    a, b = normed(0), normed(1)
    whole = sharpness.interpolate(a, b, LABELLED, test_loader=LABELLED, alphas=[0.0, 0.5])
    cut = sharpness.interpolate(a, b, LABELLED, test_loader=LABELLED, alphas=[0.0, 0.5], microbatch_size=1)
    torch.testing.assert_close(cut.train_loss, whole.train_loss, rtol=1e-10, atol=0)  # statistics of whole batches
    torch.testing.assert_close(cut.test_loss, whole.test_loss, rtol=1e-10, atol=0)
    a, b = a.float(), b.float()
    loader = [(x.float(), y) for x, y in LABELLED]
    rough = sharpness.interpolate(a, b, loader, alphas=[0.0, 0.5], precision="bfloat16")
    assert rough.train_loss[0].item() == sharpness.Objective(a, loader, precision="bfloat16").value()
    assert rough.settings["precision"] == "bfloat16"
    assert rough.train_loss.tolist() != whole.train_loss.tolist()
    torch.testing.assert_close(rough.train_loss, whole.train_loss, rtol=0.03, atol=0)
