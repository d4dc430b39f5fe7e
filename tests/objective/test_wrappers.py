"""Models that are compiled, wrapped, scripted, quantised, sharded or not all there."""

import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn

import sharpness
from sharpness import Objective
from sharpness.errors import ModelError
from tests.checks import assert_untouched
from tests.objective.dense import D
from tests.zoo import batches, features

X, Y = features(3), torch.arange(11) % 3
LOADER = batches(X, Y)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def with_child(wrap):
    torch.manual_seed(1)
    return nn.Sequential(wrap(net()), nn.Linear(3, 3, dtype=D))


def product(model, loader=LOADER, **options):
    objective = Objective(model, loader, **options)
    v = torch.linspace(-1, 2, objective.n, dtype=objective.dtype)
    with assert_untouched(model):
        first = objective.hvp(v)
    assert torch.equal(objective.hvp(v), first)
    return first


def in_place(model):
    model.compile(backend="eager")
    return model


def compiled(model):
    return torch.compile(model, backend="aot_eager")


@pytest.mark.parametrize("wrap", [compiled, in_place, nn.DataParallel], ids=["compiled", "in place", "data parallel"])
def test_wrappers_at_the_top_and_inside_are_looked_through(wrap):
    calls = []
    wrapped = wrap(net())
    wrapped.register_forward_hook(lambda *_: calls.append(1))  # a wrapper inside still runs its own hooks
    torch.testing.assert_close(product(wrapped), product(net()))
    for memory in (0, "auto"):
        torch.testing.assert_close(product(with_child(wrap), memory=memory), product(with_child(nn.Sequential)))
    hooked = nn.Sequential(wrapped, nn.Linear(3, 3, dtype=D))
    calls.clear()
    Objective(hooked, LOADER).value()
    assert len(calls) == 3


@pytest.mark.parametrize("stance", [True, False], ids=["with stances", "before PyTorch 2.6"])
@pytest.mark.parametrize("place", ["child", "in place"])
def test_compiled_models_run_uncompiled_and_stay_compiled(place, stance, monkeypatch):
    if not stance:
        monkeypatch.delattr(torch.compiler, "set_stance", raising=False)
    counted = []

    def backend(graph, inputs):
        counted.append(1)
        return graph.forward

    class Own(nn.Module):  # a plain Sequential is not compiled in place
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model = with_child(lambda inner: torch.compile(inner, backend=backend) if place == "child" else Own(inner))
    if place == "in place":
        model[0].compile(backend=backend)
    product(model)
    assert not counted
    model(X)
    assert counted


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs PyTorch 2.6")
def test_compiled_functions_run_as_they_were_written():
    @torch.compile(backend="aot_eager")
    def bend(x):
        return torch.sin(x) * x

    class Calls(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.body, self.function = net(), function

        def forward(self, x):
            return self.function(self.body(x))

    torch.testing.assert_close(product(Calls(bend)), product(Calls(lambda x: torch.sin(x) * x)))


def test_scripted_and_traced_models():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch, about its own future
        scripted, traced = torch.jit.script(net()), torch.jit.trace(net(), X)
    expected = product(net())
    for model in (scripted, traced, nn.Sequential(scripted)):
        before = [p.detach().clone() for p in model.parameters()]
        objective = Objective(model, LOADER, memory=0)
        v = torch.linspace(-1, 2, objective.n, dtype=D)
        for _ in range(4):  # the executor optimises after some runs
            torch.testing.assert_close(objective.hvp(v), expected)
        assert objective.value(objective.vector() + 1) != objective.value()
        assert all(map(torch.equal, model.parameters(), before))
        assert all(p.requires_grad and p.is_leaf and p.grad is None for p in model.parameters())


def quantised(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch, about its own future
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


needs_quantised_kernels = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="no quantised kernels here"
)


@needs_quantised_kernels
def test_quantised_layers_below_what_is_measured_are_frozen():
    torch.manual_seed(0)
    body, head = quantised(nn.Sequential(nn.Linear(3, 4), nn.Tanh())), nn.Linear(4, 3)
    loader = batches(X.float(), Y)
    found = product(nn.Sequential(body, head), loader)
    torch.testing.assert_close(found, product(head, [(body(x), y) for x, y in loader]))


@needs_quantised_kernels
@pytest.mark.filterwarnings("ignore:quantized.*an autograd kernel was not registered:UserWarning")
def test_quantised_layers_elsewhere_are_explained():
    with pytest.raises(ModelError, match="has only quantised weights.* Measure the model as it was before"):
        Objective(quantised(nn.Sequential(nn.Linear(3, 3))), LOADER)
    blocked = nn.Sequential(nn.Linear(3, 3), quantised(nn.Sequential(nn.Linear(3, 3))))
    with pytest.raises(ModelError, match="the loss does not depend on the parameters .* quantised layers"):
        product(blocked, batches(X.float(), Y))


def test_integer_and_quantised_parameters_are_frozen_ones():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()
            weight = torch.quantize_per_tensor(torch.eye(3), 0.5, 0, torch.qint8)
            self.quantised = nn.Parameter(weight, requires_grad=False)
            self.shift = nn.Parameter(torch.arange(3), requires_grad=False)

        def forward(self, x):
            return self.body(x) @ self.quantised.dequantize().double() + self.shift

    class Plain(Odd):
        def forward(self, x):
            return self.body(x) + torch.arange(3)

    objective = [Objective(kind(), LOADER) for kind in (Odd, Plain)]
    v = torch.linspace(-1, 2, objective[0].n, dtype=D)
    torch.testing.assert_close(objective[0].hvp(v), objective[1].hvp(v))


def test_complex_numbers_inside_a_real_model():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(3, 4, dtype=D), nn.Linear(3, 3, dtype=D)
            self.body = nn.Identity()  # a module whose outputs are complex

        def forward(self, x):
            return self.last(self.body(torch.fft.rfft(torch.tanh(self.first(x)))).abs())

    objective = Objective(Spectrum(), LOADER)
    v, step = torch.linspace(-1, 2, objective.n, dtype=D), 1e-5
    ahead, behind = (objective.gradient(objective.vector() + sign * step * v) for sign in (1, -1))
    torch.testing.assert_close(objective.hvp(v), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("where", ["1.weight", "statistics"])
def test_tensors_without_values_are_named(where):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta" if where == "1.weight" else "cpu"))
    if where == "statistics":
        model.register_buffer("statistics", torch.empty(3, device="meta"))
    with pytest.raises(ModelError, match=f"'{where}' is on the meta device and has no values.* Load all weights"):
        Objective(model, LOADER, params="0.*")


PREAMBLE = """
import sys, tempfile, warnings
import torch
from torch import nn
import torch.distributed as dist
from sharpness import Objective
from sharpness.errors import ModelError
from tests.objective.test_wrappers import LOADER, net, product, with_child
warnings.simplefilter("ignore")
dist.init_process_group("gloo", store=dist.FileStore(tempfile.mktemp(), 1), rank=0, world_size=1)
"""
DDP = """
from torch.nn.parallel import DistributedDataParallel as DDP
torch.testing.assert_close(product(DDP(net())), product(net()))
torch.testing.assert_close(product(with_child(DDP), memory=0), product(with_child(nn.Sequential)))
print("same")
"""
SHARDED = """
from torch.distributed.fsdp import FullyShardedDataParallel
try:
    from torch.distributed.fsdp import fully_shard  # since PyTorch 2.6
except ImportError:
    from torch.distributed._composable.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
mesh = init_device_mesh("cpu", (1,))
for model in (
    fully_shard(net(), mesh=mesh),
    nn.Sequential(fully_shard(net(), mesh=mesh)),
    FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=True),
):
    try:
        Objective(model, LOADER)
    except ModelError as error:
        print(error)
"""


def run(script):
    code = textwrap.dedent(PREAMBLE + script) + "\ndist.destroy_process_group()\n"
    root = os.path.dirname(os.path.dirname(sharpness.__file__))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_distributed_data_parallel_at_the_top_and_inside():
    assert run(DDP) == "same\n"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_sharded_models_are_named():
    top, child, old = run(SHARDED).splitlines()
    for line, name in ((top, "the FSDPSequential"), (child, "module '0' (FSDPSequential)"), (old, "the FullySharded")):
        assert line.startswith(name)
        assert "is sharded over processes" in line
        assert "Gather a full state dict" in line


class Sharded(nn.Parameter):
    pass


Sharded.__name__ = "DTensor"


def test_parameters_sharded_without_a_wrapper_are_named():
    model = nn.Linear(3, 3)
    model.weight = Sharded(model.weight.detach())
    with pytest.raises(ModelError, match=r"parameter 'weight' \(DTensor\) is sharded over processes"):
        Objective(model, LOADER)
