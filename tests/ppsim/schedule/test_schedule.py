"""A schedule is a value: made from orders, written to CSV and read back strictly."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ppsim import Action, Kind, Schedule, ScheduleError, build_schedule
from ppsim.schedule.placement import loop_placement, v_placement
from tests.support.strategies import schedules


@given(schedules())
def test_csv_round_trip(schedule: Schedule) -> None:
    again = Schedule.from_csv(schedule.to_csv(), name=schedule.name)
    assert again == schedule
    assert again.placement == schedule.placement


@given(schedules(), st.randoms(use_true_random=False))
def test_idle_cells_spaces_and_line_ends_mean_nothing(schedule: Schedule, dice) -> None:
    lines = []
    for line in schedule.to_csv().splitlines():
        cells = line.split(",")
        for _ in range(dice.randrange(4)):
            cells.insert(dice.randrange(len(cells) + 1), dice.choice(["", " ", "  "]))
        lines.append(",".join(cells))
    for line_end in ("\n", "\r\n", "\r"):
        text = line_end.join(lines) + line_end
        assert Schedule.from_csv(text, name=schedule.name) == schedule


def test_csv_is_pytorchs() -> None:
    schedule = Schedule.of([["0F0", "(0F1;0B0)OVERLAP_F_B", "0B1"], ["1F0", "1B0", "1F1", "1I1", "1W1"]])
    assert schedule.to_csv() == "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1B0,1F1,1I1,1W1\n"


def test_a_rank_without_actions_survives_csv_at_the_end_too() -> None:
    schedule = Schedule.of([["0F0", "0B0"], [], []])
    assert Schedule.from_csv(schedule.to_csv()).ranks == 3


def test_blank_lines_at_the_end_are_no_ranks() -> None:
    """Cause of a bug: each counted as a rank that idles all the time, and the bubble grew."""
    assert Schedule.from_csv("0F0,0B0\n\n\n").ranks == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0F0,0B0\n1F0,oops\n", "row 2, column 2: 'oops' is not an action"),
        ("0F0, , 0F0junk", "row 1, column 3: '0F0junk' is not an action"),
        ("0F0,0SEND_F0", "row 1, column 2: 0SEND_F0 has nothing to carry on rank 0"),
        ("0F0,1REDUCE_GRAD", "row 1, column 2: 1REDUCE_GRAD is on rank 0, which does not hold stage 1"),
        ("0F0\n0B0\n", "stage 0 computes on rank 0 and on rank 1"),
        ("0F0,0B0\n2F0,2B0\n", "stage 1 has no action, but stage 2 has"),
        ("", "the schedule holds no action"),
        (",,\n,\n", "the schedule holds no action"),
        # Cause of a bug: csv.Error is no ValueError and came out as a traceback.
        ("0F" + "0" * 200_000, "the schedule is not CSV: field larger than field limit"),
        # Cause of a bug: all stages up to the largest were listed to find the missing ones.
        ("0F0,2147483647F0", "stage 1 has no action, but stage 2147483647 has"),
    ],
)
def test_what_is_no_schedule_is_refused_where_it_stands(text: str, said: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_csv(text)
    assert said in str(caught.value)


_cells = st.sampled_from(["0F0", "0B0", "1F0", "1B0", "0I0", "0W0", "1F1", "(0F0;1B0)OVERLAP_F_B", "", "x", '"', "9F9"])


@given(st.text(max_size=60) | st.lists(st.lists(_cells, max_size=6).map(",".join), max_size=4).map("\n".join))
@example('"')
@example("0F0\x00")
@example("0F2147483647,0B2147483647")
def test_rubbish_is_a_schedule_or_a_schedule_error(text: str) -> None:
    try:
        schedule = Schedule.from_csv(text)
        schedule.check()
    except ScheduleError:
        return
    assert Schedule.from_csv(schedule.to_csv()) == schedule


def test_attributes() -> None:
    schedule = Schedule.of([["0F0", "3F0", "3B0", "0B0"], ["1F0", "2F0", "2B0", "1B0"]])
    assert (schedule.ranks, schedule.stages, schedule.microbatches) == (2, 4, 1)
    assert schedule.placement == (0, 1, 1, 0)
    assert schedule.stages_of(0) == (0, 3)
    assert not schedule.is_forward_only
    assert str(schedule) == "custom: 2 ranks, 4 stages, 1 microbatches"


@given(schedules())
def test_forward_only_is_the_same_without_backwards(schedule: Schedule) -> None:
    forward = schedule.forward_only()
    assert forward.is_forward_only
    forward.check()
    for order, before in zip(forward.orders, schedule.orders, strict=True):
        kept = [
            part
            for action in before
            for part in ([action] if isinstance(action, Action) else action)
            if part.kind == Kind.F
        ]
        assert list(order) == kept


def test_placements() -> None:
    assert loop_placement(3, 2) == (0, 1, 2, 0, 1, 2)
    assert v_placement(4) == (0, 1, 2, 3, 3, 2, 1, 0)
    assert v_placement(2, 3) == (0, 1, 1, 0, 0, 1)


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (1, 3), (2, 1), (4, 3)])
def test_afab_drawn(ranks: int, microbatches: int) -> None:
    schedule = build_schedule("afab", ranks=ranks, microbatches=microbatches)
    for rank, order in enumerate(schedule.orders):
        wanted = [f"{rank}F{b}" for b in range(microbatches)] + [f"{rank}B{b}" for b in range(microbatches)]
        assert [str(action) for action in order] == wanted
