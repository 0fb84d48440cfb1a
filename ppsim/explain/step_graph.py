"""Graph: a trace as the delays that made it: who waited for whom, and how long each thing took once it could begin."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ppsim.schedule.program import Program
from ppsim.trace.trace import Trace

Seconds = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
DELAYS = ("compute_s", "device_s", "post_s", "occupied_s", "latency_s")


@dataclass(frozen=True, kw_only=True, eq=False)
class Wiring:
    """What waits for what in a program; the same for every trace of it. Arrays of whole numbers, -1 for none.

    order: (actions,), the actions, each after all that it needs. rank, previous: (actions,), each action's rank and
    the action before on it. producer, consumer: (messages,), actions. ahead: (messages,), the message before on the
    link. inputs, outputs: (actions, 2), the messages that an action waits for and those that leave at its end.
    """

    order: Integers
    rank: Integers
    previous: Integers
    producer: Integers
    consumer: Integers
    ahead: Integers
    inputs: Integers
    outputs: Integers

    @classmethod
    def of(cls, program: Program) -> Wiring:
        """Raises ScheduleError if the program hangs, so that no trace of it can be."""
        row_action, messages = program.row_action, program.messages
        count = np.diff(program.rank_actions)
        previous = np.arange(program.actions) - 1
        previous[program.rank_actions[:-1][count > 0]] = -1
        return cls(
            order=program.execution_order.astype(np.int64),
            rank=np.repeat(np.arange(program.ranks), count),
            previous=previous,
            producer=row_action[messages.producer].astype(np.int64),
            consumer=row_action[messages.consumer].astype(np.int64),
            ahead=np.where(messages.position > 0, np.arange(len(messages)) - 1, -1),
            inputs=_by_action(program, program.message_in),
            outputs=_by_action(program, program.message_out),
        )


def _by_action(program: Program, of_row: npt.NDArray[np.integer]) -> Integers:
    """A message of each row as (actions, 2): ascending, none last; so those of one link are in its order."""
    first, last = program.action_start[:-1], program.action_start[1:] - 1
    table = np.stack([of_row[first], np.where(last > first, of_row[last], -1)], axis=1).astype(np.int64)
    none = np.iinfo(np.int64).max
    table[table < 0] = none
    table.sort(axis=1)
    table[table == none] = -1
    return table


@dataclass(frozen=True, kw_only=True)
class Delays:
    """What a step is made of; its times follow from these by `replay`.

    compute_s, device_s: shape (actions,); how long the action takes, and how long after its rank is free and its
    inputs are there it starts. post_s, occupied_s, latency_s: shape (messages,); how long after its producer's end and
    the message ahead the transfer begins, for how long the link is taken, how much later the message is there.
    """

    compute_s: Seconds
    device_s: Seconds
    post_s: Seconds
    occupied_s: Seconds
    latency_s: Seconds

    def towards(self, other: Delays, share: float) -> Delays:
        """These delays moved by `share` of the way to the other's."""
        return Delays(**{name: (1 - share) * getattr(self, name) + share * getattr(other, name) for name in DELAYS})


@dataclass(frozen=True, kw_only=True, eq=False)
class Times:
    """Times from the step's start. Of actions, (actions,): ready_s (rank free and inputs there), start_s, end_s. Of
    messages, (messages,): message_ready_s (producer ended and link free), message_start_s, left_s, arrival_s."""

    ready_s: Seconds
    start_s: Seconds
    end_s: Seconds
    message_ready_s: Seconds
    message_start_s: Seconds
    left_s: Seconds
    arrival_s: Seconds


@dataclass(frozen=True, kw_only=True, eq=False)
class StepGraph:
    """A trace with its wiring, its times from the step's start, and its delays.

    inner_s: shape (actions,); time between the two rows of an overlapped pair, which compute_s holds too. shown_left_s:
    (messages,) when the transfer is said to end; for measured messages the arrival, since nobody sees them leave.
    """

    trace: Trace = field(repr=False)
    wiring: Wiring = field(repr=False)
    times: Times = field(repr=False)
    delays: Delays = field(repr=False)
    inner_s: Seconds
    shown_left_s: Seconds = field(repr=False)

    @property
    def program(self) -> Program:
        """The trace's program."""
        return self.trace.program

    @property
    def end_s(self) -> float:
        """The step's end, which is its makespan: time starts with the first action."""
        return float(self.trace.end_s.max() - self.trace.start_s.min())

    @classmethod
    def of(cls, trace: Trace, wiring: Wiring | None = None) -> StepGraph:
        """Read the delays off a trace, such that replaying them gives its times again.

        A measured message has arrived when its receiver's wait ended. A receiver that was busy until then may have
        looked long after the message was there, so such a message is taken to travel no longer than is usual on its
        link: the median of those whose receiver was waiting already when they were sent.
        """
        program = trace.program
        wiring = Wiring.of(program) if wiring is None else wiring
        zero = trace.start_s.min()
        first, last = program.action_start[:-1], program.action_start[1:] - 1
        start, end = trace.start_s[first] - zero, trace.end_s[last] - zero
        lengths = np.add.reduceat(trace.end_s - trace.start_s, first)
        free = np.where(wiring.previous >= 0, end[wiring.previous], 0.0)
        begun, left, arrival = (
            times - zero for times in (trace.message_start_s, trace.message_left_s, trace.message_arrival_s)
        )
        is_measured = trace.clock != "simulated"
        shown_left = left
        if is_measured:
            arrival = _arrivals(program, begun, arrival, free[wiring.consumer])
            shown_left, left = arrival, begun
        ready = free.copy()
        np.maximum.at(ready, wiring.consumer, arrival)
        message_ready = end[wiring.producer]
        message_ready = np.where(wiring.ahead >= 0, np.maximum(message_ready, left[wiring.ahead]), message_ready)
        return cls(
            trace=trace,
            wiring=wiring,
            times=Times(
                ready_s=ready,
                start_s=start,
                end_s=end,
                message_ready_s=message_ready,
                message_start_s=begun,
                left_s=left,
                arrival_s=arrival,
            ),
            delays=Delays(
                compute_s=end - start,
                device_s=start - ready,
                post_s=begun - message_ready,
                occupied_s=left - begun,
                latency_s=arrival - left,
            ),
            inner_s=(end - start) - lengths,
            shown_left_s=shown_left,
        )


def _arrivals(program: Program, sent: Seconds, seen: Seconds, free: Seconds) -> Seconds:
    """When measured messages will have been there; see `StepGraph.of`."""
    travel = seen - sent
    is_exact = sent >= free  # the receiver was waiting all the time
    if not is_exact.any():
        return seen
    link = np.cumsum(program.messages.position == 0) - 1
    overall = float(np.median(travel[is_exact]))
    exact_link, exact_travel = link[is_exact], travel[is_exact]
    bounds = np.searchsorted(exact_link, np.arange(link[-1] + 2))  # the table is ordered by link
    usual = np.array(
        [np.median(exact_travel[begin:end]) if end > begin else overall for begin, end in pairwise(bounds)]
    )[link]
    # Who waited for longer than a message usually travels did wait for the message.
    may_be_late = ~is_exact & (seen - free <= usual)
    return np.where(may_be_late, np.minimum(seen, sent + np.maximum(usual, 0.0)), seen)


def replay(wiring: Wiring, delays: Delays) -> Times:
    """The times of a step that is made of these delays: the longest path through the wiring."""
    from ppsim.explain import kernels  # numba takes a second to import, so only who explains pays

    actions, messages = len(wiring.order), len(wiring.producer)
    times = Times(
        **{name: np.empty(actions) for name in ("ready_s", "start_s", "end_s")},
        **{name: np.empty(messages) for name in ("message_ready_s", "message_start_s", "left_s", "arrival_s")},
    )
    kernels.replay(
        wiring.order,
        wiring.previous,
        wiring.inputs,
        wiring.outputs,
        wiring.ahead,
        delays.compute_s,
        delays.device_s,
        delays.post_s,
        delays.occupied_s,
        delays.latency_s,
        times.ready_s,
        times.start_s,
        times.end_s,
        times.message_ready_s,
        times.message_start_s,
        times.left_s,
        times.arrival_s,
    )
    return times
