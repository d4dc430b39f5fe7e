"""What makes a comparison unfair, with the numbers and what to do; and what else to know before quoting it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from sharpness.comparison.facts import Facts
from sharpness.results import ComparisonRow

Groups: TypeAlias = "Mapping[str, Sequence[Facts]]"  # by name of the row

_MATCHED = 1.5  # losses, and lengths of all weights or of the logits, within this factor of each other
_TENSOR = 2.0  # the same for one tensor of weights
_GAIN = 0.1  # of the loss: what a Newton step may gain at a minimum
# Cross-entropy of data that are all classified right has no minimum. Its tail is exponential, and a Newton step gains
# half of the loss, however far one trains; up to all of it where a few samples are still on the wrong side.
_TAIL = 1.0
_SHIFT = 0.01  # of the length of the weights: what a Newton step must move to make the point no minimum
_FITTED = 0.95  # training accuracy from which on that holds
_NEARLY = 0.99  # training accuracy from which on curvature is about proportional to the loss
_DESCENT = 0.1  # of the largest curvature: negative curvature that is not a matter of small change
_NAMED = 3  # modules, or metrics, in a message
_SCALE_FREE = ("relative_flatness", "fisher_rao_norm")
_NO_CURVATURE = ("learning_rate_limit", "gradient_noise_scale", "low_pass_sharpness")  # 1 / curvature, none, the loss


def find_warnings(rows: Sequence[ComparisonRow], groups: Groups, mode: str) -> list[str]:
    """Return what makes the comparison unfair."""
    checks: tuple[Iterator[str], ...] = (
        _losses(rows, groups),
        _logits(rows),
        _weights(rows, groups),
        _minima(groups),
        unconverged(rows),
        _modes(groups, mode),
        _statistics(groups),
        _kinds(groups),
    )
    return [text for check in checks for text in check]


def find_notes(rows: Sequence[ComparisonRow], groups: Groups, mode: str) -> list[str]:
    """Return what else to know."""
    found = []
    if len(rows) > 1 and all(len(facts) == 1 for facts in groups.values()):
        found.append(
            "one model each: the intervals of the ratios are those of the measurements. How far they vary with the "
            "seed of the training takes several models each, in lists."
        )
    gains = [fact.gain for facts in groups.values() for fact in facts if fact.gain is not None]
    fitted = all((fact.train.accuracy or 0.0) >= _FITTED for facts in groups.values() for fact in facts)
    if gains and fitted and max(gains) > _GAIN:
        found.append(
            f"a Newton step would still gain {_span(gains, 100)} % of the training loss: cross-entropy has no minimum "
            "where all data are classified right, and its curvature falls on with the loss. The numbers belong to "
            "these training losses."
        )
    for name, facts in groups.items():
        least = min((f.newton for f in facts if f.newton and f.newton.descends), key=lambda n: n.least, default=None)
        if least is not None and -least.least <= _DESCENT * least.largest:
            found.append(
                f"{name} has directions of slightly negative curvature, {least.least:.2g} beside {least.largest:.3g}, "
                "as most trained networks do."
            )
        reasons = {fact.unchecked for fact in facts if fact.unchecked}
        found += [f"whether {name} is at a minimum was not checked: {reason}" for reason in sorted(reasons)]
        mixed = mode == "as_is" and any(len(set(fact.training.values())) > 1 for fact in facts)
        found += [
            f'{name} is measured with some modules in training mode and others not, as mode="as_is" asks.'
        ] * mixed
    return found


def _losses(rows: Sequence[ComparisonRow], groups: Groups) -> Iterator[str]:
    low, high = _ends(rows, lambda row: row.train_loss.mean)
    a, b = low.train_loss.mean, high.train_loss.mean
    if b - a <= (_MATCHED - 1) * min(abs(a), abs(b)):
        return
    text = f"the training losses are not matched: {a:.3g} ({low.name}) against {b:.3g} ({high.name})"
    text += f", a factor of {b / a:.3g}. " if a > 0 else ". "
    shared = next((m for m in low.metrics if _tells_curvature(m, low, high)), None)
    ratio = high.metrics[shared].mean / low.metrics[shared].mean if shared is not None else math.nan
    if shared is not None:
        text += f"{shared} differs by a factor of {ratio:.3g} ({high.name} over {low.name}). "
    accuracies = [fact.train.accuracy for facts in groups.values() for fact in facts]
    if None in accuracies:
        text += "How far curvature moves with the loss depends on the loss function. "
    else:
        text += "Near a perfect fit the curvature of cross-entropy is about proportional to the loss (a rule of thumb)"
        near = a > 0 and ratio > 0 and min(accuracy or 0.0 for accuracy in accuracies) >= _NEARLY
        text += (
            f"; divided by the losses the factor is {ratio * a / b:.3g}, a hint and no correction. " if near else ". "
        )
    yield text + "Train to the same loss."


def _logits(rows: Sequence[ComparisonRow]) -> Iterator[str]:
    known = [row for row in rows if row.logit_norm is not None]
    seen = _seen_by(rows, lambda settings: bool(settings.get("normalize_logits")))
    if len(known) < 2 or seen is None:
        return
    low, high = _ends(known, lambda row: row.logit_norm.mean if row.logit_norm else math.nan)
    a, b = (row.logit_norm.mean for row in (low, high) if row.logit_norm)
    if b > _MATCHED * a:
        yield (
            f"the scales of the logits differ: mean length {a:.3g} ({low.name}) against {b:.3g} ({high.name}). Scaling "
            f"the logits changes loss and curvature, and no decision; it moves {seen}. Look at measures with "
            'normalize_logits=True; metrics="scale-free" has them.'
        )


def _weights(rows: Sequence[ComparisonRow], groups: Groups) -> Iterator[str]:
    seen = _seen_by(rows, lambda s: s.get("adaptive") is not None or s.get("metric") in _SCALE_FREE)
    if seen is None:
        return
    shapes: dict[Any, dict[str, Sequence[Facts]]] = {}
    for name, facts in groups.items():
        layouts = {fact.place.layout for fact in facts}
        if len(layouts) == 1:  # other architectures have no scale in common
            shapes.setdefault(layouts.pop(), {})[name] = facts
    for layout, alike in shapes.items():
        norms = {name: _mean_norms(facts) for name, facts in alike.items()}
        whole = {name: math.hypot(*each.values()) for name, each in norms.items()}
        matrices = [name for name, shape in layout if len(shape) > 1]
        each = [(t, {name: by[t] for name, by in norms.items()}) for t in matrices]
        what, lengths = max(each, key=lambda pair: _factor(pair[1].values()), default=("", {}))
        if _factor(whole.values()) > _MATCHED:
            what, lengths = "all weights", whole
        elif _factor(lengths.values()) <= _TENSOR:
            continue
        low, high = (pick(lengths, key=lambda name: lengths[name]) for pick in (min, max))
        yield (
            f"the scales of the weights differ: {what} of length {lengths[low]:.3g} ({low}) against "
            f"{lengths[high]:.3g} ({high}). The same function has another curvature at another scale of its weights "
            f'(Dinh et al. 2017), which moves {seen}. Look at measures with adaptive="elementwise" and at '
            'relative_flatness; metrics="scale-free" has them.'
        )


def _minima(groups: Groups) -> Iterator[str]:
    for name, facts in groups.items():
        reasons = []
        # A fit to nearly zero squared error can still be improved a lot, by a step too short to change anything.
        known = [fact.gain if fact.shift > _SHIFT else 0.0 for fact in facts if fact.gain is not None]
        gain = sum(known) / len(known) if known else 0.0
        fitted = all((fact.train.accuracy or 0.0) >= _FITTED for fact in facts)
        if gain > (_TAIL if fitted else _GAIN):
            norm = sum(fact.newton.gradient_norm for fact in facts if fact.newton) / len(facts)
            shift = sum(fact.shift for fact in facts) / len(facts)
            reasons.append(
                f"by the quadratic model a Newton step gains at least {100 * gain:.3g} % of its training loss, and "
                f"moves the weights by {100 * shift:.2g} % of their length (gradient norm {norm:.3g})"
            )
        bent = [fact.newton for fact in facts if fact.newton and fact.newton.descends]
        worst = min(bent, key=lambda newton: newton.least / max(newton.largest, -newton.least), default=None)
        if worst is not None and -worst.least > _DESCENT * worst.largest:
            reasons.append(
                f"the loss curves downwards, by {worst.least:.3g} beside {worst.largest:.3g}, in a direction that the "
                "gradient has a part in"
            )
        if reasons:
            yield f"{name} is not at a minimum: {'; '.join(reasons)}. Train it longer, or with a lower learning rate."


def unconverged(rows: Iterable[ComparisonRow]) -> Iterator[str]:
    """Yield a warning for each metric of a row that did not converge for some of its models."""
    for row in rows:
        for metric, records in row.records.items():
            missed = sum(not getattr(record, "converged", True) for record in records)
            if missed:
                yield f"{metric} of {row.name} did not converge for {missed} of {len(records)} models."


def _modes(groups: Groups, mode: str) -> Iterator[str]:
    if mode != "as_is":
        return
    first = next(iter(groups.values()))[0].training
    for name, facts in groups.items():
        for fact in facts:
            other = [m for m, on in fact.training.items() if m in first and first[m] != on]
            if other:
                named = ", ".join(other[:_NAMED]) + f" and {len(other) - _NAMED} more" * (len(other) > _NAMED)
                state = "training" if fact.training[other[0]] else "evaluation"
                yield (
                    f'{name} is in another mode: with mode="as_is", {named} of it is in {state} mode and that of '
                    f"{next(iter(groups))} is not. Call eval() on all models, or leave out mode."
                )
                break


def _statistics(groups: Groups) -> Iterator[str]:
    for name, facts in groups.items():
        unset = next((fact.unset for fact in facts if fact.unset), ())
        if unset:
            yield (
                f"the running statistics of {name} were never updated ({', '.join(unset[:_NAMED])}): it is measured as "
                'a network that was never trained. Run the data through it in training mode, or pass mode="train".'
            )


def _kinds(groups: Groups) -> Iterator[str]:
    def differing(of: Callable[[Facts], Any]) -> dict[Any, str] | None:
        found: dict[Any, str] = {}
        for name, facts in groups.items():
            for fact in facts:
                found.setdefault(of(fact), name)
        return found if len(found) > 1 else None

    def said(found: Mapping[Any, str]) -> str:
        return " against ".join(f"{value} ({name})" for value, name in found.items())

    if found := differing(lambda fact: fact.loss):
        yield f"the losses are not the same function: {said(found)}. Pass loss_fn, so that there is one for all."
    if found := differing(lambda fact: fact.dtypes):
        yield f"the weights are in different precisions: {said(found)}. Rounding moves the minimum; convert all to one."
    if found := differing(lambda fact: fact.place.n):
        yield (
            f"the models have different numbers of parameters: {said(found)}. Distances are left out; sums over all "
            "parameters (average_case_sharpness, epsilon_sharpness) grow with their number."
        )
    elif differing(lambda fact: fact.place.layout):
        yield "the models have different architectures, of as many parameters. Distances are left out."


def _tells_curvature(metric: str, low: ComparisonRow, high: ComparisonRow) -> bool:
    """Return whether the ratio of a metric is about how curvature moves between two rows."""
    if metric.partition("(")[0] in _NO_CURVATURE or metric not in high.metrics:
        return False
    a, b = low.metrics[metric].mean, high.metrics[metric].mean
    return a > 0 and math.isfinite(a) and math.isfinite(b)


def _seen_by(rows: Sequence[ComparisonRow], free: Callable[[Mapping[str, Any]], bool]) -> str | None:
    """Return which metrics see a difference of scale, ``None`` if they are all free of it."""
    settings = {name: getattr(rs[0], "settings", {}) for row in rows for name, rs in row.records.items() if rs}
    names = [name for name in settings if not free(settings[name])]
    if not names:
        return None
    return ", ".join(names[:_NAMED]) + f" and {len(names) - _NAMED} more" * (len(names) > _NAMED)


def _ends(rows: Sequence[ComparisonRow], by: Callable[[ComparisonRow], float]) -> tuple[ComparisonRow, ComparisonRow]:
    return min(rows, key=by), max(rows, key=by)


def _mean_norms(facts: Sequence[Facts]) -> dict[str, float]:
    each = [fact.place.norms for fact in facts]
    return {name: sum(norms[name] for norms in each) / len(each) for name in each[0]}


def _factor(values: Iterable[float]) -> float:
    """Return the largest value over the smallest, 1 for none."""
    known = sorted(values)
    if not known or known[0] == known[-1]:
        return 1.0
    return known[-1] / known[0] if known[0] else math.inf


def _span(values: Sequence[float], by: float) -> str:
    low, high = f"{by * min(values):.2g}", f"{by * max(values):.2g}"
    return low if low == high else f"{low} to {high}"
