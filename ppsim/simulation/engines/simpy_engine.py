"""The SimPy engine: one event per action at most.

It bypasses parts of SimPy for speed. `shared_engine` is the same model in SimPy's own terms, with shared devices.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from itertools import chain, repeat
from typing import Any

import numpy as np
import simpy
from simpy.events import NORMAL

from ppsim.simulation.engines.times import StepTimes
from ppsim.simulation.timed_program import TimedProgram

Resume = Callable[[Any], Any]


def run_simpy(timed: TimedProgram) -> StepTimes:
    """Run a program on ranks that compute by themselves.

    Parameters
    ----------
    timed : TimedProgram
        What is run.

    Returns
    -------
    StepTimes
        Seconds from the step's start.

    Raises
    ------
    ScheduleError
        If ranks wait for ever.
    """
    run = _Run(timed)
    for rank in range(timed.program.ranks):
        run.begin(rank)
    run.environment.run()
    if sum(map(len, run.start)) < timed.program.actions:
        timed.program.execution_order  # noqa: B018  (raises: ranks wait for ever; says which)
    return StepTimes.of_actions(
        timed,
        action_start_s=np.fromiter(chain.from_iterable(run.start), float, timed.program.actions),
        message_start_s=np.array(run.message_start, float),
        message_arrival_s=np.array(run.arrival[:-1], float),
    )


class _Run:
    """The state that the ranks share. Lists, not arrays: single elements are read and written.

    A rank is a generator that SimPy's events resume as their callback. It waits either for its own alarm, set for the
    end of each action that others see the end of, or for whoever sends it what it lacks; so an action costs at most
    one event, and a message none. is_plain: there are neither overlapped pairs nor a window.
    """

    def __init__(self, timed: TimedProgram) -> None:
        messages = timed.program.messages
        self.environment = simpy.Environment()
        self.actions = _Actions(timed)
        self.link = messages.link.tolist()
        self.occupied, self.latency = timed.occupied_s.tolist(), timed.latency_s.tolist()
        self.link_free = [0.0] * len(timed.program.links())
        self.window = None if timed.receive_window is None else _Window(timed, timed.receive_window)
        self.is_plain = self.window is None and not timed.program.has_pairs
        self.start: list[list[float]] = [[] for _ in range(timed.program.ranks)]
        self.message_start: list[float | None] = [None] * len(messages)
        self.arrival: list[float | None] = [None] * len(messages) + [0.0]  # the last stands for -1, "no message"
        self.waiting: list[Resume | None] = [None] * len(messages)

    def begin(self, rank: int) -> None:
        """Set a rank going."""
        process = self.process(rank)
        next(process)
        process.send(process.send)

    def process(self, rank: int) -> Generator[None, Any, None]:
        """Run a rank's order, action by action. The first value sent in is the callback that resumes it.

        Inputs from the rank itself are there: its earlier actions have ended. Times are sums of costs, not read from
        the clock, so that every engine gives the same floats. `now` is the clock up to a rounding, as told by whoever
        resumes the rank.
        """
        environment, schedule, is_plain = self.environment, self.environment.schedule, self.is_plain
        arrival, waiting, link_of, link_free = self.arrival, self.waiting, self.link, self.link_free
        occupied, latency, message_start = self.occupied, self.latency, self.message_start
        note = self.start[rank].append
        resume = yield
        alarm, resumed_by_alarm = environment.timeout(0), [resume]
        alarm.callbacks.append(resume)
        yield
        now = free = 0.0
        for needed, also, dispatch, duration, second, send, given, given_also in self.actions.of_rank(rank):
            begin = arrival[needed]
            if begin is None:
                waiting[needed] = resume
                now = yield
                begin = arrival[needed]
            if free > begin:
                begin = free
            if not is_plain:
                if also >= 0:
                    while (there := arrival[also]) is None:
                        waiting[also] = resume
                        now = yield
                    begin = max(begin, there)
                self.use(needed, also, begin)
            begin += dispatch
            note(begin)
            free = begin + duration + send if is_plain else begin + duration + second + send
            if given < 0 and given_also < 0:
                continue  # no message leaves at its end, so no event is needed
            alarm.callbacks = resumed_by_alarm
            schedule(alarm, NORMAL, free - now)
            yield
            now = free
            if is_plain:  # `transfer` in place: calling it would cost as much as the event
                link = link_of[given]
                begin = link_free[link]
                if free > begin:
                    begin = free
                message_start[given] = begin
                link_free[link] = left = begin + occupied[given]
                arrival[given] = left + latency[given]
                waiter = waiting[given]
                if waiter is not None:
                    waiter(free)
            else:
                self.give(given, given_also, free)
        yield

    def use(self, needed: int, also: int, now: float) -> None:
        """Post the receives that an action's use of its messages makes room for; their transfers may begin."""
        if self.window is not None:
            for message in (needed, also):
                freed = self.window.posts[message]
                if freed >= 0 and (ready := self.window.post(freed, now)) is not None:
                    self.transfer(freed, ready)

    def give(self, given: int, given_also: int, now: float) -> None:
        """Hand over an action's messages. They leave once their receives are posted."""
        for message in (given, given_also):
            if message >= 0:
                ready = now if self.window is None else self.window.produce(message, now)
                if ready is not None:
                    self.transfer(message, ready)

    def transfer(self, message: int, ready: float) -> None:
        """Put a message on its link. The link serves first in, first out, so the arrival is known at once."""
        link = self.link[message]
        begin = self.link_free[link]
        if ready > begin:
            begin = ready
        self.message_start[message] = begin
        self.link_free[link] = left = begin + self.occupied[message]
        self.arrival[message] = left + self.latency[message]
        waiter = self.waiting[message]
        if waiter is not None:
            waiter(self.environment.now)


class _Window:
    """Which receives are posted. A message leaves once it is produced and its receive is posted."""

    def __init__(self, timed: TimedProgram, size: int) -> None:
        self.posts = [*timed.posts().tolist(), -1]  # the last stands for -1, "no message"
        self._posted = [0.0 if position < size else None for position in timed.program.messages.position.tolist()]
        self._produced: list[float | None] = [None] * len(self._posted)

    def produce(self, message: int, now: float) -> float | None:
        """When a message that is produced now may leave. None until its receive is posted."""
        self._produced[message] = now
        posted = self._posted[message]
        return None if posted is None else max(now, posted)

    def post(self, message: int, now: float) -> float | None:
        """When a message whose receive is posted now may leave. None until it is produced."""
        self._posted[message] = now
        produced = self._produced[message]
        return None if produced is None else max(now, produced)


class _Actions:
    """What a rank must know of each action, as columns. A pair may have a second message in and out."""

    def __init__(self, timed: TimedProgram) -> None:
        program = timed.program
        first, last = program.action_start[:-1], program.action_start[1:] - 1
        is_pair = last > first
        self._bounds = program.rank_actions.tolist()
        self._columns: list[list[Any] | None] = [
            program.message_in[first].tolist(),
            np.where(is_pair, program.message_in[last], -1).tolist() if program.has_pairs else None,
            timed.dispatch_s.tolist(),
            timed.duration_s[first].tolist(),
            np.where(is_pair, timed.duration_s[last], 0.0).tolist() if program.has_pairs else None,
            timed.send_s.tolist(),
            program.message_out[first].tolist(),
            np.where(is_pair, program.message_out[last], -1).tolist() if program.has_pairs else None,
        ]

    def of_rank(self, rank: int) -> Iterator[tuple[Any, ...]]:
        """needed, also needed, dispatch, duration, the pair's other duration, send, given, also given."""
        begin, end = self._bounds[rank : rank + 2]
        absent = (None, -1, None, 0.0, 0.0, None, None, -1)
        return zip(
            *(
                repeat(none) if column is None else column[begin:end]
                for column, none in zip(self._columns, absent, strict=True)
            ),
            strict=False,
        )
