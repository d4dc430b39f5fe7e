"""Which precision the forward pass has, and that every flag of PyTorch is as before."""

import math

import pytest
import torch
from torch import nn

import sharpness
from sharpness import Objective
from sharpness.errors import NonFiniteError
from sharpness.objective.guard import guarded
from sharpness.objective.kernels import PRECISIONS, autocast, matmul_precision
from sharpness.objective.memory import graph_nodes
from tests.zoo import features

NEW = hasattr(torch.backends, "fp32_precision")  # since PyTorch 2.9
CPU = torch.device("cpu")


def flags():
    """Everything that decides about TF32, as the user can read it; ``None`` where PyTorch refuses to tell."""

    def read(get):
        try:
            return get()
        except RuntimeError:
            return None

    found = {
        "matmul": read(lambda: torch.backends.cuda.matmul.allow_tf32),
        "cudnn": read(lambda: torch.backends.cudnn.allow_tf32),
        "precision": read(torch.get_float32_matmul_precision),
    }
    if NEW:
        found |= {
            "new all": torch.backends.fp32_precision,
            "new matmul": torch.backends.cuda.matmul.fp32_precision,
            "new conv": torch.backends.cudnn.conv.fp32_precision,
            "new rnn": torch.backends.cudnn.rnn.fp32_precision,
            "new mkldnn": torch.backends.mkldnn.matmul.fp32_precision,
        }
    return found


def exact(found):
    old = (found["matmul"], found["cudnn"], found["precision"])
    return old in ((False, False, "highest"), (None, None, None)) and all(
        found.get(f"new {name}", "ieee") in ("ieee", "none") for name in ("matmul", "conv", "rnn", "mkldnn")
    )


@pytest.fixture
def _restored():
    """PyTorch's flags after the test are those before it."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    raw = flags()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept[:2]
    torch.set_float32_matmul_precision(kept[2])
    if NEW:
        torch.backends.fp32_precision = raw["new all"]
        torch.backends.cuda.matmul.fp32_precision = raw["new matmul"]
        torch.backends.cudnn.conv.fp32_precision = raw["new conv"]
        torch.backends.cudnn.rnn.fp32_precision = raw["new rnn"]
        torch.backends.mkldnn.matmul.fp32_precision = raw["new mkldnn"]


def old_matmul():
    torch.backends.cuda.matmul.allow_tf32 = True


def old_cudnn():
    torch.backends.cudnn.allow_tf32 = False


def new_matmul():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def new_mixed():
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # the rest of cuDNN stays in TF32


def new_all():
    torch.backends.fp32_precision = "tf32"


USERS = [
    lambda: None,
    old_matmul,
    old_cudnn,
    lambda: torch.set_float32_matmul_precision("medium"),
    *([new_matmul, new_mixed, new_all] if NEW else []),
]


class Watching(nn.Module):
    def __init__(self, seen, fails=False):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.seen, self.fails = nn.Linear(3, 3), seen, fails

    def forward(self, x):
        out = self.layer(x)
        self.seen.append((flags(), out.dtype))
        if self.fails:
            raise KeyboardInterrupt
        return out


@pytest.mark.usefixtures("_restored")
@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, about the older flags
@pytest.mark.parametrize("user", USERS, ids=lambda f: f.__name__)
def test_tf32_is_off_inside_and_every_flag_is_restored(user):
    user()
    before, seen = flags(), []
    loader = [(features(3).float(), torch.arange(11) % 3)]
    Objective(Watching(seen), loader).hvp(torch.ones(12))
    assert flags() == before
    with pytest.raises(KeyboardInterrupt):
        Objective(Watching(seen, fails=True), loader).value()
    assert flags() == before
    assert len(seen) == 2
    for found, dtype in seen:
        assert exact(found) or user in (new_matmul, new_mixed, new_all)
        assert all(found.get(f"new {name}", "ieee") in ("ieee", "none") for name in ("matmul", "conv", "rnn", "mkldnn"))
        assert dtype == torch.float32


@pytest.mark.usefixtures("_restored")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("user", USERS, ids=lambda f: f.__name__)
def test_tf32_on_request(user):
    user()
    before = flags()
    with guarded(nn.Linear(3, 3), "eval", CPU, [], "tf32"):
        inside = flags()
    assert flags() == before
    if NEW:
        assert [inside[f"new {name}"] for name in ("matmul", "conv", "rnn")] == ["tf32"] * 3
    assert inside["matmul"] in (True, None)
    assert inside["cudnn"] in (True, None)
    with matmul_precision("bfloat16"):
        assert exact(flags()) or user in (new_matmul, new_mixed, new_all)


def product(model, precision, loader):
    objective = Objective(model, loader, precision=precision)
    return objective.hvp(torch.linspace(-1, 1, objective.n, dtype=objective.dtype)).double()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_forward_pass_runs_in_what_is_asked_for(precision):
    loader, seen = [(features(3).float(), torch.arange(11) % 3)], []
    found = product(Watching(seen), precision, loader)
    kind = getattr(torch, precision, torch.float32)
    assert seen[-1][1] == kind
    truth = product(Watching(seen).double(), "exact", [(x.double(), y) for x, y in loader])
    error = ((found - truth).norm() / truth.norm()).item()
    assert error < 8 * torch.finfo(kind).eps
    assert error > 0.01 * torch.finfo(kind).eps


@pytest.mark.parametrize("outside", [torch.bfloat16, torch.float16])
def test_a_users_autocast_changes_nothing(outside):
    loader, seen = [(features(3).float(), torch.arange(11) % 3)], []
    plain = product(Watching(seen), "exact", loader)
    with torch.autocast("cpu", dtype=outside):
        assert torch.equal(product(Watching(seen), "exact", loader), plain)
        half = product(Watching(seen), "bfloat16", loader)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == outside
    assert [dtype for _, dtype in seen] == [torch.float32, torch.float32, torch.bfloat16]
    assert torch.equal(half, product(Watching(seen), "bfloat16", loader))
    assert not torch.is_autocast_enabled("cpu")


def test_intervals_under_autocast_hold_an_eigenvalue_of_the_float64_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    loader = [(features(3).float(), torch.arange(11) % 3)]
    half = sharpness.top_eigenvalues(model, loader, precision="bfloat16", on_failure="ignore")
    exact = sharpness.top_eigenvalues(model.double(), [(x.double(), y) for x, y in loader], method="dense", k=5)
    assert half.settings["precision"] == "bfloat16"
    low, high = half.interval[0].tolist()
    assert ((low <= exact.eigenvalues) & (exact.eigenvalues <= high)).any()
    assert 1e-5 < half.settings["rounding"] / exact.eigenvalues[0] < 0.1


def test_graphs_of_several_batches_share_no_casts():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    with autocast(CPU, "bfloat16"):
        one, two = (model(x).float().square().sum() for x in features(3).float().split(6))
    shared = set(graph_nodes([one])) & set(graph_nodes([two]))
    assert {type(node).__name__ for node in shared} == {"AccumulateGrad"}


def test_overflow_in_half_precision_names_the_batch():
    """3e5 is a number in single precision and infinite in half."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(3.0)
    loader = [(torch.full((2, 1), size), torch.zeros(2, 1)) for size in (1.0, 1e5)]
    assert math.isfinite(Objective(model, loader).value())
    objective = Objective(model, loader, precision="float16")
    for call in (objective.value, lambda: objective.hvp(torch.ones(1))):
        with pytest.raises(NonFiniteError, match=r"batch 1 \(counted from 0\)"):
            call()
