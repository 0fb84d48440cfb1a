"""Every built schedule: sound, as drawn, and as its paper's tables have it."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Kind, Network, Schedule, StageCost, build_schedule, schedule_names, search, simulate
from ppsim.errors import InputError
from ppsim.export.staircase import staircase, unit_trace
from ppsim.schedule.named import registry
from ppsim.schedule.named.controllable_memory import v_half, v_min
from ppsim.schedule.named.interleaved import interleaved_1f1b, interleaved_overlap, interleaved_zb, looped_bfs
from ppsim.schedule.named.one_f_one_b import eager_one_f_one_b, one_f_one_b
from ppsim.schedule.named.registry import natural_stages_per_rank, register
from ppsim.schedule.named.v_shape import dualpipe_v, zb_v
from ppsim.schedule.named.zero_bubble import zb_h1, zb_h2
from ppsim.schedule.order import (
    Order,
    backward_inputs,
    backward_weights,
    backwards,
    concatenate,
    first_microbatches,
    forwards,
    in_slots,
    interleave,
    overlap,
)
from tests.support.named import allowed

PUBLISHED = json.loads((Path(__file__).parents[4] / "studies/published/zero_bubble_iclr2024.json").read_text())
ROWS = [dict(zip(PUBLISHED["columns"], row, strict=True)) for row in PUBLISHED["rows"]]
CHUNKED = ("interleaved-1f1b", "interleaved-zb", "looped-bfs", "interleaved-1f1b-overlap")
V_SHAPED = ("zb-v", "dualpipe-v", "v-half", "v-min")


# Sound


@st.composite
def built(draw):
    name = draw(st.sampled_from(schedule_names()))
    v = draw(st.sampled_from([None, 1, 2, 3, 4])) if name in CHUNKED else None
    ranks, microbatches = allowed(name, draw(st.integers(1, 8)), draw(st.integers(1, 24)))
    return build_schedule(name, ranks=ranks, microbatches=microbatches, stages_per_rank=v)


@given(built())
def test_every_schedule_is_complete_and_ends(schedule):
    """For any number of ranks and microbatches; those in both directions refuse odd ranks, and say so."""
    schedule.check()
    assert schedule.stages == len(schedule.placement) == sum(len(schedule.stages_of(r)) for r in range(schedule.ranks))


@pytest.mark.parametrize("name", schedule_names())
def test_ranks_and_microbatches_that_few_think_of(name):
    for ranks, microbatches in [(1, 1), (1, 7), (7, 1), (5, 3), (4, 9), (12, 13), (3, 50)]:
        ranks, microbatches = allowed(name, ranks, microbatches)
        schedule = build_schedule(name, ranks=ranks, microbatches=microbatches)
        schedule.check()
        assert schedule.microbatches == microbatches
        assert schedule.stages == ranks * natural_stages_per_rank(name)


@given(st.integers(1, 12), st.integers(1, 60), st.integers(1, 4), st.sampled_from(CHUNKED[:2]))
def test_rounds_need_not_be_of_one_size(ranks, microbatches, v, name):
    """Where PyTorch asks for m % (m // p) == 0, rounds here differ by at most one microbatch."""
    schedule = build_schedule(name, ranks=ranks, microbatches=microbatches, stages_per_rank=v)
    schedule.check()
    order = schedule.orders[0]
    first_chunk = (order.kind == Kind.F) & (order.stage == 0)
    assert order.microbatch[first_chunk].tolist() == list(range(microbatches))


@pytest.mark.parametrize("name", V_SHAPED)
def test_v_shaped_schedules_have_two_stages_per_rank(name):
    with pytest.raises(ValueError, match=f"{name} has 2 stage.* got stages_per_rank=3: leave it out or set it to 2"):
        build_schedule(name, ranks=4, microbatches=8, stages_per_rank=3)
    assert build_schedule(name, ranks=3, microbatches=6).placement == (0, 1, 2, 2, 1, 0)


def test_interleaved_zb_with_one_stage_is_zb_h1():
    for ranks, microbatches in [(1, 3), (4, 3), (4, 8), (5, 17)]:
        wide = build_schedule("interleaved-zb", ranks=ranks, microbatches=microbatches, stages_per_rank=1)
        assert wide.orders == build_schedule("zb-h1", ranks=ranks, microbatches=microbatches).orders


@pytest.mark.parametrize(("name", "full"), [("zb-v", 2 * 4 - 1), ("dualpipe-v", 2 * 4)])
def test_few_microbatches_are_the_start_of_many(name, full):
    """What is left out breaks up pairs and moves nothing else."""
    whole = build_schedule(name, ranks=4, microbatches=full)
    for microbatches in range(1, full):
        part = build_schedule(name, ranks=4, microbatches=microbatches)
        for few, many in zip(part.orders, whole.orders, strict=True):
            kept = many.take(many.microbatch < microbatches)
            assert (few.stage.tolist(), few.kind.tolist(), few.microbatch.tolist()) == (
                kept.stage.tolist(),
                kept.kind.tolist(),
                kept.microbatch.tolist(),
            )


# As drawn


@pytest.mark.parametrize(
    ("function", "name", "ranks", "microbatches"),
    [
        (one_f_one_b, "1f1b", 3, 4),
        (eager_one_f_one_b, "1f1b-eager", 3, 4),
        (interleaved_1f1b, "interleaved-1f1b", 2, 4),
        (interleaved_overlap, "interleaved-1f1b-overlap", 2, 4),
        (interleaved_zb, "interleaved-zb", 2, 4),
        (looped_bfs, "looped-bfs", 2, 3),
        (zb_h1, "zb-h1", 3, 5),
        (zb_h2, "zb-h2", 3, 6),
        (zb_v, "zb-v", 2, 4),
        (dualpipe_v, "dualpipe-v", 2, 4),
        (v_half, "v-half", 3, 2),
        (v_min, "v-min", 3, 2),
    ],
)
def test_the_docstring_draws_what_is_built(function, name, ranks, microbatches):
    drawing = staircase(unit_trace(build_schedule(name, ranks=ranks, microbatches=microbatches)))
    assert drawing in inspect.getdoc(function)


def test_zb_h2_as_in_figure_3_of_its_paper():
    """Four devices, six microbatches: seven forwards run ahead on the first device where there are as many."""
    schedule = build_schedule("zb-h2", ranks=4, microbatches=8)
    starts = [next(i for i, action in enumerate(order) if action.kind == Kind.I) for order in schedule.orders]
    assert starts == [7, 5, 3, 1]


# As their papers' tables have it


def simulated(name, row, *, v=1):
    """A trace of one row of the table: equal stages, communication as pure latency."""
    schedule = build_schedule(name, ranks=row["ranks"], microbatches=row["microbatches"], stages_per_rank=v)
    cost = StageCost(
        forward_s=row["forward_ms"] / v,
        backward_input_s=row["backward_input_ms"] / v,
        backward_weight_s=row["backward_weight_ms"] / v,
    )
    return simulate(schedule, [cost] * schedule.stages, network=Network(latency_s=row["communication_ms"]))


def rate(length, row):
    """The share of the step that is not work: (cost - m (F + B + W)) / cost."""
    work = row["microbatches"] * (row["forward_ms"] + row["backward_input_ms"] + row["backward_weight_ms"])
    return (length - work) / length


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['hidden']}-{row['microbatches']}")
def test_bubble_rates_of_the_zero_bubble_paper(row):
    """To the printed digits; ZB-H2's is of the longest rank, the others' of the makespan."""
    assert round(rate(simulated("1f1b", row).makespan_s, row), 4) == row["1f1b"]
    assert round(rate(simulated("zb-h1", row).makespan_s, row), 4) == row["zb_h1"]
    assert round(rate(simulated("zb-h2", row).rank_time_s.max(), row), 4) == row["zb_h2"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['hidden']}-{row['microbatches']}")
def test_interleaved_rates_of_the_zero_bubble_paper(row):
    """The authors leave most hops from the last rank to the first uncharged: ours are up to 0.01 higher."""
    ours = rate(simulated("interleaved-1f1b", row, v=row["v"]).makespan_s, row)
    assert row["interleaved_1f1b"] <= round(ours, 4) <= row["interleaved_1f1b"] + 0.01


def test_interleaved_rates_agree_without_communication():
    """The published rates are at least those of the closed form with c = 0."""
    for row in ROWS:
        ours = rate(simulated("interleaved-1f1b", row | {"communication_ms": 0}, v=row["v"]).makespan_s, row)
        ideal = (row["ranks"] - 1) / row["v"]
        assert ours == pytest.approx(ideal / (ideal + row["microbatches"]), rel=1e-9)
        assert ours < row["interleaved_1f1b"]


@pytest.mark.parametrize("name", ["v-half", "v-min"])
@given(ranks=st.integers(1, 10), microbatches=st.integers(1, 30))
def test_v_half_and_v_min_stay_within_their_memory(name, ranks, microbatches):
    """Between F and W, for any number of microbatches, whatever the stages' times: the order alone decides."""
    limit = 2 * {"v-half": (ranks + 2) // 2, "v-min": (ranks + 4) // 3}[name]
    for order in build_schedule(name, ranks=ranks, microbatches=microbatches).orders:
        held = np.cumsum((order.kind == Kind.F).astype(int) - (order.kind == Kind.W))
        assert held.max() <= limit
        if microbatches >= 2 * ranks and name == "v-half":
            assert held.max() == limit


# ranks, microbatches, times of F, I and W on each stage, latency, and the longest rank's time of V-Half and V-Min as
# the authors' generators order them (sail-sg/zero-bubble-pipeline-parallelism, run apart and timed by the plain model).
CONTROLLABLE_MEMORY = [
    (2, 5, (10, 10, 10), 0, 310, 330),
    (3, 4, (10, 10, 10), 0, 290, 290),
    (4, 8, (10, 10, 10), 0, 530, 590),
    (4, 8, (10, 10, 10), 1, 552, 630),
    (5, 13, (12, 11, 7), 0, 934, 1093),
    (6, 12, (10, 10, 10), 2, 898, 1034),
    (7, 9, (9, 10, 6), 1, 680, 816),
    (8, 24, (10, 10, 10), 1, 1658, 1856),
    (8, 6, (10, 12, 8), 0, 652, 706),
    (9, 20, (10, 10, 10), 5, 1700, 2140),
    (12, 36, (14, 15, 9), 2, 3385, 4293),
    (16, 48, (10, 10, 10), 1, 3392, 3792),
]


@pytest.mark.parametrize("row", CONTROLLABLE_MEMORY, ids=lambda row: f"{row[0]}-{row[1]}-{row[3]}")
def test_v_half_and_v_min_are_as_fast_as_the_authors(row):
    """V-Half once was up to 9 % slower: its W kept slots of the cool-down that backwards could have."""
    ranks, microbatches, times, latency_s, half, least = row
    cost = StageCost(**dict(zip(("forward_s", "backward_input_s", "backward_weight_s"), times, strict=True)))
    for name, published in (("v-half", half), ("v-min", least)):
        schedule = build_schedule(name, ranks=ranks, microbatches=microbatches)
        trace = simulate(schedule, [cost] * schedule.stages, network=Network(latency_s=latency_s))
        assert trace.rank_time_s.max() <= published


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8])
def test_v_half_keeps_its_bubble_while_the_paper_s_condition_holds(ranks):
    """W + 2 I >= 2 F and W + 2 F >= 2 I: more microbatches, no more bubble."""
    for times in [(2, 2, 1), (2, 2, 4), (4, 5, 3), (5, 4, 3), (5, 4, 2), (2, 3, 2)]:
        few, many = (
            longest_bubble(build_schedule("v-half", ranks=ranks, microbatches=m), times) for m in (4 * ranks, 8 * ranks)
        )
        assert many == few


def longest_bubble(schedule, times):
    forward_s, backward_input_s, backward_weight_s = times
    cost = StageCost(
        forward_s=forward_s, backward_input_s=backward_input_s, backward_weight_s=backward_weight_s
    )  # fmt: skip
    work = schedule.microbatches * schedule.stages / schedule.ranks * sum(times)
    return simulate(schedule, [cost] * schedule.stages).rank_time_s.max() - work


# The parts that schedules are written with


def test_runs_drawn_in_slots():
    every = np.arange(3)
    order = in_slots(
        (forwards(0, every), every - 1), (backward_inputs(0, every), every), (backward_weights(0, every), every + 1)
    )
    assert order == Order.of(["0F0", "0F1", "0I0", "0F2", "0I1", "0W0", "0I2", "0W1", "0W2"])


def test_in_slots_wants_a_slot_for_each_part():
    with pytest.raises(ValueError, match="got 2 for 3 parts"):
        in_slots((forwards(0, range(3)), [0, 1]))


def test_interleaving_three_orders():
    order = interleave(forwards(1, [0, 1]), backward_inputs(1, [0, 1]), backward_weights(1, [0, 1]))
    assert order == Order.of(["1F0", "1I0", "1W0", "1F1", "1I1", "1W1"])
    with pytest.raises(ValueError, match="got 2 and 1 and 1"):
        interleave(forwards(1, [0, 1]), backward_inputs(1, [0]), backward_weights(1, [0]))


def test_overlapped_pairs_and_what_is_left_of_them():
    order = forwards(0, [0]) + overlap(forwards(0, [1, 2, 3]), backwards(3, [0, 1, 3]))
    assert order == Order.of(["0F0", "(0F1;3B0)OVERLAP_F_B", "(0F2;3B1)OVERLAP_F_B", "(0F3;3B3)OVERLAP_F_B"])
    assert first_microbatches(order, 2) == Order.of(["0F0", "(0F1;3B0)OVERLAP_F_B", "3B1"])
    assert first_microbatches(order, 1) == Order.of(["0F0", "3B0"])


def test_nothing_taken_from_an_order():
    assert len(forwards(0, range(3)).take([])) == 0


def test_a_rule_for_all_ranks_is_registered_in_one_line(monkeypatch):
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))

    def in_turn(ranks, microbatches, stages_per_rank):
        every = range(microbatches)
        held = [range(rank, ranks * stages_per_rank, ranks) for rank in range(ranks)]
        return [
            concatenate([forwards(stage, every) for stage in own] + [backwards(stage, every) for stage in own[::-1]])
            for own in held
        ]

    register("mine", in_turn, all_ranks=True, chunked=True)
    schedule = build_schedule("mine", ranks=2, microbatches=2, stages_per_rank=2)
    assert schedule.orders[0] == Order.of(["0F0", "0F1", "2F0", "2F1", "2B0", "2B1", "0B0", "0B1"])
    schedule.check()
    assert Schedule.of(schedule.orders).placement == schedule.placement


def test_what_is_unmet_is_what_is_refused_and_is_left_out_of_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cause of a bug: two texts for one rule, and a search that took any ValueError of a rule for an unmet one."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))

    def requirement(ranks: int, microbatches: int, stages_per_rank: int) -> str | None:
        return f"needs an even number of microbatches, got {microbatches}: add one" if microbatches % 2 else None

    registry.register("even", one_f_one_b, requirement=requirement)
    for name, microbatches, stages_per_rank in (("even", 3, 1), ("1f1b", 4, 2)):
        said = registry.unmet_requirement(name, 2, microbatches, stages_per_rank)
        assert said is not None
        with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
            build_schedule(name, ranks=2, microbatches=microbatches, stages_per_rank=stages_per_rank)
    assert registry.unmet_requirement("even", 2, 4, 1) is None
    stages = [StageCost(forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0)] * 2
    assert search(stages, ranks=2, microbatches=3).schedule.ranks == 2

    def wrong(rank: int, ranks: int, microbatches: int) -> Order:
        raise ValueError("a fault of this rule")

    registry.register("wrong", wrong)
    with pytest.raises(ValueError, match="a fault of this rule"):
        search(stages, ranks=2, microbatches=3)
