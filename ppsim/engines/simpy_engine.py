"""The SimPy engine: one process per rank, one timeout per action."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import numpy.typing as npt
import simpy

from ppsim.engines.times import Times
from ppsim.network import Network
from ppsim.program import Program


def run_simpy(
    program: Program, durations_s: npt.NDArray[np.float64], message_bytes: npt.NDArray[np.int64], network: Network
) -> Times:
    """Run a program that passed the check; seconds from the step's start."""
    run = _Run(program, durations_s, message_bytes, network)
    for rank in range(program.ranks):
        run.environment.process(run.rank_process(rank))
    run.environment.run()
    return Times(
        start_s=np.array(run.start),
        end_s=np.array(run.end),
        message_start_s=np.array(run.message_start),
        message_left_s=np.array(run.message_left),
        message_arrival_s=np.array(run.arrival, float),
    )


class _Run:
    """The state that the ranks' processes share. Lists, not arrays: single elements are read and written."""

    def __init__(
        self,
        program: Program,
        durations_s: npt.NDArray[np.float64],
        message_bytes: npt.NDArray[np.int64],
        network: Network,
    ) -> None:
        self.environment = simpy.Environment()
        self.durations = durations_s.tolist()
        self.action_start = program.action_start.tolist()
        self.rank_actions = program.rank_actions.tolist()
        self.needs_message = program.message_in.tolist()
        self.gives_message = program.message_out.tolist()
        messages = program.messages
        links = program.links()
        index = {pair: number for number, pair in enumerate(links)}
        self.link = [index[pair] for pair in zip(messages.source.tolist(), messages.destination.tolist(), strict=True)]
        self.link_free = [0.0] * len(links)
        models = [network.link(*pair) for pair in links]
        self.occupied = [
            models[link].occupied_s(size) for link, size in zip(self.link, message_bytes.tolist(), strict=True)
        ]
        self.latency = [models[link].latency_s for link in self.link]
        self.start = [0.0] * len(self.durations)
        self.end = [0.0] * len(self.durations)
        self.message_start = [0.0] * len(messages)
        self.message_left = [0.0] * len(messages)
        self.arrival: list[Any] = [None] * len(messages)
        self.waiting: dict[int, simpy.Event] = {}

    def rank_process(self, rank: int) -> Generator[simpy.Event, None, None]:
        """Run a rank's order. What a rank needs from itself is there: its own earlier action has ended.

        Times are kept as sums of costs, not read back from the clock, so that every engine gives the same floats.
        """
        environment, timeout = self.environment, self.environment.timeout
        free = 0.0
        for action in range(self.rank_actions[rank], self.rank_actions[rank + 1]):
            rows = range(self.action_start[action], self.action_start[action + 1])
            begin = free
            for row in rows:
                message = self.needs_message[row]
                if message >= 0:
                    if self.arrival[message] is None:
                        self.waiting[message] = event = environment.event()
                        yield event
                    begin = max(begin, self.arrival[message])
            for row in rows:
                self.start[row] = begin
                begin = self.end[row] = begin + self.durations[row]
            free = begin
            yield timeout(max(free - environment.now, 0.0))
            for row in rows:
                if self.gives_message[row] >= 0:
                    self.send(self.gives_message[row], free)

    def send(self, message: int, now: float) -> None:
        """Put a message on its link. The link serves first in, first out, so its arrival is known at once."""
        link = self.link[message]
        self.message_start[message] = begin = max(now, self.link_free[link])
        self.message_left[message] = self.link_free[link] = left = begin + self.occupied[message]
        self.arrival[message] = left + self.latency[message]
        waiter = self.waiting.pop(message, None)
        if waiter is not None:
            waiter.succeed()
