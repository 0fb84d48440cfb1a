"""Timed compute: stated durations and bytes, real messages, no cores used."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ppexec
import ppsim
from ppexec import Session, WorkerPool
from ppsim import LayerCost, StageCost
from ppsim.simulation.memory_levels import activation_levels
from ppsim.simulation.timed_program import message_bytes, row_durations
from tests.support.chains import named_schedules
from tests.support.remote import tiny
from tests.support.settings import with_workers

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")

NANOSECOND = 1e-9


def stage_costs(stages: int) -> st.SearchStrategy[list[StageCost]]:
    """Uneven stages of up to 2 ms an action."""
    seconds, amounts = st.integers(0, 20).map(lambda tenths: tenths / 1e4), st.integers(1, 5000)
    cost = st.builds(
        StageCost,
        forward_s=seconds,
        backward_input_s=seconds,
        backward_weight_s=seconds,
        backward_s=st.none() | seconds,
        activation_bytes=amounts,
        weight_activation_bytes=amounts,
        output_bytes=amounts,
    )
    return st.lists(cost, min_size=stages, max_size=stages)


@with_workers
@given(data=st.data(), schedule=named_schedules())
def test_a_timed_step_has_the_stated_times_messages_and_levels(
    data: st.DataObject, schedule: ppsim.Schedule, pool: WorkerPool
) -> None:
    costs = data.draw(stage_costs(schedule.stages))
    config = tiny(
        schedule=schedule.name,
        ranks=schedule.ranks,
        microbatches=schedule.microbatches,
        layers=schedule.stages,
    )
    with Session(config, pool=pool, costs=costs) as session:
        (trace,) = session.measure(1)
        levels = [level for rank in session.count_memory() for level in rank]
    program = schedule.program
    assert (trace.end_s - trace.start_s >= row_durations(program, costs) - NANOSECOND).all()
    assert trace.message_bytes.tolist() == message_bytes(program, costs).tolist()
    assert levels == activation_levels(program, costs).tolist()
    # Waits are never shorter than stated, messages are not free: no real step beats the ideal one.
    ideal = ppsim.simulate(schedule, costs)
    assert trace.makespan_s >= ideal.makespan_s - len(program.stage) * NANOSECOND


def test_a_run_takes_its_times_from_a_cost_file(pool: WorkerPool, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    layers = [
        LayerCost(
            name=f"layer {n}",
            forward_s=0.002,
            backward_input_s=0.001,
            backward_weight_s=0.002,
            activation_bytes=100,
            output_bytes=40,
        )
        for n in range(4)
    ]
    ppsim.save_costs(layers, path)
    trace = ppexec.run(tiny(compute="timed", costs=path), pool=pool)
    assert trace.makespan_s >= (4 + 2 - 1) * 2 * 0.005 - 1e-6  # (m + p - 1)(F + B), two layers a stage
    assert trace.peak_activation_bytes.tolist() == [4 * 160, 4 * 160]
    assert trace.message_bytes.tolist() == [40] * 8
    assert trace.details["config"]["compute"] == "timed"


def test_without_a_file_a_profile_is_made_first(pool: WorkerPool) -> None:
    config = tiny(compute="timed")
    timed, real = ppexec.run(config, pool=pool), ppexec.run(tiny(), pool=pool)
    assert timed.peak_activation_bytes.tolist() == real.peak_activation_bytes.tolist()
    assert timed.message_bytes.tolist() == real.message_bytes.tolist()


def test_what_is_timed_cannot_be_verified_or_profiled(pool: WorkerPool) -> None:
    cost = StageCost(forward_s=0, backward_input_s=0, backward_weight_s=0)
    with Session(tiny(), pool=pool, costs=[cost, cost]) as session:
        with pytest.raises(ValueError, match="timed compute has nothing to verify: use compute='real'"):
            session.verify()
        with pytest.raises(ValueError, match="timed compute has nothing to profile"):
            session.profile(1)


def test_costs_of_another_number_of_stages_are_refused(pool: WorkerPool) -> None:
    cost = StageCost(forward_s=0, backward_input_s=0, backward_weight_s=0)
    with pytest.raises(ValueError, match="3 stage costs for a schedule of 2 stages"):
        Session(tiny(), pool=pool, costs=[cost] * 3)
    with pytest.raises(ValueError, match="timed compute needs costs"):
        Session(tiny(compute="timed"), pool=pool)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("forward_s", 1e308, r"stage \d has an action of 1e\+308 s, which a timed run waits for"),
        ("output_bytes", 2**53, r"messages of stage \d would take [\d,]+ GiB or more"),
    ],
)
def test_costs_that_no_run_can_have_are_refused(field: str, value: float, said: str, pool: WorkerPool) -> None:
    """Cause of a bug: they were an OverflowError and a RuntimeError in a worker, as if they were ours."""
    costs = [StageCost(**{"forward_s": 0, "backward_input_s": 0, "backward_weight_s": 0, field: value})] * 2
    with pytest.raises(ppsim.InputError, match=said), Session(tiny(ranks=2), pool=pool, costs=costs) as session:
        session.measure(1)
