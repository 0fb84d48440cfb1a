"""R, a forward computed once more: where it may stand, where a rule puts it, what it takes and what it holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import (
    Action,
    InputError,
    Kind,
    LayerCost,
    Network,
    Schedule,
    ScheduleError,
    StageCost,
    Trace,
    attribute,
    build_schedule,
    costs_of,
    partition,
    read_run,
    simulate,
)
from ppsim.costs.sharing import share_cost
from ppsim.explorer.picture import order_picture, picture_of
from ppsim.export.staircase import staircase, unit_trace
from ppsim.schedule.review import review_csv
from tests.support.evaluator import cells, evaluate, spelled
from tests.support.strategies import communications, networks, schedules, stage_costs

COST = StageCost(forward_s=2, backward_input_s=1, backward_weight_s=1, activation_bytes=10, output_bytes=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0R0,0F0,0B0\n", "0R0 comes before 0F0, which it needs: put 0R0 after 0F0"),
        ("0F0,0B0,0R0\n", "0B0 comes before 0R0, which it needs: put 0B0 after 0R0"),
        ("0F0,0I0,0R0,0W0\n", "0I0 comes before 0R0"),
        ("0F0,0R0,0R0,0B0\n", "0R0 occurs 2 times: keep one"),
        ("0F0,0R0\n", "stage 0, microbatch 0 has no backward"),
        ("0F0,0R,0B0\n", "'0R' is not an action: give its microbatch, as in 0R0"),
        ("0F0,(0R0;0B0)OVERLAP_F_B\n", "the first part of a pair must be an F"),
    ],
)
def test_an_r_that_makes_no_sense_is_named(text: str, said: str) -> None:
    with pytest.raises(ScheduleError, match=said.replace("(", r"\(")):
        Schedule.from_csv(text).check()
    assert said in review_csv(text).problems[0].message


@given(schedules(recompute=False) | schedules(recompute=False).flatmap(communications), st.data())
def test_the_rule_puts_r_right_before_each_backward(schedule: Schedule, data: st.DataObject) -> None:
    """Communication and sharding keep their places, so that a send never waits for an R."""
    stages = data.draw(st.lists(st.integers(0, schedule.stages - 1), unique=True))
    microbatches = data.draw(st.lists(st.integers(0, schedule.microbatches - 1), unique=True))
    placed = schedule.with_sharding(2).with_recompute(stages, microbatches=microbatches)
    with_messages = schedule.communication is not None
    wanted = []
    for row in cells(schedule.with_sharding(2).to_csv(messages=with_messages, sharding=True)):
        wanted.append([])
        for cell in row:
            served = [
                f"{stage}R{mb}"
                for stage in stages
                for mb in microbatches
                for kind in "BI"
                if f"{stage}{kind}{mb}" in cell.strip("()").replace(")OVERLAP_F_B", "").split(";")
            ]
            wanted[-1] += [*served, cell]
    assert cells(placed.to_csv(messages=with_messages, sharding=True)) == wanted
    placed.program  # noqa: B018  (is complete and in order)
    assert placed.with_recompute(stages, microbatches=microbatches) == placed


def test_a_share_is_spread_evenly() -> None:
    schedule = build_schedule("1f1b", ranks=2, microbatches=8)
    for share, wanted in ((0.25, [3, 7]), (0.5, [1, 3, 5, 7]), (0, []), (1, list(range(8)))):
        placed = schedule.with_recompute([1], share=share)
        found = [action.microbatch for action in placed.orders[1] if action.kind == Kind.R]
        assert found == wanted
        assert list(placed.orders[0]) == list(schedule.orders[0])


def test_stages_microbatches_and_shares_that_cannot_be_are_refused() -> None:
    schedule = build_schedule("1f1b", ranks=2, microbatches=2)
    with pytest.raises(InputError, match="stage 2 is not there: there are 2, counted from 0"):
        schedule.with_recompute([2])
    with pytest.raises(InputError, match="microbatch -1 is not there"):
        schedule.with_recompute(microbatches=[-1])
    with pytest.raises(InputError, match=r"share must be from 0 to 1, got 1\.5"):
        schedule.with_recompute(share=1.5)


@given(st.data())
def test_the_step_is_the_evaluators(data: st.DataObject) -> None:
    """Times on both engines, and bytes after every row."""
    schedule = data.draw(schedules(recompute=False)).with_recompute(share=data.draw(st.sampled_from([0.5, 1.0])))
    costs, network = data.draw(stage_costs(schedule.stages)), data.draw(networks(schedule.ranks))
    answer = evaluate(spelled(schedule), schedule.placement, costs, network)
    traces = [simulate(schedule, costs, network=network, engine=engine) for engine in ("simpy", "compiled")]
    for trace in traces:
        assert trace.makespan_s == answer.makespan
        for rank in range(schedule.ranks):
            rows = list(trace.program.rows_of(rank))
            assert trace.activation_bytes[rows].tolist() == answer.levels[rank]
    assert np.array_equal(traces[0].start_s, traces[1].start_s)
    assert attribute(traces[0]).bubble_s.tolist() == traces[0].bubble_s.tolist()


def test_by_hand() -> None:
    """Three microbatches of 10 bytes, of which two outputs of 2 stay until R; R takes the 2 seconds of F."""
    schedule = Schedule.from_csv("0F0,0F1,0F2,0R0,0B0,0B1,0R2,0I2,0W2\n")
    trace = simulate(schedule, [COST])
    assert trace.activation_bytes.tolist() == [4, 14, 18, 24, 14, 4, 10, 0, 0]
    assert trace.peak_activation_bytes.tolist() == [24]
    assert trace.makespan_s == 3 * 2 + 2 * 2 + 3 * 2
    stated = replace(COST, recompute_s=0.5, recompute_bytes=3, forward_communication_s=0.25)
    trace = simulate(schedule, [stated])
    assert trace.activation_bytes.tolist() == [3, 13, 16, 23, 13, 3, 10, 0, 0]
    assert trace.makespan_s == 3 * 2.25 + 2 * 0.75 + 3 * 2
    assert stated.alone_s["R"] == 0.75


def test_activations_no_larger_than_two_outputs_gain_nothing() -> None:
    schedule = Schedule.from_csv("0F0,0R0,0B0\n")
    assert simulate(schedule, [replace(COST, activation_bytes=3)]).activation_bytes.tolist() == [3, 3, 0]


def test_recomputation_hides_in_the_wait_for_a_gradient() -> None:
    """1F1B on p ranks holds two outputs of p microbatches and one microbatch whole, for at most m more forwards."""
    schedule = build_schedule("1f1b", ranks=4, microbatches=8)
    plain = simulate(schedule, [COST] * 4)
    again = simulate(schedule.with_recompute(), [COST] * 4)
    assert plain.peak_activation_bytes.tolist() == [40, 30, 20, 10]
    assert again.peak_activation_bytes.tolist() == [3 * 4 + 10, 2 * 4 + 10, 4 + 10, 10]
    assert plain.makespan_s < again.makespan_s <= plain.makespan_s + 8 * 2
    # On rank 0 the first R ends before the gradient arrives, which has to come through three ranks.
    first = int(np.flatnonzero((again.program.kind == Kind.R) & (again.program.rank == 0))[0])
    assert again.start_s[first + 1] > again.end_s[first]


def test_costs_of_several_layers_and_of_parts() -> None:
    layers = [
        LayerCost(
            name=name,
            forward_s=1,
            backward_input_s=1,
            backward_weight_s=1,
            activation_bytes=9,
            output_bytes=size,
            **more,
        )
        for name, size, more in (("a", 3, {"recompute_bytes": 8}), ("b", 4, {"recompute_s": 0.5, "recompute_bytes": 7}))
    ]
    whole = partition(layers, stages=1)[0]
    assert (whole.again_s, whole.kept_bytes) == (1.5, 5 + 4)  # the input of a, and the output of b
    assert (
        partition([replace(each, recompute_s=None, recompute_bytes=None) for each in layers], stages=1)[0].recompute_s
        is None
    )
    parts = share_cost(replace(COST, recompute_s=1.0, recompute_bytes=4), [0, 0])
    assert [(part.again_s, part.kept_bytes) for part in parts] == [(0.5, 4)] * 2


def test_it_is_drawn_saved_and_shown(tmp_path) -> None:
    schedule = Schedule.from_csv("0F0,0F1,0R0,0B0,0R1,0B1\n")
    trace = unit_trace(schedule)
    assert staircase(trace) == "rank 0  F0 F1 R0 B0 B0 R1 B1 B1"
    trace.save(tmp_path / "step.trace")
    loaded = Trace.load(tmp_path / "step.trace")
    assert loaded.schedule.orders == schedule.orders
    assert loaded.activation_bytes.tolist() == trace.activation_bytes.tolist()
    assert trace.to_frame()["kind"].tolist() == ["F", "F", "R", "B", "R", "B"]
    assert [bar.name for bar in trace.plot().data if bar.type == "bar"] == [
        "bubble",
        "F forward",
        "B backward",
        "R recomputed forward",
    ]
    # The page has a letter for each kind: "FBIWR".
    assert picture_of(trace)["rows"]["kind"] == [0, 0, 4, 1, 4, 1]
    assert order_picture(schedule, [COST])["rows"]["end"] == [2, 4, 6, 8, 10, 12]


def test_an_evaluation_recomputes_nothing() -> None:
    schedule = build_schedule("1f1b", ranks=2, microbatches=2).with_recompute()
    assert schedule.forward_only().orders == build_schedule("1f1b", ranks=2, microbatches=2).forward_only().orders


def test_trace_files_of_before_are_read(tmp_path) -> None:
    """Kinds are numbers in trace files, so the number of R stands behind those that files may hold."""
    assert [int(kind) for kind in (Kind.F, Kind.SEND_F, Kind.RESHARD)] == [0, 4, 10]
    assert int(Kind.R) == 11
    assert Action(0, Kind.R, 1).kind.computes


def test_messages_are_as_without() -> None:
    network = Network(latency_s=0.5, bytes_per_s=4.0)
    schedule = build_schedule("interleaved-1f1b", ranks=2, microbatches=4)
    plain, again = (simulate(each, [COST] * 4, network=network) for each in (schedule, schedule.with_recompute([0, 3])))
    assert len(plain.message_bytes) == len(again.message_bytes)
    assert sorted(plain.message_bytes.tolist()) == sorted(again.message_bytes.tolist())


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_run_that_recomputes_says_what_r_costs(share: float, tmp_path) -> None:
    """Cause of a bug in waiting: the F of a recomputed microbatch takes fewer bytes, which are no activations."""
    cost = replace(COST, recompute_s=1.5, weight_activation_bytes=4)
    trace = simulate(build_schedule("zb-h1", ranks=2, microbatches=6).with_recompute(share=share), [cost] * 2)
    trace.save(tmp_path / "step.trace")
    for found in costs_of(read_run(tmp_path / "step.trace")):
        assert (found.recompute_s, found.kept_bytes) == (1.5, 4)
        assert (found.activation_bytes, found.weight_activation_bytes) == (10, 4)
