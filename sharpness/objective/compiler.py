"""Programs of tapes as compiled code, kept on disk between processes, and whether that pays.

PyTorch's compiler fuses the elementwise work of a product, which a tape runs operation by operation. Compiling takes
seconds to minutes, so it is for long runs, and for runs whose code an earlier one has left on disk.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeAlias, final

import platformdirs
import torch
from torch import Tensor

from sharpness._version import __version__
from sharpness._warn import warn
from sharpness.errors import CompileWarning
from sharpness.objective.simplify import restate
from sharpness.objective.tape import Program

Run: TypeAlias = Callable[..., Sequence[Tensor]]

_SUPPORTED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
# Estimates where nothing was measured: times on the high side, the saving on the low side.
_COMPILE, _PER_OPERATION = 10.0, 0.06
_IMPORT, _LOAD = 4.0, 0.1
_SAVED = 0.05  # of the time of a product
_CLOSE = 1e-3  # relative difference from the tape, beyond which something is wrong rather than rounded


@final
@dataclass(frozen=True)
class Economy:
    """What compiled code of a program costs and saves.

    Attributes:
        compile_seconds: Time that compiling took.
        load_seconds: Time that loading it from disk takes.
        ratio: Time of a product over that of the tape.
    """

    compile_seconds: float
    load_seconds: float
    ratio: float


@final
class Compiler:
    """Compiles programs where it pays.

    Args:
        wanted: ``"auto"``, ``True`` for always, ``False`` for never.
        precision: What matrix products are computed in, which compiled code remembers.

    Attributes:
        failure: Why nothing is compiled, where it was tried in vain.
        seconds: Time spent on compiling and loading.
    """

    def __init__(self, wanted: bool | str, precision: str) -> None:
        self.failure: str | None = None
        self.seconds = 0.0
        self.wanted = wanted
        self._precision = precision
        if wanted is not False and not _SUPPORTED:
            self.failure = f"PyTorch {torch.__version__} cannot keep compiled code on disk, 2.8 can"

    def may_pay(self, seconds: float) -> bool:
        """Return whether any code could pay, if what it is for takes ``seconds`` from now on."""
        if self.wanted is False or self.failure is not None:
            return False
        return self.wanted is True or seconds * _SAVED > _LOAD

    def pays(self, programs: Sequence[Program], seconds: float, *, untried: bool = True) -> bool:
        """Return whether code for ``programs`` pays, if running them takes ``seconds`` in all from now on.

        With ``untried=False`` only code that an earlier run has found faster does.
        """
        if not self.may_pay(seconds):
            return False
        if self.wanted is True:
            return True
        known = [self._economy(program) for program in programs]
        if None in known and not untried:
            return False
        price = 0.0 if "torch._inductor.compile_fx" in sys.modules else _IMPORT
        for program, economy in zip(programs, known, strict=True):
            new = _COMPILE + _PER_OPERATION * len(program.graph.graph.nodes)
            price += new if economy is None else economy.load_seconds
        ratios = [economy.ratio for economy in known if economy is not None]
        saved = 1 - max(ratios) if len(ratios) == len(known) else _SAVED
        return seconds * saved > price

    def run(self, program: Program, example: Sequence[Tensor]) -> Run | None:
        """Return compiled code for a program, from disk or new; ``None`` where that fails, or is slower than the tape.

        Args:
            program: What to compile.
            example: Its arguments.
        """
        started = time.perf_counter()
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                return self._loaded(program) or self._compiled(program, example)
        except Exception as error:  # whatever a compiler, a file system or generated code raises
            self.failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            warn(
                f"products are not compiled, since that failed ({self.failure}); they run as they are, which takes "
                "longer. Pass compile=False to have no such warning.",
                CompileWarning,
            )
            return None
        finally:
            self.seconds += time.perf_counter() - started

    def _loaded(self, program: Program) -> Run | None:
        path = self._path(program)
        if not path.exists():
            return None
        from torch._inductor.standalone_compile import CompiledArtifact

        with contextlib.suppress(Exception):  # written by another version, or cut off: it is made anew
            return CompiledArtifact.load(path=str(path), format="binary")
        return None

    def _compiled(self, program: Program, example: Sequence[Tensor]) -> Run | None:
        from torch._inductor.standalone_compile import standalone_compile

        started = time.perf_counter()
        graph = copy.deepcopy(program.graph)
        restate(graph.graph)
        graph.recompile()
        code = standalone_compile(graph, list(example), dynamic_shapes="from_example_inputs", options={})
        seconds = time.perf_counter() - started
        expected, found = program.graph(*example), code(*example)
        for a, b in zip(expected, found, strict=True):
            if torch.linalg.vector_norm(a - b) > _CLOSE * torch.linalg.vector_norm(a):
                raise ArithmeticError("compiled code computes something else")
        path = self._path(program)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # another process may write the same file
            code.save(path=str(Path(folder, "code")), format="binary")
            Path(folder, "code").replace(path)
        started = time.perf_counter()
        self._loaded(program)
        load = time.perf_counter() - started
        economy = Economy(seconds, load, _ratio(code, program.graph, example))
        self._note(program, economy)
        return code if economy.ratio < 1 or self.wanted is True else None

    def learn(self, programs: Sequence[Program], ratio: float) -> None:
        """Remember that products by the code of ``programs`` take ``ratio`` times as long as without any code."""
        for program in programs:
            economy = self._economy(program)
            if economy is not None:
                with contextlib.suppress(OSError):
                    self._note(program, replace(economy, ratio=ratio))

    def _note(self, program: Program, economy: Economy) -> None:
        self._path(program).with_suffix(".json").write_text(json.dumps(asdict(economy)))

    def _economy(self, program: Program) -> Economy | None:
        try:
            return Economy(**json.loads(self._path(program).with_suffix(".json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _path(self, program: Program) -> Path:
        told = (
            __version__,
            program.key,
            torch.__version__,
            platform.python_version(),
            platform.machine(),
            platform.processor(),
        )
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        more = (torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), gpu, self._precision)
        digest = hashlib.sha256(repr(told + more).encode()).hexdigest()
        return folder() / f"{digest[:40]}.bin"


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was asked for, so that a clock tells how long that takes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def folder() -> Path:
    """Return where compiled code is kept: the user's cache, or what the variable ``SHARPNESS_CACHE_DIR`` says."""
    return Path(os.environ.get("SHARPNESS_CACHE_DIR") or platformdirs.user_cache_path("sharpness"))


def _ratio(code: Run, tape: Run, example: Sequence[Tensor]) -> float:
    """Return the time of ``code`` over that of ``tape``, both warm."""
    ratios, device = [], example[-1].device
    for _ in range(3):
        wait_for(device)
        started = time.perf_counter()
        code(*example)
        wait_for(device)
        middle = time.perf_counter()
        tape(*example)
        wait_for(device)
        ratios.append((middle - started) / (time.perf_counter() - middle))
    return statistics.median(ratios)
