"""Worker: what runs where points are computed, be it a thread, another process or another machine."""

from __future__ import annotations

import functools
import json
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from ppsim.parameter_sweep.grid import Point
from ppsim.parameter_sweep.store import PointOutcome

_LOOK_AT_PARENT_S = 0.5


def run_points(function: Callable[..., Any], points: Sequence[Point]) -> list[PointOutcome]:
    """Call the function for each point. What it raises is an outcome, and the other points still run."""
    return [_run_point(function, point) for point in points]


def run_points_in_process(pickled_function: bytes, points: Sequence[Point]) -> list[PointOutcome]:
    """`run_points` for a function that was pickled once, by the process that started the sweep."""
    return run_points(_unpickled(pickled_function), points)


@functools.lru_cache(maxsize=1)
def _unpickled(pickled_function: bytes) -> Callable[..., Any]:
    function: Callable[..., Any] = pickle.loads(pickled_function)
    return function


def set_up_process(parent: int) -> None:
    """Prepare a worker process: it ignores Ctrl-C, which its parent handles, and ends when its parent has ended.

    Parameters
    ----------
    parent : int
        The process id of the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    # loky's workers hold both ends of their queues, so the death of the parent closes nothing they could wait for.
    while os.getppid() == parent:
        time.sleep(_LOOK_AT_PARENT_S)
    os._exit(1)


def _run_point(function: Callable[..., Any], point: Point) -> PointOutcome:
    begin_s = time.perf_counter()
    try:
        value = function(**point)
        took_s = time.perf_counter() - begin_s
        return PointOutcome(result=_json_of(value), took_s=took_s)
    except (Exception, SystemExit) as error:
        took_s = time.perf_counter() - begin_s
        line = " ".join(f"{type(error).__name__}: {error}".split("\n"))
        # SQLite refuses text that UTF-8 cannot encode, such as half a surrogate pair in a file's name.
        line, details = (text.encode(errors="replace").decode() for text in (line, traceback.format_exc()))
        return PointOutcome(error=line, traceback=details, took_s=took_s)


def _json_of(value: Any) -> str:
    try:
        return json.dumps(value, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        remedy = "return a number, or a dict of numbers, text and lists"
        raise TypeError(f"the function returned what JSON cannot hold ({error}): {remedy}") from None


def _plain(value: Any) -> Any:
    """NumPy numbers and arrays as Python numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} in the result")
