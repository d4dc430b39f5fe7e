"""A run that was killed goes on where it stopped, and ends in the same bits; a file of another run is refused."""

import copy
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import sharpness
from sharpness.errors import ArgumentError, DataError
from tests.checks import assert_untouched
from tests.zoo import batches, features, tanh_net

PROBLEM = tanh_net()
CALLS = {
    "lanczos": {"k": 3, "vectors": True},
    "confirmed": {"k": 2, "confirm": True},
    "restarted": {"k": 5, "memory": 0},
    "power": {"method": "power", "on_failure": "ignore"},
    "arpack": {"method": "arpack", "k": 2},
    "ggn": {"curvature": "ggn", "k": 2},
}


class Killed(list):
    """A loader that ends the walk for good after so many batches."""

    def __init__(self, loader, after):
        super().__init__(loader)
        self.after, self.count = after, 0

    def __iter__(self):
        for batch in super().__iter__():
            self.count += 1
            if self.count > self.after:
                raise KeyboardInterrupt
            yield batch


def numbers(result):
    fields = (result.eigenvalues, result.residuals, result.interval, result.eigenvectors)
    return [field for field in fields if field is not None], result.num_matvecs, result.confirmation


def same(a, b):
    return all(map(torch.equal, a[0], b[0])) and a[1:] == b[1:]


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bits(name, tmp_path):
    options = {"memory": 0, **CALLS[name]}  # the data are walked for each product
    plain = sharpness.top_eigenvalues(PROBLEM.model, PROBLEM.loader, **options)
    whole = sharpness.top_eigenvalues(PROBLEM.model, PROBLEM.loader, checkpoint=tmp_path / "whole", **options)
    path = tmp_path / "products"
    for after in (7, 11):
        with assert_untouched(PROBLEM.model), pytest.raises(KeyboardInterrupt):
            sharpness.top_eigenvalues(PROBLEM.model, Killed(PROBLEM.loader, after), checkpoint=path, **options)
    result = sharpness.top_eigenvalues(PROBLEM.model, PROBLEM.loader, checkpoint=path, **options)
    assert same(numbers(result), numbers(plain))
    assert same(numbers(whole), numbers(plain))
    assert result.num_passes < whole.num_passes
    again = sharpness.top_eigenvalues(PROBLEM.model, PROBLEM.loader, checkpoint=path, **options)
    assert same(numbers(again), numbers(plain))
    assert again.num_passes <= 4  # the data's digest, the first product, two looks whether the loss stays the same


SCRIPT = """
    import sys, time, torch, sharpness
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4))
    x, y = torch.randn(60, 6), torch.arange(60) % 4

    class Slow(list):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(float(sys.argv[2]))
                yield batch

    loader = Slow([(x[:40], y[:40]), (x[40:], y[40:])])
    result = sharpness.top_eigenvalues(model, loader, k=4, memory=0, checkpoint=sys.argv[1])
    print(result.eigenvalues.numpy().tobytes().hex(), result.num_passes, flush=True)
"""


def test_after_kill_9_the_same_call_ends_in_the_same_bits(tmp_path):
    script, path, other = tmp_path / "run.py", tmp_path / "products", tmp_path / "other"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(file, pause):
        return subprocess.Popen(
            [sys.executable, script, file, str(pause)], stdout=subprocess.PIPE, text=True, env=environment
        )

    whole, _ = run(other, 0).communicate(timeout=120)
    killed = run(path, 0.05)
    size = 4 * (6 * 20 + 20 + 20 * 4 + 4)
    while killed.poll() is None and (not path.exists() or path.stat().st_size < 5 * size):
        pass
    assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    rest, _ = run(path, 0).communicate(timeout=120)
    assert rest.split()[0] == whole.split()[0]
    assert int(rest.split()[1]) < int(whole.split()[1])


def changed_weights():
    model = copy.deepcopy(PROBLEM.model)
    model.core.last.bias.data[0] += 1e-9
    return model


def changed_buffer():
    model = copy.deepcopy(PROBLEM.model)
    model.one.mul_(1 + 1e-12)
    return model


X, Y = features(3), torch.arange(11) % 3
OTHERS = {
    "weights": (changed_weights, PROBLEM.loader, {}),
    "weights ": (changed_buffer, PROBLEM.loader, {}),
    "data": (lambda: PROBLEM.model, batches(X + 1e-9, Y), {}),
    "data ": (lambda: PROBLEM.model, batches(X, Y.flip(0)), {}),
    "data  ": (lambda: PROBLEM.model, PROBLEM.loader[:2], {}),
    "model": (lambda: nn.Sequential(copy.deepcopy(PROBLEM.model)), PROBLEM.loader, {}),
    "loss": (lambda: PROBLEM.model, PROBLEM.loader, {"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1)}),
    "loss ": (lambda: PROBLEM.model, PROBLEM.loader, {"loss_fn": nn.CrossEntropyLoss(torch.ones(3).double())}),
    "k": (lambda: PROBLEM.model, PROBLEM.loader, {"k": 2}),
    "which": (lambda: PROBLEM.model, PROBLEM.loader, {"which": "smallest"}),
    "tol": (lambda: PROBLEM.model, PROBLEM.loader, {"tol": 1e-4}),
    "seed": (lambda: PROBLEM.model, PROBLEM.loader, {"seed": 1}),
    "method": (lambda: PROBLEM.model, PROBLEM.loader, {"method": "power"}),
    "curvature": (lambda: PROBLEM.model, PROBLEM.loader, {"curvature": "ggn"}),
    "mode": (lambda: PROBLEM.model, PROBLEM.loader, {"mode": "train"}),
    "parameters": (lambda: PROBLEM.model, PROBLEM.loader, {"params": "core.first.weight"}),
    "confirm": (lambda: PROBLEM.model, PROBLEM.loader, {"confirm": True}),
    "num_matvecs": (lambda: PROBLEM.model, PROBLEM.loader, {"num_matvecs": 9}),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "products"
    sharpness.top_eigenvalues(PROBLEM.model, PROBLEM.loader, checkpoint=path)
    return path


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_of_another_run_is_refused_by_what_differs(what, recorded):
    make, loader, options = OTHERS[what]
    before = recorded.read_bytes()
    with pytest.raises(ArgumentError, match=what.strip()):
        sharpness.top_eigenvalues(make(), loader, checkpoint=recorded, **options)
    assert recorded.read_bytes() == before


class Opaque:
    """A batch of a kind that nobody knows."""

    def __init__(self, x, y):
        self.x, self.y = x, y


def opaque_loss(model, batch):
    return nn.functional.cross_entropy(model(batch.x), batch.y), len(batch.y)


def scaled_loss(factor):
    def loss(outputs, targets):
        return factor * nn.functional.cross_entropy(outputs, targets)

    return loss


def test_what_no_digest_sees_is_seen_by_its_product(tmp_path):
    """A closure of another value, and data that are no tensors."""
    first, second = tmp_path / "loss", tmp_path / "data"
    sharpness.top_eigenvalues(PROBLEM.model, PROBLEM.loader, scaled_loss(1.0), checkpoint=first)
    with pytest.raises(ArgumentError, match=r"the loss, the model's code or the data are others"):
        sharpness.top_eigenvalues(PROBLEM.model, PROBLEM.loader, scaled_loss(2.0), checkpoint=first)
    one, other = ([Opaque(x + shift, y) for x, y in PROBLEM.loader] for shift in (0.0, 0.1))
    sharpness.top_eigenvalues(PROBLEM.model, one, batch_loss=opaque_loss, checkpoint=second)
    with pytest.raises(ArgumentError, match=r"the loss, the model's code or the data are others"):
        sharpness.top_eigenvalues(PROBLEM.model, other, batch_loss=opaque_loss, checkpoint=second)


@pytest.mark.filterwarnings("ignore::sharpness.errors.MemoryWarning")
def test_a_resumed_run_does_not_depend_on_what_memory_is_free(tmp_path, monkeypatch):
    model, loader = PROBLEM.model, PROBLEM.loader
    first = sharpness.top_eigenvalues(model, loader, k=12, checkpoint=tmp_path / "products")
    monkeypatch.setattr("sharpness.metrics.memory.free_bytes", lambda device: 30 * 8 * first.settings["n"])
    again = sharpness.top_eigenvalues(model, loader, k=12, checkpoint=tmp_path / "products")
    assert same(numbers(first), numbers(again))


def test_files_that_are_none_are_refused_and_kept(tmp_path):
    path = tmp_path / "letters"
    path.write_text("dear reader")
    with pytest.raises(DataError, match="is not a checkpoint of this library"):
        sharpness.top_eigenvalues(PROBLEM.model, PROBLEM.loader, checkpoint=path)
    assert path.read_text() == "dear reader"
    with pytest.raises(
        ArgumentError, match=r"`checkpoint`: .* cannot be written. Choose a file in a folder that exists"
    ):
        sharpness.top_eigenvalues(PROBLEM.model, PROBLEM.loader, checkpoint=tmp_path / "nowhere" / "file")
    with pytest.raises(ArgumentError, match='method="pyhessian" makes its products itself'):
        sharpness.top_eigenvalues(PROBLEM.model, PROBLEM.loader, checkpoint=tmp_path / "file", method="pyhessian")
