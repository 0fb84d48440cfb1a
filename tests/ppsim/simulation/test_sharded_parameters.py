"""Sharded stages: times, memory and attribution against counts by hand and an evaluation that shares no code."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import (
    Collectives,
    InputError,
    Jitter,
    Network,
    Schedule,
    ScheduleError,
    StageCost,
    Trace,
    attribute,
    build_schedule,
    monte_carlo,
    simulate,
)
from ppsim.conditions import Conditions
from ppsim.simulation.memory_columns import with_columns
from tests.support.shared_devices import check_with_a_core_for_each
from tests.support.strategies import schedules

COST = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=10, parameter_bytes=100)
# A gathering takes 3 rounds of 25 bytes: 0.5 s each. So does a reduction.
SLOW = Collectives(replicas=4, bytes_per_s=50.0)


def test_a_rank_waits_for_its_parameters_and_holds_them_whole_from_place_to_place() -> None:
    """By hand, one rank with two stages, one of them whole at a time; U gathers for 1.5 s, R reduces for 1.5 s.

    compute          0F0     1F0 1B0 1B0         0B0 0B0
    stream   U U U       U U         R R R U U U         R R R
    """
    schedule = Schedule.of([["0F0", "1F0", "1B0", "0B0"]]).with_sharding(1)
    for engine in ("simpy", "compiled"):
        trace = simulate(schedule, [COST] * 2, engine=engine, collectives=SLOW)
        assert trace.start_s.tolist() == [1.5, 4.0, 5.0, 10.0]
        assert trace.end_s.tolist() == [2.5, 5.0, 7.0, 12.0]
        assert trace.unshard_start_s.tolist() == [0.0, 2.5, 8.5]  # the last one behind the reduction of stage 1
        assert trace.unshard_end_s.tolist() == [1.5, 4.0, 10.0]
        assert trace.reduce_start_s.tolist() == [12.0, 7.0]
        assert trace.reduce_end_s.tolist() == [13.5, 8.5]
        assert trace.step_s == 12.0  # from the first action on, to the last reduction's end
    # 25 bytes of each stage all the time; one stage whole. Of the gradients the whole until they are reduced.
    assert trace.parameter_bytes.tolist() == [50]
    assert trace.unsharded_bytes.tolist() == [100, 100, 100, 100]
    assert trace.gradient_bytes.tolist() == [0, 0, 100, 125]
    assert trace.memory.total_bytes.tolist() == [50 + 100 + 125]
    # From 0F0's end to 1F0 and from 1B0's end to 0B0 the rank waits for parameters.
    found = attribute(trace)
    assert found.collectives_s.tolist() == [1.5 + 3.0]
    assert found.bubble_s.tolist() == [4.5]
    assert found.critical_path.by_what_s["collectives"] == 4.5
    assert found.critical_path.label(found.critical_path.segments[1]) == "wait for parameters before 1F0 on rank 0"
    assert with_columns(trace, optimizer="adam").optimizer_bytes.tolist() == [2 * 50]


def test_a_rank_without_streams_reduces_between_its_actions() -> None:
    """By hand, one rank with two stages: 0F0 0B0, then R for 1.5 s, then 1F0 1B0 and another R."""
    schedule = Schedule.from_csv("0UNSHARD,1UNSHARD,0F0,1F0,1B0,1REDUCE_GRAD,0B0,0REDUCE_GRAD\n")
    collectives = Collectives(replicas=4, unshard_s=[1, 1], reduce_s=[1.5, 1.5])
    traces = [
        simulate(schedule, [COST] * 2, engine=engine, collectives=collectives, blocking=True)
        for engine in ("simpy", "compiled")
    ]
    for trace in traces:
        assert trace.start_s.tolist() == [1.0, 2.0, 3.0, 6.5]  # both are gathered beside computations
        assert trace.reduce_end_s.tolist() == [10.0, 6.5]
        assert trace.gradient_bytes.tolist() == [0, 0, 100, 125]
    found = attribute(traces[0])
    assert found.collectives_s.tolist() == [1.5]
    assert found.bubble_s.tolist() == [1.5]
    # As many cores as ranks or fewer: a rank that reduces keeps none of them.
    two = build_schedule("1f1b", ranks=2, microbatches=2).with_sharding()
    shared = simulate(two, [COST] * 2, collectives=SLOW, blocking=True, cores=1)
    assert (shared.reduce_end_s - shared.reduce_start_s).tolist() == [1.5, 1.5]
    assert shared.unshard_start_s.tolist() == [0.0, 0.0]


def test_counted_bytes_take_the_place_of_even_shares() -> None:
    schedule = Schedule.of([["0F0", "1F0", "1B0", "0B0"]]).with_sharding(1)
    counted = Collectives(
        replicas=3,
        latency_s=0.25,
        whole_bytes=[120, 102],
        parameter_share_bytes=[40, 34],
        gradient_share_bytes=[30, 34],
    )
    trace = simulate(schedule, [COST] * 2, collectives=counted, blocking=True)
    assert trace.parameter_bytes.tolist() == [74]
    assert trace.unsharded_bytes.tolist() == [120, 102, 120, 120]
    assert trace.unshard_bytes.tolist() == [120, 102, 120]
    assert trace.gradient_bytes.tolist() == [0, 0, 100, 134]
    assert with_columns(trace, optimizer="adam").optimizer_bytes.tolist() == [2 * 64]


def test_a_second_whole_stage_hides_its_gathering_under_the_first_one() -> None:
    schedule = Schedule.of([["0F0", "1F0", "1B0", "0B0"]]).with_sharding(2)
    trace = simulate(schedule, [COST] * 2, collectives=SLOW, engine="compiled")
    assert trace.unshard_start_s.tolist() == [0.0, 1.5]
    assert trace.start_s.tolist() == [1.5, 3.0, 4.0, 6.0]
    assert trace.unsharded_bytes.max() == 200


def test_what_another_rank_waits_for_is_followed_to_the_gathering() -> None:
    schedule = build_schedule("1f1b", ranks=2, microbatches=1).with_sharding()
    trace = simulate(schedule, [COST] * 2, collectives=Collectives(replicas=2, unshard_s=[0, 10], reduce_s=[0, 0]))
    found = attribute(trace)  # rank 0 ends its forward at 1 and waits for rank 1, which is whole at 10
    assert trace.start_s.tolist() == [0.0, 13.0, 10.0, 11.0]
    assert found.warm_up_of_s["collectives"].tolist() == [0.0, 9.0]
    assert found.collectives_s.tolist() == [9.0, 0.0]
    assert found.warm_up_s.tolist() == [3.0, 10.0]


@st.composite
def sharded(draw: st.DrawFn) -> Schedule:
    schedule = draw(schedules()).with_sharding(draw(st.integers(1, 4)))
    return schedule.with_communication(draw(st.sampled_from(["derived", "early"])))


@given(sharded(), st.sampled_from(["link", "rank"]), st.data())
def test_both_engines_give_the_times_of_a_relaxation_to_the_bit(
    schedule: Schedule, streams: str, data: st.DataObject
) -> None:
    seconds = st.integers(0, 64).map(lambda eighths: eighths / 8)  # sums are exact, in any order
    collectives = Collectives(
        replicas=2, **{name: [data.draw(seconds) for _ in range(schedule.stages)] for name in ("unshard_s", "reduce_s")}
    )
    try:
        schedule.check(streams)
    except ScheduleError:
        streams = "link"
    costs = [COST] * schedule.stages
    options = {"network": Network(latency_s=_LATENCY_S), "streams": streams, "collectives": collectives}
    options["blocking"] = data.draw(st.booleans())
    traces = [simulate(schedule, costs, engine=engine, **options) for engine in ("simpy", "compiled")]
    for name in ("start_s", "end_s", "unshard_start_s", "unshard_end_s", "reduce_end_s", "message_arrival_s"):
        assert np.array_equal(getattr(traces[0], name), getattr(traces[1], name))
    assert np.array_equal(traces[0].unsharded_bytes, traces[1].unsharded_bytes)
    if schedule.communication is None and streams == "link":
        _check_by_relaxation(traces[1], collectives)
    check_with_a_core_for_each(schedule, costs, options.pop("network"), Conditions(**options))
    found = attribute(traces[1])
    parts = [math.fsum(part) for part in zip(*found.parts_s.values(), strict=True)]
    assert parts == pytest.approx(found.bubble_s.tolist(), abs=1e-9)
    assert all((part >= 0).all() for part in found.parts_s.values())


_LATENCY_S = 0.25
_CELL = re.compile(r"(\d+)(F|B|I|W|R|UNSHARD|RESHARD|REDUCE_GRAD)(?![A-Z])(\d*)")


def _check_by_relaxation(trace: Trace, collectives: Collectives) -> None:
    """Walk over the cells of the file until nothing moves any more; messages take their latency alone."""
    rows = [row.split(",") for row in trace.schedule.to_csv(sharding=True).strip("\n").split("\n")]
    place, end = trace.schedule.placement, {}
    while True:
        before = dict(end)
        for row in rows:
            now = stream = 0.0
            whole: dict[int, float] = {}
            for cell in row:
                parts = [(int(stage), kind, number) for stage, kind, number in _CELL.findall(cell)]
                if not parts:
                    continue
                if parts[0][1] in ("UNSHARD", "RESHARD", "REDUCE_GRAD"):
                    ((stage, kind, _),) = parts
                    if kind != "RESHARD":
                        taken = collectives.unshard_s if kind == "UNSHARD" else collectives.reduce_s
                        whole[stage] = stream = max(stream, now) + taken[stage]
                        end[stage, kind, ""] = stream
                    if kind == "REDUCE_GRAD" and trace.conditions.blocking:
                        now = stream
                    continue
                begin = now
                for stage, kind, number in parts:
                    near = stage + {"F": -1, "B": 1, "I": 1, "W": len(place), "R": len(place)}[kind]
                    found = [end[near, other, number] for other in "FBI" if (near, other, number) in end]
                    needed = found[:1] if kind == "F" else found[1:]
                    late = _LATENCY_S if 0 <= near < len(place) and place[near] != place[stage] else 0.0
                    begin = max([begin, whole[stage], *(each + late for each in needed)])
                now = begin + sum(2.0 if kind == "B" else 1.0 for _, kind, _ in parts)
                end |= dict.fromkeys(parts, now)
        if end == before:
            break
    program = trace.program
    last = (program.action_start[1:] - 1)[program.row_action]
    for row, action in enumerate(map(program.action_of, range(len(last)))):
        assert trace.end_s[last[row]] == end[action.stage, action.kind.name, str(action.microbatch)]
    if not trace.schedule.is_forward_only:
        assert trace.reduce_end_s.tolist() == [end[stage, "REDUCE_GRAD", ""] for stage in range(len(place))]


def test_free_collectives_change_no_time_and_one_replica_no_byte_but_what_is_whole() -> None:
    schedule = build_schedule("interleaved-1f1b", ranks=2, microbatches=4).with_sharding(1)
    plain = simulate(schedule, [COST] * 4)
    free = simulate(schedule, [COST] * 4, collectives=Collectives(replicas=4))
    assert np.array_equal(plain.start_s, free.start_s)
    assert attribute(free).collectives_s.tolist() == [0.0, 0.0]
    assert plain.unsharded_bytes is None
    assert (free.unsharded_bytes == 100).all()


def test_a_trace_of_sharded_stages_is_saved_and_shown(tmp_path) -> None:
    trace = simulate(build_schedule("zb-v", ranks=2, microbatches=4).with_sharding(1), [COST] * 4, collectives=SLOW)
    trace.save(tmp_path / "step.trace")
    again = Trace.load(tmp_path / "step.trace")
    for name in ("unshard_start_s", "unshard_end_s", "unshard_bytes", "unsharded_bytes", "reduce_end_s"):
        assert np.array_equal(getattr(again, name), getattr(trace, name))
    assert again.conditions == trace.conditions
    frame = again.to_frame()
    assert (frame["kind"] == "UNSHARD").sum() == trace.schedule.to_csv(sharding=True).count("UNSHARD")
    assert "gathering of parameters" in [bar.name for bar in again.plot().data]


@pytest.mark.parametrize("engine", ["simpy", "compiled"])
def test_samples_are_their_traces_to_the_bit(engine: str) -> None:
    schedule = build_schedule("interleaved-1f1b", ranks=2, microbatches=4).with_sharding(1)
    jitter = Jitter(action=0.2, rank=0.1)
    found = monte_carlo(schedule, [COST] * 4, jitter=jitter, samples=3, collectives=SLOW, engine=engine)
    for sample in range(3):
        trace = found.trace(sample)
        assert (trace.makespan_s, trace.step_s) == (found.makespan_s[sample], found.step_s[sample])
    assert (found.step_s > found.makespan_s).all()


@pytest.mark.parametrize(
    ("schedule", "options", "said"),
    [
        ("0F0,0B0\n", {"collectives": SLOW}, "this schedule states none: take .with_sharding()"),
        ("0UNSHARD,0F0,0B0\n", {"collectives": SLOW}, "0REDUCE_GRAD is missing"),
        (
            "0UNSHARD,0F0,0B0,0REDUCE_GRAD\n",
            {"collectives": Collectives(replicas=2, unshard_s=[1, 2])},
            "collectives.unshard_s has 2 numbers for 1 stages",
        ),
        (
            "0UNSHARD,0F0,0B0\n",
            {"collectives": SLOW, "receive_window": 1},
            "receive_window cannot be given with collectives",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(schedule: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(").replace(")", r"\)")):
        simulate(Schedule.from_csv(schedule), [COST], **options)


def test_collectives_are_held_against_their_meaning() -> None:
    for wrong, said in (
        ({"replicas": 0}, "replicas must be a whole number of 1 or more"),
        ({"replicas": 2, "latency_s": -1.0}, "latency_s must be seconds"),
        ({"replicas": 2, "bytes_per_s": 0.0}, "bytes_per_s must be > 0"),
        ({"replicas": 2, "unshard_s": [-1.0]}, "unshard_s must be seconds"),
        ({"replicas": 2, "whole_bytes": [-1]}, "whole_bytes must be bytes"),
    ):
        with pytest.raises(InputError, match=said):
            Collectives(**wrong)
    for each in (SLOW, Collectives(replicas=2), Collectives(replicas=2, reduce_s=[1.0])):
        assert Collectives.from_dict(each.to_dict()) == each
        assert Conditions.from_dict(Conditions(collectives=each).to_dict()).collectives == each
    assert SLOW.share_bytes(101) == 26
