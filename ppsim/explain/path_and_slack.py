"""Path and slack: the chain of computations, messages and gaps that is as long as the step, and what has time left."""

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

SEGMENTS = ("compute", "posting", "transfer", "latency", "collectives", "copies", "device")

_WAITED_FOR = {"collectives": "parameters", "copies": "activations", "device": "the device"}


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of the critical path.

    Parameters
    ----------
    what : str
        "compute": `row` is computed on `rank`. "posting": the message is made and its link is free, but the transfer
        has not begun. "transfer", "latency": the message is on its link, or has left it and is not there yet.
        In measured steps latency is part of "transfer". "collectives", "copies", "device": `rank` is free and the
        messages for `row` are there, but `row` has not started. It waits for its stage's parameters, for activations
        from host memory, or for the device: that is shared, or the runtime starts the action late.
    start_s, end_s : float
        Seconds from the step's start.
    rank : int
        Where it happens. Of a message the sender.
    row : int
        Row of the program. Of a message its producer.
    message, destination : int
        The message and its receiver; -1 for other segments.
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
        """Seconds."""
        return self.end_s - self.start_s

    @property
    def is_wait(self) -> bool:
        """Whether `rank` is free and has its messages, and waits for something of its own."""
        return self.what in _WAITED_FOR


@dataclass(frozen=True, kw_only=True, eq=False)
class CriticalPath:
    """The chain of computations, messages and gaps that is as long as the step.

    Parameters
    ----------
    program : Program
        What ran.
    segments : tuple of Segment
        From the step's start to its end. Each starts where the one before it ends.

    Notes
    -----
    It is read from the end. The last action of the step began when its rank was free and its input was there. It waited
    for the later of the two, which waited for something itself, and so on. A message behind others waited for the
    transfer ahead of it on the link. Where two were equally late, the rank's own action is taken.
    """

    program: Program
    segments: tuple[Segment, ...]

    @cached_property
    def length_s(self) -> float:
        """The makespan."""
        return self.segments[-1].end_s - self.segments[0].start_s

    @cached_property
    def by_what_s(self) -> dict[str, float]:
        """Seconds of the path by `Segment.what`; the values add up to the makespan."""
        return {
            what: math.fsum(segment.length_s for segment in self.segments if segment.what == what) for what in SEGMENTS
        }

    @property
    def rows(self) -> list[int]:
        """The rows that are computed on the path, in the order of time."""
        return [segment.row for segment in self.segments if segment.what == "compute"]

    def label(self, segment: Segment) -> str:
        """What a segment is, in words: "2F0 on rank 2", "transfer of 0F3 from rank 0 to 1"."""
        action = self.program.action_of(segment.row)
        if segment.what == "compute":
            return f"{action} on rank {segment.rank}"
        if segment.is_wait:
            return f"wait for {_WAITED_FOR[segment.what]} before {action} on rank {segment.rank}"
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
        """The path as JSON values."""
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
            if length > 0 and seconds >= 0.0005 * length  # what would show as 0.0% is left out
        ]
        return f"critical path: {len(self.rows)} computations; {', '.join(shares) or 'no time'}"


def path_of(graph: StepGraph) -> CriticalPath:
    """The critical path of a step. It crosses every moment of the step once."""
    way = _WayBack(graph)
    action = int(np.argmax(graph.times.end_s))
    while action >= 0:
        message = way.cross_action(action)
        action = int(graph.wiring.previous[action]) if message < 0 else way.cross_messages(message)
    return CriticalPath(program=graph.program, segments=way.segments())


class _WayBack:
    """The critical path from the step's end to the moment `now_s`."""

    def __init__(self, graph: StepGraph) -> None:
        self.graph, self.now_s = graph, graph.end_s
        self._found: list[Segment] = []

    def cross_action(self, action: int) -> int:
        """Go back to when the action's rank was free and its inputs were there.

        Returns the message that came last, or -1 if the rank was the last to be ready.
        """
        graph, wiring, times = self.graph, self.graph.wiring, self.graph.times
        rank = int(wiring.rank[action])
        rows = range(int(graph.program.action_start[action]), int(graph.program.action_start[action + 1]))
        zero_s = float(graph.trace.start_s.min())
        for row in reversed(rows):
            self._cross("device", float(graph.trace.end_s[row]) - zero_s, rank=rank, row=row)  # time inside a pair
            begin_s = max(min(float(graph.trace.start_s[row]) - zero_s, self.now_s), 0.0)
            # A computation is on the path even if it takes no time.
            self._found.append(Segment(what="compute", start_s=begin_s, end_s=self.now_s, rank=rank, row=row))
            self.now_s = begin_s
        ready_s = float(times.ready_s[action])
        there_s = {  # when each wait after the messages began, the latest first, as this goes back in time
            "device": float(max(ready_s, graph.gathered_s[action], graph.loaded_s[action])),
            "copies": float(max(ready_s, graph.gathered_s[action])),
            "collectives": ready_s,
        }
        for what, begin_s in there_s.items():
            self._cross(what, begin_s, rank=rank, row=rows[0])
        before = int(wiring.previous[action])
        free_s = times.end_s[before] if before >= 0 else 0.0
        inputs = [message for message in wiring.inputs[action].tolist() if message >= 0]
        if free_s >= ready_s or not inputs:
            return -1
        return int(max(inputs, key=times.arrival_s.__getitem__))

    def cross_messages(self, message: int) -> int:
        """Go back to the end of the action that the message waited for, and return the action.

        It is the later of those that posted its send and its receive. If the message queued behind another one, it is
        that message's.
        """
        graph, wiring, times = self.graph, self.graph.wiring, self.graph.times
        while True:
            producer = int(wiring.producer[message])
            place = {
                "rank": int(wiring.rank[producer]),
                "row": int(graph.program.messages.producer[message]),
                "message": message,
                "destination": int(graph.program.messages.destination[message]),
            }
            # A message ahead was waited for until it left the link, so of that one no latency is crossed: `now_s` is
            # its departure already.
            self._cross("latency", float(graph.shown_left_s[message]), **place)
            self._cross("transfer", float(times.message_start_s[message]), **place)
            self._cross("posting", float(times.message_ready_s[message]), **place)
            ready_s = times.message_ready_s[message]
            posters = (int(wiring.sent_after[message]), int(wiring.received_after[message]))
            late = next((poster for poster in posters if poster >= 0 and times.end_s[poster] >= ready_s), None)
            ahead = [front for front in wiring.ahead[message].tolist() if front >= 0]
            if late is not None or not ahead:
                return posters[0] if late is None else late
            message = max(ahead, key=times.left_s.__getitem__)

    def segments(self) -> tuple[Segment, ...]:
        """What was crossed, in the order of time."""
        found = self._found
        if self.now_s > 0 and found:  # clocks that disagree: nothing explains the step's first moments
            first = found[-1]
            found = [*found, Segment(what="device", start_s=0.0, end_s=self.now_s, rank=first.rank, row=first.row)]
        return tuple(reversed(found))

    def _cross(self, what: str, begin_s: float, **place: int) -> None:
        """Add what lasted from `begin_s` to now, if it has length. What began before the step is cut."""
        begin_s = max(begin_s, 0.0)
        if begin_s < self.now_s:
            self._found.append(Segment(what=what, start_s=begin_s, end_s=self.now_s, **place))
            self.now_s = begin_s


def slack_of(graph: StepGraph) -> npt.NDArray[np.float64]:
    """By how much each action could end later without a longer step.

    Parameters
    ----------
    graph : StepGraph
        The step.

    Returns
    -------
    array of shape (actions,)
        Seconds; exactly 0 on the critical path.

    Notes
    -----
    Everything else keeps its duration and its edge times, and every rank and link its order. A slack is a sum of
    differences between when something was there and when it was needed, so no rounding spoils the 0.
    """
    from ppsim.explain import kernels  # imported here because numba takes a second to import

    found = np.empty(len(graph.times.end_s))
    kernels.find_slack(graph.wiring, graph.times, found)
    return found
