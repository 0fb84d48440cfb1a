"""Communicators: what is posted on them and not done yet, and which transfer begins next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import simpy

from ppsim.schedule.program_tables import Post
from ppsim.simulation.timed_program import TimedProgram


class Transfer(NamedTuple):
    """A transfer that is known to begin, and when it does and is there."""

    message: int
    begin_s: float
    arrival_s: float


class _End:
    """One rank's end of a communicator: its posts that have not begun, and when it is free of those that have."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Post, float]] = deque()
        self.free_s = 0.0


class Communicators:
    """The communicators of a step. They run what is posted on each in the order in which it is posted.

    Parameters
    ----------
    timed : TimedProgram
        Whose messages they carry, and who has a communicator.
    """

    def __init__(self, timed: TimedProgram) -> None:
        messages = timed.program.messages
        self._occupied_s, self._latency_s = timed.occupied_s.tolist(), timed.latency_s.tolist()
        ends: dict[tuple[int, ...], _End] = {}
        self._ends: dict[Post, _End] = {}
        for message, (source, destination) in enumerate(
            zip(messages.source.tolist(), messages.destination.tolist(), strict=True)
        ):
            for is_send, rank, peer in ((True, source, destination), (False, destination, source)):
                key: tuple[int, ...] = {"link": (rank, peer, is_send), "pair": (rank, peer), "rank": (rank,)}[
                    timed.streams
                ]
                self._ends[Post(message, is_send)] = ends.setdefault(key, _End())

    def post(self, post: Post, now_s: float) -> Iterator[Transfer]:
        """Put a send or a receive behind what its end has; gives the transfers that can begin now, in sequence."""
        end = self._ends[post]
        end.queue.append((post, now_s))
        waiting = [end]
        while waiting:
            first = waiting.pop()
            if not first.queue:
                continue
            (message, is_send), posted_s = first.queue[0]
            other = self._ends[Post(message, not is_send)]
            if not other.queue or other.queue[0][0] != Post(message, not is_send):
                continue
            begin_s = max(posted_s, other.queue[0][1], first.free_s, other.free_s)
            first.free_s = other.free_s = left_s = begin_s + self._occupied_s[message]
            first.queue.popleft()
            other.queue.popleft()
            waiting += [first, other]
            yield Transfer(message, begin_s, left_s + self._latency_s[message])


def succeed(event: simpy.Event, _: simpy.Event) -> None:
    """Let those who wait for an event go on; the callback of another."""
    event.succeed()
