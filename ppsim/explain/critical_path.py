"""Critical path: the chain of computations, messages and gaps that is as long as the step, and everybody's slack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ppsim.explain.step_graph import StepGraph
from ppsim.schedule.program import Program

if TYPE_CHECKING:
    import pandas

SEGMENTS = ("compute", "queueing", "transfer", "latency", "device")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of the critical path, in seconds from the step's start.

    what: "compute" (row is computed on rank), "transfer" or "latency" of a message, "queueing" (the message's sender
    has it ready, but does not begin: between link and hand-over), or "device" (rank has the inputs of row and is free,
    yet does not start it: a shared device, or a measured executor's own time). row: of the program; for a message's
    its producer. rank: where it happens; for a message's the sender. destination: a message's receiver, else -1.
    """

    what: str
    start_s: float
    end_s: float
    rank: int
    row: int
    message: int = -1
    destination: int = -1

    @property
    def length_s(self) -> float:
        """end_s - start_s."""
        return self.end_s - self.start_s


@dataclass(frozen=True, kw_only=True, eq=False)
class CriticalPath:
    """Segments from the step's start to its end; each starts where the one before it ends.

    Read from the end: the last action of the step began when its rank was free and its input was there; whichever of
    the two was later is what it waited for, and so on. A message that had to queue waited for the one ahead of it on
    the link. Where two were equally late the rank's own action is taken.
    """

    program: Program
    segments: tuple[Segment, ...]

    @cached_property
    def length_s(self) -> float:
        """The makespan."""
        return self.segments[-1].end_s - self.segments[0].start_s

    @cached_property
    def by_what_s(self) -> dict[str, float]:
        """Seconds of the path by what it does; the values add up to the makespan."""
        return {
            what: math.fsum(segment.length_s for segment in self.segments if segment.what == what) for what in SEGMENTS
        }

    @property
    def rows(self) -> list[int]:
        """The rows that are computed on the path, in time."""
        return [segment.row for segment in self.segments if segment.what == "compute"]

    def label(self, segment: Segment) -> str:
        """What a segment is, in words: "2F0 on rank 2", "transfer of 0F3 from rank 0 to 1"."""
        action = self.program.action_of(segment.row)
        if segment.what == "compute":
            return f"{action} on rank {segment.rank}"
        if segment.what == "device":
            return f"device wait before {action} on rank {segment.rank}"
        return f"{segment.what} of {action} from rank {segment.rank} to {segment.destination}"

    def to_frame(self) -> pandas.DataFrame:
        """A row per segment: what, rank, destination, action, start_s, end_s, message (-1 for none)."""
        import pandas

        return pandas.DataFrame(
            {
                "what": [segment.what for segment in self.segments],
                "rank": [segment.rank for segment in self.segments],
                "destination": [segment.destination for segment in self.segments],
                "action": [str(self.program.action_of(segment.row)) for segment in self.segments],
                "start_s": [segment.start_s for segment in self.segments],
                "end_s": [segment.end_s for segment in self.segments],
                "message": [segment.message for segment in self.segments],
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "length_s": self.length_s,
            "by_what_s": self.by_what_s,
            "segments": [
                {"what": part.what, "label": self.label(part), "start_s": part.start_s, "end_s": part.end_s}
                for part in self.segments
            ],
        }

    def __str__(self) -> str:
        length = self.length_s
        shares = [
            f"{what} {seconds / length:.1%}"
            for what, seconds in self.by_what_s.items()
            if length > 0 and seconds >= 0.0005 * length  # what would be shown as 0.0% is left out
        ]
        return f"critical path: {len(self.rows)} computations; {', '.join(shares) or 'no time'}"


def path_of(graph: StepGraph) -> CriticalPath:
    """Walk back from the step's end; every moment is crossed once."""
    wiring, times, program = graph.wiring, graph.times, graph.program
    found: list[Segment] = []
    now = graph.end_s

    def cross(what: str, begin: float, **place: int) -> None:
        """Add [begin, now] if it has length; what begins before the step or after `now` is cut."""
        nonlocal now
        begin = max(begin, 0.0)
        if begin < now:
            found.append(Segment(what=what, start_s=begin, end_s=now, **place))
            now = begin

    zero = float(graph.trace.start_s.min())
    action = int(np.argmax(times.end_s))
    while action >= 0:
        rank = int(wiring.rank[action])
        rows = range(int(program.action_start[action]), int(program.action_start[action + 1]))
        for row in reversed(rows):
            cross("device", float(graph.trace.end_s[row]) - zero, rank=rank, row=row)
            _compute(found, rank, row, max(min(float(graph.trace.start_s[row]) - zero, now), 0.0), now)
            now = found[-1].start_s
        ready = float(times.ready_s[action])
        cross("device", ready, rank=rank, row=rows[0])
        before = int(wiring.previous[action])
        free = times.end_s[before] if before >= 0 else 0.0
        inputs = [message for message in wiring.inputs[action].tolist() if message >= 0]
        if free >= ready or not inputs:
            action = before
            continue
        message = max(inputs, key=times.arrival_s.__getitem__)
        while True:
            producer = int(wiring.producer[message])
            row = int(program.messages.producer[message])
            place = {
                "rank": int(wiring.rank[producer]),
                "row": row,
                "message": message,
                "destination": int(program.messages.destination[message]),
            }
            # A message ahead that is crossed only for its link's sake is left at its departure: no latency then.
            cross("latency", float(graph.shown_left_s[message]), **place)
            cross("transfer", float(times.message_start_s[message]), **place)
            cross("queueing", float(times.message_ready_s[message]), **place)
            ahead = int(wiring.ahead[message])
            if ahead < 0 or times.end_s[producer] >= times.message_ready_s[message]:
                break
            message = ahead
        action = producer
    if now > 0 and found:  # clocks that disagree: nothing explains the step's first moments
        first = found[-1]
        found.append(Segment(what="device", start_s=0.0, end_s=now, rank=first.rank, row=first.row))
    return CriticalPath(program=program, segments=tuple(reversed(found)))


def _compute(found: list[Segment], rank: int, row: int, begin: float, end: float) -> None:
    found.append(Segment(what="compute", start_s=begin, end_s=end, rank=rank, row=row))


def slack_of(graph: StepGraph) -> npt.NDArray[np.float64]:
    """By how much each action could end later without a longer step, shape (actions,).

    Everything else keeps its duration and its delays, and every rank and link its order. Sums of differences between
    when something was there and when it was needed, so what is on the critical path has exactly 0.
    """
    from ppsim.explain import kernels  # numba takes a second to import, so only who explains pays

    wiring, times = graph.wiring, graph.times
    found = np.empty(len(times.end_s))
    kernels.slack(
        wiring.order,
        wiring.previous,
        wiring.consumer,
        wiring.outputs,
        wiring.ahead,
        times.ready_s,
        times.end_s,
        times.message_ready_s,
        times.left_s,
        times.arrival_s,
        found,
    )
    return found
