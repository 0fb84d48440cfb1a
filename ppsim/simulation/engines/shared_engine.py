"""The SimPy engine for ranks that share devices: a resource for each device."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from functools import partial
from itertools import count
from typing import Any, Protocol

import numpy as np
import simpy

from ppsim.simulation.engines.times import Times
from ppsim.simulation.sharing import Devices
from ppsim.simulation.timed_program import Load

Steps = Generator[simpy.Event, Any, None]


class Device(Protocol):
    """Something that ranks compute on."""

    def compute(self, work_s: float, begun: Callable[[float], None]) -> Steps:
        """Wait until `work_s` seconds of work are done; `begun` is told when they begin."""
        ...


class Turns:
    """Cores that an action keeps from its start to its end; others queue, first come first served."""

    def __init__(self, environment: simpy.Environment, devices: Devices) -> None:
        self._environment = environment
        self._cores = simpy.Resource(environment, capacity=devices.cores)

    def compute(self, work_s: float, begun: Callable[[float], None]) -> Steps:
        """Wait for a core, then work."""
        with self._cores.request() as core:
            yield core
            begun(self._environment.now)
            yield self._environment.timeout(work_s)


class FairShare:
    """Cores shared out evenly among all that are at work: n of them run at efficiency * cores / n of their speed each.

    All at work advance alike, so one virtual clock that runs at their speed says when each is done.
    """

    def __init__(self, environment: simpy.Environment, devices: Devices) -> None:
        self._environment = environment
        self._capacity = devices.efficiency * devices.cores
        self._at_work: list[tuple[float, int, simpy.Event]] = []  # done at this virtual time
        self._arrivals = count()
        self._virtual_s = self._seen_s = 0.0
        self._plan = 0

    def compute(self, work_s: float, begun: Callable[[float], None]) -> Steps:
        """Work at once, at the speed that is left."""
        begun(self._environment.now)
        self._advance()
        done = self._environment.event()
        heapq.heappush(self._at_work, (self._virtual_s + work_s, next(self._arrivals), done))
        self._replan()
        yield done

    @property
    def _speed(self) -> float:
        return min(1.0, self._capacity / len(self._at_work)) if self._at_work else 1.0

    def _advance(self) -> None:
        now = self._environment.now
        self._virtual_s += (now - self._seen_s) * self._speed
        self._seen_s = now

    def _replan(self) -> None:
        """Wake up when the first is done, unless somebody comes or goes before."""
        self._plan += 1
        if self._at_work:
            left_s = max(self._at_work[0][0] - self._virtual_s, 0.0) / self._speed
            self._environment.timeout(left_s).callbacks.append(partial(self._finish, self._plan))

    def _finish(self, plan: int, _: simpy.Event) -> None:
        if plan != self._plan:
            return
        self._seen_s = self._environment.now
        self._virtual_s, _order, done = heapq.heappop(self._at_work)
        done.succeed()
        self._replan()


_KINDS: dict[str, type[Turns] | type[FairShare]] = {"turns": Turns, "fair": FairShare}


def run_shared(load: Load, devices: Devices) -> Times:
    """Run a program on ranks that share devices; seconds from the step's start. Raises ScheduleError if it hangs."""
    program, run = load.program, _Run(load, devices)
    for rank in range(program.ranks):
        run.environment.process(run.rank_process(rank))
    run.environment.run()
    program.execution_order  # noqa: B018  (if somebody waits for ever, says who, and for what)
    start, end = np.array(run.start), np.array(run.end)
    message_start_s = np.array(run.message_start)
    return Times(
        start_s=start,
        end_s=end,
        message_start_s=message_start_s,
        message_left_s=message_start_s + load.occupied_s,
        message_arrival_s=np.array(run.arrival),
    )


class _Run:
    def __init__(self, load: Load, devices: Devices) -> None:
        self.load = load
        self.environment = simpy.Environment()
        kind = _KINDS[devices.sharing]
        made: dict[int, Device] = {device: kind(self.environment, devices) for device in sorted(set(devices.of_rank))}
        self.device = [made[device] for device in devices.of_rank]
        messages = load.program.messages
        self.posts = load.posts().tolist()
        window = load.receive_window
        self.posted = [window is None or position < window for position in messages.position.tolist()]
        self.produced = [False] * len(messages)
        self.link_free = [0.0] * len(load.program.links())
        self.start = [0.0] * len(load.duration_s)
        self.end = [0.0] * len(load.duration_s)
        self.message_start = [0.0] * len(messages)
        self.arrival = [0.0] * len(messages)
        self.arrived = [self.environment.event() for _ in range(len(messages))]

    def rank_process(self, rank: int) -> Steps:
        """Run a rank's order; here the clock says when things happen, since only it knows the queues."""
        program = self.load.program
        for action in range(int(program.rank_actions[rank]), int(program.rank_actions[rank + 1])):
            rows = range(int(program.action_start[action]), int(program.action_start[action + 1]))
            incoming = [int(program.message_in[row]) for row in rows if program.message_in[row] >= 0]
            for message in incoming:
                yield self.arrived[message]
            for message in incoming:
                if self.posts[message] >= 0:
                    self.posted[self.posts[message]] = True
                    self.transfer(self.posts[message])
            dispatch_s = float(self.load.dispatch_s[action])
            durations_s = [float(self.load.duration_s[row]) for row in rows]
            begun_s: list[float] = []
            work_s = dispatch_s + sum(durations_s) + float(self.load.send_s[action])
            yield from self.device[rank].compute(work_s, begun_s.append)
            self._note(rows, begun_s[0], dispatch_s, durations_s, work_s)
            for row in rows:
                message = int(program.message_out[row])
                if message >= 0:
                    self.produced[message] = True
                    self.transfer(message)

    def _note(self, rows: range, begun_s: float, dispatch_s: float, durations_s: list[float], work_s: float) -> None:
        """Where a core was shared, all that was done on it took longer by the same factor."""
        now = self.environment.now
        stretch = (now - begun_s) / work_s if work_s > 0 else 1.0
        at = begun_s + dispatch_s * stretch
        for row, duration_s in zip(rows, durations_s, strict=True):
            self.start[row] = at
            at = self.end[row] = at + duration_s * stretch
        if work_s == dispatch_s + sum(durations_s):
            self.end[rows[-1]] = now  # free of rounding

    def transfer(self, message: int) -> None:
        """Put a message on its link once it is produced and its receive is posted."""
        if not (self.produced[message] and self.posted[message]):
            return
        link = int(self.load.program.messages.link[message])
        begin = max(self.environment.now, self.link_free[link])
        self.message_start[message] = begin
        self.link_free[link] = left = begin + float(self.load.occupied_s[message])
        self.arrival[message] = arrival = left + float(self.load.latency_s[message])
        event = self.arrived[message]
        alarm = self.environment.timeout(max(arrival - self.environment.now, 0.0))
        alarm.callbacks.append(partial(_succeed, event))


def _succeed(event: simpy.Event, _: simpy.Event) -> None:
    event.succeed()
