"""Graph: a trace as the delays that made it: who waited for whom, and how long each thing took once it could begin."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ppsim.errors import ScheduleError
from ppsim.program import Program
from ppsim.trace import Trace

Seconds = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
DELAYS = ("compute_s", "device_s", "post_s", "occupied_s", "latency_s")


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """What waits for what in a program; the same for every trace of it.

    order: the actions, each after all that it needs. previous: (actions,) the action before on its rank, -1 for none.
    producer, consumer: (messages,) actions. ahead: (messages,) the message before on its link, -1 for none.
    inputs, outputs: for each action the messages it waits for and those that leave at its end.
    """

    order: list[int]
    rank: list[int]
    previous: list[int]
    producer: list[int]
    consumer: list[int]
    ahead: list[int]
    inputs: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]

    @classmethod
    def of(cls, program: Program) -> Wiring:
        """Raises ScheduleError if the program hangs, so that no trace of it can be."""
        row_action, messages = program.row_action, program.messages
        rank_actions = program.rank_actions.tolist()
        rank = np.repeat(np.arange(program.ranks), np.diff(program.rank_actions)).tolist()
        previous = np.arange(program.actions) - 1
        firsts = program.rank_actions[:-1][np.diff(program.rank_actions) > 0]
        previous[firsts] = -1
        ahead = np.where(messages.position > 0, np.arange(len(messages)) - 1, -1)
        producer, consumer = row_action[messages.producer].tolist(), row_action[messages.consumer].tolist()
        inputs: list[tuple[int, ...]] = [()] * program.actions
        outputs: list[tuple[int, ...]] = [()] * program.actions
        for message, (sender, receiver) in enumerate(zip(producer, consumer, strict=True)):
            inputs[receiver] += (message,)
            outputs[sender] += (message,)
        order: list[int] = []
        missing = [len(each) for each in inputs]
        position = rank_actions[:-1]
        ready = list(range(program.ranks))[::-1]
        while ready:
            at = ready.pop()
            action, last = position[at], rank_actions[at + 1]
            while action < last and missing[action] == 0:
                order.append(action)
                for message in outputs[action]:
                    receiver = consumer[message]
                    missing[receiver] -= 1
                    if missing[receiver] == 0 and position[rank[receiver]] == receiver and rank[receiver] != at:
                        ready.append(rank[receiver])
                action += 1
                position[at] = action
        if len(order) < program.actions:
            raise ScheduleError("the trace's schedule hangs, so nothing can have run it: see Schedule.check")
        return cls(
            order=order,
            rank=rank,
            previous=previous.tolist(),
            producer=producer,
            consumer=consumer,
            ahead=ahead.tolist(),
            inputs=inputs,
            outputs=outputs,
        )


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


@dataclass(frozen=True, kw_only=True)
class Times:
    """Times from the step's start. Of actions: ready_s (rank free and inputs there), start_s, end_s. Of messages:
    ready_s (producer ended and link free), start_s, left_s, arrival_s."""

    ready_s: list[float]
    start_s: list[float]
    end_s: list[float]
    message_ready_s: list[float]
    message_start_s: list[float]
    left_s: list[float]
    arrival_s: list[float]


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
    shown_left_s: list[float] = field(repr=False)

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
        previous = np.array(wiring.previous)
        free = np.where(previous >= 0, end[previous], 0.0)
        begun, left, arrival = (
            times - zero for times in (trace.message_start_s, trace.message_left_s, trace.message_arrival_s)
        )
        producer, consumer = (np.array(each, np.int64) for each in (wiring.producer, wiring.consumer))
        is_measured = trace.clock != "simulated"
        shown_left = left
        if is_measured:
            arrival = _arrivals(program, begun, arrival, free[consumer])
            shown_left, left = arrival, begun
        ready = free.copy()
        np.maximum.at(ready, consumer, arrival)
        ahead = np.array(wiring.ahead, np.int64)
        message_ready = end[producer]
        message_ready = np.where(ahead >= 0, np.maximum(message_ready, left[ahead]), message_ready)
        return cls(
            trace=trace,
            wiring=wiring,
            times=Times(
                ready_s=ready.tolist(),
                start_s=start.tolist(),
                end_s=end.tolist(),
                message_ready_s=message_ready.tolist(),
                message_start_s=begun.tolist(),
                left_s=left.tolist(),
                arrival_s=arrival.tolist(),
            ),
            delays=Delays(
                compute_s=end - start,
                device_s=start - ready,
                post_s=begun - message_ready,
                occupied_s=left - begun,
                latency_s=arrival - left,
            ),
            inner_s=(end - start) - lengths,
            shown_left_s=shown_left.tolist(),
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
    compute, device = delays.compute_s.tolist(), delays.device_s.tolist()
    post, occupied, latency = delays.post_s.tolist(), delays.occupied_s.tolist(), delays.latency_s.tolist()
    actions, messages = len(compute), len(post)
    ready, start, end = [0.0] * actions, [0.0] * actions, [0.0] * actions
    message_ready, message_start = [0.0] * messages, [0.0] * messages
    left, arrival = [0.0] * messages, [0.0] * messages
    previous, inputs, outputs, ahead = wiring.previous, wiring.inputs, wiring.outputs, wiring.ahead
    for action in wiring.order:
        before = previous[action]
        now = end[before] if before >= 0 else 0.0
        for message in inputs[action]:
            if arrival[message] > now:
                now = arrival[message]
        ready[action] = now
        start[action] = now = now + device[action]
        end[action] = now = now + compute[action]
        for message in outputs[action]:
            begin, front = now, ahead[message]
            if front >= 0 and left[front] > begin:
                begin = left[front]
            message_ready[message] = begin
            message_start[message] = begin = begin + post[message]
            left[message] = begin = begin + occupied[message]
            arrival[message] = begin + latency[message]
    return Times(
        ready_s=ready,
        start_s=start,
        end_s=end,
        message_ready_s=message_ready,
        message_start_s=message_start,
        left_s=left,
        arrival_s=arrival,
    )
