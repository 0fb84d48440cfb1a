"""The check against token games played by brute force: hanging schedules, and windows of posted receives."""

from __future__ import annotations

import pytest
from hypothesis import event, given

from ppsim import Action, Order, OverlappedPair, Schedule, ScheduleError
from ppsim.schedule import deadlock
from ppsim.schedule.deadlock import smallest_receive_window
from tests.support.evaluator import spelled, stuck_ranks
from tests.support.strategies import orders_that_may_hang, schedules


@given(orders_that_may_hang())
def test_a_schedule_is_refused_exactly_if_tokens_get_stuck(orders: list[list[Action | OverlappedPair]]) -> None:
    schedule = Schedule.of(orders)
    stuck = stuck_ranks(spelled(schedule), schedule.placement)
    event(f"hangs: {bool(stuck)}")
    if stuck:
        with pytest.raises(ScheduleError, match="would wait for ever") as caught:
            schedule.check()
        # The circle is named, and only ranks that are stuck are in it.
        waits = [part for part in str(caught.value).split("; ") if " waits for " in part]
        named = {int(part.split("rank ")[1].split(" ")[0]) for part in waits}
        assert named
        assert named <= set(stuck)
    else:
        schedule.check()


@given(orders_that_may_hang())
def test_waves_go_as_far_as_one_action_at_a_time(orders: list[list[Action | OverlappedPair]]) -> None:
    """And every order they find is one in which an action comes after what it needs."""
    program = Schedule.of(orders).program
    found = [order.tolist() for order in (deadlock._one_by_one(program), deadlock._in_waves(program))]
    assert sorted(found[0]) == sorted(found[1])
    for order in found:
        at = {action: place for place, action in enumerate(order)}
        for action in order:
            needs = [int(program.needs[row]) for row in range(*program.action_start[action : action + 2])]
            assert all(at[int(program.row_action[need])] < at[action] for need in needs if need >= 0)
            assert action == program.rank_actions[program.rank[program.action_start[action]]] or action - 1 in at


@given(schedules())
def test_every_interleaving_of_a_sequence_passes(schedule: Schedule) -> None:
    schedule.check()
    assert stuck_ranks(spelled(schedule), schedule.placement) == []


def test_the_circle_is_shown() -> None:
    """PyTorch's validator accepts this one."""
    schedule = Schedule.of([["0F0", "0B0", "0F1", "0B1"], ["1F0", "1F1", "1B0", "1B1"]])
    with pytest.raises(ScheduleError) as caught:
        schedule.check()
    assert str(caught.value) == (
        "the schedule would wait for ever: rank 0 at 0B0 waits for 1B0, which rank 1 runs 1 later than the 1F1 it is "
        "held at; rank 1 at 1F1 waits for 0F1, which rank 0 runs 1 later than the 0B0 it is held at. "
        "Move one of these actions earlier or later"
    )


def test_a_rank_that_waits_for_itself() -> None:
    with pytest.raises(ScheduleError, match="rank 0 at 1F0 waits for 0F0, which rank 0 runs 1 later than the 1F0"):
        Schedule.of([["1F0", "0F0", "1B0", "0B0"]]).check()


def test_a_pair_that_waits_for_its_own_half() -> None:
    """0B0 takes what 1F0 leads to, and both are to start at once."""
    with pytest.raises(ScheduleError, match="would wait for ever"):
        Schedule.of([["0F0", "(1F0;0B0)OVERLAP_F_B", "1B0"]]).check()


@given(schedules())
def test_the_smallest_window_is_the_smallest_with_which_tokens_reach_the_end(schedule: Schedule) -> None:
    orders, placement = spelled(schedule), schedule.placement
    window = smallest_receive_window(schedule.program)
    event(f"window: {window}")
    assert stuck_ranks(orders, placement, window=window) == []
    if window > 0:
        assert stuck_ranks(orders, placement, window=window - 1) != []


@pytest.mark.parametrize(
    ("first", "second", "window"),
    [
        (["0F0", "0F1", "0F2"], ["1F0", "1F1", "1F2"], 1),
        (["0F0", "0F1", "0F2"], ["1F2", "1F0", "1F1"], 3),
        (["0F0", "0F1", "0F2"], ["1F1", "1F0", "1F2"], 2),
    ],
)
def test_windows_drawn(first: list[str], second: list[str], window: int) -> None:
    assert smallest_receive_window(Schedule.of([first, second]).program) == window


def test_no_messages_need_no_window() -> None:
    assert smallest_receive_window(Schedule.of([["0F0", "1F0", "1B0", "0B0"]]).program) == 0


def test_a_pair_that_takes_both_messages_from_one_link_needs_both_at_once() -> None:
    """Cause of a bug: the pair was taken to use its first message before its second was there."""
    rank_0 = ["0F0", "3F0", "3B0", "0F1", "3F1", "3B1", "0B0", "0B1"]
    rank_1 = ["1F0", "2F0", "(1F1;2B0)OVERLAP_F_B", "2F1", "2B1", "1B0", "1B1"]
    schedule = Schedule.of([rank_0, rank_1])
    schedule.check()
    assert smallest_receive_window(schedule.program) == 2
    assert stuck_ranks(spelled(schedule), schedule.placement, window=1) == [0, 1]


def test_long_chains_are_checked_without_recursion() -> None:
    stages = 3000
    orders = [Order.of([f"{s}F0", f"{s}B0"]) for s in range(stages)]
    Schedule.of(orders).check()
