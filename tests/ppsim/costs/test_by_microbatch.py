"""Costs by microbatch: each row and message has those of its own microbatch, on every clock."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ppsim
from ppsim import CostError, Kind, Schedule, StageCost
from tests.support.strategies import schedules

PLAIN = StageCost(
    forward_s=1.0,
    backward_input_s=0.5,
    backward_weight_s=0.25,
    activation_bytes=64,
    weight_activation_bytes=16,
    output_bytes=8,
    parameter_bytes=100,
)


def longer(rows: int) -> StageCost:
    """A stage's cost for a microbatch of so many rows."""
    names = ("forward_s", "backward_input_s", "backward_weight_s", "activation_bytes", "weight_activation_bytes")
    return replace(PLAIN, **{name: rows * getattr(PLAIN, name) for name in (*names, "output_bytes")})


@given(schedules(pairs=False, recompute=False), st.data())
def test_rows_messages_and_levels_are_those_of_their_microbatch(schedule: Schedule, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(1, 4), min_size=schedule.microbatches, max_size=schedule.microbatches))
    costs = [[longer(count) for count in rows]] * schedule.stages
    network = ppsim.Network(latency_s=0.5, bytes_per_s=16.0)
    trace = ppsim.simulate(schedule, costs, network=network)
    program, factor = trace.program, np.array(rows)[trace.program.microbatch]
    seconds = {Kind.F: 1.0, Kind.B: 0.75, Kind.I: 0.5, Kind.W: 0.25}
    expected_s = [seconds[Kind(int(kind))] for kind in program.kind] * factor
    assert np.array_equal(trace.end_s - trace.start_s, expected_s)
    assert np.array_equal(trace.message_bytes, 8 * factor[program.messages.producer])
    for rank in range(program.ranks):
        held = 0
        for row in program.rows_of(rank):
            change = {Kind.F: 64, Kind.B: -64, Kind.I: 16 - 64, Kind.W: -16}[Kind(int(program.kind[row]))]
            held += change * int(factor[row])
            assert trace.activation_bytes[row] == held
    assert trace.gradient_bytes is not None
    assert max(trace.gradient_bytes) <= 100 * schedule.stages


@given(schedules())
def test_the_same_cost_for_each_is_one_for_all(schedule: Schedule) -> None:
    one = [longer(stage + 1) for stage in range(schedule.stages)]
    each = [[cost] * schedule.microbatches if stage % 2 else cost for stage, cost in enumerate(one)]
    network = ppsim.Network(latency_s=0.5, bytes_per_s=16.0)
    for engine in ("simpy", "compiled"):
        apart = ppsim.simulate(schedule, each, network=network, engine=engine)
        together = ppsim.simulate(schedule, one, network=network, engine=engine)
        for name in ("start_s", "end_s", "activation_bytes", "gradient_bytes", "message_bytes", "message_arrival_s"):
            assert np.array_equal(getattr(apart, name), getattr(together, name)), name


def test_every_clock_and_explanation_takes_them() -> None:
    schedule = ppsim.build_schedule("1f1b", ranks=2, microbatches=3)
    costs = [[longer(rows) for rows in (3, 3, 2)]] * 2
    trace = ppsim.simulate(schedule, costs)
    # Rank 1 waits for the first F (3 s), computes 8 rows (1.75 s each), and rank 0 ends with the B of 2 rows.
    assert trace.makespan_s == pytest.approx(3 + 8 * 1.75 + 2 * 0.75)
    ensemble = ppsim.monte_carlo(schedule, costs, jitter=ppsim.Jitter(), samples=2)
    assert ensemble.step_s.tolist() == [trace.makespan_s] * 2
    assert np.array_equal(ensemble.trace(1).activation_bytes, trace.activation_bytes)
    found = ppsim.attribute(trace, expected=costs)
    assert found.straggler_s.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ([PLAIN, [PLAIN] * 2], "stage 1 has 2 costs for 3 microbatches: give one StageCost for all, or one for each"),
        ([[], PLAIN], "stage 0 has 0 costs for 3 microbatches"),
        ([PLAIN, [PLAIN, PLAIN, replace(PLAIN, parameter_bytes=1)]], "stage 1 has costs with other parameter_bytes"),
    ],
)
def test_costs_that_do_not_fit_are_refused(costs: list[StageCost | list[StageCost]], said: str) -> None:
    with pytest.raises(CostError, match=said):
        ppsim.simulate(ppsim.build_schedule("1f1b", ranks=2, microbatches=3), costs)


def test_a_search_has_one_cost_for_each_stage() -> None:
    with pytest.raises(ppsim.InputError, match=r"stages\[0\] must be a StageCost"):
        ppsim.search([[PLAIN] * 3, PLAIN], ranks=2, microbatches=3)  # type: ignore[list-item]
