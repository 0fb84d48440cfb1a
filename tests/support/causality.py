"""Causality: what holds of the times of any measured step, whatever ran it."""

from __future__ import annotations

from ppsim import Trace


def check_causality(trace: Trace) -> None:
    """A rank runs its actions in order, one at a time; a message follows its action and is there before its use."""
    program, messages = trace.program, trace.program.messages
    assert trace.clock == "measured"
    assert len(trace.start_s) == len(program.stage)
    assert len(trace.message_start_s) == len(messages)
    assert trace.start_s.min() == 0
    assert (trace.start_s <= trace.end_s).all()
    for rank in range(trace.ranks):
        rows = list(program.rows_of(rank))
        assert (trace.end_s[rows[:-1]] <= trace.start_s[rows[1:]]).all()
    needing = (program.needs >= 0).nonzero()[0]
    assert (trace.end_s[program.needs[needing]] <= trace.start_s[needing]).all()
    assert (trace.end_s[messages.producer] <= trace.message_start_s).all()
    assert (trace.message_start_s <= trace.message_arrival_s).all()
    assert (trace.message_arrival_s <= trace.start_s[messages.consumer]).all()
