"""The SimPy engine for ranks that share devices, in turns or evenly."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import count
from typing import Any, Protocol

import numpy as np
import simpy

from ppsim.schedule.action import Kind
from ppsim.schedule.program_tables import Post
from ppsim.schedule.side_table import STREAMS
from ppsim.simulation.engines.communicators import Communicators, Transfer, succeed
from ppsim.simulation.engines.times import StepTimes
from ppsim.simulation.sharing import Devices
from ppsim.simulation.timed_program import TimedProgram

Steps = Generator[simpy.Event, Any, None]


class SharedDevice(Protocol):
    """Something that ranks compute on."""

    def compute(self, work_s: float, begun: Callable[[float], None]) -> Steps:
        """Wait until `work_s` seconds of work are done; `begun` is told when they begin."""
        ...


class Turns:
    """Cores that an action keeps from its start to its end. Others queue, first come first served."""

    def __init__(self, environment: simpy.Environment, cores: int) -> None:
        self._environment = environment
        self._cores = simpy.Resource(environment, capacity=cores)

    def compute(self, work_s: float, begun: Callable[[float], None]) -> Steps:
        """Wait for a core, then work."""
        with self._cores.request() as core:
            yield core
            begun(self._environment.now)
            yield self._environment.timeout(work_s)


class FairShare:
    """A device shared evenly by all ranks at work. With n of them each runs at `speeds[n - 1]` times its speed alone.

    All advance alike, so one virtual clock that runs at their speed says when each is done.
    """

    def __init__(self, environment: simpy.Environment, speeds: Sequence[float]) -> None:
        self._environment = environment
        self._speeds = speeds
        self._at_work: list[tuple[float, int, simpy.Event]] = []  # done at this virtual time
        self._arrivals = count()
        self._virtual_s = self._seen_s = 0.0
        self._wake_up = 0  # number of the last one planned; older ones are ignored

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
        at_work = len(self._at_work)
        return self._speeds[min(at_work, len(self._speeds)) - 1] if at_work else 1.0

    def _advance(self) -> None:
        """Move the virtual clock to now, at the speed since it was last seen."""
        now = self._environment.now
        self._virtual_s += (now - self._seen_s) * self._speed
        self._seen_s = now

    def _replan(self) -> None:
        """Wake up when the first is done, unless somebody comes or goes before."""
        self._wake_up += 1
        if self._at_work:
            left_s = max(self._at_work[0][0] - self._virtual_s, 0.0) / self._speed
            self._environment.timeout(left_s).callbacks.append(partial(self._finish, self._wake_up))

    def _finish(self, wake_up: int, _: simpy.Event) -> None:
        if wake_up != self._wake_up:
            return
        self._seen_s = self._environment.now
        self._virtual_s, _order, done = heapq.heappop(self._at_work)
        done.succeed()
        self._replan()


def run_shared(timed: TimedProgram, devices: Devices) -> StepTimes:
    """Run a program on ranks that share devices.

    Parameters
    ----------
    timed : TimedProgram
        What is run.
    devices : Devices
        What the ranks share.

    Returns
    -------
    StepTimes
        Seconds from the step's start.

    Raises
    ------
    ScheduleError
        If ranks wait for ever.
    """
    program, run = timed.program, _Run(timed, devices)
    for rank in range(program.ranks):
        run.environment.process(run.rank_process(rank))
    run.environment.run()
    # `TimedProgram` refuses circles on streams and windows that are too small. A circle in the orders themselves has
    # ended the simulation early: this raises and names it.
    program.execution_order  # noqa: B018
    start, end = np.array(run.start), np.array(run.end)
    message_start_s = np.array(run.message_start)
    return StepTimes(
        start_s=start,
        end_s=end,
        message_start_s=message_start_s,
        message_left_s=message_start_s + timed.occupied_s,
        message_arrival_s=np.array(run.arrival),
        side_start_s=np.array(run.side_start),
        side_end_s=np.array(run.side_end[:-1]),
        side=timed.side,
    )


class _Run:
    def __init__(self, timed: TimedProgram, devices: Devices) -> None:
        self.timed = timed
        self.environment = simpy.Environment()
        made: dict[int, SharedDevice] = {}
        for device in devices.of_rank:
            if device not in made and devices.sharing == "turns":
                made[device] = Turns(self.environment, devices.cores)
            elif device not in made:
                made[device] = FairShare(self.environment, devices.speeds)
        self.device = [made[device] for device in devices.of_rank]
        messages = timed.program.messages
        self.communicators = Communicators(timed) if timed.program.is_posted(timed.streams) else None
        # With a receive window: the message whose receive is posted when this one is used, -1 for none; and whether the
        # receive of each message is posted.
        self.next_receive = timed.posts().tolist()
        window = timed.receive_window
        self.receive_posted = [window is None or position < window for position in messages.position.tolist()]
        self.produced = [False] * len(messages)
        self.link_free = [0.0] * len(timed.program.links())
        self.start = [0.0] * len(timed.duration_s)
        self.end = [0.0] * len(timed.duration_s)
        self.message_start = [0.0] * len(messages)
        self.arrival = [0.0] * len(messages)
        self.arrived = [self.environment.event() for _ in range(len(messages))]
        self.side_start = [0.0] * len(timed.side.stage)
        self.side_end = [0.0] * len(timed.side.stage) + [0.0]  # the last stands for -1, "none"
        self.stream_free = [0.0] * (STREAMS * timed.program.ranks)

    def rank_process(self, rank: int) -> Steps:
        """Run a rank's order. Times are read from the simulated clock: waits for a device cannot be known before."""
        program = self.timed.program
        *before_each, last = program.posts_of(rank) if self.communicators is not None else self._no_posts(rank)
        for action, posts in enumerate(before_each, int(program.rank_actions[rank])):
            self.post_on_communicators(posts)
            yield from self.start_beside(action, rank)
            rows = range(int(program.action_start[action]), int(program.action_start[action + 1]))
            incoming = [int(program.message_in[row]) for row in rows if program.message_in[row] >= 0]
            for message in incoming:
                yield self.arrived[message]
            yield from self._until(self._side_ready_s(rows))
            for message in incoming:
                if self.next_receive[message] >= 0:
                    self.receive_posted[self.next_receive[message]] = True
                    self.transfer(self.next_receive[message])
            dispatch_s = float(self.timed.dispatch_s[action])
            durations_s = [float(self.timed.duration_s[row]) for row in rows]
            begun_s: list[float] = []
            work_s = dispatch_s + sum(durations_s) + float(self.timed.send_s[action])
            yield from self.device[rank].compute(work_s, begun_s.append)
            self._note(rows, begun_s[0], dispatch_s, durations_s, work_s)
            for row in rows:
                message = int(program.message_out[row])
                # With communicators, sends are among the posts before the next action.
                if message >= 0 and self.communicators is None:
                    self.produced[message] = True
                    self.transfer(message)
        self.post_on_communicators(last)
        yield from self.start_beside(program.actions + rank, rank)

    def start_beside(self, place: int, rank: int) -> Steps:
        """Start the gathers, reductions and copies at a place of a rank's order: a row of `SideTable.before`.

        With `Conditions.blocking` O, L and REDUCE_GRAD keep their rank from going on. A reduction takes no device,
        since a rank in it waits for others. A copy takes the rank's device, as a core copies memory.
        """
        table = self.timed.side
        for entry in range(*table.before[place].tolist()) if len(table.before) else ():
            stream, taken_s = int(table.stream[entry]), float(self.timed.side_s[entry])
            begin = max(self.environment.now, self.stream_free[stream], self.side_end[int(table.after[entry])])
            end = begin + taken_s
            if table.blocks[entry]:
                yield from self._until(begin)
                if table.kind[entry] == Kind.REDUCE_GRAD:
                    yield from self._until(end)
                else:
                    begun_s: list[float] = []
                    yield from self.device[rank].compute(taken_s, begun_s.append)
                    begin = begun_s[0]
                end = self.environment.now
            self.side_start[entry] = begin
            self.side_end[entry] = self.stream_free[stream] = end

    def _side_ready_s(self, rows: range) -> float:
        """When the UNSHARD and L that an action needs have ended."""
        if not len(self.side_start):
            return 0.0
        awaited = (self.timed.side.gather, self.timed.side.load)
        return max(self.side_end[int(entry)] for each in awaited for entry in each[rows.start : rows.stop])

    def _until(self, moment: float) -> Steps:
        """Wait until a moment, unless it is past."""
        if moment > self.environment.now:
            yield self.environment.timeout(moment - self.environment.now)

    def _no_posts(self, rank: int) -> list[list[Post]]:
        """No posts before each of a rank's actions and after the last."""
        program = self.timed.program
        return [[] for _ in range(int(program.rank_actions[rank + 1] - program.rank_actions[rank]) + 1)]

    def post_on_communicators(self, posts: Sequence[Post]) -> None:
        """Put sends and receives on their communicators."""
        if self.communicators is not None:
            for post in posts:
                for transfer in self.communicators.post(post, self.environment.now):
                    self._carry(transfer)

    def _note(self, rows: range, begun_s: float, dispatch_s: float, durations_s: list[float], work_s: float) -> None:
        """Note when an action's rows ran: on a shared device all parts of the action took longer by the same factor."""
        now = self.environment.now
        stretch = (now - begun_s) / work_s if work_s > 0 else 1.0
        at = begun_s + dispatch_s * stretch
        for row, duration_s in zip(rows, durations_s, strict=True):
            self.start[row] = at
            at = self.end[row] = at + duration_s * stretch
        if work_s == dispatch_s + sum(durations_s):
            # Nothing is sent after the rows, so the last one ends now, exactly; yet not before its start, which is
            # rounded.
            self.end[rows[-1]] = max(now, self.start[rows[-1]])

    def transfer(self, message: int) -> None:
        """Put a message on its link once it is produced and its receive is posted."""
        if not (self.produced[message] and self.receive_posted[message]):
            return
        link = int(self.timed.program.messages.link[message])
        begin = max(self.environment.now, self.link_free[link])
        self.link_free[link] = left = begin + float(self.timed.occupied_s[message])
        self._carry(Transfer(message, begin, left + float(self.timed.latency_s[message])))

    def _carry(self, transfer: Transfer) -> None:
        """Note a transfer, and let its receiver know when it is there."""
        message, self.message_start[transfer.message] = transfer.message, transfer.begin_s
        self.arrival[message] = transfer.arrival_s
        alarm = self.environment.timeout(max(transfer.arrival_s - self.environment.now, 0.0))
        alarm.callbacks.append(partial(succeed, self.arrived[message]))
