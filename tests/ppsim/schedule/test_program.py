"""Lowering: completeness, the message table, and the assignment's Q7."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from ppsim import Action, Kind, Order, Schedule, ScheduleError, build_schedule
from ppsim.schedule.program import Program
from tests.support.evaluator import messages_of_links, spelled
from tests.support.strategies import schedules

_PEER = {"RECV_F": -1, "SEND_F": +1, "RECV_B": +1, "SEND_B": -1}


@pytest.mark.parametrize("microbatches", [1, 2, 5])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_four_operations_exist_exactly_where_q7_says(ranks: int, microbatches: int) -> None:
    """recv_forward and send_backward: all but the first. send_forward and recv_backward: all but the last."""
    program = build_schedule("afab", ranks=ranks, microbatches=microbatches).program
    for rank in range(ranks):
        is_first, is_last = rank == 0, rank == ranks - 1
        exists = {"RECV_F": not is_first, "SEND_F": not is_last, "RECV_B": not is_last, "SEND_B": not is_first}
        wanted = []
        for b in range(microbatches):
            wanted += (
                [f"{rank}RECV_F{b}"] * exists["RECV_F"] + [f"{rank}F{b}"] + [f"{rank}SEND_F{b}"] * exists["SEND_F"]
            )
        for b in range(microbatches):
            wanted += (
                [f"{rank}RECV_B{b}"] * exists["RECV_B"] + [f"{rank}B{b}"] + [f"{rank}SEND_B{b}"] * exists["SEND_B"]
            )
        assert [str(action) for action in program.order_with_messages(rank)] == wanted


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_four_operations_go_to_the_neighbours_q7_names(ranks: int) -> None:
    program = build_schedule("afab", ranks=ranks, microbatches=3).program
    messages = program.messages
    found = set()
    for message in range(len(messages)):
        source, destination = int(messages.source[message]), int(messages.destination[message])
        sent = program.message_action(message, sending=True).kind.name
        received = program.message_action(message, sending=False).kind.name
        assert destination == source + _PEER[sent]
        assert source == destination + _PEER[received]
        found |= {sent, received}
    assert found == (set(_PEER) if ranks > 1 else set())
    assert program.links() == sorted((a, b) for a in range(ranks) for b in range(ranks) if abs(a - b) == 1)


@given(schedules())
def test_the_message_table_is_what_the_design_says(schedule: Schedule) -> None:
    program = schedule.program
    messages = program.messages
    found: dict[tuple[int, int], list] = {}
    for k in range(len(messages)):
        link = (int(messages.source[k]), int(messages.destination[k]))
        assert messages.position[k] == len(found.setdefault(link, []))
        ends = (program.action_of(int(messages.producer[k])), program.action_of(int(messages.consumer[k])))
        found[link].append(tuple((a.stage, a.kind.name, a.microbatch) for a in ends))
    assert found == messages_of_links(spelled(schedule), schedule.placement)
    assert program.links() == sorted(found)


@given(schedules())
def test_rows_are_the_orders_and_point_at_their_messages(schedule: Schedule) -> None:
    program = schedule.program
    for rank in range(program.ranks):
        texts = [p for action in schedule.orders[rank] for p in ([action] if isinstance(action, Action) else action)]
        assert [program.action_of(row) for row in program.rows_of(rank)] == texts
        assert {int(program.rank[row]) for row in program.rows_of(rank)} <= {rank}
    index = np.arange(len(program.messages))
    assert (program.message_in[program.messages.consumer] == index).all()
    assert (program.message_out[program.messages.producer] == index).all()
    assert (program.message_in >= 0).sum() == (program.message_out >= 0).sum() == len(index)
    assert program.actions == sum(map(len, schedule.orders))
    assert np.array_equal(np.diff(program.action_start).sum(), len(program.stage))


def test_a_pairs_receives_come_before_it_and_its_sends_after() -> None:
    schedule = Schedule.of([["0F0", "0F1", "0B0", "0B1"], ["1F0", "(1F1;1B0)OVERLAP_F_B", "1B1"]])
    lowered = [str(action) for action in schedule.program.order_with_messages(1)]
    assert lowered == ["1RECV_F0", "1F0", "1RECV_F1", "(1F1;1B0)OVERLAP_F_B", "1SEND_B0", "1B1", "1SEND_B1"]


@pytest.mark.parametrize(
    ("orders", "said"),
    [
        ([["0F0", "0B0"], ["1B0"]], "stage 1, microbatch 0 has no F: add 1F0"),
        ([["0F0", "0B0", "0F1"], ["1F0", "1B0", "1F1", "1B1"]], "stage 0, microbatch 1 has no backward: add 0B1"),
        ([["0F0", "0F0", "0B0"]], "0F0 occurs 2 times"),  # PyTorch's validator accepts it
        ([["0F0", "0B0", "0B0"]], "0B0 occurs 2 times"),
        ([["0F0", "0B0", "0I0", "0W0"]], "a full backward B and a split one: keep 0B0, or 0I0 and 0W0"),
        ([["0F0", "0W0"]], "has W without I: add 0I0"),
        ([["0F0", "0I0"]], "has I without W: add 0W0"),
        ([["0B0", "0F0"]], "on rank 0 0B0 comes before 0F0, which it needs: put 0B0 after 0F0"),
        ([["0F0", "0W0", "0I0"]], "on rank 0 0W0 comes before 0I0"),
        ([["(0F0;0B0)OVERLAP_F_B"]], "0B0 comes before 0F0"),  # both start at once, so B would run without its F
    ],
)
def test_incomplete_or_disordered_schedules_are_refused(orders: list[list[str]], said: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.of(orders).check()
    assert said in str(caught.value)


@given(schedules(pairs=False, recompute=False))
def test_taking_any_action_away_is_noticed(schedule: Schedule) -> None:
    """By name, unless whole microbatches or stages are gone, where the rest may be complete."""
    for rank, order in enumerate(schedule.orders):
        for index in range(len(order)):
            rest = [*order[:index], *order[index + 1 :]]
            orders = tuple(Order.of(rest) if r == rank else o for r, o in enumerate(schedule.orders))
            less = Schedule(orders=orders, placement=schedule.placement, microbatches=schedule.microbatches)
            if less.is_forward_only and not schedule.is_forward_only:
                continue  # only the last backward of a one-action step: what is left is an evaluation
            with pytest.raises(ScheduleError, match=r"has no|without"):
                less.check()


@pytest.mark.parametrize(
    ("microbatches", "said"),
    [
        (2_000_000_000, "stage 0, microbatch 1 has no F: add 0F1"),
        (2**62, "stage 0, microbatch 1 has no F: add 0F1"),
        (2, "stage 0, microbatch 1 has no F: add 0F1"),
    ],
)
def test_a_mistyped_microbatch_does_not_ask_for_gigabytes(microbatches: int, said: str) -> None:
    """Cause of a bug: tables of stages times microbatches were made before anything was counted."""
    orders = (Order.of(["0F0", "0B0"]),)
    with pytest.raises(ScheduleError) as caught:
        Schedule(orders=orders, placement=(0,), microbatches=microbatches).check()
    assert str(caught.value) == said


def test_the_first_missing_forward_is_named_with_many_stages() -> None:
    with pytest.raises(ScheduleError, match="stage 1, microbatch 1 has no F: add 1F1"):
        Schedule.of([["0F0", "0F1", "0F2"], ["1F0", "1F2"]]).check()


@pytest.mark.parametrize("orders", [(), (Order.of([]),)])
def test_a_schedule_without_actions_is_refused(orders: tuple[Order, ...]) -> None:
    """Cause of a bug: numpy's words about empty arrays instead of ours."""
    with pytest.raises(ScheduleError, match="holds no action"):
        Schedule(orders=orders, placement=(), microbatches=0).check()


def test_actions_beyond_the_schedules_numbers_are_refused() -> None:
    order = Order.of(["0F0", "0B0", "0F5"])
    with pytest.raises(ScheduleError, match="computes stage 0, microbatch 5, but there are only 1 stages and 1 micro"):
        Schedule(orders=(order,), placement=(0,), microbatches=1).check()
    with pytest.raises(ScheduleError, match="stage 0 computes on rank 0 but is placed on rank 1"):
        Schedule(orders=(Order.of(["0F0"]), Order.of([])), placement=(1,), microbatches=1).check()


def test_a_program_is_made_once() -> None:
    schedule = build_schedule("afab", ranks=2, microbatches=2)
    assert isinstance(schedule.program, Program)
    assert schedule.program is schedule.program
    assert schedule.program.kind.tolist().count(Kind.B) == 4
