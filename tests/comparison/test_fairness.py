"""Each warning fires on the pair that it is about, and on no fair one."""

import copy
import math

import pytest
import torch
from torch import nn

import sharpness
from sharpness.comparison.intervals import ratio_interval
from sharpness.errors import NonFiniteError
from tests.zoo import Quadratic, batches, rotated

ROWS = torch.zeros(11, 3, dtype=torch.float64)
SPECTRUM = torch.tensor([3.0, 2, 1], dtype=torch.float64)


def quadratic(at=(1.0, -1.0, 2.0), target=None, loss=0.01, spectrum=SPECTRUM):
    """``loss + (w - target)' H (w - target) / 2``, with the weights ``at``."""
    at = torch.tensor(at, dtype=torch.float64)
    target = at if target is None else torch.tensor(target, dtype=torch.float64)
    return Bowl(rotated(spectrum), at, target, loss)


class Bowl(Quadratic):
    def __init__(self, hessian, at, target, loss):
        super().__init__(hessian, at, loss)
        self.register_buffer("target", target)

    def forward(self, rows):
        off = self.w - self.target
        return 0.5 * off @ self.h @ off + self.constant + 0 * rows.sum()


def compare(models, **options):
    settings = {"metrics": ["top_eigenvalues"], "batch_loss": lambda m, b: (m(b), len(b)), **options}
    return sharpness.compare(models, batches(ROWS), **settings)


torch.manual_seed(0)
X = torch.randn(60, 4, dtype=torch.float64)
Y = (X[:, 0] > 0).long()
DATA = [(X, Y)]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()


def trained(seed=0, decay=1e-2, steps=400):
    """A net at the minimum of cross-entropy with weight decay, which keeps the scales alike."""
    model = net(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=decay)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def pair():
    return {"a": trained(0), "b": trained(1)}


def scaled(model, first, last):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in (other[0].weight, other[0].bias):
            p.mul_(first)
        other[2].weight.mul_(last / first)
        other[2].bias.mul_(last)
    return other


def test_a_fair_pair_has_no_warnings(pair):
    assert compare({"a": quadratic(), "b": quadratic(spectrum=5 * SPECTRUM)}).warnings == ()
    found = sharpness.compare(pair, DATA, metrics=["top_eigenvalues"])
    assert found.warnings == ()
    one = sharpness.compare({"a": pair["a"]}, DATA, metrics=["top_eigenvalues"])
    assert one.warnings == ()
    assert not any("one model each" in note for note in one.notes)


def test_losses_that_differ_and_how_far_curvature_moved():
    (text,) = compare({"low": quadratic(loss=0.001), "high": quadratic(loss=0.1)}).warnings
    assert text == (
        "the training losses are not matched: 0.001 (low) against 0.1 (high), a factor of 100. top_eigenvalues differs "
        "by a factor of 1 (high over low). How far curvature moves with the loss depends on the loss function. Train "
        "to the same loss."
    )
    below = compare({"low": quadratic(loss=-2.0), "high": quadratic(loss=-1.0)}).warnings
    assert "not matched: -2 (low) against -1 (high). top_eigenvalues" in below[0]
    assert not compare({"a": quadratic(loss=-1.0), "b": quadratic(loss=-1.2)}).warnings


def test_how_far_curvature_moved_is_told_by_a_metric_that_both_have():
    low, high = quadratic(target=(1.001, -1.0, 2.0), loss=0.001), quadratic(loss=0.1)
    found = compare({"low": low, "high": high}, metrics=["critical_sharpness", "top_eigenvalues"])
    assert found["low"].metrics["critical_sharpness"].mean > 0
    assert math.isnan(found["high"].metrics["critical_sharpness"].mean)  # without a gradient there is no direction
    assert "top_eigenvalues differs by a factor of 1 (high over low)" in found.warnings[0]


def test_how_far_curvature_moved_is_not_told_by_what_is_no_curvature():
    models = {"low": quadratic(loss=0.001), "high": quadratic(loss=0.1, spectrum=2 * SPECTRUM)}
    found = compare(models, metrics=["learning_rate_limit", "top_eigenvalues"])
    assert "top_eigenvalues differs by a factor of 2 (high over low)" in found.warnings[0]
    (text,) = compare(models, metrics=["learning_rate_limit"]).warnings
    assert "learning_rate_limit" not in text


@pytest.mark.parametrize("metric", ["learning_rate_limit", "gradient_noise_scale"])
def test_no_curvature_is_told_of_metrics_that_do_not_rise_with_it(metric):
    data = [(torch.tensor([[1.0], [-1.0]], dtype=torch.float64).repeat(2, 1), torch.tensor([0, 1, 0, 1]))]
    pair = {"far": margin(8.0), "near": margin(5.0)}
    (alone,) = [t for t in sharpness.compare(pair, data, metrics=[metric]).warnings if "not matched" in t]
    assert "differs by" not in alone
    assert "divided by the losses" not in alone
    both = sharpness.compare(pair, data, metrics=[metric, "top_eigenvalues"])
    (text,) = [t for t in both.warnings if "not matched" in t]
    assert "top_eigenvalues differs by" in text
    assert "divided by the losses" in text


def margin(size):
    """Two classes on one line, classified with this margin: loss and curvature are log(1 + e^-m) and p(1-p) |x|^2."""
    model = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[size / 2], [-size / 2]]))
    return model


def test_the_rule_of_thumb_holds_where_its_law_is_known():
    data = [(torch.tensor([[1.0], [-1.0]], dtype=torch.float64), torch.tensor([0, 1]))]
    found = sharpness.compare({"far": margin(8.0), "near": margin(5.0)}, data, metrics=["top_eigenvalues"])
    losses = [row.train_loss.mean for row in found.rows]
    tops = [row.metrics["top_eigenvalues"].mean for row in found.rows]
    assert tops[1] / tops[0] == pytest.approx(losses[1] / losses[0], rel=0.01)
    hint = float(found.warnings[0].split("divided by the losses the factor is ")[1].split(",")[0])
    assert hint == pytest.approx(1.0, abs=0.02)
    assert "a rule of thumb" in found.warnings[0]
    assert "a hint and no correction" in found.warnings[0]


def test_no_correction_is_offered_far_from_a_perfect_fit(pair):
    found = sharpness.compare({"a": pair["a"], "raw": net(3)}, DATA, metrics=["top_eigenvalues"])
    assert "training losses are not matched" in found.warnings[0]
    assert "divided by the losses" not in found.warnings[0]


def test_scales_of_logits(pair):
    found = sharpness.compare({"a": pair["a"], "b": scaled(pair["a"], 1, 3)}, DATA, metrics=["top_eigenvalues"])
    assert found["b"].logit_norm.mean == pytest.approx(3 * found["a"].logit_norm.mean)
    (text,) = [w for w in found.warnings if "scales of the logits" in w]
    assert "it moves top_eigenvalues. Look at measures with normalize_logits=True" in text
    normal = [("average_case_sharpness", {"normalize_logits": True})]
    free = sharpness.compare({"a": pair["a"], "b": scaled(pair["a"], 1, 3)}, DATA, metrics=normal)
    assert not any("logits" in w for w in free.warnings)
    assert found["b"].train_accuracy.mean == found["a"].train_accuracy.mean
    by_hand = pair["a"](X) - pair["a"](X).mean(1, keepdim=True)
    assert found["a"].logit_norm.mean == pytest.approx(by_hand.norm(dim=1).mean().item(), rel=1e-6)
    lifted = copy.deepcopy(pair["a"])  # the same probabilities
    with torch.no_grad():
        lifted[2].bias += 10
    same = sharpness.compare({"lifted": lifted}, DATA, metrics=["top_eigenvalues"], check_minimum=False)
    assert same["lifted"].logit_norm.mean == pytest.approx(found["a"].logit_norm.mean, rel=1e-5)


def test_scales_of_weights_and_measures_that_do_not_see_them(pair):
    models = {"a": pair["a"], "b": scaled(pair["a"], 8, 1)}
    raw = sharpness.compare(models, DATA, metrics=["top_eigenvalues", "average_case_sharpness"])
    (text,) = [w for w in raw.warnings if "scales of the weights differ: all weights of length" in w]
    assert "which moves top_eigenvalues, average_case_sharpness. Look at" in text
    assert not any("logits" in w for w in raw.warnings)
    for metric in raw.ratios:
        assert raw.ratios[metric][1].mean > 1.5
    torch.manual_seed(0)  # two classes have no normalised logits but two
    three = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    data = [(X, torch.arange(len(X)) % 3)]
    free = sharpness.compare({"a": three, "b": scaled(three, 8, 1)}, data, metrics="scale-free", check_minimum=False)
    assert len(free.ratios) == 6
    assert not any("scales" in w for w in free.warnings)  # nothing that was measured sees them
    for metric, ratios in free.ratios.items():
        assert ratios[1].mean == pytest.approx(1.0, rel=1e-6), metric
    default = sharpness.compare(models, DATA)
    assert default.ratios["average_case_sharpness"][1].mean == pytest.approx(1.0, rel=1e-6)
    assert "average_case_sharpness [elementwise]" in default.table()


def test_one_tensor_of_another_scale_is_named():
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(0.25)
        other = copy.deepcopy(model)
        other[0].weight.mul_(2.5)
    found = sharpness.compare({"a": model, "b": other}, DATA, metrics=["top_eigenvalues"], check_minimum=False)
    (text,) = found.warnings
    assert text.startswith("the scales of the weights differ: 0.weight of length")


def test_weights_are_compared_among_models_of_one_shape_only(pair):
    models = {"wide": nn.Linear(4, 2).double(), "a": pair["a"], "b": scaled(pair["a"], 8, 1)}
    found = sharpness.compare(models, DATA, metrics=["top_eigenvalues"], check_minimum=False).warnings
    (text,) = [w for w in found if "scales of the weights" in w]
    assert "(a) against" in text
    assert "wide" not in text


def test_a_minimum_that_is_none_with_the_newton_decrement():
    off = quadratic(target=(2.0, 1.0, 1.0))
    found = compare({"at": quadratic(loss=0.5), "off": off})
    g, step = torch.tensor([-1.0, -2, 1]).double() @ off.h, torch.tensor([-1.0, -2, 1]).double()
    row = found["off"]
    assert row.newton_decrease.mean == pytest.approx(0.5 * (g @ step).item(), rel=1e-9)
    assert row.gradient_norm.mean == pytest.approx(g.norm().item())
    assert found["at"].newton_decrease.mean == 0.0
    (text,) = [w for w in found.warnings if "at a minimum" in w]
    share = 100 * row.newton_decrease.mean / row.train_loss.mean
    assert text.startswith(
        f"off is not at a minimum: by the quadratic model a Newton step gains at least {share:.3g} % of its training "
        f"loss, and moves the weights by 1e+02 % of their length (gradient norm {row.gradient_norm.mean:.3g})."
    )
    assert not [w for w in compare({"off": off}, check_minimum=False).warnings if "minimum" in w]
    assert compare({"off": off}, check_minimum=False)["off"].newton_decrease is None


def test_a_step_too_short_to_change_anything_is_no_matter():
    """Least squares fitted to a loss of 1e-10: all of it could still be gained, by a thousandth of the weights."""
    near = quadratic(target=(1.0, -1.0, 2.00001), loss=0.0)
    found = compare({"near": near})
    assert found.rows[0].newton_decrease.mean == pytest.approx(found.rows[0].train_loss.mean)
    assert found.warnings == ()


def test_a_saddle_is_named_and_a_slight_bend_is_a_note():
    saddle = quadratic(target=(1.1, -1.1, 2.1), spectrum=torch.tensor([3.0, 1.0, -2.0]).double(), loss=1.0)
    assert any("curves downwards, by -2 beside 3" in w for w in compare({"saddle": saddle}).warnings)
    bent = quadratic(target=(1.01, -1.01, 2.01), spectrum=torch.tensor([3.0, 1.0, -0.02]).double(), loss=1.0)
    found = compare({"bent": bent})
    assert found.warnings == ()
    assert any("slightly negative curvature, -0.02 beside 3" in note for note in found.notes)
    assert found.rows[0].least_curvature.mean == pytest.approx(-0.02)


def test_separable_cross_entropy_has_no_minimum_and_that_is_a_note():
    data = [(torch.tensor([[1.0], [-1.0]], dtype=torch.float64), torch.tensor([0, 1]))]
    found = sharpness.compare({"a": margin(8.0), "b": margin(8.1)}, data, metrics=["top_eigenvalues"])
    assert found.warnings == ()
    share = found["a"].newton_decrease.mean / found["a"].train_loss.mean
    assert share == pytest.approx(0.5, rel=0.01)  # the exponential tail
    assert any("a Newton step would still gain 50 % of the training loss" in note for note in found.notes)


class Unbent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def test_a_minimum_that_cannot_be_checked_is_a_note():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return Unbent.apply(self.w * x)

    data = [(torch.ones(3, 2), torch.zeros(3, 2))]
    found = sharpness.compare({"once": Once()}, data, metrics=["low_pass_sharpness"])
    assert any(note.startswith("whether once is at a minimum was not checked:") for note in found.notes)
    assert found["once"].newton_decrease is None
    assert found["once"].metrics["low_pass_sharpness"].mean > 0


def dropped():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()


@pytest.mark.filterwarnings("ignore::sharpness.DeterminismWarning")
def test_models_in_another_mode():
    off, on = dropped().eval(), dropped().eval()
    on[1].train()
    options = {"metrics": ["low_pass_sharpness"], "check_minimum": False, "mode": "as_is"}
    found = sharpness.compare({"off": off, "on": on}, DATA, **options)
    assert any('on is in another mode: with mode="as_is", 1 of it is in training mode' in w for w in found.warnings)
    assert any("on is measured with some modules in training mode" in note for note in found.notes)
    for models in ({"off": off, "off too": dropped().eval()}, {"off": off}):
        assert not any("another mode" in w for w in sharpness.compare(models, DATA, **options).warnings)
    plain = sharpness.compare({"off": off, "on": on}, DATA, **{**options, "mode": "eval"})
    assert not any("another mode" in text or "training mode" in text for text in (*plain.warnings, *plain.notes))


def normed(passes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    for _ in range(passes):
        model(X)
    return model.eval()


def test_running_statistics_that_were_never_updated():
    options = {"metrics": ["top_eigenvalues"], "check_minimum": False}
    found = sharpness.compare({"used": normed(30), "new": normed(0)}, DATA, **options)
    (text,) = [w for w in found.warnings if "running statistics" in w]
    assert text.startswith("the running statistics of new were never updated (1)")
    trained_mode = sharpness.compare({"new": normed(0)}, DATA, mode="train", **options)
    assert not any("running statistics" in w for w in trained_mode.warnings)
    bare = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 2)).double()
    assert not any("running" in w for w in sharpness.compare({"bare": bare}, DATA, **options).warnings)


def test_precisions_that_differ():
    wide, narrow = nn.Linear(4, 2), nn.Linear(4, 2)
    narrow.load_state_dict(wide.state_dict())
    data = [(X.float(), Y)]
    options = {"metrics": ["top_eigenvalues"], "check_minimum": False}
    found = sharpness.compare({"wide": wide, "narrow": narrow.bfloat16()}, data, **options)
    assert any("different precisions: float32 (wide) against bfloat16 (narrow)" in w for w in found.warnings)
    assert not sharpness.compare({"wide": wide, "same": copy.deepcopy(wide)}, data, **options).warnings


def test_other_architectures_are_compared_without_what_needs_one_shape(pair):
    models = {"a": pair["a"], "linear": nn.Linear(4, 2).double()}
    found = sharpness.compare(models, DATA, check_minimum=False)
    assert any("numbers of parameters: 58 (a) against 10 (linear)" in w for w in found.warnings)
    assert found.distances == ((0.0, None), (None, 0.0))
    assert found["linear"].metrics.keys() == found["a"].metrics.keys()
    noise = [found[name].records["average_case_sharpness"] for name in ("linear", "a")]
    assert found.ratio_intervals["average_case_sharpness"][1] == ratio_interval(*noise, same_draws=False)
    assert ratio_interval(*noise, same_draws=False) != ratio_interval(*noise)
    renamed = nn.Sequential(nn.Identity(), *pair["a"])
    same = sharpness.compare({"a": pair["a"], "renamed": renamed}, DATA, metrics=["top_eigenvalues"]).warnings
    assert any("different architectures, of as many parameters" in w for w in same)


def test_losses_that_are_inferred_differently():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2).double()

        def forward(self, x, labels=None):
            logits = self.layer(x)
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return {"logits": logits, "loss": loss} if loss is not None else logits

    class Bare(Own):
        def forward(self, x):
            return self.layer(x)

    data = [{"x": X, "labels": Y}]
    own, bare = Own(), Bare()
    bare.load_state_dict(own.state_dict())
    options = {"metrics": ["top_eigenvalues"], "check_minimum": False}
    found = sharpness.compare({"own": own, "bare": bare}, data, **options)
    assert any("the losses are not the same function: the model's own loss (own) against" in w for w in found.warnings)
    assert found.ratios["top_eigenvalues"][1].mean == pytest.approx(1.0)


def test_a_loss_that_is_not_finite_names_the_model_and_its_seed():
    broken = quadratic()
    with torch.no_grad():
        broken.w[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model 'b': the loss of batch 0 .* is nan"):
        compare({"a": quadratic(), "b": broken})
    with pytest.raises(NonFiniteError, match=r"model 'b' \(2 of 2\): the loss of batch 0 .* is nan"):
        compare({"a": quadratic(), "b": [quadratic(), broken]})


def test_one_model_each_is_a_note_and_several_are_none():
    note = "one model each"
    assert any(note in text for text in compare({"a": quadratic(), "b": quadratic()}).notes)
    assert not any(note in text for text in compare({"a": [quadratic(), quadratic()], "b": [quadratic()]}).notes)
