"""Every way of making products gives the same ones: graphs, tapes, batches made anew by programs, compiled code."""

import importlib
import shutil
import warnings

import pytest
import torch
from torch import nn

import sharpness
from sharpness import Objective
from sharpness.errors import ArgumentError, CompileWarning
from sharpness.objective import compiler, replay, stream
from sharpness.objective.curvature import CURVATURES, Curvature
from tests.zoo import networks, problems


@pytest.fixture
def eager_code(monkeypatch):
    """Let tapes be made of everything, and "compiled" code be the tape itself."""
    monkeypatch.setattr(replay, "_PER_NODE", 0.0)
    monkeypatch.setattr(compiler, "_SUPPORTED", True)
    monkeypatch.setattr(compiler.Compiler, "run", lambda self, program, example: program.graph)


def products(objective, curvature, count=4):
    """Products with several vectors one after the other, and the engine's own word on how they were made."""
    v = torch.randn(count, objective.n, dtype=objective.dtype, generator=torch.Generator().manual_seed(3))
    with objective.session():
        found = [objective.products([row], curvature=curvature)[0] for row in v]
        block = objective.products(list(v), curvature=curvature)
        return torch.stack([*found, *block]), objective.provenance(curvature)


def objective_of(problem, **options):
    return Objective(problem.model, problem.loader, **options, **problem.options)


def close(found, expected):
    limit = 1e-12 if expected.dtype == torch.float64 else 1e-5
    return torch.linalg.vector_norm(found - expected) <= limit * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("memory", ["auto", 0])
@pytest.mark.parametrize("problem", problems(), ids=lambda problem: problem.name)
def test_tapes_make_the_products_of_the_zoo(problem, memory, eager_code):
    expected, plain = products(
        Objective(problem.model, problem.loader, compile=False, memory=0, **problem.options), Curvature()
    )
    objective = Objective(problem.model, problem.loader, compile=True, memory=memory, **problem.options)
    found, said = products(objective, Curvature())
    assert plain["engine"] == "autograd"
    assert said["engine"] == "compiled"
    assert close(found, expected)


@pytest.mark.parametrize("memory", ["auto", 0])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("problem", networks(), ids=lambda problem: problem.name)
def test_tapes_make_the_products_of_every_curvature(problem, curvature, memory, eager_code):
    if "batch_loss" in problem.options and curvature != "hessian":
        pytest.skip("hides the outputs")
    expected, _ = products(
        Objective(problem.model, problem.loader, compile=False, memory=0, **problem.options), Curvature(curvature)
    )
    found, said = products(
        Objective(problem.model, problem.loader, compile=True, memory=memory, **problem.options), Curvature(curvature)
    )
    assert said["engine"] == "compiled"
    assert close(found, expected)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("problem", networks(), ids=lambda problem: problem.name)
def test_tapes_of_kept_graphs_give_the_same_bits(problem, curvature, eager_code):
    if "batch_loss" in problem.options and curvature != "hessian":
        pytest.skip("hides the outputs")
    objective = Objective(problem.model, problem.loader, compile=False, **problem.options)
    v = torch.randn(objective.n, dtype=objective.dtype)
    with objective.session():
        found = [objective.products([v], curvature=Curvature(curvature))[0] for _ in range(4)]
        assert objective.provenance(Curvature(curvature))["engine"] == "recorded"
    assert all(torch.equal(product, found[0]) for product in found)


class Branching(nn.Module):
    """Takes another way through itself where the data say so."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        return self.one(x).tanh() if bool(x.sum() > 0) else self.two(x).sin()


class Cube(torch.autograd.Function):
    """An autograd function that someone wrote in Python."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class OwnFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x):
        return Cube.apply(self.linear(x))


def rows(*sizes, features=4, classes=3):
    g = torch.Generator().manual_seed(1)
    shift = [1.0, -1.0, 0.5, -0.5]
    return [
        (
            torch.randn(size, features, dtype=torch.float64, generator=g) + shift[i % 4],
            torch.randint(classes, (size,), generator=g),
        )
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("memory", ["auto", 0])
@pytest.mark.parametrize(
    ("model", "note"), [(Branching(), "turns a tensor into a number"), (OwnFunction(), "autograd function of its own")]
)
def test_models_that_hide_something_get_their_products_from_autograd_and_the_result_says_why(
    model, note, memory, eager_code
):
    loader = rows(5, 5, 3)
    expected, _ = products(Objective(model, loader, compile=False), Curvature())
    found, said = products(Objective(model, loader, compile=True, memory=memory), Curvature())
    assert close(found, expected)
    if isinstance(model, Branching) and memory == "auto":  # which way was taken is known once it was taken
        assert said["engine"] == "compiled"
        assert said["engine_note"] is None
    else:
        assert said["engine"] == "autograd"
        assert note in said["engine_note"]


def test_a_batch_that_the_program_is_not_true_of_is_left_to_the_model(eager_code):
    """Flags of Python are seen by no tape; the loss tells that another way was taken."""

    class Alternating(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3).double()

        def forward(self, x):
            with torch.no_grad():
                scale = 2.0 if float(x.numpy().sum()) > 0 else 1.0
            return self.linear(x).tanh() * scale

    model, loader = Alternating(), rows(5, 5, 5)
    expected, _ = products(Objective(model, loader, compile=False), Curvature())
    found, said = products(Objective(model, loader, compile=True, memory=0), Curvature())
    assert close(found, expected)
    assert said["engine"] == "compiled"


def test_batches_of_other_weight_are_left_to_the_model(eager_code):
    loader = rows(6, 6, 6)
    loader[1][1][:2] = -100
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    expected, _ = products(Objective(model, loader, nn.CrossEntropyLoss(), compile=False), Curvature())
    found, said = products(Objective(model, loader, nn.CrossEntropyLoss(), compile=True, memory=0), Curvature())
    assert close(found, expected)
    assert said["engine"] == "compiled"


def test_dropout_that_is_on_is_not_recorded_for_batches_that_are_not_kept(eager_code):
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double()
    loader = rows(6, 6)
    expected, _ = products(Objective(model, loader, mode="train", compile=False), Curvature())
    found, said = products(Objective(model, loader, mode="train", compile=True, memory=0), Curvature())
    assert close(found, expected)
    assert "random" in said["engine_note"]


def test_blocks_after_whole_products_are_those_of_the_matrix(eager_code):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    objective = Objective(model, rows(6, 4), compile=True)
    dense = sharpness.HessianOperator(Objective(model, rows(6, 4), compile=False)).to_dense()
    v = torch.randn(objective.n, dtype=torch.float64)
    with objective.session():
        for _ in range(3):
            assert close(objective.products([v])[0], dense @ v)
        left = objective.passes.room().left
        block = objective.products([v[:25]], blocks=[[0, 1]])[0]
        assert close(block, dense[:25, :25] @ v[:25])
        for _ in range(3):
            assert close(objective.products([v])[0], dense @ v)
        assert objective.passes.room().left == left  # what was charged for graphs was given back
    assert objective.provenance()["kept_graphs"] == 2


def test_tapes_stay_within_the_memory(eager_code):
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    loader = rows(40, 40, 40, 40, features=64)
    expected, _ = products(Objective(model, loader, compile=False, memory=0), Curvature())
    for memory in (400_000, 700_000, 1_500_000):
        objective = Objective(model, loader, compile=True, memory=memory)
        with objective.session():
            found, _ = products(objective, Curvature())
            assert objective.passes.room().left >= 0
        assert close(found, expected)


def test_a_short_run_is_never_compiled_by_default(monkeypatch):
    monkeypatch.setattr(compiler.Compiler, "run", lambda *a: pytest.fail("compiled"))
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    loader = [(x.float(), y) for x, y in rows(6, 4)]
    result = sharpness.top_eigenvalues(model, loader, k=2)
    assert result.settings["engine"] != "compiled"  # recorded, if products take unusually long today
    assert sharpness.top_eigenvalues(model, loader, k=2, memory=0).settings["engine"] == "autograd"


@pytest.mark.parametrize("memory", ["auto", 0])
def test_a_compiler_that_fails_is_told_of_once_and_the_products_are_made_without(monkeypatch, memory, tmp_path):
    monkeypatch.setenv("SHARPNESS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_SUPPORTED", True)
    monkeypatch.setattr(compiler.Compiler, "_compiled", lambda *a: (_ for _ in ()).throw(OSError("no such compiler")))
    model, loader = Branching().one, rows(6, 4)
    expected, _ = products(Objective(model, loader, compile=False), Curvature())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found, said = products(Objective(model, loader, compile=True, memory=memory), Curvature())
    assert [w.category for w in told] == [CompileWarning]
    assert "OSError: no such compiler" in str(told[0].message)
    assert close(found, expected)
    assert said["engine"] != "compiled"
    assert "no such compiler" in said["engine_note"]


def test_an_old_pytorch_says_so(monkeypatch):
    monkeypatch.setattr(compiler, "_SUPPORTED", False)
    _, said = products(Objective(Branching().one, rows(6), compile=True), Curvature())
    assert "2.8" in said["engine_note"]


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_compile_is_auto_or_a_flag(value):
    with pytest.raises(ArgumentError, match='`compile` must be "auto", True or False, got'):
        Objective(nn.Linear(2, 1), [(torch.eye(2), torch.zeros(2, 1))], compile=value)


@pytest.mark.skipif(not compiler._SUPPORTED or shutil.which("g++") is None, reason="needs a compiler")
def test_compiled_code_makes_the_products_and_is_loaded_by_the_next_run(monkeypatch, tmp_path):
    monkeypatch.setenv("SHARPNESS_CACHE_DIR", str(tmp_path))
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    loader = [(x.float(), y) for x, y in rows(6)]
    expected, _ = products(Objective(model, loader, compile=False), Curvature())
    found, said = products(Objective(model, loader, compile=True), Curvature())
    assert said["engine"] == "compiled"
    assert close(found, expected)
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin", ".json"}
    monkeypatch.setattr(compiler.Compiler, "_compiled", lambda *a: pytest.fail("compiled again"))
    again, said = products(Objective(model, loader, compile=True), Curvature())
    assert said["engine"] == "compiled"
    assert torch.equal(again, found)


@pytest.mark.skipif(not compiler._SUPPORTED, reason="needs a compiler")
def test_compiled_code_that_computes_something_else_is_not_used(monkeypatch, tmp_path):
    def miscompiled(graph, example, **options):
        return lambda *inputs: [1.01 * result for result in graph(*inputs)]

    monkeypatch.setenv("SHARPNESS_CACHE_DIR", str(tmp_path))
    module = importlib.import_module("torch._inductor.standalone_compile")  # a function has the same name
    monkeypatch.setattr(module, "standalone_compile", miscompiled)
    model, loader = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), rows(6, 4)
    expected, _ = products(Objective(model, loader, compile=False), Curvature())
    with pytest.warns(CompileWarning, match="computes something else"):
        found, said = products(Objective(model, loader, compile=True), Curvature())
    assert close(found, expected)
    assert said["engine"] == "recorded"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ratio", "engine"), [(0.5, "compiled"), (2.0, "autograd"), (None, "autograd")])
def test_batches_that_are_not_kept_are_compiled_by_default_where_that_was_found_faster(
    ratio, engine, eager_code, monkeypatch
):
    """The second product is made by code, if at all, and takes ``ratio`` times as long as the first."""
    economy = None if ratio is None else compiler.Economy(1.0, 0.0, ratio)
    monkeypatch.setattr(compiler.Compiler, "_economy", lambda *a: economy)
    monkeypatch.setattr(compiler.Compiler, "may_pay", lambda *a: True)
    monkeypatch.setattr(compiler, "_IMPORT", 0.0)
    model, loader = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), rows(6, 4)
    monkeypatch.setattr(stream.Stream, "compare", lambda *a: None)
    expected, _ = products(Objective(model, loader, compile=False), Curvature())
    found, said = products(Objective(model, loader, memory=0), Curvature())
    assert close(found, expected)
    assert said["engine"] == engine


def test_code_that_turns_out_slower_is_given_up_and_remembered(eager_code, monkeypatch):
    learnt = []
    economy = compiler.Economy(1.0, 0.0, 0.5)
    monkeypatch.setattr(compiler.Compiler, "_economy", lambda *a: economy)
    monkeypatch.setattr(compiler.Compiler, "may_pay", lambda *a: True)
    monkeypatch.setattr(compiler.Compiler, "_note", lambda self, program, economy: learnt.append(economy.ratio))
    monkeypatch.setattr(compiler, "_IMPORT", 0.0)
    compare = stream.Stream.compare
    monkeypatch.setattr(stream.Stream, "compare", lambda self, by_code, without: compare(self, 3.0, 2.0))
    model, loader = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), rows(6, 6)
    expected, _ = products(Objective(model, loader, compile=False), Curvature())
    objective = Objective(model, loader, memory=0)
    found, said = products(objective, Curvature())
    assert close(found, expected)
    assert "slower than autograd" in said["engine_note"]
    assert learnt == [1.5, 1.5]
    assert objective._engines == {} or not any(objective._engines[Curvature()]._stream._shapes.values())


@pytest.mark.skipif(not compiler._SUPPORTED, reason="needs a compiler")
def test_code_that_is_slower_than_its_tape_is_not_used_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("SHARPNESS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_ratio", lambda *a: 1.2)
    module = importlib.import_module("torch._inductor.standalone_compile")

    class Code:
        def __init__(self, graph):
            self.graph = graph

        def __call__(self, *inputs):
            return self.graph(*inputs)

        def save(self, path, format):
            open(path, "w").close()

    monkeypatch.setattr(module, "standalone_compile", lambda graph, example, **options: Code(graph))
    model, loader = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), rows(6, 6)
    monkeypatch.setattr(replay, "_PER_NODE", 0.0)
    monkeypatch.setattr(compiler.Compiler, "pays", lambda *a, **k: True)
    _, said = products(Objective(model, loader), Curvature())
    assert said["engine"] == "recorded"
    assert [path.suffix for path in tmp_path.iterdir()].count(".json") == 1
