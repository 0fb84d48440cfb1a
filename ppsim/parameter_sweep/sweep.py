"""Sweep: call a function for every point of a grid, and keep what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ppsim.checks import checked
from ppsim.errors import InputError
from ppsim.parameter_sweep.grid import Listed, Point, Product, points_of
from ppsim.parameter_sweep.key import check_arguments, digest, function_name
from ppsim.parameter_sweep.result import SweepResult
from ppsim.parameter_sweep.store import PointOutcome, Store

_MOST_AT_ONCE = 10_000  # worker processes, or calls under way: more is a typing error


@checked
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

    Parameters
    ----------
    function : callable
        Returns a number, or a dict that JSON can hold. With a store it stands at the top level of a module or script.
    grid : mapping or iterable of mappings
        Name -> values, for all combinations (the last name changes fastest); or the points one by one, each a mapping
        name -> value. Values are numbers, text, lists, mappings, paths and dataclasses such as StageCost or Network.
    executor : concurrent.futures.Executor, optional
        Where points are computed, such as `dask.distributed.Client.get_executor()`; the caller closes it. Without one,
        processes of this machine compute them, and are replaced when they die.
    store : path, optional
        SQLite file of results. A point that it holds is not computed again. Every result is written as it comes back,
        so a sweep that was killed goes on where it was. Several sweeps may share a file. None keeps nothing.
    progress : bool
        Show a bar on standard error.
    workers : int, optional
        How many processes of this machine; one for each usable core unless given.
    in_flight : int, optional
        How many calls of the executor may be under way: 4 per worker unless given, and 1,000 where an executor does
        not say how many workers it has. Several quick points share a call.

    Returns
    -------
    SweepResult
        A row per point, in the order of the grid.

    Raises
    ------
    InputError
        The function, the grid or the store cannot be used; the message says why.
    RuntimeError
        The given executor is broken, or every process died.

    Notes
    -----
    The key of a result is made of the function's name and the point, not of the function's code, nor of what is in a
    file whose path is given. A point whose function raises is a row with its `error`; the next sweep tries it again. A
    point whose process died is computed again, the second time alone; after three times it is a row with an `error`.
    Ctrl-C leaves a sound store.

    Examples
    --------
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> with ThreadPoolExecutor() as threads:
    ...     found = sweep(lambda a, b: a * b, {"a": [1, 2], "b": [10, 20]}, threads, progress=False)
    >>> [row.result for row in found]
    [10, 20, 20, 40]

    The bubble of 1F1B by its number of microbatches:

    >>> import ppsim
    >>> def bubble(microbatches):
    ...     cost = ppsim.StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    ...     schedule = ppsim.build_schedule("1f1b", ranks=4, microbatches=microbatches)
    ...     return {"bubble": ppsim.simulate(schedule, [cost] * 4).bubble_fraction}
    >>> with ThreadPoolExecutor() as threads:
    ...     found = sweep(bubble, {"microbatches": [4, 12]}, threads, progress=False)
    >>> found.to_frame()["bubble"].round(3).tolist()
    [0.429, 0.2]
    """
    from ppsim.parameter_sweep.dispatch import Dispatch, GivenExecutor, LocalProcesses  # loky takes 0.1 s to import

    for name, count in (("workers", workers), ("in_flight", in_flight)):
        if count is not None and not 1 <= count <= _MOST_AT_ONCE:
            raise InputError(f"{name} must be from 1 to {_MOST_AT_ONCE}, got {count}")
    if executor is not None and workers is not None:
        raise InputError(f"workers={workers} is for processes of this machine: the executor has its own, leave one out")
    points = points_of(grid)
    name = function_name(function, why=_why_named(executor, store))
    for names in points.name_sets:
        check_arguments(function, names)
    chosen: GivenExecutor | LocalProcesses
    if executor is None:
        chosen = LocalProcesses(function, in_flight, workers)
    else:
        chosen = GivenExecutor(executor, function, in_flight)
    with Store(store) as results:
        Dispatch(name, points, chosen, results).run(progress)
        return SweepResult(points, list(_outcomes(name, points, results)))


def _why_named(executor: Executor | None, store: str | Path | None) -> str | None:
    """What needs a function that can be imported by its name, if anything does."""
    if isinstance(executor, ProcessPoolExecutor):
        return "a process pool"
    return "a store" if store is not None and str(store) != ":memory:" else None


def _outcomes(name: str, points: Product | Listed, store: Store) -> Iterator[PointOutcome]:
    for index in range(len(points)):
        outcome = store.read(digest(name, points.configuration(index)))
        if outcome is None:
            raise RuntimeError(f"the store lost {points.configuration(index):.200}: was the file changed by hand?")
        yield outcome
