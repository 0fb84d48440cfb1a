"""Sharding as written and placed: kept in files, equal to PyTorch's passes, and refused where it makes no sense."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import (
    InputError,
    Kind,
    Schedule,
    ScheduleError,
    Sharding,
    StageCost,
    Trace,
    build_schedule,
    simulate,
)
from ppsim.schedule.review import review_csv
from tests.support.named import ONE_WAY
from tests.support.strategies import communications, schedules

UNIT = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
GRID = [(name, ranks, v) for name in ONE_WAY for ranks in (2, 3) for v in (None, 5)]


def cells(text: str) -> list[list[str]]:
    """All that is in a file, of each rank; a rank that does nothing has an empty cell."""
    return [[cell for cell in row.split(",") if cell.strip('"')] for row in text.strip("\n").split("\n")]


def _built(name: str, ranks: int, stages_per_rank: int | None) -> list[Schedule]:
    found = []
    for microbatches in (1, ranks, 2 * ranks + 1):
        try:
            found.append(build_schedule(name, ranks=ranks, microbatches=microbatches, stages_per_rank=stages_per_rank))
        except InputError:
            continue
    return found


@pytest.mark.parametrize(("name", "ranks", "stages_per_rank"), GRID)
def test_sharding_stands_where_pytorchs_own_passes_put_it(name: str, ranks: int, stages_per_rank: int | None) -> None:
    theirs = pytest.importorskip("torch.distributed.pipelining.schedules")
    for schedule in _built(name, ranks, stages_per_rank):
        for active in (1, 2, 3):
            placed = schedule.with_sharding(active)
            rows = {}
            for rank, order in enumerate(schedule.orders):
                actions = [theirs._Action.from_str(str(action)) for action in order]
                unsharded = theirs._add_unshard_reshard(actions, active)
                rows[rank] = theirs._add_reduce_grad(unsharded, schedule.microbatches)
            wanted = [[str(action) for action in rows[rank]] for rank in range(ranks)]
            assert cells(placed.to_csv(sharding=True)) == wanted
            # And in its whole lowering, where sharding takes a turn as computations do.
            theirs_whole = theirs._add_send_recv(rows, schedule.placement.__getitem__, schedule.stages)
            ours = placed.with_communication("early").to_csv(messages=True)
            assert cells(ours) == [[str(action) for action in theirs_whole[rank]] for rank in range(ranks)]
            assert Schedule.from_csv(ours).to_csv(messages=True) == ours


@given(schedules(recompute=False), st.integers(1, 4))
def test_orders_of_any_kind_are_sharded_as_pytorch_does(schedule: Schedule, active: int) -> None:
    theirs = pytest.importorskip("torch.distributed.pipelining.schedules")
    placed = cells(schedule.with_sharding(active).to_csv(sharding=True))
    for order, row in zip(schedule.orders, placed, strict=True):
        actions = [theirs._Action.from_str(str(action)) for action in order]
        wanted = theirs._add_reduce_grad(theirs._add_unshard_reshard(actions, active), schedule.microbatches)
        assert row == [str(action) for action in wanted]


@given(schedules(), st.integers(1, 4), st.sampled_from(["derived", "early", "late"]))
def test_what_is_written_is_read_and_kept(schedule: Schedule, active: int, place: str) -> None:
    placed = schedule.with_sharding(active).with_communication(place)
    text = placed.to_csv(messages=True)
    again = Schedule.from_csv(text)
    assert again.to_csv(messages=True) == text
    assert again.orders == placed.orders
    without = Schedule.from_csv(placed.to_csv(sharding=True))
    assert without.sharding == schedule.with_sharding(active).sharding
    assert without.communication is None
    assert cells(without.with_sharding(None).to_csv(sharding=True)) == cells(schedule.to_csv())
    assert review_csv(text).problems == ()


@given(schedules().flatmap(communications), st.integers(1, 3))
def test_an_evaluation_is_what_is_left_without_backwards(schedule: Schedule, active: int) -> None:
    text = schedule.with_sharding(active).to_csv(messages=True)
    placed = Schedule.from_csv(text).forward_only()
    kept = [[cell for cell in row if not re.search(r"B|I|W|REDUCE|R\d", cell)] for row in cells(text)]
    if "(" not in text:
        assert cells(placed.to_csv(messages=True)) == kept
    again = Schedule.from_csv(placed.to_csv(messages=True))
    assert again.to_csv(messages=True) == placed.to_csv(messages=True)


def test_a_trace_keeps_the_sharding(tmp_path) -> None:
    for place in ("derived", "early"):
        schedule = build_schedule("1f1b", ranks=2, microbatches=3).with_sharding(1).with_communication(place)
        simulate(schedule, [UNIT] * 2).save(tmp_path / "step.trace")
        assert Trace.load(tmp_path / "step.trace").schedule.sharding == schedule.sharding


def test_frozen_stages_reduce_nothing() -> None:
    schedule = build_schedule("zb-h1", ranks=2, microbatches=4).with_sharding(1).with_frozen_stages([0])
    assert "0REDUCE_GRAD" not in schedule.to_csv(messages=True)
    assert "1REDUCE_GRAD" in schedule.to_csv(messages=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0UNSHARD,0F0,0UNSHARD,0B0,0REDUCE_GRAD\n", "row 1, column 3: 0UNSHARD stands where stage 0 is whole already"),
        ("0RESHARD,0F0,0B0\n", "row 1, column 1: 0RESHARD stands where stage 0 is not whole: put 0UNSHARD before it"),
        ("0UNSHARD,0F0,0RESHARD,0B0\n", "row 1: 0B0 needs stage 0 whole: put 0UNSHARD before it"),
        ("0UNSHARD,0F0,0REDUCE_GRAD,0B0\n", "row 1, column 3: 0REDUCE_GRAD comes before the last backward of stage 0"),
        ("0F0,0B0,0REDUCE_GRAD,0REDUCE_GRAD\n", "row 1, column 4: 0REDUCE_GRAD occurs twice: keep one"),
        ("0F0,0B0,1REDUCE_GRAD\n1F0,1B0\n", "row 1, column 3: 1REDUCE_GRAD is on rank 0, which does not hold stage 1"),
        ("0F0,0B0,7UNSHARD\n", "row 1, column 3: 7UNSHARD is on rank 0, which does not hold stage 7"),
        ("0UNSHARD,0F0,0B0\n1F0,1B0\n", "row 2: 1F0 needs stage 1 whole"),
    ],
)
def test_what_makes_no_sense_is_refused_at_its_cell(text: str, said: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_csv(text)
    assert said in str(caught.value)
    assert said in review_csv(text).problems[0].message


def test_entries_that_do_not_fit_are_refused_where_they_are_given() -> None:
    schedule = Schedule.of([["0F0", "0B0"], ["1F0", "1B0"]])
    with pytest.raises(ScheduleError, match="sharding is of 1 ranks, but there are 2"):
        replace(schedule, sharding=(Sharding(),))
    with pytest.raises(ScheduleError, match="an entry stands before action 9, but there are 2 actions"):
        replace(schedule, sharding=(Sharding([9], 0, Kind.UNSHARD), Sharding()))
    with pytest.raises(ScheduleError, match="sharding has places among posts, but no communication is stated"):
        replace(schedule, sharding=(Sharding([0], 0, Kind.UNSHARD, [0]), Sharding()))
    with pytest.raises(ScheduleError, match="an entry is REDUCE_GRAD, UNSHARD or RESHARD, got kind F"):
        Sharding([0], 0, Kind.F)
    with pytest.raises(ScheduleError, match="posted must be a number for each of 2 entries"):
        Sharding([0, 0], 0, [Kind.UNSHARD, Kind.RESHARD], [1, 0])
    with pytest.raises(ScheduleError, match="the columns of Sharding must be lists of one length"):
        Sharding([0, 0], 0, [Kind.UNSHARD, Kind.RESHARD], [[0], [0, 1]])  # a ragged list was a fault of ours
    with pytest.raises(InputError, match="active_stages must be 1 or more"):
        schedule.with_sharding(0)


def test_places_among_posts_cannot_be_changed() -> None:
    entries = Sharding([0, 0], 0, [Kind.UNSHARD, Kind.RESHARD], [0, 1])
    assert entries.posted is not None
    with pytest.raises(ValueError, match="read-only"):  # they alone of the columns could be written
        entries.posted[0] = 1
    assert entries != Sharding(entries.before, entries.stage, entries.kind)
    assert entries != Sharding(entries.before, entries.stage, entries.kind, [0, 0])
    assert entries == Sharding(entries.before, entries.stage, entries.kind, [0, 1])
