"""Work: what happens where points are computed, be it this process, another one or another machine."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ppsim.sweep.grid import Point
from ppsim.sweep.store import Outcome


def run_points(function: Callable[..., Any], points: Sequence[Point]) -> list[Outcome]:
    """The outcome of each point. What a function raises is an outcome; it stops nothing else."""
    return [_run_point(function, point) for point in points]


def _run_point(function: Callable[..., Any], point: Point) -> Outcome:
    begin_s = time.perf_counter()
    try:
        value = function(**point)
        took_s = time.perf_counter() - begin_s
        return Outcome(result=_spelled(value), took_s=took_s)
    except (Exception, SystemExit) as error:
        took_s = time.perf_counter() - begin_s
        line = " ".join(f"{type(error).__name__}: {error}".split("\n"))
        # What cannot be encoded (half a surrogate pair in a file's name) would not fit into the store.
        line, details = (text.encode(errors="replace").decode() for text in (line, traceback.format_exc()))
        return Outcome(error=line, traceback=details, took_s=took_s)


def _spelled(value: Any) -> str:
    try:
        return json.dumps(value, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        remedy = "return a number, or a dict of numbers, text and lists"
        raise TypeError(f"the function returned what JSON cannot hold ({error}): {remedy}") from None


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as JSON has them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} in the result")


@dataclass(frozen=True, kw_only=True)
class Script:
    """The script that a sweep is called from, `__main__` there: what a process needs to have its functions, too.

    path: its file. package: its package where it was started with -m, else None.
    """

    path: str
    package: str | None

    @classmethod
    def current(cls) -> Script | None:
        """The script of this process; None in an interactive session."""
        main = sys.modules["__main__"]
        path, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
        if path is None or not Path(path).is_file():
            return None
        return cls(path=str(Path(path).absolute()), package=None if spec is None else spec.parent)


class NotImportable(ValueError):
    """The function, or a value of the grid, cannot be had in a worker process; the message gives the remedy."""


class FarEnough(BaseException):
    """Ends a worker's import of a script at the script's own call of `sweep`, where that has no __main__ guard."""


class _ScriptModule(types.ModuleType):
    is_importing = True


def stop_import_of_script() -> None:
    """Called where a sweep begins: in a worker that imports the script, that is as far as it has to."""
    main = sys.modules["__main__"]
    if isinstance(main, _ScriptModule) and main.is_importing:
        raise FarEnough


def live_with(lifeline: Connection) -> None:
    """Set up a worker process: it ends with the process that started it, and leaves Ctrl-C to that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(lifeline,), daemon=True).start()


def _die_with(lifeline: Connection) -> None:
    """Nothing is ever sent: what ends the wait is the end of the other side, however it came."""
    try:
        lifeline.recv()
    except (EOFError, OSError):
        os._exit(1)


def run_pickled(script: Script | None, payload: bytes) -> list[Outcome]:
    """`run_points` in a worker process. The script is imported when the payload needs something of it."""
    try:
        if b"__main__" in payload:
            _import_script(script)
        function, points = pickle.loads(payload)
    except Exception as error:
        raise NotImportable(
            f"a worker process cannot import what the sweep needs ({type(error).__name__}: {error}): define it in a "
            "module, or above the script's first sweep; sweeps of a script belong under `if __name__ == '__main__':`"
        ) from error
    return run_points(function, points)


def _import_script(script: Script | None) -> None:
    """Run the script as the module `__main__` of this process, once, up to its first sweep or its guard."""
    if script is None or isinstance(sys.modules["__main__"], _ScriptModule):
        return
    module = _ScriptModule("__mp_main__")  # as multiprocessing calls it; a guard keeps its promise
    module.__file__ = script.path
    module.__package__ = script.package
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    code = compile(Path(script.path).read_bytes(), script.path, "exec", dont_inherit=True)
    try:
        exec(code, module.__dict__)
    except FarEnough:
        pass
    finally:
        module.is_importing = False
