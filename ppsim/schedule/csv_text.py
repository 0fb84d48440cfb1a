"""CSV text: a schedule in PyTorch's format, a row per rank and a cell per action, with or without communication."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ppsim.errors import ScheduleError
from ppsim.schedule.action import Action, Kind, OverlappedPair, parse_action
from ppsim.schedule.offload import COPY_KINDS, OffloadError
from ppsim.schedule.placed import PlacedError
from ppsim.schedule.posts import MESSAGE_KINDS, SENDS
from ppsim.schedule.sharding import ShardingError

_BACKWARD = re.compile(r"(?<![\w])(\d+)(BW|B|I|W)(\d+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell that holds an action.

    Parameters
    ----------
    row, column : int
        Where it stands in the file, counted from 1.
    action : Action or OverlappedPair
        What it holds.
    """

    row: int
    column: int
    action: Action | OverlappedPair

    @property
    def parts(self) -> tuple[Action, ...]:
        """The action, or the two parts of a pair."""
        return tuple(self.action) if isinstance(self.action, OverlappedPair) else (self.action,)

    @property
    def computes(self) -> bool:
        """Whether the cell is a computation; else it is communication, a copy, or concerns a stage as a whole."""
        return all(part.kind.computes for part in self.parts)

    @property
    def is_post(self) -> bool:
        """Whether the cell is a send or a receive."""
        return any(part.kind in MESSAGE_KINDS for part in self.parts)

    @property
    def is_copy(self) -> bool:
        """Whether the cell moves activations to host memory or back: O or L."""
        return any(part.kind in COPY_KINDS for part in self.parts)

    @property
    def is_of_stage(self) -> bool:
        """Whether the cell concerns a stage as a whole: REDUCE_GRAD, UNSHARD or RESHARD."""
        return any(part.microbatch is None for part in self.parts)

    def error(self, message: str) -> ScheduleError:
        """The error that says what is wrong with this cell, and where it stands."""
        where = f"row {self.row}, column {self.column}"
        return ScheduleError(f"{where}: {self.action} {message}", place=(self.row, self.column))


def write_rows(ranks: Iterable[Sequence[Action | OverlappedPair]]) -> str:
    """CSV with a row per rank. Idle time is left out: it follows from the costs."""
    text = io.StringIO()
    # One empty cell for a rank without actions: a line with nothing on it would be lost at the end of a file.
    csv.writer(text, lineterminator="\n").writerows([str(action) for action in rank] or [""] for rank in ranks)
    return text.getvalue()


def with_reductions(actions: Sequence[Action | OverlappedPair]) -> list[Action | OverlappedPair]:
    """A rank's actions with a REDUCE_GRAD for each stage, after its last B or W and the sends right behind that."""
    last: dict[int, int] = {}
    for at, action in enumerate(actions):
        for part in action if isinstance(action, OverlappedPair) else (action,):
            if part.kind in (Kind.B, Kind.W):
                last[part.stage] = at
    after: dict[int, int] = {}
    for stage, at in last.items():
        # Sends go first, so that no other rank waits for the reduction.
        while at + 1 < len(actions) and isinstance(sent := actions[at + 1], Action) and sent.kind in SENDS:
            at += 1
        after[at] = stage
    result: list[Action | OverlappedPair] = []
    for at, action in enumerate(actions):
        result.append(action)
        if at in after:
            result.append(Action(after[at], Kind.REDUCE_GRAD, None))
    return result


def read_cells(text: str) -> list[list[Cell]]:
    """The cells of each rank that hold something; blank lines at the end are no ranks.

    Raises
    ------
    ScheduleError
        If the text is not CSV, a cell holds no action, or the text mixes the older and the newer spelling.
    """
    return [
        [read_cell(row, column, cell) for column, cell in enumerate(cells, start=1) if cell.strip()]
        for row, cells in enumerate(split_cells(text), start=1)
    ]


def split_cells(text: str) -> list[list[str]]:
    """The cells of each row as text, empty ones too; blank lines at the end are no rows.

    PyTorch 2.5 and older spell a whole backward BW and its first half B. A text is in this spelling if it has a BW, or
    no I, and a B and a W of one stage and microbatch. The result is in the newer spelling.

    Raises
    ------
    ScheduleError
        If the text is not CSV, or mixes both spellings: it has I and BW.
    """
    try:
        rows = list(csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=None)))
    except csv.Error as error:
        raise ScheduleError(f"the schedule is not CSV: {error}; write a row per rank and a cell per action") from None
    while rows and not rows[-1]:
        rows.pop()
    return _in_newer_spelling(rows)


def _in_newer_spelling(rows: list[list[str]]) -> list[list[str]]:
    """The cells with B for a whole backward and I for its first half, as PyTorch 2.6 and newer write them."""
    found = [_BACKWARD.findall(cell) for row in rows for cell in row]
    of_kind: dict[str, set[tuple[str, str]]] = {name: set() for name in ("BW", "B", "I", "W")}
    for stage, name, microbatch in (each for cell in found for each in cell):
        of_kind[name].add((stage, microbatch))
    if not of_kind["BW"] and (of_kind["I"] or not of_kind["B"] & of_kind["W"]):
        return rows
    if of_kind["I"]:
        raise ScheduleError(
            "the schedule has both I and BW, which PyTorch never wrote together: spell a whole backward B, or its "
            "halves I and W"
        )
    newer = {"BW": "B", "B": "I", "W": "W"}
    return [
        [_BACKWARD.sub(lambda match: f"{match[1]}{newer[match[2]]}{match[3]}", cell) for cell in row] for row in rows
    ]


def read_cell(row: int, column: int, text: str) -> Cell:
    """The cell at a row and column, counted from 1. Raises ScheduleError, with its place, if it holds no action."""
    try:
        return Cell(row=row, column=column, action=parse_action(text.strip()))
    except ScheduleError as error:
        raise ScheduleError(f"row {row}, column {column}: {error}", place=(row, column)) from None


def located(error: PlacedError, ranks: Sequence[Sequence[Cell]]) -> ScheduleError:
    """The same error, with the row and column of the file instead of the rank and the entry."""
    if error.index is None:
        return ScheduleError(f"row {error.rank + 1}: {error.what}")
    # The index counts the entries of the error's own sort: sharding, copies, or sends and receives.
    sort = {ShardingError: "is_of_stage", OffloadError: "is_copy"}.get(type(error), "is_post")
    cell = [cell for cell in ranks[error.rank] if getattr(cell, sort)][error.index]
    return ScheduleError(f"row {cell.row}, column {cell.column}: {error.what}", place=(cell.row, cell.column))
