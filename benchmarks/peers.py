"""The other libraries' ways to each quantity, each as its own documentation would have it done."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pyhessian
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator, xtrace
from curvlinops.papyan2020traces.spectrum import fast_lanczos
from hessian_eigenthings import GGNOperator as EigenthingsGGN
from hessian_eigenthings import HessianOperator as EigenthingsHessian
from hessian_eigenthings import lanczos as eigenthings_lanczos
from hessian_eigenthings import spectral_density as eigenthings_density
from hessian_eigenthings import trace as eigenthings_trace
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.density import compatible
from benchmarks.methods import (
    DRAWS,
    STEPS,
    TOL,
    WANTED,
    Counted,
    Method,
    Outcome,
    Pairs,
    Rules,
    Run,
    direction,
    several,
)
from benchmarks.models import Batch, Problem
from benchmarks.settings import Settings, Top

_FORMS = 40  # of PyHessian's trace that are run; the time of as many as it needs follows


def methods(quantity: str, problem: Problem, told: Settings) -> list[Method]:
    """Return the peers' methods; for what they have to be told, `told` must have been calibrated."""
    if quantity == "product":
        found = [
            ("PyHessian, one batch", "", pyhessian_product),
            ("PyHessian, loader", "", partial(pyhessian_product, whole=False)),
            ("hessian-eigenthings", "", eigenthings_product),
            ("curvlinops", "", curvlinops_product),
        ]
    elif quantity == "ggn":
        found = [("hessian-eigenthings", "", eigenthings_ggn), ("curvlinops", "", curvlinops_ggn)]
    elif quantity in WANTED:
        k = WANTED[quantity]
        top = told.top[k]
        tol, ncv = f"tol={top.eigsh_tol:g}", top.eigsh_ncv
        found = [
            ("PyHessian", f"tol={top.pyhessian_tol:g}", partial(pyhessian_top, k=k, told=top)),
            ("hessian-eigenthings", f"max_iter={top.eigenthings_steps}", partial(eigenthings_top, k=k, told=top)),
            ("eigsh over curvlinops", tol, partial(eigsh_top, k=k, told=top, ncv=None)),
            ("eigsh over curvlinops, told ncv", f"{tol}, ncv={ncv}", partial(eigsh_top, k=k, told=top, ncv=ncv)),
        ]
    elif quantity == "trace":
        assert told.trace is not None
        forms, steps, budget = told.trace.pyhessian, told.trace.eigenthings, told.trace.curvlinops
        found = [
            ("PyHessian", f"{forms} forms, {min(forms, _FORMS)} run", partial(pyhessian_trace, forms=forms)),
            ("hessian-eigenthings, Hutch++", f"num_matvecs={steps}", partial(eigenthings_hutchpp, budget=steps)),
            ("curvlinops, XTrace", f"num_matvecs={budget}", partial(curvlinops_xtrace, budget=budget)),
        ]
    elif quantity == "density":
        size = f"{DRAWS} x {STEPS}"
        found = [
            ("PyHessian", size, pyhessian_rules),
            ("hessian-eigenthings", size, eigenthings_rules),
            ("curvlinops", f"{size}, no reorthogonalisation", curvlinops_rules),
        ]
    else:
        found = []
    if not problem.separable:
        found = [one for one in found if not one[0].endswith("one batch")]
    return [Method(name, settings, prepare, peer=True) for name, settings, prepare in found]


@contextmanager
def quiet(seed: int) -> Iterator[None]:
    """Seed the global generators, and let nobody warn: PyHessian does so at every step."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield


class PyHessian:
    """PyHessian, with its products counted.

    Args:
        problem: Model and data.
        whole: Whether it gets the data as one batch, where it keeps the gradient's graph between products.
    """

    def __init__(self, problem: Problem, whole: bool) -> None:
        self.model = problem.model
        self.batches = Counted(problem.loader)
        self.data: dict[str, Any] = {"data": problem.whole} if whole else {"dataloader": self.batches}
        self.cuda = problem.device.type == "cuda"
        self.whole = whole
        self.products = 0

    @contextmanager
    def opened(self, seed: int) -> Iterator[Any]:
        """Construct it, and count products while it is used."""
        module = sys.modules["pyhessian.hessian"]
        with (
            quiet(seed),
            mock.patch.object(module, "hessian_vector_product", wraps=module.hessian_vector_product) as kept,
        ):
            yield pyhessian.hessian(self.model, functional.cross_entropy, cuda=self.cuda, **self.data)
            self.products = kept.call_count if self.whole else self.batches.walks
        for parameter in self.model.parameters():
            parameter.grad = None  # it holds the graph that holds the model

    def outcome(self, answer: Any, scale: float = 1.0) -> Outcome:
        """Return the answer and its price, of which only a part may have been paid."""
        products = round(self.products * scale)
        self.batches.walks = 0
        return Outcome(answer, products, products + self.whole, scale)


def pyhessian_product(problem: Problem, seed: int, *, whole: bool = True) -> Run:
    guest, v = PyHessian(problem, whole), direction(problem, seed)
    parameters = [p for p in guest.model.parameters() if p.requires_grad]
    pieces = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]
    with guest.opened(seed) as hessian:
        pass

    def product() -> Tensor:
        if whole:
            found = sys.modules["pyhessian.hessian"].hessian_vector_product(hessian.gradsH, hessian.params, pieces)
        else:
            found = hessian.dataloader_hv_product(pieces)[1]
        return torch.cat([part.flatten() for part in found])

    def run() -> Outcome:
        with quiet(seed):
            return several(product)

    return run


def pyhessian_top(problem: Problem, seed: int, *, k: int, told: Top) -> Run:
    def run() -> Outcome:
        guest = PyHessian(problem, problem.separable)
        with guest.opened(seed) as hessian:
            values, rows = hessian.eigenvalues(maxIter=told.pyhessian_steps, tol=told.pyhessian_tol, top_n=k)
        vectors = torch.stack([torch.cat([piece.flatten() for piece in row]) for row in rows])
        return guest.outcome(Pairs(torch.tensor(values), vectors))

    return run


def pyhessian_trace(problem: Problem, seed: int, *, forms: int) -> Run:
    def run() -> Outcome:
        guest, spent = PyHessian(problem, problem.separable), min(forms, _FORMS)
        with guest.opened(seed) as hessian:
            found = hessian.trace(maxIter=spent, tol=-math.inf)  # it stops early where the mean is negative
        return guest.outcome(sum(found) / len(found), forms / spent)

    return run


def pyhessian_rules(problem: Problem, seed: int) -> Run:
    def run() -> Outcome:
        guest = PyHessian(problem, problem.separable)
        with guest.opened(seed) as hessian, compatible():
            nodes, weights = hessian.density(iter=min(STEPS, problem.num_parameters), n_v=DRAWS)
        return guest.outcome(Rules(torch.tensor(np.array(nodes)), torch.tensor(np.array(weights))))

    return run


def eigenthings_operator(problem: Problem) -> tuple[Any, Counted]:
    """Return the operator of hessian-eigenthings, and the batches, which count.

    It averages batches as if all were of one size, so each batch's loss is scaled by its share of the data.
    """
    batches, share = Counted(problem.loader), len(problem.loader) / problem.num_samples

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        inputs, targets = batch
        return functional.cross_entropy(model(inputs), targets) * (share * len(targets))

    return EigenthingsHessian(problem.model, batches, loss), batches


def eigenthings_product(problem: Problem, seed: int) -> Run:
    operator, v = eigenthings_operator(problem)[0], direction(problem, seed)
    return lambda: several(lambda: operator.matvec(v))


def eigenthings_ggn(problem: Problem, seed: int) -> Run:
    share, v = len(problem.loader) / problem.num_samples, direction(problem, seed)

    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        return functional.cross_entropy(outputs, batch[1]) * (share * len(batch[1]))

    operator = EigenthingsGGN(problem.model, problem.loader, lambda model, batch: model(batch[0]), loss)
    return lambda: several(lambda: operator.matvec(v))


def eigenthings_top(problem: Problem, seed: int, *, k: int, told: Top) -> Run:
    def run() -> Outcome:
        operator, batches = eigenthings_operator(problem)
        found = eigenthings_lanczos(operator, k=k, max_iter=told.eigenthings_steps, tol=TOL, which="LA", seed=seed)
        return Outcome(Pairs(found.eigenvalues, found.eigenvectors), batches.walks, batches.walks)

    return run


def eigenthings_hutchpp(problem: Problem, seed: int, *, budget: int) -> Run:
    def run() -> Outcome:
        operator, batches = eigenthings_operator(problem)
        found = eigenthings_trace(operator, num_matvecs=budget, method="hutch++", seed=seed)
        return Outcome(found.estimate, batches.walks, batches.walks)

    return run


def eigenthings_rules(problem: Problem, seed: int) -> Run:
    def run() -> Outcome:
        operator, batches = eigenthings_operator(problem)
        steps = min(STEPS, problem.num_parameters)
        found = eigenthings_density(operator, num_runs=DRAWS, lanczos_steps=steps, seed=seed)
        return Outcome(Rules(found.raw_eigenvalues, found.raw_weights), batches.walks, batches.walks)

    return run


def curvlinops_operator(problem: Problem, kind: Callable[..., Any] = HessianLinearOperator) -> tuple[Any, Counted]:
    """Return the operator of curvlinops, whose check of the data is turned off, and the batches, which count."""
    model, batches = problem.model, Counted(problem.loader)
    parameters = [p for p in model.parameters() if p.requires_grad]
    operator = kind(
        model, nn.CrossEntropyLoss(), parameters, batches, check_deterministic=False, num_data=problem.num_samples
    )
    batches.walks = 0
    return operator, batches


def curvlinops_product(problem: Problem, seed: int, kind: Callable[..., Any] = HessianLinearOperator) -> Run:
    operator, v = curvlinops_operator(problem, kind)[0], direction(problem, seed)
    return lambda: several(lambda: operator @ v)


def curvlinops_ggn(problem: Problem, seed: int) -> Run:
    return curvlinops_product(problem, seed, GGNLinearOperator)


def eigsh_top(problem: Problem, seed: int, *, k: int, told: Top, ncv: int | None) -> Run:
    def run() -> Outcome:
        operator, _ = curvlinops_operator(problem)
        inner, products = operator.to_scipy(dtype=np.float32), 0

        def matvec(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            nonlocal products
            products += 1
            return inner.matvec(v)

        counted = ScipyOperator(inner.shape, matvec=matvec, dtype=np.float32)
        start = np.random.default_rng(seed).standard_normal(inner.shape[0], dtype=np.float32)
        values, vectors = eigsh(counted, k=k, which="LA", tol=told.eigsh_tol, ncv=ncv, v0=start)
        return Outcome(Pairs(torch.from_numpy(values), torch.from_numpy(vectors.T.copy())), products, products)

    return run


def curvlinops_xtrace(problem: Problem, seed: int, *, budget: int) -> Run:
    def run() -> Outcome:
        operator, batches = curvlinops_operator(problem)
        with quiet(seed):
            found = xtrace(operator, budget)
        return Outcome(float(found), budget, batches.walks)

    return run


def curvlinops_rules(problem: Problem, seed: int) -> Run:
    def run() -> Outcome:
        operator, batches = curvlinops_operator(problem)
        with quiet(seed):
            rules = [fast_lanczos(operator, min(STEPS, problem.num_parameters)) for _ in range(DRAWS)]
        nodes, weights = zip(*((values, vectors[0] ** 2) for values, vectors in rules), strict=True)
        return Outcome(Rules(torch.stack(nodes), torch.stack(weights)), batches.walks, batches.walks)

    return run
