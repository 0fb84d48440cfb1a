"""Waits: what a rank without work waits for, moment by moment, followed to where it comes from."""

from __future__ import annotations

import enum
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppsim.explain.graph import StepGraph

Seconds = npt.NDArray[np.float64]


class Cause(enum.IntEnum):
    """What keeps a rank waiting at a moment. The middle three are a message's."""

    COMPUTE = 0  # a rank computes what is needed, or what comes before it
    QUEUE = 1  # the link is taken by the messages ahead
    TRANSFER = 2
    LATENCY = 3
    DEVICE = 4  # everything is there and the rank is free, yet the action does not start


@dataclass(frozen=True, kw_only=True)
class Waits:
    """before_s: shape (actions, causes), the wait before each action. after_s: (p, causes), after each rank's last."""

    before_s: Seconds
    after_s: Seconds


def follow_waits(graph: StepGraph) -> Waits:
    """Split every wait by cause.

    A rank that waits for an action of another rank waits, at each moment, for what that rank is doing then: computing,
    or itself waiting for something. So a wait is followed from rank to rank to its root at that moment. After its last
    action a rank waits for the action that ends the step.
    """
    wiring, times = graph.wiring, graph.times
    lines = [_Idle() for _ in range(graph.program.ranks)]
    free_of_rank = [0.0] * graph.program.ranks
    before = np.zeros((graph.program.actions, len(Cause)))
    start, end = times.start_s, times.end_s
    for action in wiring.order:
        rank = wiring.rank[action]
        free, now = free_of_rank[rank], start[action]
        if now > free:
            line = lines[rank]
            message = max(wiring.inputs[action], key=times.arrival_s.__getitem__, default=-1)
            at = free
            if message >= 0 and times.arrival_s[message] > free:
                producer = wiring.producer[message]
                until = min(max(end[producer], at), now)
                if until > at:
                    line.copy(lines[wiring.rank[producer]], at, until)
                at = until
                for moment, cause in (
                    (times.message_start_s[message], Cause.QUEUE),
                    (graph.shown_left_s[message], Cause.TRANSFER),
                    (times.arrival_s[message], Cause.LATENCY),
                ):
                    until = min(max(moment, at), now)
                    line.add(at, until, cause)
                    at = until
            line.add(at, now, Cause.DEVICE)
            for cause, seconds in line.take():
                before[action, cause] += seconds
        free_of_rank[rank] = max(free, end[action])
    after = np.zeros((graph.program.ranks, len(Cause)))
    last = lines[wiring.rank[int(np.argmax(np.array(end)))]]
    for rank, line in enumerate(lines):
        if free_of_rank[rank] < graph.end_s:
            line.copy(last, free_of_rank[rank], graph.end_s)
            for cause, seconds in line.take():
                after[rank, cause] += seconds
    return Waits(before_s=before, after_s=after)


class _Idle:
    """A rank's idle time so far as pieces of one cause each, in time; pieces that touch and agree are one."""

    def __init__(self) -> None:
        self.begin: list[float] = []
        self.end: list[float] = []
        self.cause: list[Cause] = []
        self.taken: list[tuple[Cause, float]] = []

    def add(self, begin: float, end: float, cause: Cause) -> None:
        """Append a piece; one without length is left out."""
        if end <= begin:
            return
        self.taken.append((cause, end - begin))
        if self.end and self.end[-1] >= begin and self.cause[-1] is cause:
            self.end[-1] = end
            return
        self.begin.append(begin)
        self.end.append(end)
        self.cause.append(cause)

    def copy(self, other: _Idle, begin: float, end: float) -> None:
        """Append what the other rank does between two moments: its causes where it is idle, COMPUTE where it is not."""
        at = begin
        for index in range(bisect_right(other.end, begin), len(other.begin)):
            if other.begin[index] >= end:
                break
            self.add(at, max(other.begin[index], at), Cause.COMPUTE)
            at = max(at, other.begin[index])
            until = min(other.end[index], end)
            self.add(at, until, other.cause[index])
            at = until
        self.add(at, end, Cause.COMPUTE)

    def take(self) -> list[tuple[Cause, float]]:
        """The pieces since the last time this was asked."""
        taken, self.taken = self.taken, []
        return taken
