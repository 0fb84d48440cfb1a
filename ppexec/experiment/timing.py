"""Timing: functions timed in turn, and figures with their quartiles."""

from __future__ import annotations

import gc
import operator
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_RELATIONS = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow:
    """One figure of a benchmark.

    Parameters
    ----------
    part : str
        The group that it belongs to.
    what : str
        What was measured.
    value, low, high : float
        The median and the quartiles over all turns, in `unit`.
    unit : str
    target : str
        What the median should be: "<", "<=" or ">=" and a number. "" if there is no target.
    """

    part: str
    what: str
    value: float
    low: float
    high: float
    unit: str
    target: str = ""

    @classmethod
    def of(cls, part: str, what: str, values: npt.ArrayLike, unit: str, target: str = "") -> BenchmarkRow:
        """Make a row from the figure of every turn.

        Examples
        --------
        >>> BenchmarkRow.of("engines", "SimPy", [1.0, 3.0, 2.0], "M actions/s").cells["median"]
        '2 M actions/s'
        """
        low, middle, high = np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75]).tolist()
        return cls(part=part, what=what, value=middle, low=low, high=high, unit=unit, target=target)

    @property
    def meets_target(self) -> bool | None:
        """Whether the median is as it should be. None without a target.

        Examples
        --------
        >>> BenchmarkRow.of("scale", "its peak memory", [1.9], "GB", "< 4").meets_target
        True
        """
        if not self.target:
            return None
        relation, wanted = self.target.split()
        return bool(_RELATIONS[relation](self.value, float(wanted)))

    @property
    def cells(self) -> dict[str, str]:
        """The figure as a row of a table."""
        return {
            "part": self.part,
            "figure": self.what,
            "median": f"{self.value:.4g} {self.unit}",
            "quartiles": f"{self.low:.4g} to {self.high:.4g}" if self.low < self.high else "",
            "target": self.target if self.meets_target in (None, True) else f"{self.target}: missed",
        }


def time_in_turn(
    functions: Mapping[str, Callable[[Any], Any]], *, turns: int, prepare: Callable[[], Any]
) -> dict[str, npt.NDArray[np.float64]]:
    """Time several functions in turn, so that a machine whose speed drifts drifts under all alike.

    Parameters
    ----------
    functions : mapping
        Name -> function of what `prepare` made.
    turns : int
        How often each is timed; one turn before is not counted.
    prepare : callable
        Makes the argument of every call. It is not timed, and garbage is collected after it.

    Returns
    -------
    dict
        Name -> seconds of each turn, shape (turns,).
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            given = prepare()
            gc.collect()
            elapsed_s = seconds_of(lambda: function(given))  # noqa: B023  (called at once)
            if turn:
                times[name].append(elapsed_s)
    return {name: np.array(values) for name, values in times.items()}


def seconds_of(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
