"""Result: what a sweep found, a row per point."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ppsim.checks import checked
from ppsim.parameter_sweep.grid import Point
from ppsim.parameter_sweep.key import function_name, readable
from ppsim.parameter_sweep.store import PointOutcome, Store

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One point of a sweep.

    Parameters
    ----------
    configuration : mapping
        Name -> value.
    result : Any
        What the function returned, as JSON gives it back: tuples are lists, keys are text. None where it failed.
    error : str or None
        One line where it failed.
    traceback : str or None
        All of it where the function raised.
    took_s : float or None
        Seconds in the function. None where its process was lost.
    """

    configuration: Point
    result: Any
    error: str | None
    traceback: str | None
    took_s: float | None


class SweepResult(Sequence[SweepRow]):
    """The rows of a sweep, a sequence of `SweepRow`.

    Parameters
    ----------
    points : sequence of mappings
        In the order of the grid, or, read from a store, in the order in which they came back.
    outcomes : sequence of PointOutcome
        One for each point.
    """

    def __init__(self, points: Sequence[Point], outcomes: Sequence[PointOutcome]) -> None:
        self._points, self._outcomes = points, outcomes

    def __len__(self) -> int:
        return len(self._outcomes)

    @overload
    def __getitem__(self, index: int) -> SweepRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[SweepRow]: ...
    def __getitem__(self, index: int | slice) -> SweepRow | list[SweepRow]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        outcome = self._outcomes[index]
        return SweepRow(
            configuration=self._points[index],
            result=None if outcome.result is None else json.loads(outcome.result),
            error=outcome.error,
            traceback=outcome.traceback,
            took_s=outcome.took_s,
        )

    def __repr__(self) -> str:
        return f"<SweepResult: {len(self)} points, {len(self.failed)} failed>"

    @property
    def failed(self) -> list[SweepRow]:
        """The rows whose function raised or whose process was lost every time. The next sweep tries them again."""
        return [self[index] for index, outcome in enumerate(self._outcomes) if outcome.error is not None]

    def to_frame(self) -> pd.DataFrame:
        """The rows as a table.

        Returns
        -------
        pandas.DataFrame
            A row per point. Columns are the configuration's names, the result's keys (`result` for what is no dict)
            and `error`, which is None where there is none. A key of the result that a name has taken is
            `result.<key>`.

        Examples
        --------
        >>> points = [{"width": 2, "height": 3}, {"width": 2, "height": 4}]
        >>> found = SweepResult(points, [PointOutcome(result='{"area": 6}'), PointOutcome(error="ValueError: no")])
        >>> print(found.to_frame())
           width  height  area           error
        0      2       3   6.0            None
        1      2       4   NaN  ValueError: no
        """
        import pandas as pd

        rows = list(self)
        names = list(dict.fromkeys(name for row in rows for name in row.configuration))
        columns: dict[str, list[Any]] = {name: [row.configuration.get(name) for row in rows] for name in names}
        results = [row.result if isinstance(row.result, dict) else {"result": row.result} for row in rows]
        kept = [result for row, result in zip(rows, results, strict=True) if row.error is None]
        for key in dict.fromkeys(key for result in kept for key in result):
            column = f"result.{key}" if key in names or key == "error" else key
            columns[column] = [result.get(key) for result in results]
        columns["error"] = [row.error for row in rows]
        frame = pd.DataFrame({name: pd.Series(values) for name, values in columns.items() if name != "error"})
        frame["error"] = pd.Series(columns["error"], dtype=object, index=frame.index)
        return frame


@checked
def load_sweep(path: str | Path, function: Callable[..., Any] | str | None = None) -> SweepResult:
    """Read what sweeps left in a store, while they are writing or later.

    Parameters
    ----------
    path : path
        The store's file.
    function : callable or str, optional
        Read the results of this function, or of the one with this "module.name". Without it those of all.

    Returns
    -------
    SweepResult
        In the order in which the results came back. Values of configurations are as the store spells them: dataclasses
        are mappings of their fields, tuples are lists.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    InputError
        If the file is no store.
    """
    name = function_name(function, why=None) if callable(function) else function
    with Store(path, must_exist=True) as store:
        rows = [(json.loads(text), outcome) for of, text, outcome in store.rows() if name is None or of == name]
    points = [{key: readable(value) for key, value in point.items()} for point, _ in rows]
    return SweepResult(points, [outcome for _, outcome in rows])
