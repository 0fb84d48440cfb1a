"""Traces, simulated and as a run might record them, and what holds of the waits in any."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import strategies as st

from ppsim import StageCost, Trace, attribute, simulate
from ppsim.explain.step_graph import StepGraph
from ppsim.explain.waits import Cause, follow_waits
from tests.support import strategies

F, B = 3.0, 5.0
COST = StageCost(forward_s=F, backward_input_s=2.0, backward_weight_s=3.0, output_bytes=8)


@st.composite
def simulated(draw: st.DrawFn) -> Trace:
    schedule = draw(strategies.schedules())
    if draw(st.booleans()):
        schedule = schedule.forward_only()
    costs = draw(strategies.stage_costs(schedule.stages))
    return simulate(schedule, costs, network=draw(strategies.networks(schedule.ranks)))


@st.composite
def measured(draw: st.DrawFn) -> Trace:
    """What a run might have recorded: every wait longer, ranks' clocks apart, arrivals seen late or before sending."""
    trace = draw(simulated())
    program, dice = trace.program, np.random.default_rng(draw(st.integers(0, 2**32)))
    noise, skew = draw(st.sampled_from([0.0, 0.01, 3.0])), draw(st.sampled_from([0.0, 0.1, 20.0]))
    offset = dice.normal(0, skew, program.ranks) + 1e3
    start, end = trace.start_s.copy(), trace.end_s.copy()
    for rank in range(program.ranks):
        late = 0.0
        for row in program.rows_of(rank):
            late += noise * dice.random()
            start[row] += late
            late += noise * dice.random()
            end[row] += late
    source, destination = offset[program.messages.source], offset[program.messages.destination]
    sent = trace.message_start_s + source + noise * dice.normal(size=len(source))
    seen = trace.message_arrival_s + destination + noise * dice.normal(size=len(source))
    return dataclasses.replace(
        trace,
        clock="measured",
        start_s=start + offset[program.rank],
        end_s=end + offset[program.rank],
        message_start_s=sent,
        message_left_s=seen,
        message_arrival_s=seen,
    )


def check_sums(trace: Trace, expected: list[StageCost] | None = None) -> None:
    found = attribute(trace, expected=expected)
    for part in found.parts_s.values():
        assert part.shape == (trace.ranks,)
        assert (part >= 0).all()
    for rank, bubble_s in enumerate(trace.bubble_s.tolist()):
        total = math.fsum(part[rank] for part in found.parts_s.values())
        assert total == pytest.approx(max(bubble_s, 0.0), rel=1e-9, abs=1e-14 * trace.makespan_s)
        for name, causes in (("warm_up", found.warm_up_of_s), ("drain", found.drain_of_s)):
            inside = math.fsum(seconds[rank] for seconds in causes.values())
            assert inside == pytest.approx(found.parts_s[name][rank], rel=1e-12)
            assert all((seconds >= 0).all() for seconds in causes.values())
        inside = found.queueing_s + found.transfer_s + found.latency_s + found.messages_knock_on_s
        assert inside[rank] == pytest.approx(found.messages_s[rank], rel=1e-12)
    assert sum(found.fractions.values()) == pytest.approx(trace.bubble_fraction, rel=1e-9, abs=1e-14)


def cause_at(trace: Trace, rank: int, moment: float) -> Cause | None:
    """What the rank waits for at a moment, by asking the trace alone; None if it computes."""
    program, messages = trace.program, trace.program.messages
    rows = np.array(program.rows_of(rank), np.int64)
    if ((trace.start_s[rows] <= moment) & (moment < trace.end_s[rows])).any():
        return None
    later = rows[trace.start_s[rows] >= moment]
    later = later[trace.end_s[later] > moment]
    if not len(later):  # done: waits for the action that ends the step
        return cause_at(trace, int(program.rank[int(np.argmax(trace.end_s))]), moment) or Cause.COMPUTE
    action = program.row_action[later[0]]
    parts = range(int(program.action_start[action]), int(program.action_start[action + 1]))
    message = max(
        (int(program.message_in[row]) for row in parts if program.message_in[row] >= 0),
        key=lambda at: trace.message_arrival_s[at],
        default=None,
    )
    if message is None or moment >= trace.message_arrival_s[message]:
        loads = [int(load) for load in program.offload.load[list(parts)] if load >= 0] if trace.schedule.offload else []
        if trace.conditions.blocking and trace.schedule.offload:
            loads += range(*program.offload.before[action].tolist())
        return Cause.COPY if any(moment < trace.copy_end_s[load] for load in loads) else Cause.DEVICE
    producer = program.row_action[messages.producer[message]]
    produced_s = trace.end_s[program.action_start[producer + 1] - 1]
    if moment < produced_s:
        return cause_at(trace, int(messages.source[message]), moment) or Cause.COMPUTE
    if moment < trace.message_start_s[message]:
        ahead = message - 1  # of its link, whose messages stand side by side
        is_link_taken = messages.position[message] > 0 and moment < trace.message_left_s[ahead]
        is_plain = trace.conditions.streams == "link" and program.written is None
        return Cause.QUEUE if is_link_taken or is_plain else Cause.STREAM
    return Cause.TRANSFER if moment < trace.message_left_s[message] else Cause.LATENCY


def check_waits(trace: Trace) -> None:
    """Against `cause_at` asked between any two moments at which something happens."""
    times = [trace.start_s, trace.end_s, trace.message_start_s, trace.message_left_s, trace.message_arrival_s]
    times += [] if trace.copy_end_s is None else [trace.copy_end_s]
    begin_s, end_s = trace.start_s.min(), trace.end_s.max()
    moments = np.unique(np.concatenate([each[(begin_s <= each) & (each <= end_s)] for each in times]))
    seen = np.zeros((trace.ranks, len(Cause)))
    for begin, end in pairwise(moments):
        for rank in range(trace.ranks):
            cause = cause_at(trace, rank, (begin + end) / 2)
            if cause is not None:
                seen[rank, cause] += end - begin
    graph = StepGraph.of(trace)
    waits = follow_waits(graph)
    found = waits.after_s.copy()
    np.add.at(found, np.array(graph.wiring.rank), waits.before_s)
    assert found.tolist() == seen.tolist()
