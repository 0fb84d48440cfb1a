"""Communication as written: kept, matched, and checked on every kind of communicator by a token game."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from ppsim import InputError, Schedule, ScheduleError, build_schedule
from ppsim.schedule.action import Kind
from ppsim.schedule.posts import Posts
from tests.support.evaluator import cells, stuck_on_streams
from tests.support.named import ONE_WAY
from tests.support.strategies import communications, schedules

STREAMS = ("link", "pair", "rank")


def _as_text(rows: list[list[str]]) -> str:
    return "".join(",".join(row) + "\n" for row in rows)


@pytest.mark.parametrize("streams", STREAMS)
@given(st.data())
def test_a_schedule_is_refused_exactly_if_tokens_get_stuck_on_its_streams(streams: str, data: st.DataObject) -> None:
    schedule = data.draw(schedules(least=2).flatmap(communications) | schedules(least=2))
    derived = schedule.communication is None
    if derived and streams == "link":
        schedule = schedule.with_communication("late")
    stuck = stuck_on_streams(cells(schedule.to_csv(messages=True)), schedule.placement, streams)
    event(f"derived: {derived}, hangs: {bool(stuck)}")
    if stuck:
        with pytest.raises(ScheduleError, match="would wait for ever") as caught:
            schedule.check(streams)
        named = {
            int(rank) for rank in re.findall(r"rank (\d+)'s|rank (\d+) ", str(caught.value)) for rank in rank if rank
        }
        assert named & set(stuck)
    else:
        schedule.check(streams)


@given(schedules().flatmap(communications))
def test_what_is_written_is_kept_where_it_stands(schedule: Schedule) -> None:
    text = schedule.to_csv(messages=True)
    again = Schedule.from_csv(text, name=schedule.name)
    assert again.communication == schedule.communication
    assert again.to_csv(messages=True) == text
    assert again.orders == schedule.orders


@given(schedules().flatmap(communications))
def test_an_evaluation_keeps_what_is_left_in_its_place(schedule: Schedule) -> None:
    rows = cells(schedule.to_csv(messages=True))
    wanted = [
        [
            f"{stage}F{mb}" if "(" in cell else cell
            for cell in row
            for stage, kind, mb in re.findall(r"(\d+)(F|SEND_F|RECV_F)(\d+)", cell)
        ]
        for row in rows
    ]
    assert cells(schedule.forward_only().to_csv(messages=True)) == wanted


@given(schedules(), st.sampled_from(["early", "late"]))
def test_receives_placed_early_hang_on_no_streams(schedule: Schedule, place: str) -> None:
    placed = schedule.with_communication(place)
    for streams in STREAMS if place == "early" else ["link"]:
        placed.check(streams)
        assert stuck_on_streams(cells(placed.to_csv(messages=True)), schedule.placement, streams) == []
    assert placed == schedule
    assert placed.with_communication("derived").communication is None


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", ONE_WAY)  # their pass knows one copy of the model
def test_early_receives_stand_where_pytorchs_own_pass_puts_them(name: str, ranks: int) -> None:
    torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    for microbatches in (1, ranks, 2 * ranks + 1):
        try:
            schedule = build_schedule(name, ranks=ranks, microbatches=microbatches)
        except ScheduleError:
            continue
        actions = {
            rank: [torch_schedules._Action.from_str(str(action)) for action in order]
            for rank, order in enumerate(schedule.orders)
        }
        theirs = torch_schedules._add_send_recv(actions, schedule.placement.__getitem__, schedule.stages)
        ours = cells(schedule.with_communication("early").to_csv(messages=True))
        assert ours == [[str(action) for action in theirs[rank]] for rank in range(ranks)]


def test_a_send_that_stands_behind_what_waits_for_it_hangs() -> None:
    """Cause of a bug: sends were derived anew, so this passed, and would have hung on any communicators."""
    text = "0F0,0RECV_B0,0B0,0SEND_F0\n1RECV_F0,1F0,1B0,1SEND_B0\n"
    schedule = Schedule.from_csv(text)
    for streams in STREAMS:
        with pytest.raises(ScheduleError) as caught:
            schedule.check(streams)
        said = str(caught.value)
        for part in (
            "rank 0 posts 0SEND_F0 after 0B0",
            "rank 0 at 0B0 waits for 0RECV_B0",
            "rank 1 at 1F0 waits for 1RECV_F0",
        ):
            assert part in said or streams == "rank"


def test_the_circle_on_one_stream_is_shown() -> None:
    """Both ranks send first and receive then: each send waits for a receive that stands behind the other send."""
    schedule = Schedule.of([["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]])
    schedule.check("link")
    for streams, name in (("pair", "communicator with rank 1"), ("rank", "communicator")):
        with pytest.raises(ScheduleError) as caught:
            schedule.check(streams)
        assert str(caught.value).startswith(
            f"the schedule would wait for ever: rank 0's 0RECV_B0 stands behind 0SEND_F1 on its {name}; rank 1's "
            f"1RECV_F1 stands behind 1SEND_B0 on its {name.replace('1', '0')}. Take schedule.with_comm"
        )


def test_one_compute_order_hangs_or_not_by_where_receives_stand() -> None:
    """Interleaved 1F1B: forwards that cross in the warm-up, with receives at their use and as they are sent."""
    schedule = build_schedule("interleaved-1f1b", ranks=2, microbatches=4)
    late, early = schedule.with_communication("late"), schedule.with_communication("early")
    assert late == early
    assert late.communication != early.communication
    late.check("link")
    with pytest.raises(ScheduleError, match="wait for ever"):
        late.check("rank")
    early.check("rank")


def test_sends_may_stand_in_another_order_than_their_actions() -> None:
    schedule = Schedule.of([["0F0", "0F1", "0SEND_F1", "0SEND_F0"], ["1RECV_F1", "1RECV_F0", "1F0", "1F1"]])
    messages = schedule.program.messages
    assert [str(schedule.program.message_action(k, sending=True)) for k in range(2)] == ["0SEND_F1", "0SEND_F0"]
    assert messages.sent_after.tolist() == [1, 1]
    assert messages.position.tolist() == [0, 1]
    schedule.check()


@pytest.mark.parametrize(
    ("orders", "said"),
    [
        ([["0F0", "0SEND_F0"], ["1F0"]], "rank 1: 1RECV_F0 is missing, which 1F0 needs"),
        ([["0F0", "0SEND_F0"], ["1F0", "1RECV_F0"]], "rank 1: 1RECV_F0 must come before 1F0"),
        ([["0SEND_F0", "0F0"], ["1RECV_F0", "1F0"]], "rank 0: 0SEND_F0 must come after 0F0"),
    ],
)
def test_what_is_wrong_with_stated_communication_names_the_rank(orders: list[list[str]], said: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.of(orders)
    assert said in str(caught.value)


def test_other_streams_are_refused() -> None:
    with pytest.raises(InputError, match="streams must be"):
        build_schedule("afab", ranks=2, microbatches=2).check("node")
    for streams in ("node", {}):  # what cannot be hashed used to be a TypeError
        with pytest.raises(InputError, match="streams must be one of link, pair, rank"):
            build_schedule("afab", ranks=2, microbatches=2).program.message_graph(streams)


def test_communication_that_does_not_fit_the_orders_is_refused_where_it_is_given() -> None:
    """Cause of a bug: this was checked in lowering alone, so `forward_only` and others met it as their own errors."""
    schedule = Schedule.of([["0F0", "0B0"], ["1F0", "1B0"]])
    with pytest.raises(ScheduleError, match="communication is of 1 ranks, but there are 2"):
        replace(schedule, communication=(Posts(),))
    with pytest.raises(ScheduleError, match="rank 0: a post stands before action 99, but there are 2 actions"):
        replace(schedule, communication=(Posts([99], 0, Kind.SEND_F, 0), Posts()))


def test_the_first_rank_that_lacks_something_or_has_it_wrong_is_named() -> None:
    """What is missing on rank 0 comes before what is wrong on rank 1, and of a row's two posts the receive."""
    with pytest.raises(ScheduleError, match="rank 0: 0SEND_F0 is missing, which 0F0 needs"):
        Schedule.of([["0F0"], ["1F0", "1RECV_F0"]])
    with pytest.raises(ScheduleError, match="rank 1: 1RECV_F0 is missing, which 1F0 needs"):
        Schedule.of([["0F0", "0SEND_F0"], ["1F0"], ["2RECV_F0", "2F0"]])
    for stage, microbatch in ((7, 0), (0, 2**31 - 1), (2**31 - 1, 2**31 - 1)):  # no number wraps round to another post
        with pytest.raises(ScheduleError, match=f"{stage}SEND_F{microbatch} has nothing to carry on rank 0"):
            Schedule.of([["0F0", "0SEND_F0", f"{stage}SEND_F{microbatch}"], ["1RECV_F0", "1F0"]])
