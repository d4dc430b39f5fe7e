"""Memory: batches cut into pieces, a word beforehand where a run will not fit, and bases that restart."""

import warnings

import pytest
import torch
from torch import nn

import sharpness
from sharpness import HessianOperator, Objective
from sharpness.errors import ArgumentError, MemoryWarning
from sharpness.objective.data import pieces, samples
from tests.checks import assert_untouched, check_operator
from tests.zoo import features, tanh_net

PROBLEM = tanh_net()
X, Y = (torch.cat(parts) for parts in zip(*PROBLEM.loader, strict=True))
GIB = 2**30


# --- microbatches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0, "auto"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_pieces_of_batches_are_the_same_operator(size, memory):
    loader = [(X, Y)] if size > 1 else PROBLEM.loader
    objective = Objective(PROBLEM.model, loader, microbatch_size=size, memory=memory)
    with assert_untouched(PROBLEM.model):
        check_operator(HessianOperator(objective), PROBLEM.hessian)
    objective.check()
    assert objective.provenance()["num_batches"] == len(loader)
    assert objective.provenance()["num_terms"] == 11
    result = sharpness.top_eigenvalues(PROBLEM.model, loader, microbatch_size=size)
    assert result.settings["microbatch_size"] == size
    assert result.eigenvalues[0] == pytest.approx(PROBLEM.eigenvalues[0].item(), rel=1e-6)


def test_the_last_piece_weighs_what_it_holds():
    """H2 of the peers' table: 30 samples in pieces of 28 are not the mean of 28 and of 2."""
    x, y = features(3).repeat(3, 1)[:30], (torch.arange(30) * 7) % 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    whole = sharpness.top_eigenvalues(model, [(x, y)], tol=1e-9)
    cut = sharpness.top_eigenvalues(model, [(x, y)], tol=1e-9, microbatch_size=28)
    torch.testing.assert_close(cut.eigenvalues, whole.eigenvalues, rtol=1e-10, atol=0)


def test_what_a_piece_holds():
    batch = {"x": torch.arange(5), "y": torch.arange(10).view(5, 2), "scale": torch.ones(3), "name": "a", "n": None}
    found = list(pieces(batch, 2))
    assert [piece["x"].tolist() for piece in found] == [[0, 1], [2, 3], [4]]
    assert [piece["y"].shape for piece in found] == [(2, 2), (2, 2), (1, 2)]
    assert all(piece["scale"].shape == (3,) and piece["name"] == "a" for piece in found)
    assert samples(batch, 1, 3)["x"].tolist() == [1, 2]
    assert next(pieces(batch, None)) is batch


def test_batch_statistics_forbid_pieces():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    for mode in ("train", "as_is"):
        with pytest.raises(ArgumentError, match=r"`microbatch_size` would change the loss: '1' \(BatchNorm1d\)"):
            Objective(model, [(X, Y)], microbatch_size=4, mode=mode)
    Objective(model, [(X, Y)], microbatch_size=4).value()  # running statistics do not see the batch
    alone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).double()
    with pytest.raises(ArgumentError, match="normalises by the statistics of the batch in this mode"):
        Objective(alone, [(X, Y)], microbatch_size=4)


class Centred(nn.Module):
    """Samples that see each other in a way that no list of layers knows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x):
        return self.layer(x - x.mean(0))


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x):
        return self.layer(x.view(11, 3))


def test_samples_that_see_each_other_are_found_out():
    with pytest.raises(ArgumentError, match=r"`microbatch_size` changes the loss of a batch from .* see each"):
        sharpness.top_eigenvalues(Centred(), [(X, Y)], microbatch_size=4)
    with pytest.raises(ArgumentError, match="into pieces that the model cannot take"):
        sharpness.top_eigenvalues(Fixed(), [(X, Y)], microbatch_size=4)
    with pytest.raises(ArgumentError, match="`microbatch_size` must be at least 1"):
        Objective(PROBLEM.model, PROBLEM.loader, microbatch_size=0)


# --- a word beforehand ---------------------------------------------------------------------------------------------


def wide(samples=4000):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 10))
    return model, [(torch.randn(samples, 64), torch.arange(samples) % 10)]


def with_free(monkeypatch, size):
    for place in ("sharpness.metrics.memory", "sharpness.objective.memory"):
        monkeypatch.setattr(f"{place}.free_bytes", lambda device: size)


def test_the_graph_of_a_batch_is_told_from_a_few_samples():
    model, loader = wide()
    told = Objective(model, loader).graph_size()
    objective = Objective(model, loader, memory=10 * GIB)
    objective.hvp(torch.ones(objective.n))
    (graph,) = (graph for engine in objective._engines.values() for graph in engine.kept.values())
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in graph.tensors())}
    assert told.samples == 4000
    assert told.bytes == pytest.approx(sum(storages.values()), rel=0.1)
    assert told.fitting(told.bytes) == pytest.approx(4000, abs=1)


def test_a_run_that_will_hardly_fit_is_announced_with_what_would(monkeypatch):
    model, loader = wide()
    size = Objective(model, loader).graph_size().bytes
    with_free(monkeypatch, size // 4)
    told = r"will need about .* MiB and .* are free: .* samples.* Pass microbatch_size="
    with pytest.warns(MemoryWarning, match=told) as caught:
        sharpness.top_eigenvalues(model, loader, num_matvecs=3, on_failure="ignore", memory=0)
    advised = int(str(caught[0].message).split("microbatch_size=")[1].split(".")[0].split(" ")[0])
    assert 100 < advised < 2000
    sharpness.top_eigenvalues(model, loader, num_matvecs=3, on_failure="ignore", memory=0, microbatch_size=advised)


def test_a_large_basis_is_announced(monkeypatch):
    model, loader = wide(samples=8)
    with_free(monkeypatch, 12 * 4 * 112_610)
    with pytest.warns(MemoryWarning, match=r"for the basis of Lanczos.*memory=0, which restarts Lanczos"):
        sharpness.top_eigenvalues(model, loader, k=3, num_matvecs=60, on_failure="ignore")


def test_a_run_that_fits_says_nothing():
    model, loader = wide()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sharpness.top_eigenvalues(model, loader, num_matvecs=4, on_failure="ignore")
    assert caught == []


def test_a_batch_that_cannot_be_cut_is_not_told():
    assert Objective(Fixed(), [(X, Y)]).graph_size() is None


# --- the basis -----------------------------------------------------------------------------------------------------


def digits_net(width=40):
    torch.manual_seed(0)
    x, y = sharpness.datasets.digits(num_train=200)[0].tensors
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10)).double()
    return model, [(x.double(), y)]


def test_a_bounded_basis_restarts_and_finds_the_same():
    model, loader = digits_net()
    free = sharpness.top_eigenvalues(model, loader, k=6)
    n = free.settings["n"]
    for memory in (0, 2 * 22 * n * 8):
        bound = sharpness.top_eigenvalues(model, loader, k=6, memory=memory, tol=1e-3)
        assert bound.settings["basis_rows"] == 22
        torch.testing.assert_close(bound.eigenvalues, free.eigenvalues, rtol=1e-5, atol=0)
        assert bound.converged


def test_a_memory_below_the_least_says_the_least():
    model, loader = digits_net()
    n = Objective(model, loader).n
    with pytest.raises(ArgumentError, match=rf"`memory` must be at least {20 * n * 8} bytes, a basis of 20 vectors"):
        sharpness.top_eigenvalues(model, loader, memory=1000)
    sharpness.top_eigenvalues(model, loader, memory=20 * n * 8)


@pytest.mark.parametrize("options", [{"basis_dtype": torch.float32}, {"basis_device": "cpu"}])
def test_where_the_basis_lives(options):
    model, loader = digits_net()
    free = sharpness.top_eigenvalues(model, loader, k=2)
    other = sharpness.top_eigenvalues(model, loader, k=2, **options)
    torch.testing.assert_close(other.eigenvalues, free.eigenvalues, rtol=1e-5, atol=0)
    assert other.converged


def test_options_of_lanczos_are_not_ignored_elsewhere():
    for name, value in (("confirm", True), ("basis_dtype", torch.float32), ("basis_device", "cpu")):
        with pytest.raises(ArgumentError, match=rf'`{name}` is for method="lanczos", got method=\'power\''):
            sharpness.top_eigenvalues(PROBLEM.model, PROBLEM.loader, method="power", **{name: value})
