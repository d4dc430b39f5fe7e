"""A metric of each layer on its own."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from sharpness._checks import check_choice, check_count, nearest
from sharpness._progress import progress_bar
from sharpness._warn import warn
from sharpness.errors import ArgumentError, ConvergenceError, ConvergenceWarning
from sharpness.linalg import LinearOperator, dense
from sharpness.linalg.answer import check_on_failure
from sharpness.linalg.lanczos import lanczos_steps, least_rows
from sharpness.linalg.steps import Steps
from sharpness.linalg.which import WHICH, count
from sharpness.metrics.door import COMMON, DEFAULTS, open_objective, provenance
from sharpness.metrics.eigenvalues import ITERATIVE, METHODS, top_eigenvalues
from sharpness.metrics.fisher_rao import fisher_rao_norm
from sharpness.metrics.layerwise_traces import SHARED
from sharpness.metrics.memory import plan_basis, warn_of_memory
from sharpness.metrics.registry import find_metric
from sharpness.metrics.relative_flatness import relative_flatness
from sharpness.objective import Objective
from sharpness.objective.curvature import Curvature
from sharpness.objective.parameters import ParameterChoice, choose
from sharpness.objective.reduction import LossFn
from sharpness.results import EigenResult, LayerwiseResult

Grouping: TypeAlias = "str | Callable[[str], str | None] | Mapping[str, ParameterChoice]"
_NAMED = 5  # layers in a message
# Options of Lanczos that any block may take.
_LOCKSTEP = ("k", "which", "tol", "num_matvecs", "vectors", "confirm", "basis_dtype", "basis_device")


def per_layer(
    metric: str | Callable[..., Any],
    model: nn.Module | Objective,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    *,
    by: Grouping = "module",
    on_failure: str = "warn",
    **options: Any,
) -> LayerwiseResult:
    """Measure each layer on its own: the metric with respect to its parameters alone, all others held fixed.

    For eigenvalues these are those of the diagonal blocks of the curvature matrix. All layers advance together: one
    pass over the data makes the next product of every layer that is not done, so the passes are those of the slowest
    layer, not the sum. The traces and diagonals of all layers come out of the products of one run with the whole
    matrix, and ``tol`` of a trace is relative to the sum over the layers of their traces, or Frobenius norms where
    these are more. Other metrics, and other methods than Lanczos, run for one layer after the other.

    No block has an eigenvalue above the largest of the whole matrix, and the largest of the whole can be as much as the
    sum of those of the blocks.

    Args:
        metric: A metric such as `top_eigenvalues`, `trace` or `diagonal`, or its name. `relative_flatness` is that of
            the one weight matrix of each group; modules without any are left out. `fisher_rao_norm` needs
            ``method="parameters"``.
        model: The trained model, or an `Objective` that replaces ``model, loader, loss_fn`` and the common options.
        loader: Any re-iterable of batches.
        loss_fn: A criterion ``(outputs, targets) -> scalar``, or ``None`` to infer it (see `Objective`).
        by: ``"module"``, one group per module that has parameters of its own; ``"parameter"``, one per tensor; a
            mapping from names of your own to parameters (names, globs, compiled regular expressions, predicates),
            which may overlap; or a callable from a parameter's name to that of its group, ``None`` to leave it out.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` when a layer does not converge.
        **options: The common options, and those of the metric. A layer with fewer than ``k`` parameters has all of its
            eigenvalues reported.

    Returns:
        A mapping from each layer's name to its record, the worst layer first.

    Raises:
        ArgumentError: If an option cannot be accepted, or a group is empty.
        ConvergenceError: If a layer does not converge and ``on_failure="raise"``; carries the result.

    Cost: for eigenvalues by Lanczos, the passes of the slowest layer; each makes the first derivatives of a batch once
    for all layers. For traces and diagonals, that of one run. Else the cost of the metric for each layer.

    Example:
        >>> import torch, sharpness
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
        >>> for p in model.parameters(): _ = torch.nn.init.ones_(p)
        >>> layers = sharpness.per_layer("top_eigenvalues", model, [(torch.eye(2), torch.zeros(2, 1))])
        >>> {name: round(record.headline, 3) for name, record in layers.items()}
        {'1': 4.0, '0': 2.0}
    """
    name, function = find_metric(metric)
    check_on_failure(on_failure)
    common = {option: options.pop(option) for option in COMMON if option in options}
    known = [p for p in inspect.signature(function).parameters if p not in (*COMMON, "model", "loader", "loss_fn")]
    for option in options:
        if option not in known:
            raise ArgumentError(f"`{option}` is not an option of {name}.{nearest(option, [*known, *COMMON])}")
    if options.get("checkpoint") is not None or options.get("sample_interval"):
        raise ArgumentError(
            "`checkpoint` and `sample_interval` are for the whole model, got one of them for its layers. Leave it out."
        )
    if function is fisher_rao_norm and options.get("method") != "parameters":
        raise ArgumentError(
            'fisher_rao_norm with method="outputs" is of the whole function, and has no layers. '
            'Pass method="parameters", the form <w, F w> of each layer.'
        )
    if function is relative_flatness and options.get("layer") is not None:
        raise ArgumentError("`layer` names one layer, and per_layer measures each. Leave it out.")
    objective = open_objective(model, loader, loss_fn, {**DEFAULTS, **common})
    groups = _groups(objective, by)
    if function is relative_flatness:
        groups = _with_one_matrix(objective, groups)

    started, passes = time.perf_counter(), objective.passes.count
    method = options.get("method", "lanczos")
    if function is top_eigenvalues and method == "lanczos":
        found: dict[str, Any] = dict(_together(objective, groups, options))
    elif function is top_eigenvalues and check_choice("method", method, METHODS) != "pyhessian":
        found = dict(_one_by_one(objective, groups, options))
    elif name in SHARED:
        found = SHARED[name](objective, groups, options)
    else:
        found = {}
        for layer, block in groups.items():
            found[layer] = function(objective.restricted(block), on_failure="ignore", **options)
            objective.passes.count += found[layer].num_passes
    num_passes = objective.passes.count - passes
    sign = 1 if options.get("which") == "smallest" else -1  # the most negative curvature is the worst of that end
    order = sorted(found, key=lambda layer: sign * found[layer].headline)
    asked = {"metric": name, "by": by, **options}
    result = LayerwiseResult(
        records={layer: found[layer] for layer in order},
        num_parameters={layer: objective.parameters.subset(groups[layer]).n for layer in order},
        num_passes=num_passes,
        seconds=time.perf_counter() - started,
        settings=provenance(objective, {key: _plain(value) for key, value in asked.items()}),
    )
    _report(result, on_failure)
    return result


@final
class _Block(LinearOperator):
    """A diagonal block of a curvature matrix."""

    def __init__(self, objective: Objective, curvature: Curvature, block: Sequence[int]) -> None:
        super().__init__(objective.parameters.subset(block).n, dtype=objective.dtype, device=objective.device)
        self.objective, self.curvature, self.block = objective, curvature, block

    def product_error(self, rows: Tensor) -> float | None:
        return self.objective.product_error(rows, curvature=self.curvature, block=self.block)

    def _matvec(self, v: Tensor) -> Tensor:
        return self.objective.products([v], curvature=self.curvature, blocks=[self.block])[0]

    def _matmat(self, V: Tensor) -> Tensor:  # noqa: N803
        blocks = [self.block] * V.shape[1]
        return torch.stack(self.objective.products(V.unbind(1), curvature=self.curvature, blocks=blocks), dim=1)


def _one_by_one(
    objective: Objective, groups: Mapping[str, Sequence[int]], options: Mapping[str, Any]
) -> dict[str, EigenResult]:
    """Run a method on one block after the other."""
    curvature = Curvature(options.get("curvature", "hessian"))
    objective.require(curvature)
    given = {name: options[name] for name in ("which", "tol", "num_matvecs", "vectors") if name in options}
    k, method = check_count("k", options.get("k", 1)), options["method"]
    for name in ("confirm", "basis_dtype", "basis_device"):
        if options.get(name):
            raise ArgumentError(f'`{name}` is for method="lanczos", got method={method!r}. Leave one of the two out.')
    found = {}
    with objective.session():
        for layer, block in groups.items():
            own, passes = _Block(objective, curvature, block), objective.passes.count
            size = min(k, own.n)
            if method == "dense":
                result = dense(own, size, memory=objective.memory, on_failure="ignore", **given)
            else:
                settings = {"seed": objective.seed, "progress": objective.progress, "on_failure": "ignore"}
                result = ITERATIVE[method](own, size, **settings, **given)
            found[layer] = _completed(objective, curvature, block, result, objective.passes.count - passes)
        objective.check()
    return found


def _completed(
    objective: Objective, curvature: Curvature, block: Sequence[int], result: EigenResult, num_passes: int
) -> EigenResult:
    """Return the record of a block with what only the objective knows."""
    return dataclasses.replace(
        result,
        num_passes=num_passes,
        layout=objective.parameters.subset(block).layout,
        settings={**provenance(objective, {"curvature": curvature.name}, curvature), **result.settings},
    )


def _together(
    objective: Objective, groups: Mapping[str, Sequence[int]], options: Mapping[str, Any]
) -> dict[str, EigenResult]:
    """Run Lanczos on all blocks in lockstep, one pass over the data for the next product of each."""
    curvature = Curvature(options.get("curvature", "hessian"))
    objective.require(curvature)
    given = {name: value for name, value in options.items() if name in _LOCKSTEP}
    k = check_count("k", given.pop("k", 1))
    runs: dict[str, Steps[EigenResult]] = {}
    which = check_choice("which", given.get("which", "largest"), WHICH)
    dtype, device = given.get("basis_dtype"), given.get("basis_device")
    plan = plan_basis(
        objective,
        count(which, k, objective.n),
        num_matvecs=given.get("num_matvecs"),
        basis_dtype=dtype,
        basis_device=device,
    )
    total, taken = sum(objective.parameters.subset(block).n for block in groups.values()), 0
    for layer, block in groups.items():
        own = _Block(objective, curvature, block)
        size = min(k, own.n)
        # Each basis gets its share of the memory, and no less than it needs.
        rows = min(least_rows(count(which, size, own.n)), own.n)
        least = rows * own.n * (dtype or own.dtype).itemsize
        memory, taken = plan.memory and max(plan.memory * own.n // total, least), taken + least
        runs[layer] = lanczos_steps(own, size, seed=objective.seed, on_failure="ignore", memory=memory, **given)
    if objective.memory and taken > objective.memory:
        raise ArgumentError(
            f"`memory` must be at least {taken} bytes, the least for the bases of all layers, got {objective.memory}. "
            f"Pass memory={taken} or more, or memory=0 for the least that works."
        )
    warn_of_memory(objective, curvature, plan, device)
    found: dict[str, EigenResult] = {}
    with objective.session(), progress_bar(objective.progress, total=None, title="layers", unit="pass") as bar:
        waiting = {layer: next(steps) for layer, steps in runs.items()}
        while waiting:
            layers = list(waiting)
            products = objective.products(
                [waiting[layer] for layer in layers], curvature=curvature, blocks=[groups[layer] for layer in layers]
            )
            bar.update()
            bar.set_postfix_str(f"{len(waiting)} of {len(runs)} layers left", refresh=False)
            for layer, product in zip(layers, products, strict=True):
                try:
                    waiting[layer] = runs[layer].send(product)
                except StopIteration as end:
                    found[layer] = end.value
                    del waiting[layer]
        objective.check()
    return {
        layer: _completed(objective, curvature, groups[layer], result, result.num_matvecs)
        for layer, result in found.items()
    }


def _groups(objective: Objective, by: Any) -> dict[str, list[int]]:
    """Return the positions of the parameters in each group, in the order of the model."""
    names = objective.parameters.names
    if isinstance(by, Mapping):
        if not by:
            raise ArgumentError("`by` is an empty mapping; it must name at least one group of parameters.")
        groups: dict[str, list[int]] = {}
        for group, chosen in by.items():
            if str(group) in groups:
                raise ArgumentError(f"`by` names {str(group)!r} twice. Give each group a name of its own.")
            try:
                own = set(choose(objective.model, chosen).names)
            except ArgumentError as error:
                raise ArgumentError(f"`by`, group {str(group)!r}: {str(error).replace('`params`: ', '')}") from None
            groups[str(group)] = [i for i, name in enumerate(names) if name in own]
            if not groups[str(group)]:
                raise ArgumentError(
                    f"`by`: {group!r} holds none of the measured parameters. Look at params=... as well."
                )
        return groups
    if callable(by):
        key = by
    else:
        check_choice("by", by, ("module", "parameter"))
        key = (lambda name: name.rpartition(".")[0] or "(model)") if by == "module" else (lambda name: name)
    groups = {}
    for i, name in enumerate(names):
        group = key(name)
        if group is not None:
            groups.setdefault(str(group), []).append(i)
    if not groups:
        raise ArgumentError("`by` left out every parameter; the callable must return a name for at least one.")
    return groups


def _with_one_matrix(objective: Objective, groups: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Return the groups that have a weight matrix."""
    kept = {}
    for group, block in groups.items():
        matrices = [i for i in block if len(objective.parameters.shapes[i]) >= 2]
        if len(matrices) > 1:
            raise ArgumentError(
                f"`by`: {group!r} holds {len(matrices)} weight matrices, and relative flatness is that of one. "
                'Pass by="parameter".'
            )
        if matrices:
            kept[group] = block
    if not kept:
        raise ArgumentError("`by`: no group holds a weight matrix, which relative flatness needs. Choose others.")
    return kept


def _report(result: LayerwiseResult, on_failure: str) -> None:
    missed = [layer for layer, record in result.items() if not getattr(record, "converged", True)]
    if not missed or on_failure == "ignore":
        return
    numbers = {layer: f"{result[layer].headline:.4g} {result[layer].doubt}" for layer in missed[:_NAMED]}
    named = ", ".join(f"{layer} ({text.removesuffix(', NOT converged')})" for layer, text in numbers.items())
    message = (
        f"{len(missed)} of {len(result)} layers did not converge: {named}{' ...' * (len(missed) > _NAMED)}. "
        "Raise the budget of the metric, or loosen tol."
    )
    if on_failure == "raise":
        raise ConvergenceError(message, result)
    warn(message, ConvergenceWarning)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
