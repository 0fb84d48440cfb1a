"""Review: what is wrong with a schedule's text, held against the reader that raises the first complaint."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import InputError, Schedule, ScheduleError, build_schedule, schedule_names
from ppsim.schedule.review import review_csv
from tests.support.strategies import communications, schedules


def _first_complaint(text: str, copies: int = 1) -> str | None:
    try:
        Schedule.from_csv(text, copies=copies).check()
    except ScheduleError as error:
        return str(error)
    return None


@given(st.sampled_from(schedule_names()), st.integers(0, 2**32), st.integers(0, 4), st.booleans())
def test_the_first_problem_is_what_the_reader_raises(name: str, seed: int, changes: int, messages: bool) -> None:
    draw = random.Random(seed)
    schedule = build_schedule(name, ranks=2, microbatches=6)
    rows = [row.split(",") for row in schedule.to_csv(messages=messages).split()]
    for _ in range(changes):
        row = draw.choice(rows)
        here, there = draw.randrange(len(row)), draw.randrange(len(row))
        change = draw.choice(["swap", "swap", "lose", "double", "misspell", "move"])
        if change == "swap":
            row[here], row[there] = row[there], row[here]
        elif change == "lose":
            row[here] = ""
        elif change == "double":
            row[here] = row[there]
        elif change == "misspell":
            row[here] = "0X1"
        else:
            draw.choice(rows).append(row[here])
            row[here] = ""
    text = "\n".join(",".join(row) for row in rows)
    found = review_csv(text, copies=schedule.copies)
    assert (found.problems[0].message if found.problems else None) == _first_complaint(text, schedule.copies)
    for problem in found.problems:
        for row, column in problem.places:
            assert rows[row - 1][column - 1]


@given(schedules(least=2).flatmap(communications))
def test_stated_communication_that_hangs_is_a_problem_at_its_cells(schedule: Schedule) -> None:
    """Cause of a bug: the circle was looked for as if communication were derived, so a text that hangs was sound."""
    text = schedule.to_csv(messages=True)
    found, rows = review_csv(text), [row.split(",") for row in text.splitlines()]
    said = _first_complaint(text)
    assert [problem.message for problem in found.problems] == ([] if said is None else [said])
    for problem in found.problems:
        cells = [rows[row - 1][column - 1] for row, column in problem.places]
        assert cells
        assert len(problem.places) == len(set(problem.places))
        # Each step of the sentence is one cell's, and names it.
        steps = problem.message.removeprefix("the schedule would wait for ever: ").split(". ")[0].split("; ")
        assert len(cells) == len(steps)
        # A part of a pair is said, its cell holds both.
        assert all(
            any(part in step for part in re.findall(r"\d+[A-Z_]+\d+", cell))
            for cell, step in zip(cells, steps, strict=True)
        )


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("0F0,0F1,OB0\n1F0,,1Q0", [((1, 3),), ((2, 3),)]),  # every cell that is no action
        ("0B0,0F0,0B1,0F1\n1F0,1B0,1F1,1B1", [((1, 2), (1, 1)), ((1, 4), (1, 3))]),  # every backward before its F
        ("0F0,0B0,0F0\n1F0,1B0", [((1, 1), (1, 3))]),  # both of what is doubled
        ("0F0,0F1,0B0,0B1\n1F0,1B0,1F1", [((2, 3),)]),  # what is there of the microbatch that lacks something
        ("0F0,0B0\n0F1,0B1", [((2, 1), (2, 2))]),  # the stage's cells on its second rank
        ("0F0,0B0\n1B0,1F0", [((2, 2), (2, 1))]),
        ("0F0,0F1,0B1,0B0\n1F0,1B0,1F1,1B1", []),
        ("0F1,0F0,0B0,0B1\n1F0,1B0,1F1,1B1", []),
        ("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1", [((1, 2), (2, 1))]),  # one of each rank in the circle
        # A send behind the action that waits for its answer: both ranks' actions, and the posts that never come.
        (
            "0F0,0RECV_B0,0B0,0SEND_F0\n1RECV_F0,1F0,1B0,1SEND_B0",
            [((2, 3), (2, 2), (1, 4), (1, 3), (2, 4))],
        ),
    ],
)
def test_each_problem_is_at_its_cells(text: str, places: list[tuple[tuple[int, int], ...]]) -> None:
    assert [problem.places for problem in review_csv(text).problems] == places


def test_orders_that_cannot_run_can_be_shown() -> None:
    found = review_csv("0B0,0F0\n1F0,1B0")
    assert found.problems
    assert found.schedule is not None
    assert found.schedule.ranks == 2
    assert review_csv("what is this").schedule is None


def test_an_error_of_one_cell_knows_its_place() -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_csv("0F0,0B0\n1F0,1C0")
    assert caught.value.place == (2, 2)


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(InputError, match="text must be text, got 1"):
        review_csv(1)
