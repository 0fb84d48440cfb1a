"""Recording: what one rank was seen to compute in one step, and how the ranks' recordings become a trace."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.errors import InputError
from ppsim.runs.clocks import clock_offsets
from ppsim.schedule.action import Action, Kind, OverlappedPair
from ppsim.schedule.named.registry import build_schedule, schedule_names
from ppsim.schedule.program import Program
from ppsim.schedule.schedule import Schedule
from ppsim.trace.trace import Trace

Seconds = npt.NDArray[np.float64]

_TOUCHING = 0.02  # of the shorter action: what two actions may overlap by, as clocks are read and rounded


class Recorded(NamedTuple):
    """An action, and when it ran on its rank's clock, in seconds."""

    action: Action | OverlappedPair
    start_s: float
    end_s: float


def assemble(
    recordings: Sequence[Sequence[Recorded]],
    *,
    where: str,
    has_common_clock: bool,
    sent_s: Mapping[Action, float] | None = None,
    details: dict[str, Any] | None = None,
    total_peak_bytes: npt.NDArray[np.int64] | None = None,
) -> Trace:
    """Make a step's trace from what each rank recorded.

    Parameters
    ----------
    recordings : sequence of p sequences of Recorded
        By rank, in any order.
    where : str
        File and step, for messages.
    has_common_clock : bool
        Whether all ranks read one clock. If so, it is believed as long as nothing starts before its input was made.
    sent_s : mapping of Action to float, optional
        When the result of each action was sent, on its rank's clock. It is seen to arrive when its consumer starts.
        Without it, or if some are missing, messages are unknown.
    details : dict, optional
        The trace's.
    total_peak_bytes : array of shape (p,), optional
        The trace's.

    Returns
    -------
    Trace
        Its `details` hold `clock_offsets_s`, what was added to each rank's times.

    Raises
    ------
    InputError
        If the actions are no schedule, or overlap in time on a rank.
    """
    ordered = [_in_sequence(rank, recorded, where) for rank, recorded in enumerate(recordings)]
    try:
        schedule = Schedule.of([[each.action for each in recorded] for recorded in ordered], name="recorded")
        schedule.check()
    except InputError as error:
        raise InputError(f"{where}: the actions in the order of their times are no schedule: {error}") from None
    schedule = replace(schedule, name=_built_in_name(schedule) or "recorded")
    program = schedule.program
    start_s, end_s = _row_times(program, [each for recorded in ordered for each in recorded])
    offsets_s = clock_offsets(program, start_s, end_s, keep=has_common_clock)
    columns: dict[str, Any] = {}
    messages = program.messages
    producers = [program.action_of(row) for row in messages.producer.tolist()]
    if sent_s is not None and all(each in sent_s for each in producers):
        posted = [sent_s[each] for each in producers]
        first = program.action_start[:-1][program.row_action]
        arrival_s = start_s[first][messages.consumer] + offsets_s[messages.destination]
        columns = {
            "message_start_s": np.array(posted, np.float64) + offsets_s[messages.source],
            "message_left_s": arrival_s,
            "message_arrival_s": arrival_s,
        }
    return Trace(
        program=program,
        clock="measured",
        start_s=start_s + offsets_s[program.rank],
        end_s=end_s + offsets_s[program.rank],
        details={**(details or {}), "clock_offsets_s": offsets_s.tolist()},
        total_peak_bytes=total_peak_bytes,
        **columns,
    )


@functools.lru_cache(maxsize=8)
def _built_in_name(schedule: Schedule) -> str | None:
    """The built-in schedule that has these orders. It is asked anew for each step of a run."""
    stages_per_rank, rest = divmod(schedule.stages, schedule.ranks)
    for name in [] if rest else schedule_names():
        try:
            built = build_schedule(
                name, ranks=schedule.ranks, microbatches=schedule.microbatches, stages_per_rank=stages_per_rank
            )
        except InputError:
            continue
        if built.orders == schedule.orders and built.copies == schedule.copies:
            return name
    return None


def _in_sequence(rank: int, recorded: Sequence[Recorded], where: str) -> list[Recorded]:
    """A rank's actions by time, none beginning before the last has ended."""
    found: list[Recorded] = []
    for each in sorted(recorded, key=lambda each: (each.start_s, each.end_s)):
        action, start_s, end_s = each
        if not (np.isfinite(start_s) and np.isfinite(end_s) and end_s >= start_s):
            raise InputError(
                f"{where}, rank {rank}: {action} runs from {start_s!r} s to {end_s!r} s: record both times"
            )
        if found and start_s < (free_s := found[-1].end_s):
            shorter_s = min(end_s - start_s, free_s - found[-1].start_s)
            if free_s - start_s > _TOUCHING * shorter_s:
                raise InputError(
                    f"{where}, rank {rank}: {action} starts {free_s - start_s:.3g} s before {found[-1].action} ends, "
                    "but a rank computes one action at a time: record each action's own times"
                )
            start_s = free_s
        found.append(Recorded(action, start_s, max(start_s, end_s)))
    return found


def _row_times(program: Program, recorded: Sequence[Recorded]) -> tuple[Seconds, Seconds]:
    """When each row ran. A pair's time is dealt to its rows as these last alone on the median, else by halves."""
    start_s = np.array([each.start_s for each in recorded], np.float64)[program.row_action]
    end_s = np.array([each.end_s for each in recorded], np.float64)[program.row_action]
    if program.has_pairs:
        first = program.action_start[:-1][np.diff(program.action_start) == 2]
        alone = np.diff(program.action_start)[program.row_action] == 1
        middle_s = start_s[first] + (end_s[first] - start_s[first]) * _forward_share(program, end_s - start_s, alone)
        end_s[first], start_s[first + 1] = middle_s, middle_s
    return start_s, end_s


def _forward_share(program: Program, lengths_s: Seconds, alone: npt.NDArray[np.bool_]) -> float:
    usual_s = [
        np.median(lengths_s[chosen]) for kind in (Kind.F, Kind.B) if (chosen := alone & (program.kind == kind)).any()
    ]
    return float(usual_s[0] / sum(usual_s)) if len(usual_s) == 2 and sum(usual_s) > 0 else 0.5
