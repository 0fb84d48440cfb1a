"""Review: everything that is wrong with a schedule's text, each at its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ppsim.checks import checked
from ppsim.errors import ScheduleError
from ppsim.schedule import csv_text
from ppsim.schedule.csv_text import Cell
from ppsim.schedule.lowering import find_violations
from ppsim.schedule.program_tables import Post
from ppsim.schedule.schedule import Schedule, schedule_of_cells

Place = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Parameters
    ----------
    message : str
        What, where, and the remedy.
    places : tuple of (int, int)
        Row and column of each cell that it concerns, counted from 1; empty where no cell is to blame.
    """

    message: str
    places: tuple[Place, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Review:
    """What a text holds, and what is wrong with it.

    Parameters
    ----------
    schedule : Schedule or None
        None where the text could not be read as orders of stages. With problems it can be shown but not run.
    problems : tuple of Problem
        Empty for a schedule that can be run.
    """

    schedule: Schedule | None
    problems: tuple[Problem, ...]


@checked
def review_csv(text: str, *, name: str = "custom", copies: int = 1) -> Review:
    """Read a schedule as `Schedule.from_csv` and `Schedule.check` do, and collect what they would complain about.

    Parameters
    ----------
    text : str
        A schedule in PyTorch's format.
    name : str
        For titles.
    copies : int
        Copies of the model; see `Schedule`.

    Returns
    -------
    Review
        All complaints of the first kind that occurs: of cells that hold no action, of stages on several ranks, of
        microbatches in two copies of the model, of actions that are doubled, of those that are missing or out of order
        on their rank, of communication, of waiting in a circle.

    Raises
    ------
    InputError
        If `text` or `name` is no text.

    Examples
    --------
    >>> review_csv("0F0,0X0,0B1\\n").problems[0].places
    ((1, 2),)
    """
    ranks, problems = _read(text)
    if problems:
        return Review(schedule=None, problems=problems)
    try:
        schedule = Schedule.of(
            ([cell.action for cell in cells if cell.computes] for cells in ranks), name=name, copies=copies
        )
    except ScheduleError as error:
        return Review(schedule=None, problems=(Problem(message=str(error), places=_misplaced(ranks)),))
    problems = _violations(ranks, schedule)
    if not problems and any(not cell.computes for cells in ranks for cell in cells):
        try:
            schedule = schedule_of_cells(ranks, name, copies)
        except ScheduleError as error:
            problems = (_problem(error),)
    return Review(schedule=schedule, problems=problems or _waiting(ranks, schedule))


def _read(text: str) -> tuple[list[list[Cell]], tuple[Problem, ...]]:
    """The cells that hold actions, and what is said of those that hold none."""
    try:
        rows = csv_text.split_cells(text)
    except ScheduleError as error:
        return [], (Problem(message=str(error)),)
    ranks: list[list[Cell]] = []
    problems = []
    for row, cells in enumerate(rows, start=1):
        ranks.append([])
        for column, cell in enumerate(cells, start=1):
            if cell.strip():
                try:
                    ranks[-1].append(csv_text.read_cell(row, column, cell))
                except ScheduleError as error:
                    problems.append(_problem(error))
    return ranks, tuple(problems)


def _problem(error: ScheduleError) -> Problem:
    return Problem(message=str(error), places=() if error.place is None else (error.place,))


def _misplaced(ranks: Sequence[Sequence[Cell]]) -> tuple[Place, ...]:
    """The cells whose stage computes on an earlier rank too."""
    holder: dict[int, int] = {}
    found = []
    for rank, cells in enumerate(ranks):
        for cell in cells:
            if cell.computes and any(holder.setdefault(part.stage, rank) != rank for part in cell.parts):
                found.append((cell.row, cell.column))
    return tuple(found)


def _violations(ranks: Sequence[Sequence[Cell]], schedule: Schedule) -> tuple[Problem, ...]:
    """What keeps the computations from being lowered."""
    try:
        found = find_violations(schedule.orders, schedule.placement, schedule.microbatches, schedule.copies)
    except ScheduleError as error:
        return (_problem(error),)
    return tuple(Problem(message=each.message, places=_places(ranks, each.rows)) for each in found)


def _waiting(ranks: Sequence[Sequence[Cell]], schedule: Schedule) -> tuple[Problem, ...]:
    """The circle in which actions, and messages that the text posts, wait for each other."""
    circle = schedule.program.find_circle()
    if circle is None:
        return ()
    place_of_post = {(rank, cell.action): (cell.row, cell.column) for rank, cells in enumerate(ranks) for cell in cells}

    def place(waiter: int | Post) -> Place:
        if isinstance(waiter, int):
            return _places(ranks, [waiter])[0]
        messages = schedule.program.messages
        rank = int((messages.source if waiter.is_send else messages.destination)[waiter.message])
        return place_of_post[rank, schedule.program.message_action(waiter.message, sending=waiter.is_send)]

    return (Problem(message=circle.message, places=tuple(map(place, circle.waiting))),)


def _places(ranks: Sequence[Sequence[Cell]], rows: Sequence[int]) -> tuple[Place, ...]:
    """Where rows of the joined orders stand in the text."""
    cell_of_row = [cell for cells in ranks for cell in cells if cell.computes for _ in cell.parts]
    return tuple((cell_of_row[row].row, cell_of_row[row].column) for row in rows)
