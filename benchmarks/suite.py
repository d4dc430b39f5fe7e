"""Every quantity by this library and its peers, side by side in one run: same model, same data, same accuracy.

    python -m benchmarks.suite [--model NAME ...] [--quantity NAME ...] [--repeat N] [--cold] [--json FILE]
    python -m benchmarks.suite --quick

All methods take turns within each repeat, in an order that rotates; ratios are taken repeat by repeat. Before that each
of ours runs once, with which whatever it compiles is compiled: `--cold` measures what that costs in fresh processes.
What the peers have to be told is read from `settings.json`, or found in this run where it is not there.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import ours, peers, plain
from benchmarks.calibrate import calibrated
from benchmarks.cold import cold
from benchmarks.judge import Accuracy, Judge
from benchmarks.machine import Clock, Timing, environment, peak_bytes, timed
from benchmarks.methods import QUANTITIES, STEPS, WANTED, Method, Outcome, Run
from benchmarks.models import Problem
from benchmarks.problems import FULL, LARGE, UnavailableError, load
from benchmarks.settings import Settings, read
from benchmarks.tables import markdown, printed

_FIXED = ("product", "ggn")  # quantities that do not depend on the seed


@dataclass
class Record:
    """All runs of a method."""

    method: Method
    timings: list[Timing] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    accuracies: list[Accuracy] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)  # seconds of one, in the same turn
    first: float | None = None
    peak: int | None = None
    failed: str | None = None

    @property
    def seconds(self) -> list[float]:
        """Return what each run took, or would have taken if all of it had been run."""
        return [t.seconds * o.scale for t, o in zip(self.timings, self.outcomes, strict=True)]

    def summary(self, reference: Record, evaluations: bool) -> dict[str, Any]:
        """Return the record beside that of the ``reference``, ready for JSON.

        ``floor`` is the time of the run over what its products cost at the least, two gradients each, or over the
        gradients themselves where nothing else is evaluated.
        """
        own = {"method": self.method.name, "told": self.method.told, "failed": self.failed}
        own |= {"ours": self.method.ours, "peer": self.method.peer}
        if self.failed is not None or not self.outcomes:
            return own
        pairs = zip(self.seconds, reference.seconds, strict=False)  # a slow method runs less often
        costs = [s / o.products / g for s, o, g in zip(self.seconds, self.outcomes, self.gradients, strict=True)]
        residuals = [a.residual for a in self.accuracies if a.residual is not None]
        ratios = [mine / other for mine, other in pairs]
        return own | {
            "seconds": statistics.median(self.seconds),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "gradients_per_product": statistics.median(costs),
            "floor": statistics.median(costs) / (1 if evaluations else 2),
            "products": [outcome.products for outcome in self.outcomes],
            "passes": [outcome.passes for outcome in self.outcomes],
            "error": max(accuracy.error for accuracy in self.accuracies),
            "residual": max(residuals) if residuals else None,
            "reached": _all(accuracy.reached for accuracy in self.accuracies),
            "peak_bytes": self.peak,
            "first_seconds": self.first,
            "extrapolated": self.outcomes[0].scale != 1,
            "engine": self.outcomes[0].engine,
            "disturbed_runs": sum(timing.disturbed for timing in self.timings),
            "timings": [asdict(timing) for timing in self.timings],
        }


def run(problem: Problem, quantity: str, judge: Judge, told: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """Run all methods for a quantity ``options.repeat`` times and return the numbers."""
    clock = Clock(options.patience)
    methods = ours.methods(quantity) + plain.methods(quantity) + peers.methods(quantity, problem, told)
    records = [Record(method) for method in methods]
    for record in records:
        if record.method.ours:
            _attempt(record, problem, 0, lambda r, run: setattr(r, "first", timed(run)[1].seconds))
    for i in range(options.repeat):
        gradient = min(timed(lambda: plain.gradient(problem))[1].seconds for _ in range(3))
        shift, seed = i % len(records), 0 if quantity in _FIXED else i
        for record in records[shift:] + records[:shift]:
            if i and max(record.seconds, default=0.0) > options.limit:
                continue
            use = partial(_once, seed=seed, quantity=quantity, judge=judge, clock=clock, gradient=gradient)
            _attempt(record, problem, seed, use)
    for record in records:
        if options.memory and max(record.seconds, default=0.0) <= options.limit:
            _attempt(record, problem, 0, lambda r, run: None, peak=True)
    rows = [record.summary(records[0], quantity == "epsilon") for record in records]
    if options.cold and quantity not in _FIXED:
        names = [record.method.name for record in records if record.method.ours]
        found = cold(problem, quantity, names, options.repeat)
        rows = [row | {"cold": found.get(row["method"])} for row in rows]
    sizes = [len(targets) for _, targets in problem.loader]
    return {
        "model": problem.name,
        "quantity": quantity,
        "parameters": problem.num_parameters,
        "samples": problem.num_samples,
        "batches": sizes,
        "training_loss": problem.loss,
        "training_accuracy": problem.accuracy,
        "device": str(problem.device),
        "gradient_seconds": statistics.median(g for record in records for g in record.gradients),
        "methods": rows,
    }


def _attempt(
    record: Record, problem: Problem, seed: int, use: Callable[[Record, Run], None], *, peak: bool = False
) -> None:
    """Prepare a method on its own copy of the model and use it; a guest that fails is out of the race, and says why."""
    if record.failed:
        return
    own = problem if record.method.ours else replace(problem, model=copy.deepcopy(problem.model))
    try:
        if peak:
            record.peak = peak_bytes(lambda: record.method.prepare(own, seed)())
        else:
            use(record, record.method.prepare(own, seed))
    except Exception as error:
        if record.method.ours:
            raise
        record.failed = f"{type(error).__name__}: {error}"[:200]
        print(f"  {record.method.name} fails: {record.failed}", flush=True)


def _once(record: Record, run: Run, *, seed: int, quantity: str, judge: Judge, clock: Clock, gradient: float) -> None:
    outcome, timing = clock.time(run)
    accuracy = judge(quantity, outcome, seed)
    judge.objective.release()  # its graphs shall not be in the way of what is measured
    record.timings.append(timing)
    record.outcomes.append(replace(outcome, answer=None))
    record.accuracies.append(accuracy)
    record.gradients.append(gradient)
    note = f" (others took {timing.others:.0%} of the processors)" if timing.disturbed else ""
    print(f"  {record.method.name}: {record.seconds[-1]:.3g} s, {outcome.products} products{note}", flush=True)


def _all(reached: Any) -> bool | None:
    known = [one for one in reached if one is not None]
    return all(known) if known else None


def warm_up(problem: Problem) -> None:
    """Pay for what is only paid once, with a few samples: lazy imports and the first call of each kind of kernel."""
    inputs, targets = problem.loader[-1]
    few = replace(problem, loader=[(inputs[:2], targets[:2])], model=copy.deepcopy(problem.model))
    for method in peers.methods("product", few, Settings()):
        try:
            method.prepare(few, 0)()
        except Exception as error:  # said again, with its method, when it is timed
            print(f"  {method.name} fails: {type(error).__name__}", flush=True)


def feasible(problem: Problem, quantities: list[str], quick: bool) -> list[str]:
    """Return the quantities without a density whose basis alone would fill a common machine."""
    size = 4 * STEPS * problem.num_parameters * 4
    if "density" in quantities and size > 8 * 2**30 and not quick:
        print(f"density of {problem.name} is left out: a basis takes {size / 2**30:.0f} GiB")
        return [quantity for quantity in quantities if quantity != "density"]
    return quantities


def main() -> None:
    parser = argparse.ArgumentParser(description="sharpness beside its peers.")
    parser.add_argument("--model", choices=[*FULL, *LARGE], nargs="+", default=list(FULL), help="(default: all)")
    parser.add_argument("--quantity", choices=QUANTITIES, nargs="+", default=list(QUANTITIES), help="(default: all)")
    parser.add_argument("--repeat", type=int, default=3, help="how often each method runs (default 3)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds above which a method runs once")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet machine (default 0)")
    parser.add_argument("--cold", action="store_true", help="also run ours in fresh processes, the compile cache empty")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure peaks")
    parser.add_argument("--device", default="cpu", help="where to measure (default cpu)")
    parser.add_argument("--quick", action="store_true", help="tiny networks, to see that everything runs")
    parser.add_argument("--json", type=Path, help="write the numbers and the environment to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # what is not reached is told by the tables
    document: dict[str, Any] = {"environment": environment(), "repeat": options.repeat, "results": []}
    print(", ".join(f"{key} {value}" for key, value in document["environment"].items()))
    if ours.missing():
        print(f"left out, since this version has no such option: {'; '.join(ours.missing())}")
    known = read()
    for name in options.model:
        try:
            problem = load(name, quick=options.quick, device=options.device)
        except UnavailableError as error:
            print(error)
            continue
        print(problem, flush=True)
        quantities = feasible(problem, options.quantity, options.quick)
        wanted = [WANTED[quantity] for quantity in quantities if quantity in WANTED]
        judge = Judge(problem, max(wanted, default=1))
        told = calibrated(problem, judge, wanted, trace="trace" in quantities, known=known.get(problem.name))
        warm_up(problem)
        for quantity in quantities:
            result = run(problem, quantity, judge, told, options)
            document["results"].append(result)
            print(printed(result), flush=True)
            if options.json:
                options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown([document]))


if __name__ == "__main__":
    main()
