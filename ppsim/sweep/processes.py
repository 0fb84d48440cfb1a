"""Processes: where points are computed. An executor that was given, or processes of this machine that are replaced."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Protocol

from ppsim.sweep.grid import Point
from ppsim.sweep.store import Outcome
from ppsim.sweep.work import Script, live_with, run_pickled, run_points

_FEW = 4  # futures per worker: enough that none waits for the parent
_MANY = 1000  # futures of an executor of unknown width: a cluster may have hundreds of threads


class Place(Protocol):
    """Where points are computed. in_flight: how many futures it should hold at a time; workers: how wide it is."""

    in_flight: int
    workers: int

    def submit(self, points: Sequence[Point]) -> Future[list[Outcome]]:
        """Start computing; BrokenExecutor where it is broken."""

    def restart(self, error: BaseException) -> None:
        """Go on after a BrokenExecutor, or raise why not."""

    def close(self, *, now: bool) -> None:
        """Give everything back; `now`: without waiting for what is being computed."""


class GivenPlace:
    """An executor of the caller's, who also closes it."""

    def __init__(self, executor: Executor, function: Callable[..., Any], in_flight: int | None) -> None:
        self._executor, self._function = executor, function
        known = getattr(executor, "_max_workers", None)  # of the standard library's pools; others do not say
        self.in_flight = in_flight or (_FEW * known if isinstance(known, int) else _MANY)
        self.workers = known if isinstance(known, int) else max(1, self.in_flight // _FEW)

    def submit(self, points: Sequence[Point]) -> Future[list[Outcome]]:
        return self._executor.submit(run_points, self._function, points)

    def restart(self, error: BaseException) -> None:
        raise RuntimeError(
            f"the executor is broken ({type(error).__name__}: {error}). What came back is in the store: sweep again "
            "with a new executor, or without one, on processes that are replaced when they die"
        ) from error

    def close(self, *, now: bool) -> None:
        pass


class LocalPlace:
    """Processes of this machine, one per core, in a pool that is replaced when one of them dies.

    They are spawned: a fork of a process that has used numba's or torch's threads may hang. The caller's script is kept
    from multiprocessing, which would run it in every process from top to bottom; a worker imports it when it needs
    something of it, and stops at its first sweep. So scripts without a __main__ guard work, too.
    """

    def __init__(self, function: Callable[..., Any], in_flight: int | None, workers: int | None) -> None:
        self._function, self._script = function, Script.current()
        self.workers = workers or _cores()
        self.in_flight = in_flight or _FEW * self.workers
        self._pool: ProcessPoolExecutor | None = None
        self._lifeline: Connection | None = None

    def submit(self, points: Sequence[Point]) -> Future[list[Outcome]]:
        payload = self._pickled(points)
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            watched, self._lifeline = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(self.workers, context, live_with, (watched,))
        with _no_main_module():  # processes are started here, one for a future that finds none idle
            return self._pool.submit(run_pickled, self._script, payload)

    def _pickled(self, points: Sequence[Point]) -> bytes:
        try:
            payload = pickle.dumps((self._function, points), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise ValueError(
                f"the sweep cannot be sent to another process ({type(error).__name__}: {error}): define the function "
                "and the types in its grid at the top level of a module, or give "
                "executor=concurrent.futures.ThreadPoolExecutor()"
            ) from error
        if self._script is None and b"__main__" in payload:
            raise ValueError(
                "the sweep needs what was defined in an interactive session, which no other process can import: put it "
                "into a file, or give executor=concurrent.futures.ThreadPoolExecutor()"
            )
        return payload

    def restart(self, error: BaseException) -> None:
        self.close(now=True)

    def close(self, *, now: bool) -> None:
        if self._pool is None or self._lifeline is None:
            return
        if now:
            for process in list((self._pool._processes or {}).values()):  # Python 3.14 has kill_workers for this
                process.kill()
        self._pool.shutdown(cancel_futures=True)
        self._lifeline.close()
        self._pool = self._lifeline = None


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep the caller's script from processes that are started within."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
