"""What the peers have to be told for a network: the loosest that suffices, as `benchmarks.calibrate` found it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

PATH = Path(__file__).with_name("settings.json")


@dataclass(frozen=True, kw_only=True)
class Top:
    """Settings for the top ``k`` eigenvalues.

    Attributes:
        pyhessian_tol: Relative change of the eigenvalue at which its power iteration stops.
        pyhessian_steps: Steps that it may take per eigenvalue; its default of 100 cuts some searches short.
        eigenthings_steps: Lanczos steps.
        eigsh_tol: ARPACK's relative tolerance.
        eigsh_ncv: Size of ARPACK's basis that suffices without a restart.
    """

    pyhessian_tol: float
    pyhessian_steps: int
    eigenthings_steps: int
    eigsh_tol: float
    eigsh_ncv: int


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Products for a trace to the tolerance at 95 %; PyHessian's follow from the spread of its forms."""

    pyhessian: int
    eigenthings: int
    curvlinops: int


@dataclass(kw_only=True)
class Settings:
    """All settings for one network; what is missing has not been calibrated."""

    top: dict[int, Top] = field(default_factory=dict)
    trace: Trace | None = None


def read() -> dict[str, Settings]:
    """Return the settings that come with the benchmarks, by network."""
    return {
        name: Settings(
            top={int(k): Top(**told) for k, told in found.get("top", {}).items()},
            trace=Trace(**found["trace"]) if found.get("trace") else None,
        )
        for name, found in json.loads(PATH.read_text()).items()
    }


def write(settings: dict[str, Settings]) -> None:
    """Replace the settings that come with the benchmarks."""
    PATH.write_text(json.dumps({name: asdict(found) for name, found in sorted(settings.items())}, indent=1) + "\n")
