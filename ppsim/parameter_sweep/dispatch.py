"""Dispatch: hands the points of a sweep to an executor and writes what comes back, whatever dies in between."""

from __future__ import annotations

import math
import os
import queue
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cloudpickle
import loky

from ppsim.errors import InputError
from ppsim.parameter_sweep.grid import Listed, Point, Product
from ppsim.parameter_sweep.key import digest
from ppsim.parameter_sweep.store import PointOutcome, Store
from ppsim.parameter_sweep.worker import run_points, run_points_in_process, set_up_process

if TYPE_CHECKING:
    from tqdm import tqdm

_CALLS_PER_WORKER = 4  # under way at a time: enough that no worker waits for this process
_MOST_CALLS = 1000  # of an executor that does not say how many workers it has: a cluster may have hundreds
_CALL_S = 0.05  # what a call should compute for, so that quick points are not mostly overhead
_MOST_PER_CALL = 500
_SHARES_PER_WORKER = 8  # the rest of the grid is cut into at least so many calls per worker, so that all end together
_LOSSES_BESIDE_OTHERS = 2  # a point that was lost so often with its worker runs alone from then on
_MOST_LOSSES = 3  # and is given up after so many
_HOPELESS = 5  # points given up before any was computed: then the points are not to blame


class GivenExecutor:
    """The caller's executor. The caller closes it, and it is not replaced when it breaks.

    Parameters
    ----------
    executor : Executor
    function : callable
        What is swept.
    in_flight : int or None
        How many calls may be under way; None for a number that fits the executor's workers.
    """

    def __init__(self, executor: Executor, function: Callable[..., Any], in_flight: int | None) -> None:
        self._executor, self._function = executor, function
        known = getattr(executor, "_max_workers", None)  # only the standard library's executors have it
        self.in_flight = in_flight or (_CALLS_PER_WORKER * known if isinstance(known, int) else _MOST_CALLS)
        self.workers = known if isinstance(known, int) else max(1, self.in_flight // _CALLS_PER_WORKER)

    def submit(self, points: Sequence[Point]) -> Future[list[PointOutcome]]:
        """Start a call."""
        return self._executor.submit(run_points, self._function, points)

    def restart(self, error: BaseException) -> None:
        """Say that this executor cannot be replaced."""
        raise RuntimeError(
            f"the executor is broken ({type(error).__name__}: {error}). What came back is in the store: sweep again "
            "with a new executor, or without one, on processes that are replaced when they die"
        ) from error

    def close(self) -> None:
        """Leave the executor to the caller."""


class LocalProcesses:
    """Worker processes of this machine, by loky. They are started anew when one of them dies.

    Parameters
    ----------
    function : callable
        What is swept.
    in_flight : int or None
        How many calls may be under way; None for a few per worker.
    workers : int or None
        How many processes; None for one per usable core.

    Raises
    ------
    InputError
        If the function cannot be sent to another process.

    Notes
    -----
    loky starts each worker as a fresh interpreter, because a fork of a process with numba's or torch's threads may
    hang. It sends by value what `__main__` defines. So scripts need no `__main__` guard, and interactive sessions can
    sweep, too.
    """

    def __init__(self, function: Callable[..., Any], in_flight: int | None, workers: int | None) -> None:
        try:
            self._function = cloudpickle.dumps(function)
        except Exception as error:
            raise InputError(
                f"the function cannot be sent to another process ({type(error).__name__}: {error}): build what it "
                "holds inside it, or give executor=concurrent.futures.ThreadPoolExecutor()"
            ) from error
        self.workers = workers or loky.cpu_count()
        self.in_flight = in_flight or _CALLS_PER_WORKER * self.workers
        self._executor: Executor | None = None

    def submit(self, points: Sequence[Point]) -> Future[list[PointOutcome]]:
        """Start a call, and the processes with the first one."""
        if self._executor is None:
            self._executor = loky.ProcessPoolExecutor(self.workers, initializer=set_up_process, initargs=(os.getpid(),))
        return self._executor.submit(run_points_in_process, self._function, points)

    def restart(self, error: BaseException) -> None:
        """End all processes. The next call starts new ones."""
        self.close()

    def close(self) -> None:
        """End all processes, without waiting for what they compute."""
        if self._executor is not None:
            self._executor.shutdown(kill_workers=True)  # type: ignore[call-arg]  # loky's own argument
            self._executor = None


@dataclass(kw_only=True)
class _Task:
    """A point that is to be computed; `losses` counts how often its worker died."""

    index: int
    key: bytes
    losses: int = 0


class Dispatch:
    """The points under way. Only the thread that calls `run` writes to the store.

    Parameters
    ----------
    name : str
        The function's "module.name".
    points : Product or Listed
        All points of the sweep.
    executor : GivenExecutor or LocalProcesses
        Where points are computed.
    store : Store
        What has been computed, and where outcomes go.
    """

    def __init__(
        self, name: str, points: Product | Listed, executor: GivenExecutor | LocalProcesses, store: Store
    ) -> None:
        self._name, self._points, self._executor, self._store = name, points, executor, store
        self._fresh = self._missing()
        self._lost: deque[_Task] = deque()  # to be computed again
        self._suspects: deque[_Task] = deque()  # to be computed again, each alone
        self._in_flight: dict[Future[list[PointOutcome]], list[_Task]] = {}
        self._keys_in_flight: set[bytes] = set()
        self._returned: queue.SimpleQueue[Future[list[PointOutcome]]] = queue.SimpleQueue()
        self._failed: set[bytes] = set()
        self._is_alone = False  # whether what is under way is a suspect
        self._seen = 0  # points of the grid that were looked at
        self._mean_s: float | None = None  # of a point
        self._computed = 0
        self._given_up = 0
        self._breakage: BaseException | None = None
        self._bar: tqdm[Any] | None = None

    def run(self, progress: bool) -> None:
        """Compute every point that the store lacks, with a progress bar on standard error if wanted.

        Raises
        ------
        RuntimeError
            If the given executor is broken, or if the first points were all lost with their processes.
        """
        from tqdm import tqdm

        with tqdm(total=len(self._points), file=sys.stderr, leave=False, disable=not progress, unit=" points") as bar:
            self._bar = bar
            try:
                self._submit()
                while self._in_flight:
                    self._take(self._returned.get())
                    self._submit()
            except BaseException:
                self._abandon()
                raise
            finally:
                self._executor.close()

    def _missing(self) -> Iterator[_Task]:
        """The points that are neither stored nor under way, looked up one by one: another sweep may be writing."""
        for index in range(len(self._points)):
            self._seen = index + 1
            key = digest(self._name, self._points.configuration(index))
            if key in self._keys_in_flight or key in self._failed or self._store.has_result(key):
                self._advance(1)
            else:
                yield _Task(index=index, key=key)

    def _submit(self) -> None:
        """Start as many calls as may be under way. Once the executor broke, first wait until every call has ended."""
        if self._breakage is not None:
            if self._in_flight:
                return
            self._executor.restart(self._breakage)
            self._breakage = None
        while len(self._in_flight) < self._executor.in_flight:
            batch = self._next_batch()
            if not batch:
                return
            try:
                future = self._executor.submit([self._points[task.index] for task in batch])
            except BrokenExecutor as error:
                # It broke after the last call ended. If none is under way, none will end and start this anew.
                self._lost.extendleft(reversed(batch))
                self._keys_in_flight.difference_update(task.key for task in batch)
                self._breakage = error
                if not self._in_flight:
                    self._submit()
                return
            self._in_flight[future] = batch
            future.add_done_callback(self._returned.put)

    def _next_batch(self) -> list[_Task]:
        batch: list[_Task] = []
        if self._is_alone and self._in_flight:
            return batch
        # A suspect runs while nothing else does, so that the death of a worker says which point caused it.
        self._is_alone = bool(self._suspects) and not self._in_flight
        if self._is_alone:
            batch = [self._suspects.popleft()]
        elif self._lost:
            batch = [self._lost.popleft()]
        else:
            size = self._batch_size()
            while len(batch) < size and (task := next(self._fresh, None)) is not None:
                batch.append(task)
                self._keys_in_flight.add(task.key)  # at once, so that an equal point is not taken too
        self._keys_in_flight.update(task.key for task in batch)
        return batch

    def _batch_size(self) -> int:
        """Points of the next call: enough to be worth it, few enough that all workers end at about the same time."""
        if self._mean_s is None:
            return 1
        share = (len(self._points) - self._seen) // (_SHARES_PER_WORKER * self._executor.workers)
        worthwhile = math.ceil(_CALL_S / max(self._mean_s, 1e-9))
        return max(1, min(worthwhile, share, _MOST_PER_CALL))

    def _take(self, future: Future[list[PointOutcome]]) -> None:
        """Write what a call returned, or decide what becomes of the points that were lost with it."""
        batch = self._in_flight.pop(future)
        self._keys_in_flight.difference_update(task.key for task in batch)
        error = _error_of(future)
        if error is None:
            for task, outcome in zip(batch, future.result(), strict=True):
                self._write(task, outcome)
            self._computed += len(batch)
            return
        if isinstance(error, BrokenExecutor):
            self._breakage = error
        for task in batch:
            task.losses += 1
            if task.losses >= _MOST_LOSSES and len(batch) == 1:
                self._give_up(task, error)
            elif task.losses >= _LOSSES_BESIDE_OTHERS:
                self._suspects.append(task)
            else:
                self._lost.append(task)

    def _give_up(self, task: _Task, error: BaseException) -> None:
        line = f"its process ended, or it was lost, {task.losses} times, at last with {type(error).__name__}: {error}"
        self._write(task, PointOutcome(error=" ".join(line.split("\n"))))
        self._given_up += 1
        if self._given_up >= _HOPELESS and self._computed == 0:
            raise RuntimeError(
                f"{self._given_up} points were lost with their processes, and none was computed: try the function in "
                "this process first"
            ) from error

    def _write(self, task: _Task, outcome: PointOutcome) -> None:
        self._store.write(task.key, self._name, self._points.configuration(task.index), outcome)
        self._advance(1)
        if outcome.error is not None:
            self._failed.add(task.key)
            if self._bar is not None:
                self._bar.set_postfix(failed=len(self._failed), refresh=False)
        if outcome.took_s is not None:
            # The last points weigh most: neighbours in a grid take about as long as each other.
            self._mean_s = outcome.took_s if self._mean_s is None else 0.9 * self._mean_s + 0.1 * outcome.took_s

    def _advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def _abandon(self) -> None:
        """Cancel the calls that have not begun, and write what has come back."""
        for future in self._in_flight:
            future.cancel()
        while not self._returned.empty():
            future = self._returned.get()
            if future in self._in_flight and _error_of(future) is None:
                batch = self._in_flight.pop(future)
                for task, outcome in zip(batch, future.result(), strict=True):
                    self._write(task, outcome)


def _error_of(future: Future[list[PointOutcome]]) -> BaseException | None:
    """Why a call returned nothing; what the function raised is an outcome and no such reason."""
    try:
        return future.exception()
    except BaseException as error:  # cancelled, by an executor that was closed or lost its cluster
        return error
