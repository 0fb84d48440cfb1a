"""The SimPy engine for communication that is posted on communicators, where messages wait for one another."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from functools import partial
from typing import Any

import numpy as np
import simpy

from ppsim.schedule.program_tables import Post
from ppsim.schedule.side_table import STREAMS
from ppsim.simulation.engines.communicators import Communicators, succeed
from ppsim.simulation.engines.times import StepTimes
from ppsim.simulation.timed_program import TimedProgram


def run_posting(timed: TimedProgram) -> StepTimes:
    """Run a program on ranks that compute by themselves and post what they send and receive.

    Parameters
    ----------
    timed : TimedProgram
        What is run, with its graph.

    Returns
    -------
    StepTimes
        Seconds from the step's start.
    """
    run = _Run(timed)
    for rank in range(timed.program.ranks):
        run.environment.process(run.rank_process(rank))
    run.environment.run()
    return StepTimes.of_actions(
        timed,
        action_start_s=np.array(run.start),
        message_start_s=np.array(run.message_start),
        message_arrival_s=np.array(run.arrival),
        side_start_s=np.array(run.side_start),
    )


class _Run:
    """The state that the ranks share. Times are sums of costs, so that every engine gives the same floats."""

    def __init__(self, timed: TimedProgram) -> None:
        messages = len(timed.program.messages)
        self.timed, self.environment = timed, simpy.Environment()
        self.communicators = Communicators(timed)
        self.start = [0.0] * timed.program.actions
        self.message_start, self.arrival = [0.0] * messages, [0.0] * messages
        self.arrived = [self.environment.event() for _ in range(messages)]
        self.side_start = [0.0] * len(timed.side.stage)
        self.side_end = [0.0] * len(timed.side.stage) + [0.0]  # the last stands for -1, "none"
        self.stream_free = [0.0] * (STREAMS * timed.program.ranks)
        # On links of their own, receives that nobody states are posted ahead of the step.
        self.is_posted_ahead = not timed.program.is_posted(timed.streams)
        if self.is_posted_ahead:
            for message in range(messages):
                self.post(Post(message, is_send=False), 0.0)

    def rank_process(self, rank: int) -> Generator[simpy.Event, Any, None]:
        """Run a rank's order: post, wait for what the next action needs, compute, and post again."""
        timed, program = self.timed, self.timed.program
        first = int(program.rank_actions[rank])
        now = 0.0
        *before_each, last = program.posts_of(rank)
        for action, posts in enumerate(before_each, first):
            self.post_all(posts, now)
            now = self.start_beside(action, now)
            rows = range(int(program.action_start[action]), int(program.action_start[action + 1]))
            for message in (int(program.message_in[row]) for row in rows):
                if message >= 0:
                    yield self.arrived[message]
                    now = max(now, self.arrival[message])
            if len(timed.side_s):
                for awaited in (timed.side.gather, timed.side.load):
                    now = max(now, *(self.side_end[entry] for entry in awaited[rows.start : rows.stop].tolist()))
            now += float(timed.dispatch_s[action])
            self.start[action] = now
            for row in rows:
                now += float(timed.duration_s[row])
            now += float(timed.send_s[action])
            yield self._until(now)
        self.post_all(last, now)
        self.start_beside(program.actions + rank, now)

    def start_beside(self, place: int, now: float) -> float:
        """Put what stands at a place of a rank's order on its streams; gives the moment at which the rank goes on."""
        table, taken_s = self.timed.side, self.timed.side_s
        if not len(taken_s):
            return now
        for entry in range(int(table.before[place, 0]), int(table.before[place, 1])):
            stream = int(table.stream[entry])
            self.side_start[entry] = begin = max(now, self.stream_free[stream], self.side_end[int(table.after[entry])])
            self.side_end[entry] = self.stream_free[stream] = end = begin + float(taken_s[entry])
            if table.blocks[entry]:
                now = end
        return now

    def post_all(self, posts: Iterable[Post], now: float) -> None:
        """Post what stands at a place of a rank's order."""
        for post in posts:
            if post.is_send or not self.is_posted_ahead:
                self.post(post, now)

    def post(self, post: Post, now: float) -> None:
        """Post, and let receivers know of the messages that are on their way now."""
        for transfer in self.communicators.post(post, now):
            self.message_start[transfer.message] = transfer.begin_s
            self.arrival[transfer.message] = transfer.arrival_s
            self._until(transfer.arrival_s).callbacks.append(partial(succeed, self.arrived[transfer.message]))

    def _until(self, moment: float) -> simpy.Timeout:
        """An alarm at a moment; the clock may be past it by a rounding."""
        return self.environment.timeout(max(moment - self.environment.now, 0.0))
