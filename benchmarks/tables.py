"""The numbers of the suite as tables.

python -m benchmarks.tables FILE.json ... --markdown FILE
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.methods import CALLS, QUANTITIES, TOL, TRACE_TOL
from benchmarks.ours import DEFAULT

TITLES = {
    "product": "One Hessian-vector product",
    "ggn": "One Gauss-Newton product",
    "top1": f"Largest eigenvalue, residual {TOL:g}",
    "top5": f"Top five eigenvalues, residual {TOL:g}",
    "top20": f"Top twenty eigenvalues, residual {TOL:g}",
    "trace": f"Trace to {100 * TRACE_TOL:g} %",
    "density": "Spectral density",
    "epsilon": "Epsilon-sharpness",
}
_SINGLE = ("product", "ggn")
Row = dict[str, Any]


def printed(result: Row) -> str:
    """Return the table of one quantity for a terminal."""
    return f"{_title(result)}\n{_table(result, 'simple')}\n"


def markdown(documents: list[Row]) -> str:
    """Return all tables of some runs: what must be reached first, then quantity by quantity."""
    results = [result for document in documents for result in document["results"]]
    parts = [_environment(documents), summary(results)]
    for quantity in QUANTITIES:
        own = [result for result in results if result["quantity"] == quantity]
        parts += [f"### {TITLES[quantity]}"] if own else []
        parts += [f"{_title(result)}\n\n{_table(result, 'github')}" for result in own]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(results: list[Row]) -> str:
    """Return the ratios that were set as targets, one row per network."""
    rows = [row for name in dict.fromkeys(r["model"] for r in results) for row in _targets(name, results)]
    if not rows:
        return ""
    return tabulate(rows, headers=["network", "ratio", "measured"], tablefmt="github", disable_numparse=True)


def _targets(model: str, results: list[Row]) -> Iterator[tuple[str, str, str]]:
    by = {r["quantity"]: {row["method"]: row for row in r["methods"]} for r in results if r["model"] == model}
    product, top = by.get("product", {}), by.get("top5", {})
    for label, name in (
        ("one product, kept, compiled / one gradient", "sharpness, compiled"),
        ("one product, nothing kept, compiled / one gradient", "sharpness, memory=0, compiled"),
    ):
        if "gradients_per_product" in product.get(name, {}):
            yield model, label, f"{product[name]['gradients_per_product']:.2f}"
    for label, start in (("PyHessian", "PyHessian"), ("hessian-eigenthings", "hessian"), ("curvlinops", "eigsh")):
        times = [row["ratio"] for name, row in top.items() if name.startswith(start) and "ratio" in row]
        if times:
            yield model, f"top five: {label} / sharpness", f"{min(times):.2f}"
    default, eager = (top.get(name, {}).get("cold") for name in (DEFAULT, "sharpness, eager"))
    if default and eager:
        cold = default["empty_cache"] / eager["empty_cache"]
        yield model, "top five in a fresh process, empty cache: default / eager", f"{cold:.2f}"
    for quantity, rows in by.items():
        leanest = min((row["peak_bytes"] for row in rows.values() if row["peer"] and row.get("peak_bytes")), default=0)
        own = rows.get("sharpness, memory=0", {}).get("peak_bytes")
        if own and leanest:
            yield model, f"{quantity}: peak memory with memory=0 / the leanest peer", f"{own / leanest:.2f}"


def _title(result: Row) -> str:
    sizes = result["batches"]
    unit = "evaluation of loss and gradient" if result["quantity"] == "epsilon" else "gradient over all data"
    return (
        f"**{result['model']}**, {result['parameters']:,} parameters, {result['samples']} samples in {len(sizes)} "
        f"batches ({sizes[0]}, the last {sizes[-1]}), training loss {result['training_loss']:.1e}, {result['device']}; "
        f"one {unit} takes {1000 * result['gradient_seconds']:.3g} ms"
    )


def _table(result: Row, style: str) -> str:
    single, rows = result["quantity"] in _SINGLE, result["methods"]
    first = ["method", "told", "seconds", "time / ours"]
    shown = [*first, "gradients" if single else "time / floor"]
    shown += [] if single else ["products", "passes"]
    shown += ["peak MiB", "error"] + (["residual"] if any(row.get("residual") is not None for row in rows) else [])
    shown += ["reached"] if any(row.get("reached") is not None for row in rows) else []
    shown += ["fresh process", "cache empty"] if any(row.get("cold") for row in rows) else []
    lines = [[_cell(row, name, single) for name in shown] for row in rows]
    return tabulate(lines, headers=shown, tablefmt=style, disable_numparse=True)


def _cell(row: Row, name: str, single: bool) -> str:
    if name == "method":
        return row["method"]
    if name == "told":
        return row["told"]
    if row["failed"]:
        return row["failed"] if name == "seconds" else ""
    if name == "seconds":
        marks = "*" * bool(row["disturbed_runs"]) + " (extrapolated)" * row["extrapolated"]
        return f"{row['seconds'] / (CALLS if single else 1):.3g}{marks}"
    cells = {
        "time / ours": f"{row['ratio']:.2f}",
        "gradients": f"{row['gradients_per_product']:.2f}",
        "time / floor": f"{row['floor']:.2f}",
        "products": _span(row["products"]),
        "passes": _span(row["passes"]),
        "error": "" if row["extrapolated"] else f"{row['error']:.0e}",
    }
    if name in cells:
        return cells[name]
    if name == "peak MiB":
        return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
    if name == "residual":
        return "" if row["residual"] is None else f"{row['residual']:.0e}"
    if name == "reached":
        values_only = row["residual"] is not None and row["error"] <= TOL
        return {True: "yes", False: "values only" if values_only else "MISSED", None: ""}[row["reached"]]
    cold = row.get("cold") or {}
    found = cold.get("full_cache" if name == "fresh process" else "empty_cache")
    return "" if found is None else f"{found:.3g}"


def _span(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"


def _environment(documents: list[Row]) -> str:
    lines = dict.fromkeys(
        ", ".join(f"{key} {value}" for key, value in document["environment"].items() if value is not None)
        for document in documents
    )
    return "Measured with " + "; ".join(lines) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description="The numbers of the suite as tables.")
    parser.add_argument("files", type=Path, nargs="+", help="what `benchmarks.suite --json` has written")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file (default: print them)")
    options = parser.parse_args()
    text = markdown([json.loads(path.read_text()) for path in options.files])
    if options.markdown:
        options.markdown.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
