"""Times: what an engine answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppsim.simulation.timed_program import Load

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Times:
    """start_s, end_s: shape (rows,). message_*: shape (messages,): transfer begun, link free again, arrived."""

    start_s: Seconds
    end_s: Seconds
    message_start_s: Seconds
    message_left_s: Seconds
    message_arrival_s: Seconds

    @classmethod
    def of_actions(
        cls, load: Load, *, action_start_s: Seconds, message_start_s: Seconds, message_arrival_s: Seconds
    ) -> Times:
        """The rest follows: a row ends its duration after its start, and a pair's second row starts then."""
        program = load.program
        if program.has_pairs:
            first, last = program.action_start[:-1], program.action_start[1:] - 1
            start_s = action_start_s[program.row_action]
            second = last[last > first]
            start_s[second] += load.duration_s[second - 1]
        else:
            start_s = action_start_s
        return cls(
            start_s=start_s,
            end_s=start_s + load.duration_s,
            message_start_s=message_start_s,
            message_left_s=message_start_s + load.occupied_s,
            message_arrival_s=message_arrival_s,
        )
