"""Run: a sweep from its first point to its last, whatever dies in between."""

from __future__ import annotations

import math
import queue
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppsim.sweep.grid import Listed, Point, Product, points_of
from ppsim.sweep.key import check_arguments, digest, function_name
from ppsim.sweep.processes import GivenPlace, LocalPlace, Place
from ppsim.sweep.result import SweepResult
from ppsim.sweep.store import Outcome, Store
from ppsim.sweep.work import NotImportable, stop_import_of_script

if TYPE_CHECKING:
    from tqdm import tqdm

_BATCH_S = 0.05  # of computing per future, so that tiny points are not all overhead
_MOST_PER_BATCH = 500
_SHARES_PER_WORKER = 8  # what is left is shared out in so many batches per worker at least
_CROWD_LOSSES = 2  # how often a point may be lost beside others before it has to run alone
_LOSSES = 3  # and how often in all before it is given up
_HOPELESS = 5  # so many given up and nothing computed: it is not the points


def sweep(
    function: Callable[..., Any],
    grid: Mapping[str, Iterable[Any]] | Iterable[Point],
    executor: Executor | None = None,
    *,
    store: str | Path | None = None,
    progress: bool = True,
    workers: int | None = None,
    in_flight: int | None = None,
) -> SweepResult:
    """Call `function(**point)` for every point of a grid, and keep what it returns.

    function: at the top level of a module or script; returns a number or a dict that JSON can hold.
    grid: name -> values, for all combinations (the last name changes fastest); or an iterable of points, each a mapping
    name -> value. Values are numbers, text, lists, mappings, paths and dataclasses such as StageCost or Network.
    executor: any `concurrent.futures.Executor`, as `dask.distributed.Client.get_executor()`; the caller closes it.
    Without one, `workers` processes of this machine (one per core), replaced when they die.
    store: a SQLite file of results. What it holds is not computed again, by the key function name and configuration
    (not the function's code, nor what is in a file whose path is given). Every result is written as it comes back, so a
    sweep that was killed goes on where it was; several sweeps may share a file. None keeps nothing.
    progress: a bar on standard error. in_flight: how many calls of the executor may be under way; four per worker, and
    1,000 where an executor does not say how many it has. Several quick points share a call.

    A point whose function raises is a row with its `error`; the rest goes on, and the next sweep tries it again. So is
    a point that ended its process three times. Points lost with a process are computed again. Ctrl-C leaves a sound
    store. Raises ValueError for what cannot be swept or stored; RuntimeError where the executor is broken.
    """
    stop_import_of_script()
    for name, count in (("workers", workers), ("in_flight", in_flight)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if executor is not None and workers is not None:
        raise ValueError(f"workers={workers} is for processes of this machine: the executor has its own, leave one out")
    points = points_of(grid)
    name = function_name(function, why=_why_named(executor, store))
    for names in points.name_sets:
        check_arguments(function, names)
    place: Place
    place = LocalPlace(function, in_flight, workers) if executor is None else GivenPlace(executor, function, in_flight)
    with Store(store) as results:
        _Run(name, points, place, results).run(progress)
        return SweepResult(points, list(_outcomes(name, points, results)))


def _why_named(executor: Executor | None, store: str | Path | None) -> str | None:
    if executor is None or isinstance(executor, ProcessPoolExecutor):
        return "a sweep over processes"
    return "a store" if store is not None and str(store) != ":memory:" else None


def _outcomes(name: str, points: Product | Listed, store: Store) -> Iterator[Outcome]:
    for index in range(len(points)):
        outcome = store.read(digest(name, points.configuration(index)))
        if outcome is None:
            raise RuntimeError(f"the store lost {points.configuration(index):.200}: was the file changed by hand?")
        yield outcome


@dataclass(kw_only=True)
class _Task:
    """A point that is to be computed; losses: how often it was lost with its process."""

    index: int
    key: bytes
    losses: int = 0


class _Run:
    """The points under way. Only this thread writes to the store."""

    def __init__(self, name: str, points: Product | Listed, place: Place, store: Store) -> None:
        self._name, self._points, self._place, self._store = name, points, place, store
        self._fresh = self._missing()
        self._lost: deque[_Task] = deque()  # to be computed again, beside others
        self._suspects: deque[_Task] = deque()  # to be computed again, each alone
        self._in_flight: dict[Future[list[Outcome]], list[_Task]] = {}
        self._keys_in_flight: set[bytes] = set()
        self._returned: queue.SimpleQueue[Future[list[Outcome]]] = queue.SimpleQueue()
        self._failed: set[bytes] = set()
        self._is_alone = False  # whether what is under way is a suspect
        self._seen = 0  # points of the grid that were looked at
        self._mean_s: float | None = None  # of a point
        self._computed = 0
        self._given_up = 0
        self._breakage: BaseException | None = None
        self._bar: tqdm[Any] | None = None

    def run(self, progress: bool) -> None:
        """Compute what is missing."""
        from tqdm import tqdm

        finished = False
        with tqdm(total=len(self._points), file=sys.stderr, leave=False, disable=not progress, unit=" points") as bar:
            self._bar = bar
            try:
                self._submit()
                while self._in_flight:
                    self._take(self._returned.get())
                    self._submit()
                finished = True
            except BaseException:
                self._abandon()
                raise
            finally:
                self._place.close(now=not finished)

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
        """Fill the place up. While it is broken, wait until everything has come back, then start afresh."""
        if self._breakage is not None:
            if self._in_flight:
                return
            self._place.restart(self._breakage)
            self._breakage = None
        while len(self._in_flight) < self._place.in_flight:
            batch = self._next_batch()
            if not batch:
                return
            try:
                future = self._place.submit([self._points[task.index] for task in batch])
            except BrokenExecutor as error:
                # It broke since the last future came back. If none is under way, none will come back to say so.
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
        # Right after a breakage nothing is under way: the moment to find out which point it was.
        self._is_alone = bool(self._suspects) and not self._in_flight
        if self._is_alone:
            batch = [self._suspects.popleft()]
        elif self._lost:
            batch = [self._lost.popleft()]
        else:
            size = self._batch_size()
            while len(batch) < size and (task := next(self._fresh, None)) is not None:
                batch.append(task)
                self._keys_in_flight.add(task.key)
        self._keys_in_flight.update(task.key for task in batch)
        return batch

    def _batch_size(self) -> int:
        """As many points as make up a worthwhile call, but never so many that workers end far apart."""
        if self._mean_s is None:
            return 1
        share = (len(self._points) - self._seen) // (_SHARES_PER_WORKER * self._place.workers)
        worthwhile = math.ceil(_BATCH_S / max(self._mean_s, 1e-9))
        return max(1, min(worthwhile, share, _MOST_PER_BATCH))

    def _take(self, future: Future[list[Outcome]]) -> None:
        """Write what came back, or see what becomes of points that were lost."""
        batch = self._in_flight.pop(future)
        self._keys_in_flight.difference_update(task.key for task in batch)
        error = _error_of(future)
        if error is None:
            for task, outcome in zip(batch, future.result(), strict=True):
                self._write(task, outcome)
            self._computed += len(batch)
            return
        if isinstance(error, NotImportable):
            raise error
        if isinstance(error, BrokenExecutor):
            self._breakage = error
        for task in batch:
            task.losses += 1
            if task.losses >= _LOSSES and len(batch) == 1:
                self._give_up(task, error)
            elif task.losses >= _CROWD_LOSSES:
                self._suspects.append(task)
            else:
                self._lost.append(task)

    def _give_up(self, task: _Task, error: BaseException) -> None:
        line = f"its process ended, or it was lost, {task.losses} times, at last with {type(error).__name__}: {error}"
        self._write(task, Outcome(error=" ".join(line.split("\n"))))
        self._given_up += 1
        if self._given_up >= _HOPELESS and self._computed == 0:
            raise RuntimeError(
                f"{self._given_up} points were lost with their processes, and none was computed: try the function in "
                "this process first"
            ) from error

    def _write(self, task: _Task, outcome: Outcome) -> None:
        self._store.write(task.key, self._name, self._points.configuration(task.index), outcome)
        self._advance(1)
        if outcome.error is not None:
            self._failed.add(task.key)
            if self._bar is not None:
                self._bar.set_postfix(failed=len(self._failed), refresh=False)
        if outcome.took_s is not None:
            # The last points weigh most: neighbours in a grid resemble each other.
            self._mean_s = outcome.took_s if self._mean_s is None else 0.9 * self._mean_s + 0.1 * outcome.took_s

    def _advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def _abandon(self) -> None:
        """Cancel what has not begun, and keep what has come back."""
        for future in self._in_flight:
            future.cancel()
        while not self._returned.empty():
            future = self._returned.get()
            if future in self._in_flight and _error_of(future) is None:
                batch = self._in_flight.pop(future)
                for task, outcome in zip(batch, future.result(), strict=True):
                    self._write(task, outcome)


def _error_of(future: Future[list[Outcome]]) -> BaseException | None:
    """Why a future has no outcome: not the function's error, which is an outcome."""
    try:
        return future.exception()
    except BaseException as error:  # cancelled, by an executor that was closed or lost its cluster
        return error
