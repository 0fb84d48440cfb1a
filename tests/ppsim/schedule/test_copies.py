"""Several copies of the model: what is complete, what is refused, and what a second, slow answer says of it."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import InputError, Kind, Schedule, ScheduleError, build_schedule
from ppsim.schedule.lowering import find_violations
from ppsim.schedule.review import review_csv
from ppsim.trace.trace import Trace
from tests.support.evaluator import messages_of_links, spelled, stuck_on_streams, stuck_ranks
from tests.support.named import BOTH_WAYS
from tests.support.strategies import communications, schedules

BOTH = [["0F0", "3F1", "3B1", "0B0"], ["1F0", "2F1", "1B0", "2B1"]]


def some_copies(*, recompute: bool = True) -> st.SearchStrategy[Schedule]:
    of_copies = {"max_stages": 3, "max_microbatches": 6, "recompute": recompute}
    return st.integers(1, 3).flatmap(lambda copies: schedules(copies=copies, **of_copies))


copied = some_copies()


def test_each_microbatch_passes_through_one_copy() -> None:
    schedule = Schedule.of(BOTH, copies=2)
    schedule.check()
    assert (schedule.placement, schedule.stages, schedule.model_stages) == ((0, 1, 1, 0), 4, 2)
    assert schedule.routes.tolist() == [0, 1]
    assert str(schedule) == "custom: 2 ranks, 2 x 2 stages, 2 microbatches"
    assert schedule != replace(schedule, copies=1)


def test_read_as_one_model_it_is_incomplete() -> None:
    said = "stage 0, microbatch 1 has no F: add 0F1. Its stages are those of 2 copies of one model: give copies=2"
    with pytest.raises(ScheduleError, match=said):
        Schedule.of(BOTH).check()
    with pytest.raises(ScheduleError, match=r"stage 0, microbatch 1 has no F: add 0F1$"):
        Schedule.of([[*BOTH[0][:-1]], BOTH[1]]).check()  # as two copies it is incomplete too


@given(copied)
def test_messages_are_those_of_each_copy(schedule: Schedule) -> None:
    schedule.check()
    program = schedule.program
    expected = messages_of_links(spelled(schedule), schedule.placement, schedule.copies)
    found: dict[tuple[int, int], list[tuple[str, str]]] = {}
    table = program.messages
    for producer, consumer in zip(table.producer.tolist(), table.consumer.tolist(), strict=True):
        link = int(program.rank[producer]), int(program.rank[consumer])
        found.setdefault(link, []).append((str(program.action_of(producer)), str(program.action_of(consumer))))
    assert found == {
        link: [("{}{}{}".format(*one), "{}{}{}".format(*other)) for one, other in pairs]
        for link, pairs in expected.items()
    }


@given(some_copies(recompute=False), st.integers(0, 2**32), st.booleans())  # that B waits for its R, tokens do not know
def test_a_shuffled_order_is_refused_exactly_if_it_cannot_run(schedule: Schedule, seed: int, by_swap: bool) -> None:
    dice = random.Random(seed)
    rows = [[str(action) for action in order] for order in schedule.orders]
    row = dice.choice([row for row in rows if row])
    if by_swap:
        here, there = dice.randrange(len(row)), dice.randrange(len(row))
        row[here], row[there] = row[there], row[here]
    else:
        dice.shuffle(row)
    changed = Schedule.of(rows, copies=schedule.copies)
    stuck = stuck_ranks(spelled(changed), changed.placement, copies=changed.copies)
    try:
        changed.check()
    except ScheduleError:
        assert stuck
    else:
        assert not stuck


@given(copied.flatmap(communications), st.sampled_from(["link", "pair", "rank"]))
def test_stated_communication_hangs_where_moved_tokens_hang(schedule: Schedule, streams: str) -> None:
    posts = [[str(cell) for cell in schedule.program.order_with_messages(rank)] for rank in range(schedule.ranks)]
    stuck = stuck_on_streams(posts, schedule.placement, streams, schedule.copies)
    try:
        schedule.check(streams)  # type: ignore[arg-type]
    except ScheduleError:
        assert stuck
    else:
        assert not stuck


@given(copied, st.booleans())
def test_csv_reads_back_with_the_number_of_copies(schedule: Schedule, messages: bool) -> None:
    text = schedule.to_csv(messages=messages)
    again = Schedule.from_csv(text, name=schedule.name, copies=schedule.copies)
    assert again == schedule
    assert review_csv(text, copies=schedule.copies).problems == ()


@pytest.mark.parametrize(
    ("orders", "said"),
    [
        (
            [["0F0", "3F0", "3B0", "0B0"], ["1F0", "2F1", "1B0", "2B1"]],
            "microbatch 0 is computed by two copies of the model, in 0F0 and 3F0: let it pass through the 2 stages",
        ),
        ([["0F0", "3F1", "3B1"], ["1F0", "2F1", "1B0", "2B1"]], "stage 0, microbatch 0 has no backward: add 0B0"),
        ([["0F0", "3F1", "0B0"], ["1F0", "2F1", "1B0", "2B1"]], "stage 3, microbatch 1 has no backward: add 3B1"),
        ([["0F0", "3B1", "0B0"], ["1F0", "2F1", "1B0", "2B1"]], "stage 3, microbatch 1 has no F: add 3F1"),
        ([["0F0", "3F1", "3F1", "3B1", "0B0"], ["1F0", "2F1", "1B0", "2B1"]], "3F1 occurs 2 times: keep one"),
        ([["0F0", "3B1", "3F1", "0B0"], ["1F0", "2F1", "1B0", "2B1"]], "3B1 comes before 3F1, which it needs"),
        ([["0F0", "3F1"], ["1F0"]], "stage 2 has no action, but stage 3 has"),
        ([["0F0", "0B0"], ["1F0", "1B0"], ["2F1", "2B1"]], "3 stages are not 2 copies of a model: give each as many"),
        # A mistyped microbatch names what it lacks, without a table of so many cells.
        ([["0F0", "0B0"], ["1F2000000000", "1B2000000000"]], "stage 1, microbatch 1 has no F|microbatch 1 has no F"),
    ],
)
def test_what_is_wrong_is_said(orders: list[list[str]], said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        Schedule.of(orders, copies=2).check()


def test_a_copy_without_microbatches_is_refused() -> None:
    """Its gradients would be added to nothing, and its last backward would be that of another stage."""
    schedule = build_schedule("1f1b", ranks=2, microbatches=2)
    idle = replace(schedule, placement=(0, 1, 1, 0), copies=2)
    with pytest.raises(ScheduleError, match="stages 2 to 3, a copy of the model, compute nothing"):
        idle.check()
    assert len(find_violations(idle.orders, idle.placement, 2, copies=2)) == 1


@pytest.mark.parametrize("copies", [0, -1, True, 1.5, "2"])
def test_copies_are_a_whole_number(copies: object) -> None:
    with pytest.raises(InputError, match="copies must be"):
        Schedule.of(BOTH, copies=copies)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_gathering_parameters_goes_with_one_copy(name: str) -> None:
    with pytest.raises(ScheduleError, match="2 copies of the model and gathers parameters: sharding goes with one"):
        build_schedule(name, ranks=2, microbatches=4).with_sharding(1)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_it_is_told_from_the_cells_where_copies_are_mixed(name: str) -> None:
    text = build_schedule(name, ranks=2, microbatches=4).to_csv()
    problem = review_csv(text.replace("3F3", "0F3"), copies=2).problems[0]
    assert "microbatch 3 is computed by two copies" in problem.message
    rows = [row.split(",") for row in text.splitlines()]
    assert {rows[row - 1][column - 1] for row, column in problem.places} & {"3F3", "3B3"}


@given(copied)
def test_forwards_alone_are_complete_in_each_copy(schedule: Schedule) -> None:
    evaluation = schedule.forward_only()
    evaluation.check()
    assert evaluation.copies == schedule.copies
    assert evaluation.routes.tolist() == schedule.routes.tolist()


def test_a_trace_file_keeps_the_copies(tmp_path) -> None:
    from ppsim import StageCost, simulate

    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    trace = simulate(build_schedule("dualpipe", ranks=4, microbatches=8), [cost] * 4)
    trace.save(tmp_path / "step.trace")
    again = Trace.load(tmp_path / "step.trace")
    assert again.schedule == trace.schedule
    assert again.schedule.copies == 2
    assert np.array_equal(again.end_s, trace.end_s)


def test_frozen_stages_keep_their_copies() -> None:
    frozen = build_schedule("dualpipe", ranks=2, microbatches=4).with_frozen_stages([0, 2])
    frozen.check()
    kinds = np.concatenate([order.kind[np.isin(order.stage, (0, 2))] for order in frozen.orders])
    assert Kind.W not in kinds.tolist()
