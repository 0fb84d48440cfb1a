"""Times: what an engine answers, for one step or for a batch of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ppsim.errors import InputError
from ppsim.schedule.action import Kind
from ppsim.schedule.side_table import SideTable
from ppsim.simulation.timed_program import TimedProgram

Seconds = npt.NDArray[np.float64]


def check_finite(*times_s: Seconds) -> None:
    """Raise InputError if some time is not finite."""
    if not all(np.isfinite(each).all() for each in times_s):
        raise InputError("the step takes longer than a float holds: give smaller costs, or a higher bytes_per_s")


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """When everything in one step happens.

    Parameters
    ----------
    start_s, end_s : arrays of shape (rows,)
        When each row starts and ends.
    message_start_s, message_left_s, message_arrival_s : arrays of shape (messages,)
        When each transfer begins, when its link is free again, and when it is there.
    side_start_s, side_end_s : arrays of shape (entries,)
        When each UNSHARD, REDUCE_GRAD, O (copy to host memory) and L (copy back) starts and ends.
    side : SideTable
        The table of these entries.
    """

    start_s: Seconds
    end_s: Seconds
    message_start_s: Seconds
    message_left_s: Seconds
    message_arrival_s: Seconds
    side_start_s: Seconds = field(default_factory=lambda: np.zeros(0))
    side_end_s: Seconds = field(default_factory=lambda: np.zeros(0))
    side: SideTable = field(default_factory=SideTable.none)

    @classmethod
    def of_actions(
        cls,
        timed: TimedProgram,
        *,
        action_start_s: Seconds,
        message_start_s: Seconds,
        message_arrival_s: Seconds,
        side_start_s: Seconds | None = None,
    ) -> StepTimes:
        """Compute all times of a step from the starts of its actions and messages.

        The second row of an overlapped pair starts when the first ends.
        """
        program = timed.program
        if program.has_pairs:
            first, last = program.action_start[:-1], program.action_start[1:] - 1
            start_s = action_start_s[program.row_action]
            second = last[last > first]
            start_s[second] += timed.duration_s[second - 1]
        else:
            start_s = action_start_s
        return cls(
            start_s=start_s,
            end_s=start_s + timed.duration_s,
            message_start_s=message_start_s,
            message_left_s=message_start_s + timed.occupied_s,
            message_arrival_s=message_arrival_s,
            **cls.beside(timed, side_start_s),
        )

    @property
    def reduced_s(self) -> float:
        """When the last REDUCE_GRAD on the collective streams ends; minus infinity without any."""
        return float(self.side_end_s[self.side.kind == Kind.REDUCE_GRAD].max(initial=-np.inf))

    def of_side(self, *, copies: bool) -> tuple[Seconds, Seconds]:
        """Starts and ends of the copies, or of the collectives, in the sequence of their own table."""
        chosen = self.side.is_copy == copies
        return self.side_start_s[chosen], self.side_end_s[chosen]

    @staticmethod
    def beside(timed: TimedProgram, start_s: Seconds | None) -> dict[str, Any]:
        """The three fields of UNSHARD, REDUCE_GRAD, O and L, from their starts. Empty for None."""
        if start_s is None:
            return {}
        return {"side_start_s": start_s, "side_end_s": start_s + timed.side_s, "side": timed.side}


@dataclass(frozen=True, kw_only=True)
class BatchTimes:
    """What is kept of n samples of a step.

    Parameters
    ----------
    first_start_s, last_end_s, compute_s : arrays of shape (n, p)
        When each rank's first action starts, when its last ends, and how long it computes. On a rank without actions
        the first two are the step's first start.
    watched_end_s : array of shape (n, watched)
        When the rows asked for end.
    start_s : array of shape (n, rows)
        When each row starts. Of shape (0, rows) unless asked for.
    reduced_s : array of shape (n,)
        When the last REDUCE_GRAD on the collective streams ends; minus infinity without any.
    """

    first_start_s: Seconds
    last_end_s: Seconds
    compute_s: Seconds
    watched_end_s: Seconds
    start_s: Seconds
    reduced_s: Seconds

    @property
    def makespan_s(self) -> Seconds:
        """Of each sample, shape (n,)."""
        makespan_s: Seconds = self.last_end_s.max(axis=1) - self.step_start_s
        return makespan_s

    @property
    def step_start_s(self) -> Seconds:
        """The first start in each sample, shape (n,)."""
        first_s: Seconds = self.first_start_s.min(axis=1)
        return first_s
