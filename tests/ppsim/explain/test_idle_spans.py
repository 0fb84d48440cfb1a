"""Idle spans: held against the gaps that the trace's own table shows, and against the attribution of the whole step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Network, StageCost, Trace, attribute, build_schedule, schedule_names, simulate
from ppsim.explain.attribution import PARTS
from ppsim.explain.idle_spans import idle_spans
from tests.support.traces import COST, measured, simulated


def _gaps(trace: Trace, rank: int) -> list[tuple[float, float]]:
    """Stretches without a computation, from the table."""
    frame = trace.to_frame()
    rows = frame[(frame["rank"] == rank) & frame["kind"].isin(list("FBIWR"))].sort_values("start_s")
    zero_s = float(trace.start_s.min())
    at, found = 0.0, []
    for start, end in zip(rows["start_s"] - zero_s, rows["end_s"] - zero_s, strict=True):
        found.append((at, start))
        at = max(at, end)
    found.append((at, trace.makespan_s))
    return [(begin, end) for begin, end in found if end - begin > 1e-9 * trace.makespan_s]


@given(st.one_of(simulated(), measured()))
def test_spans_are_the_gaps_and_their_parts_add_up(trace: Trace) -> None:
    """Also within overlapped pairs. Cause of a bug: measured pairs have gaps between their computations."""
    spans = idle_spans(attribute(trace))
    for rank in range(trace.ranks):
        mine = spans.rank == rank
        lengths_s = (spans.end_s - spans.begin_s)[mine]
        is_long = lengths_s > 1e-9 * trace.makespan_s
        found = np.stack([spans.begin_s[mine], spans.end_s[mine]], axis=1)[is_long]
        close = pytest.approx(np.array(_gaps(trace, rank)).reshape(-1, 2), abs=1e-9 * trace.makespan_s)
        assert found == close
        assert lengths_s.sum() == pytest.approx(max(trace.bubble_s[rank], 0.0), abs=1e-9 * trace.makespan_s)
    assert (spans.parts_s >= 0).all()
    assert spans.parts_s.sum(axis=1) == pytest.approx(spans.end_s - spans.begin_s)


@pytest.mark.parametrize("name", schedule_names())
def test_with_one_cause_spans_add_up_to_the_attribution(name: str) -> None:
    """Equal stages and free messages: the pipeline's filling and emptying, and what the order does not suit."""
    schedule = build_schedule(name, ranks=4, microbatches=8)
    found = attribute(simulate(schedule, [COST] * schedule.stages))
    spans = idle_spans(found)
    for column, part in enumerate(PARTS):
        sums = np.bincount(spans.rank, spans.parts_s[:, column], schedule.ranks)
        assert sums == pytest.approx(found.parts_s[part], abs=1e-9)


def test_a_span_before_a_late_message_is_the_messages() -> None:
    """Two ranks under 1F1B: in the steady phase each waits for nothing but the way of messages."""
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=0)
    trace = simulate(build_schedule("1f1b", ranks=2, microbatches=6), [cost] * 2, network=Network(latency_s=0.25))
    spans = idle_spans(attribute(trace))
    steady = (spans.rank == 1) & (spans.action >= 0) & (spans.begin_s > 2) & (spans.end_s < trace.makespan_s - 3)
    assert steady.any()
    assert spans.parts_s[steady][:, PARTS.index("messages")] == pytest.approx((spans.end_s - spans.begin_s)[steady])
