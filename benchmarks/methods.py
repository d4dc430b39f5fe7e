"""Five ways to the top five eigenvalues of the same Hessian, each as its own documentation would have it done.

Every method gets the same model and the same batches, and returns eigenvalues *and* eigenvectors. The guests get a copy
of the model, made before the clock starts, since some of them leave it changed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pyhessian
import torch
from curvlinops import HessianLinearOperator
from hessian_eigenthings import HessianOperator as EigenthingsOperator
from hessian_eigenthings import lanczos as eigenthings_lanczos
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn import functional

import sharpness
from benchmarks.models import Batch, Problem

K = 5
TOL = 1e-3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the guests have to be told for a network: the loosest that suffices, found by `benchmarks.calibrate`.

    Attributes:
        pyhessian_tol: Relative change of the eigenvalue at which its power iteration stops.
        pyhessian_steps: Steps that it may take per eigenvalue; its default of 100 cuts some searches short.
        eigenthings_steps: Lanczos steps.
        eigsh_tol: ARPACK's relative tolerance.
        eigsh_ncv: Size of ARPACK's basis that suffices without a restart, where its default of 20 is more than enough.
    """

    pyhessian_tol: float
    pyhessian_steps: int
    eigenthings_steps: int
    eigsh_tol: float
    eigsh_ncv: int


SETTINGS = {
    "mlp": Settings(pyhessian_tol=3e-5, pyhessian_steps=300, eigenthings_steps=16, eigsh_tol=0.1, eigsh_ncv=15),
    "resnet20": Settings(pyhessian_tol=3e-4, pyhessian_steps=300, eigenthings_steps=13, eigsh_tol=0.1, eigsh_ncv=13),
}


@dataclass(frozen=True)
class Pairs:
    """Eigenpairs as a method returned them, and what they cost.

    Attributes:
        values: ``(k,)``.
        vectors: ``(k, n)``, in the order of ``named_parameters``.
        products: Hessian-vector products over all the data.
    """

    values: Tensor
    vectors: Tensor
    products: int


@dataclass(frozen=True)
class Method:
    """A method under its name, and how it was told what to do.

    Attributes:
        name: Library and algorithm.
        told: The settings that matter, in words.
        run: ``(model, problem, seed) -> pairs``.
    """

    name: str
    told: str
    run: Callable[[nn.Module, Problem, int], Pairs]


def methods(name: str) -> list[Method]:
    """Return all methods for the network ``name``; the first is the one that the others are compared with."""
    told = SETTINGS[name]
    change, steps, tol = f"tol={told.pyhessian_tol:g}", f"max_iter={told.eigenthings_steps}", f"tol={told.eigsh_tol:g}"
    ncv = told.eigsh_ncv
    return [
        Method("sharpness", f"tol={TOL:g}", partial(ours, memory="auto")),
        Method("sharpness, memory=0", f"tol={TOL:g}", partial(ours, memory=0)),
        Method("PyHessian, data as one batch", change, partial(pyhessian_whole, told=told)),
        Method("PyHessian, data as a loader", change, partial(pyhessian_loader, told=told)),
        Method("hessian-eigenthings lanczos", steps, partial(eigenthings, told=told)),
        Method("eigsh over curvlinops", tol, partial(scipy_eigsh, told=told, ncv=None)),
        Method("eigsh over curvlinops, told ncv", f"{tol}, ncv={ncv}", partial(scipy_eigsh, told=told, ncv=ncv)),
    ]


def ours(model: nn.Module, problem: Problem, seed: int, *, memory: int | str) -> Pairs:
    """Return the pairs of this library."""
    result = sharpness.top_eigenvalues(
        model,
        problem.loader,
        functional.cross_entropy,
        k=K,
        tol=TOL,
        vectors=True,
        seed=seed,
        memory=memory,
        progress=False,
    )
    assert result.eigenvectors is not None
    return Pairs(result.eigenvalues, result.eigenvectors, result.num_matvecs)


def pyhessian_whole(model: nn.Module, problem: Problem, seed: int, *, told: Settings) -> Pairs:
    """Return PyHessian's pairs, all data in one batch: then it keeps the gradient's graph between products."""
    module = sys.modules["pyhessian.hessian"]
    with mock.patch.object(module, "hessian_vector_product", wraps=module.hessian_vector_product) as product:
        values, vectors = _pyhessian(model, seed, told, data=problem.whole)
        return Pairs(values, vectors, product.call_count)


def pyhessian_loader(model: nn.Module, problem: Problem, seed: int, *, told: Settings) -> Pairs:
    """Return PyHessian's pairs, the data in batches: then every product starts from the model."""
    batches = Counted(problem.loader)
    values, vectors = _pyhessian(model, seed, told, dataloader=batches)
    return Pairs(values, vectors, batches.walks)


def _pyhessian(model: nn.Module, seed: int, told: Settings, **data: Any) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its backward(create_graph=True) warns at every step
        torch.manual_seed(seed)
        guest = pyhessian.hessian(model, functional.cross_entropy, cuda=False, **data)
        values, vectors = guest.eigenvalues(maxIter=told.pyhessian_steps, tol=told.pyhessian_tol, top_n=K)
    for parameter in model.parameters():
        parameter.grad = None  # it holds the graph that holds the model
    return torch.tensor(values), torch.stack([torch.cat([piece.flatten() for piece in vector]) for vector in vectors])


def eigenthings(model: nn.Module, problem: Problem, seed: int, *, told: Settings) -> Pairs:
    """Return hessian-eigenthings' pairs.

    It averages batches as if all were of one size, so each batch's loss is scaled by its share of the data.
    """
    batches = Counted(problem.loader)
    share = len(problem.loader) / problem.num_samples

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        inputs, targets = batch
        return functional.cross_entropy(model(inputs), targets) * (share * len(targets))

    operator = EigenthingsOperator(model, batches, loss)
    found = eigenthings_lanczos(operator, k=K, max_iter=told.eigenthings_steps, tol=TOL, which="LA", seed=seed)
    return Pairs(found.eigenvalues, found.eigenvectors, batches.walks)


def scipy_eigsh(model: nn.Module, problem: Problem, seed: int, *, told: Settings, ncv: int | None) -> Pairs:
    """Return the pairs of SciPy's ARPACK over the Hessian of curvlinops, whose check of the data is turned off."""
    hessian = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), problem.loader, check_deterministic=False
    )
    inner = hessian.to_scipy(dtype=np.float32)
    products = 0

    def matvec(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        nonlocal products
        products += 1
        return inner.matvec(v)

    counted = ScipyOperator(inner.shape, matvec=matvec, dtype=np.float32)
    start = np.random.default_rng(seed).standard_normal(inner.shape[0], dtype=np.float32)
    values, vectors = eigsh(counted, k=K, which="LA", tol=told.eigsh_tol, ncv=ncv, v0=start)
    return Pairs(torch.from_numpy(values), torch.from_numpy(vectors.T.copy()), products)


class Counted:
    """Batches that count how often they are walked."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.walks = 0

    def __iter__(self) -> Iterator[Batch]:
        self.walks += 1
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
