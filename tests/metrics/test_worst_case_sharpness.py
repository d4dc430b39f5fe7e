"""The largest rise in a ball against its closed forms."""

import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import (
    ArgumentError,
    ConvergenceError,
    ConvergenceWarning,
    NonFiniteError,
)
from tests.metrics.neighbours import (
    AT,
    DTYPES,
    ONE,
    SPECTRUM,
    LeastSquares,
    Valley,
    data,
    half_square,
    on_quadratic,
    relu_net,
)
from tests.zoo import rotated, tanh_net

worst = sharpness.worst_case_sharpness
RHO = 0.3


@pytest.mark.parametrize(("dtype", "tol"), DTYPES.items())
def test_at_a_minimum_it_is_the_largest_eigenvalue(dtype, tol):
    h = rotated(SPECTRUM)
    result = on_quadratic(worst, h, torch.zeros(6), dtype=dtype, rho=RHO)
    assert result.value == pytest.approx(RHO**2 / 2 * 4.0, rel=tol)
    assert result.max_loss - result.loss == pytest.approx(result.value)


@pytest.mark.parametrize(("dtype", "tol"), DTYPES.items())
def test_one_step_is_that_of_sam(dtype, tol):
    h = rotated(SPECTRUM)
    g = h @ AT
    expected = RHO * g.norm() + RHO**2 / 2 * (g @ h @ g) / g.norm() ** 2
    assert on_quadratic(worst, h, AT, dtype=dtype, rho=RHO, num_steps=1).value == pytest.approx(
        expected.item(), rel=tol
    )


def test_more_steps_reach_the_maximum_over_the_ball():
    h = rotated(SPECTRUM)
    values, q = torch.linalg.eigh(h)
    g = q.T @ (h @ AT)
    low, high = values[-1].item(), 1e3  # the multiplier of the constraint: |g / (mu - values)| = rho
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if (g / (mu - values)).norm() > RHO else (low, mu)
    e = g / (mu - values)
    best = (g @ e + (values * e * e).sum() / 2).item()
    assert on_quadratic(worst, h, AT, rho=RHO).value == pytest.approx(best, rel=1e-9)
    assert on_quadratic(worst, h, AT, rho=RHO, num_steps=1).value < best


def test_an_indefinite_quadratic_is_not_led_down():
    h = rotated(torch.tensor([1.0, -9.0, 0.5, -3.0], dtype=torch.float64))
    model = on_quadratic  # the gradient of the negative part is the larger one
    g = torch.linalg.eigh(h).eigenvectors
    at = 0.01 * g[:, 0] + 1e-3 * g[:, -1]
    result = model(lambda m, d, **o: worst(m, [r[:, :4] for r in d], **o), h, at, rho=RHO, num_steps=300)
    assert result.value > 0.9 * RHO**2 / 2


@pytest.mark.parametrize("adaptive", [None, "elementwise"])
def test_a_linear_function_on_a_box(adaptive):
    scale = torch.ones(6).double() if adaptive is None else AT.abs()
    g = SPECTRUM * AT
    expected = (RHO * scale * g.abs() + RHO**2 / 2 * SPECTRUM * scale**2).sum().item()
    result = on_quadratic(worst, torch.diag(SPECTRUM), AT, rho=RHO, norm="linf", adaptive=adaptive)
    assert result.value == pytest.approx(expected, rel=1e-9)
    assert result.num_evaluations < 10  # a corner ends the ascent


@pytest.mark.parametrize(("dtype", "tol"), DTYPES.items())
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("adaptive", [None, "elementwise"])
def test_groups_of_one_have_a_closed_form(dtype, tol, norm, adaptive):
    p = LeastSquares(exact=False, dtype=dtype)
    rows = p.a if adaptive is None else p.a * p.w.abs()
    size = rows.norm(dim=1) if norm == "l2" else rows.abs().sum(1)
    expected = (2 * RHO * p.residuals.abs() * size + RHO**2 * size**2).mean().item()
    result = worst(p.model, p.loader(), rho=RHO, norm=norm, adaptive=adaptive, group_size=1)
    assert result.value == pytest.approx(expected, rel=tol)
    assert len(result.samples) == 12


@pytest.mark.parametrize(("dtype", "tol"), DTYPES.items())
def test_at_interpolation_groups_go_from_the_trace_to_the_eigenvalue(dtype, tol):
    p = LeastSquares(exact=True, dtype=dtype)
    by_size = [worst(p.model, p.loader(), rho=RHO, group_size=m, num_steps=60).value for m in (1, 2, 3, 6, 12)]
    assert by_size[0] == pytest.approx(RHO**2 / 2 * p.hessian.trace().item(), rel=tol)
    assert by_size[-1] == pytest.approx(RHO**2 / 2 * torch.linalg.eigvalsh(p.hessian)[-1].item(), rel=tol)
    assert by_size == sorted(by_size, reverse=True)
    assert worst(p.model, p.loader(), rho=RHO, num_steps=60).value == pytest.approx(by_size[-1], rel=tol)


def test_groups_do_not_depend_on_the_loader_and_weigh_by_their_terms():
    p = LeastSquares(exact=False)
    whole, ragged = (worst(p.model, p.loader(size), rho=RHO, group_size=5) for size in (12, 4))
    torch.testing.assert_close(whole.samples, ragged.samples, rtol=1e-12, atol=0)
    weights = torch.tensor([5.0, 5, 2], dtype=torch.float64)
    assert whole.value == pytest.approx(((whole.samples * weights).sum() / 12).item(), rel=1e-12)
    assert whole.max_loss == pytest.approx(whole.loss + whole.value)


def test_the_margin_of_a_logistic_regression():
    """m = 1: the mean of log(1 + exp(-(y f - rho |x|)))."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(9, 4, generator=g, dtype=torch.float64), torch.randn(4, generator=g, dtype=torch.float64)
    y = (torch.randn(9, generator=g) > 0).double()
    model = nn.Linear(4, 1, bias=False).double()
    model.weight.data = w[None]
    margin = (2 * y - 1) * (x @ w)
    rise = nn.functional.softplus(-(margin - RHO * x.norm(dim=1))) - nn.functional.softplus(-margin)
    result = worst(model, [(x, y[:, None])], nn.BCEWithLogitsLoss(), rho=RHO, group_size=1)
    assert result.value == pytest.approx(rise.mean().item(), rel=1e-9)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("adaptive", ["elementwise", "filter"])
def test_zero_weights_do_not_move_and_nothing_is_nan(adaptive, norm):
    p = LeastSquares(exact=False)
    p.w[1] = p.model.weight.data[0, 1] = 0.0
    result = worst(p.model, p.loader(), rho=RHO, norm=norm, adaptive=adaptive)
    assert result.value > 0
    if adaptive == "elementwise":
        kept = [0, 2, 3, 4]
        p.pairs = (p.pairs[0][:, kept], p.pairs[1])
        model = nn.Linear(4, 1, bias=False).double()
        model.weight.data = p.model.weight.data[:, kept]
        alone = worst(model, p.loader(), rho=RHO, norm=norm, adaptive=adaptive)
        assert result.value == pytest.approx(alone.value, rel=1e-9)


def test_all_weights_zero_is_said():
    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data.zero_()
    batch = [(torch.eye(3, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64))]
    with pytest.warns(ConvergenceWarning, match="no loss above the model's own, 1, was found within rho=0.05"):
        assert worst(model, batch, adaptive="elementwise").value == 0
    with pytest.raises(ConvergenceError, match="no loss above") as caught:
        worst(model, batch, adaptive="elementwise", on_failure="raise")
    assert caught.value.result.value == 0


def test_in_a_valley_the_adaptive_measures_stay_and_the_eigenvalue_moves():
    def at(a, metric, **options):
        return metric(Valley(a), ONE, half_square, **options).headline

    for a in (1.0, 2.0, 10.0):
        assert at(a, sharpness.top_eigenvalues) == pytest.approx(a**2 + a**-2, rel=1e-6)
        for adaptive in ("elementwise", "filter"):
            reference = at(1.0, worst, adaptive=adaptive, rho=0.1)
            assert at(a, worst, adaptive=adaptive, rho=0.1) == pytest.approx(reference, rel=1e-6)
        assert at(a, sharpness.relative_flatness, layer="second") == pytest.approx(1, rel=1e-6)
    assert at(10.0, worst, rho=0.01) > 10 * at(1.0, worst, rho=0.01)


def test_normalised_logits_do_not_feel_their_scale():
    net, scaled, tiny = relu_net(), relu_net(), relu_net()
    scaled[4].weight.data *= 30
    tiny[4].weight.data *= 1e-6
    plain, shrunk, grown = (
        worst(m, data(), adaptive="elementwise", normalize_logits=True).value for m in (net, scaled, tiny)
    )
    assert shrunk == pytest.approx(plain, rel=1e-6)
    assert grown == pytest.approx(plain, rel=1e-4)
    assert worst(scaled, data(), adaptive="elementwise").value != pytest.approx(
        worst(net, data(), adaptive="elementwise").value, rel=0.1
    )
    z = torch.cat([net(x) for x, _ in data()])
    z = z - z.mean(1, keepdim=True)
    y = torch.cat([y for _, y in data()])
    expected = nn.functional.cross_entropy(z / z.norm(dim=1, keepdim=True).clamp(min=1e-10), y).item()
    assert worst(net, data(), normalize_logits=True).loss == pytest.approx(expected, rel=1e-9)


def test_bad_input():
    p = tanh_net()
    for rho in (0, -1, float("nan"), "far"):
        with pytest.raises(ArgumentError, match="`rho` must be a finite number above 0"):
            worst(p.model, p.loader, rho=rho)
    with pytest.raises(ArgumentError, match="`norm` must be one of 'l2', 'linf', got 'l1'"):
        worst(p.model, p.loader, norm="l1")
    with pytest.raises(ArgumentError, match='`adaptive` must be None, "elementwise" or "filter", got \'layer\''):
        worst(p.model, p.loader, adaptive="layer")
    with pytest.raises(ArgumentError, match="`group_size` must be at least 1, got 0"):
        worst(p.model, p.loader, group_size=0)
    with pytest.raises(ArgumentError, match="`group_size` cuts batches into samples, and this one holds no tensor"):
        worst(p.model, [3], batch_loss=lambda m, b: (m.core.first.weight.sum() ** 2, 1), group_size=1)
    net = nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2), nn.Linear(2, 6)).double()
    with pytest.raises(ArgumentError, match="`group_size` would change the loss: '1'"):
        worst(net, [], mode="train", group_size=2)  # before the data are looked at


def test_normalised_logits_need_logits():
    p = LeastSquares(exact=True)
    with pytest.raises(ArgumentError, match="`normalize_logits` needs one tensor of logits and class labels"):
        worst(p.model, p.loader(), normalize_logits=True)
    with pytest.raises(ArgumentError, match="`normalize_logits` acts on the outputs of the model, and a batch_loss"):
        worst(p.model, p.loader(), batch_loss=lambda m, b: (m(b[0]).sum(), 1), normalize_logits=True)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 3)

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    with pytest.raises(ArgumentError, match="`normalize_logits` acts before the loss, and this model computes its own"):
        worst(Own(), [{"x": torch.eye(3), "labels": torch.arange(3)}], normalize_logits=True)


def test_normalised_log_probabilities_are_normalised_logits():
    net = relu_net()
    logs = nn.Sequential(net, nn.LogSoftmax(1))
    one, other = (
        worst(m, data(), f, normalize_logits=True) for m, f in ((net, nn.CrossEntropyLoss()), (logs, nn.NLLLoss()))
    )
    assert other.loss == pytest.approx(one.loss, rel=1e-12)
    assert other.value == pytest.approx(one.value, rel=1e-9)


def test_normalised_logits_of_probable_classes_are_those_of_the_classes():
    net, f = relu_net(), nn.CrossEntropyLoss()
    soft = [(x, nn.functional.one_hot(y, 3).double()) for x, y in data()]
    one, other = (worst(net, batches, f, normalize_logits=True).value for batches in (data(), soft))
    assert other == pytest.approx(one, rel=1e-9)


def test_groups_of_which_nothing_counts_are_left_out():
    net, f = relu_net(), nn.CrossEntropyLoss()
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    y[4:8] = -100
    result = worst(net, [(x[:10], y[:10]), (x[10:], y[10:])], f, group_size=2)
    kept = torch.cat([torch.arange(4), torch.arange(8, 24)])
    alone = worst(net, [(x[kept], y[kept])], f, group_size=2)
    assert result.value == pytest.approx(alone.value, rel=1e-12)
    assert result.samples.tolist()[2:4] == [0, 0]
    assert len(result.samples) == 12
    assert result.loss == pytest.approx(alone.loss)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(3, 4).double()

    def forward(self, x):
        return self.rnn(x)[0][-1]


def test_groups_that_are_not_of_samples_are_refused():
    x, y = torch.randn(6, 6, 3, dtype=torch.float64), torch.arange(6) % 4
    with pytest.raises(ArgumentError, match=r"`group_size` changes the loss from .*the first dimension does not count"):
        worst(TimeFirst(), [(x[:, :4], y[:4])], group_size=2)
    with pytest.raises(ArgumentError, match="`group_size` cuts the data into groups that the model cannot take"):
        worst(TimeFirst(), [(x, y)], group_size=2)

    class Together(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3).double()

        def forward(self, x):
            return self.linear(x - x.mean(0))

    with pytest.raises(ArgumentError, match="the samples see each other"):
        worst(Together(), data(), group_size=3)
    assert worst(Together(), data(), num_steps=2).value > 0


def test_an_overflow_names_the_perturbation():
    model = nn.Linear(3, 1, bias=False).double()
    rows = [(torch.ones(4, 3, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64))]

    def steep(outputs, targets):
        return (1e4 * (outputs - targets)).exp().mean()

    model.weight.data.zero_()
    with pytest.raises(NonFiniteError, match=r"perturbed within rho=0.5, the model overflows: the loss of batch 0"):
        worst(model, rows, steep, rho=0.5)
    with pytest.raises(NonFiniteError, match=r"rho=0.5 on group 0 of 2 samples, the model overflows"):
        worst(model, rows, steep, rho=0.5, group_size=2)
    with pytest.raises(NonFiniteError, match=r"perturbed within sigma=0.5, the model overflows"):
        sharpness.average_case_sharpness(model, rows, steep, sigma=0.5)
    with pytest.raises(NonFiniteError, match=r"perturbed within epsilon=0.5, the model overflows"):
        sharpness.epsilon_sharpness(model, rows, steep, epsilon=0.5)


def test_what_groups_cost_is_what_was_evaluated(monkeypatch):
    p, rows = LeastSquares(exact=False), []
    forward = p.model.forward
    monkeypatch.setattr(p.model, "forward", lambda x: (rows.append(len(x)), forward(x))[1])
    result = worst(p.model, p.loader(12), rho=RHO, group_size=5, num_steps=3)
    # Beside the evaluations: one look whether the loss stays the same.
    assert result.num_evaluations == len(rows) - 1 == 1 + 3 + 3 * 4
    # Beside the samples: the walk over the loader that makes the groups.
    assert result.num_passes == round(sum(rows) / 12) + 1


def test_without_groups_every_pass_is_an_evaluation(monkeypatch):
    p, calls = LeastSquares(exact=False), []
    forward = p.model.forward
    monkeypatch.setattr(p.model, "forward", lambda x: (calls.append(1), forward(x))[1])
    result = worst(p.model, p.loader(12), rho=RHO, num_steps=3)
    assert result.num_evaluations == 1 + 4
    assert result.num_passes == len(calls) == 1 + 4 + 1
