"""Step graph: a trace as a graph of actions and messages, with the time on each edge."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.explain.wiring import Wiring
from ppsim.schedule.action import Kind
from ppsim.schedule.program import Program
from ppsim.schedule.side_table import SideTable
from ppsim.trace.trace import Trace

Seconds = npt.NDArray[np.float64]

# EdgeTimes and GraphTimes are tuples because compiled passes take them as they are; see `explain.kernels`.

# Said wherever times of messages that nobody recorded are shown.
INFERRED = "Each is taken to last from its producer's end to the start of the action that had to wait for it."


class EdgeTimes(NamedTuple):
    """The seconds on every edge of the step graph. All starts and ends follow from them; see `replay`.

    Parameters
    ----------
    compute_s : array of shape (actions,)
        How long each action takes.
    device_s : array of shape (actions,)
        How long after its rank is free and its inputs are there each action starts.
    post_s : array of shape (messages,)
        How long after `GraphTimes.message_ready_s` each transfer begins.
    occupied_s : array of shape (messages,)
        How long each transfer keeps its link.
    latency_s : array of shape (messages,)
        How long after it has left the link each message is there.
    """

    compute_s: Seconds
    device_s: Seconds
    post_s: Seconds
    occupied_s: Seconds
    latency_s: Seconds

    def towards(self, other: EdgeTimes, share: float) -> EdgeTimes:
        """These edge times moved by a share of the way to the other's: 0 for these, 1 for the other's."""
        return EdgeTimes(*((1 - share) * mine + share * its for mine, its in zip(self, other, strict=True)))


class GraphTimes(NamedTuple):
    """When everything happens, in seconds from the step's start.

    Parameters
    ----------
    ready_s, start_s, end_s : arrays of shape (actions,)
        When an action's rank is free and its inputs are there, when it starts, and when it ends.
    message_ready_s : array of shape (messages,)
        When a message's send and receive are posted and the messages ahead of it, on its link or its communicators,
        have left.
    message_start_s, left_s, arrival_s : arrays of shape (messages,)
        When a transfer begins, when its link is free again, and when the message is there.
    """

    ready_s: Seconds
    start_s: Seconds
    end_s: Seconds
    message_ready_s: Seconds
    message_start_s: Seconds
    left_s: Seconds
    arrival_s: Seconds


@dataclass(frozen=True, kw_only=True, eq=False)
class StepGraph:
    """A trace as a graph: who waited for whom (`wiring`), and how long each edge took (`edge_times`).

    Parameters
    ----------
    trace : Trace
        The step.
    wiring : Wiring
        What waits for what.
    times : GraphTimes
        The trace's times.
    edge_times : EdgeTimes
        What the times are made of: `replay(wiring, edge_times)` gives the times.
    inner_s : array of shape (actions,)
        Time between the two rows of an overlapped pair in which nothing is computed; part of `edge_times.compute_s`.
    shown_left_s : array of shape (messages,)
        When a transfer is said to end. Nobody sees a measured message leave its link, so its arrival stands here.
    gathered_s : array of shape (actions,)
        When the parameters that an action needs are gathered; 0 where they need not be gathered. With
        `Conditions.blocking` not before the end of the gradient reductions that stand between the action and the one
        before it on its rank. An action that waits for this does so within its `edge_times.device_s`: a replay keeps
        the wait as it was.
    loaded_s : array of shape (actions,)
        When the activations that an action needs are back from host memory; 0 where they never left. With
        `Conditions.blocking` not before the end of the copies that stand between the action and the one before it. The
        wait is kept likewise.
    """

    trace: Trace = field(repr=False)
    wiring: Wiring = field(repr=False)
    times: GraphTimes = field(repr=False)
    edge_times: EdgeTimes = field(repr=False)
    inner_s: Seconds
    shown_left_s: Seconds = field(repr=False)
    gathered_s: Seconds = field(repr=False)
    loaded_s: Seconds = field(repr=False)

    @property
    def collective_s(self) -> Seconds:
        """How long each action waits for `gathered_s` when its rank and its messages are there, shape (actions,)."""
        return np.maximum(np.minimum(self.gathered_s, self.times.start_s) - self.times.ready_s, 0.0)

    @property
    def copy_s(self) -> Seconds:
        """How long each action waits for `loaded_s` when all else, parameters too, is there, shape (actions,)."""
        there_s = np.maximum(self.times.ready_s, self.gathered_s)
        waited_s: Seconds = np.maximum(np.minimum(self.loaded_s, self.times.start_s) - there_s, 0.0)
        return waited_s

    @property
    def program(self) -> Program:
        """The trace's program."""
        return self.trace.program

    @property
    def end_s(self) -> float:
        """The makespan: time starts with the first action."""
        return float(self.trace.end_s.max() - self.trace.start_s.min())

    def queued_until_s(self) -> Seconds:
        """When each message's producer has ended and its link is free, shape (messages,).

        From then to its start it waits for a stream, or for a post. Without streams it waits for neither, and this is
        its start.
        """
        if not self.wiring.is_on_streams:
            return self.times.message_start_s
        front = self.wiring.link_ahead
        free_s = self.times.end_s[self.wiring.producer]
        return np.where(front >= 0, np.maximum(free_s, self.times.left_s[front]), free_s)

    @classmethod
    def of(cls, trace: Trace) -> StepGraph:
        """Read the edge times off a trace.

        Parameters
        ----------
        trace : Trace
            A simulated or a measured step.

        Returns
        -------
        StepGraph

        Raises
        ------
        ScheduleError
            If the program hangs.

        Notes
        -----
        A measured message is seen to arrive when its receiver's wait ends. A receiver that was busy until then may have
        looked long after the message was there. Such a message is taken to travel no longer than is usual on its link:
        the median of the messages whose receiver was waiting already when they were sent.

        Where messages were not recorded at all, each is taken to be sent when its producer has ended, and to be seen
        when its consumer starts, if that was waiting already. Otherwise it takes what is usual: what passes between two
        actions of a busy rank is the rank's own time.
        """
        program = trace.program
        wiring = Wiring.of(program, trace.conditions.streams)
        zero = trace.start_s.min()
        first, last = program.action_start[:-1], program.action_start[1:] - 1
        start, end = trace.start_s[first] - zero, trace.end_s[last] - zero
        lengths = np.add.reduceat(trace.end_s - trace.start_s, first)
        free = np.where(wiring.previous >= 0, end[wiring.previous], 0.0)
        producer_end, consumer_start = end[wiring.producer], start[wiring.consumer]
        if trace.message_times_s is None:
            begun, left, arrival = producer_end, producer_end, consumer_start
        else:
            begun, left, arrival = (times - zero for times in trace.message_times_s)
        is_measured = trace.clock != "simulated" or trace.message_times_s is None
        shown_left = left
        if is_measured:  # all of its way counts as latency
            is_seen = trace.message_times_s is not None
            arrival = _arrivals(program, begun, arrival, free[wiring.consumer], is_seen=is_seen)
            shown_left, left = arrival, begun
        ready = free.copy()
        np.maximum.at(ready, wiring.consumer, arrival)
        times = GraphTimes(
            ready_s=ready,
            start_s=start,
            end_s=end,
            message_ready_s=_message_ready(wiring, end, left),
            message_start_s=begun,
            left_s=left,
            arrival_s=arrival,
        )
        return cls(
            trace=trace,
            wiring=wiring,
            times=times,
            edge_times=_edge_times(times),
            inner_s=(end - start) - lengths,
            shown_left_s=shown_left,
            gathered_s=_gathered(trace),
            loaded_s=_loaded(trace),
        )


def _gathered(trace: Trace) -> Seconds:
    """When the parameters that each action needs are whole, shape (actions,); 0 where they need not be gathered."""
    program = trace.program
    found = np.zeros(program.actions)
    if trace.unshard_end_s is None:
        return found
    table, zero = program.collectives, trace.start_s.min()
    end_s = np.zeros(len(table.kind) + 1)  # the last stands for -1, "none"
    end_s[:-1][table.kind == Kind.UNSHARD] = trace.unshard_end_s - zero
    np.maximum.at(found, program.row_action, end_s[table.gather])
    if trace.conditions.blocking and trace.reduce_end_s is not None:
        _hold_back(found, table, np.where(table.kind == Kind.REDUCE_GRAD, trace.reduce_end_s[table.stage] - zero, 0.0))
    return found


def _loaded(trace: Trace) -> Seconds:
    """When the activations that each action needs are back, shape (actions,); 0 where they were never away."""
    found = np.zeros(trace.program.actions)
    if trace.copy_end_s is not None:
        table = trace.program.offload
        end_s = np.append(trace.copy_end_s - trace.start_s.min(), 0.0)  # the last stands for -1, "none"
        np.maximum.at(found, trace.program.row_action, end_s[table.load])
        if trace.conditions.blocking:
            _hold_back(found, table, end_s[:-1])
    return found


def _hold_back(found: Seconds, table: SideTable, end_s: Seconds) -> None:
    """Let each action wait for the ends of what stands between it and the action before on its rank."""
    is_before = table.slot < len(found)
    np.maximum.at(found, table.slot[is_before], end_s[is_before])


def on_one_wiring(first: StepGraph, second: StepGraph) -> tuple[Wiring, EdgeTimes, EdgeTimes]:
    """A wiring that holds for two steps of the same computations, and both steps' edge times on it.

    Parameters
    ----------
    first, second : StepGraph
        The steps.

    Returns
    -------
    wiring : Wiring
        The steps' own where it is the same. Otherwise, where messages are carried by other streams or are posted
        elsewhere, what both have in common: a message waits for its producer, and for the message before it on its link
        if that is the same in both. What else it waited for is part of its `post_s`.
    first_times, second_times : EdgeTimes
        Both in the numbers of the first step's messages.
    """
    if all(map(np.array_equal, first.wiring, second.wiring)):
        return first.wiring, first.edge_times, second.edge_times
    number = second.program.message_out[first.program.messages.producer]  # of the first step's messages in the second
    first_number = np.append(first.program.message_out[second.program.messages.producer], -1)  # -1 stays -1
    plain = first.wiring.without_streams()
    is_same = plain.link_ahead == first_number[second.wiring.link_ahead[number]]
    link_ahead = np.where(is_same, plain.link_ahead, -1)
    wiring = plain._replace(link_ahead=link_ahead, ahead=np.stack([link_ahead, np.full_like(link_ahead, -1)], axis=1))
    of_messages = ("message_ready_s", "message_start_s", "left_s", "arrival_s")
    moved = second.times._replace(**{name: getattr(second.times, name)[number] for name in of_messages})
    before, after = (
        _edge_times(times._replace(message_ready_s=_message_ready(wiring, times.end_s, times.left_s)))
        for times in (first.times, moved)
    )
    return wiring, before, after


def _message_ready(wiring: Wiring, end: Seconds, left: Seconds) -> Seconds:
    """When each message has all that it waits for, shape (messages,)."""
    ready = end[wiring.sent_after]
    for before, known in ((wiring.received_after, end), (wiring.ahead[:, 0], left), (wiring.ahead[:, 1], left)):
        ready = np.where(before >= 0, np.maximum(ready, known[before]), ready)
    return ready


def _edge_times(times: GraphTimes) -> EdgeTimes:
    return EdgeTimes(
        compute_s=times.end_s - times.start_s,
        device_s=times.start_s - times.ready_s,
        post_s=times.message_start_s - times.message_ready_s,
        occupied_s=times.left_s - times.message_start_s,
        latency_s=times.arrival_s - times.left_s,
    )


def _arrivals(program: Program, sent: Seconds, seen: Seconds, free: Seconds, *, is_seen: bool) -> Seconds:
    """The estimated arrivals of measured messages, shape (messages,); see `StepGraph.of`."""
    travel = seen - sent
    is_exact = sent >= free  # the receiver was waiting all the time, so it saw the message at once
    if not is_exact.any():
        return seen
    link = np.cumsum(program.messages.position == 0) - 1
    overall = float(np.median(travel[is_exact]))
    exact_link, exact_travel = link[is_exact], travel[is_exact]
    bounds = np.searchsorted(exact_link, np.arange(link[-1] + 2))  # the table is ordered by link
    usual = np.array(
        [np.median(exact_travel[begin:end]) if end > begin else overall for begin, end in pairwise(bounds)]
    )[link]
    # A receiver that waited for longer than a message usually travels did wait for the message.
    may_be_late = ~is_exact & ((seen - free <= usual) | (not is_seen))
    return np.where(may_be_late, np.minimum(seen, sent + np.maximum(usual, 0.0)), seen)


def replay(wiring: Wiring, edge_times: EdgeTimes) -> GraphTimes:
    """The times of a step with these edge times: the longest paths through the wiring.

    Parameters
    ----------
    wiring : Wiring
        What waits for what.
    edge_times : EdgeTimes
        How long each thing takes.

    Returns
    -------
    GraphTimes
    """
    from ppsim.explain import kernels  # imported here because numba takes a second to import

    actions, messages = len(wiring.rank), len(wiring.producer)
    times = GraphTimes(*(np.empty(actions) for _ in range(3)), *(np.empty(messages) for _ in range(4)))
    kernels.replay(wiring, edge_times, times)
    return times
