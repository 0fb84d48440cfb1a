"""CSV text: a schedule in PyTorch's format, a row per rank and a cell per action, with or without communication."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ppsim.errors import ScheduleError
from ppsim.schedule.action import Action, Kind, OverlappedPair, parse_action
from ppsim.schedule.program_tables import ProgramTables

_SENDS = (Kind.SEND_F, Kind.SEND_B)
_MESSAGES = (*_SENDS, Kind.RECV_F, Kind.RECV_B)
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
        """Whether the cell is a computation; else it is communication or concerns a stage as a whole."""
        return all(part.kind.computes for part in self.parts)

    def error(self, message: str) -> ScheduleError:
        """The error that says what is wrong with this cell, and where it stands."""
        return ScheduleError(f"row {self.row}, column {self.column}: {self.action} {message}")


def write_rows(ranks: Iterable[Sequence[Action | OverlappedPair]]) -> str:
    """CSV with a row per rank. Idle time is left out: it follows from the costs."""
    text = io.StringIO()
    # One empty cell for a rank without actions: a line with nothing on it would be lost at the end of a file.
    csv.writer(text, lineterminator="\n").writerows([str(action) for action in rank] or [""] for rank in ranks)
    return text.getvalue()


def with_reductions(actions: Sequence[Action | OverlappedPair]) -> list[Action | OverlappedPair]:
    """A rank's actions with a REDUCE_GRAD for each stage, after its last gradient and the sends that follow that."""
    last: dict[int, int] = {}
    for at, action in enumerate(actions):
        for part in action if isinstance(action, OverlappedPair) else (action,):
            if part.kind in (Kind.B, Kind.W):
                last[part.stage] = at
    after: dict[int, int] = {}
    for stage, at in last.items():
        # Sends go first, so that no other rank waits for the reduction.
        while at + 1 < len(actions) and isinstance(sent := actions[at + 1], Action) and sent.kind in _SENDS:
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

    PyTorch 2.5 and older spell a whole backward BW and its first half B. This is told by a BW, or by a B that has a W.

    Raises
    ------
    ScheduleError
        If the text is not CSV, a cell holds no action, or the spelling is neither the older nor the newer.
    """
    try:
        rows = list(csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=None)))
    except csv.Error as error:
        raise ScheduleError(f"the schedule is not CSV: {error}; write a row per rank and a cell per action") from None
    while rows and not rows[-1]:
        rows.pop()
    return [_read_row(number, cells) for number, cells in enumerate(_in_newer_spelling(rows), start=1)]


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


def _read_row(row: int, cells: list[str]) -> list[Cell]:
    result = []
    for column, cell in enumerate(cells, start=1):
        if cell.strip():
            try:
                action = parse_action(cell.strip())
            except ScheduleError as error:
                raise ScheduleError(f"row {row}, column {column}: {error}") from None
            result.append(Cell(row=row, column=column, action=action))
    return result


def has_messages(ranks: Sequence[Sequence[Cell]]) -> bool:
    """Whether any cell is a send or a receive."""
    return any(part.kind in _MESSAGES for cells in ranks for cell in cells for part in cell.parts)


def check_whole_stages(ranks: Sequence[Sequence[Cell]], placement: Sequence[int]) -> None:
    """Check REDUCE_GRAD, UNSHARD and RESHARD.

    Raises
    ------
    ScheduleError
        If one concerns a stage of another rank, or a reduction comes before the stage's last gradient.
    """
    for rank, cells in enumerate(ranks):
        last = {part.stage: at for at, cell in enumerate(cells) for part in cell.parts if part.kind in (Kind.B, Kind.W)}
        for at, cell in enumerate(cells):
            for part in cell.parts:
                if part.microbatch is not None:
                    continue
                if part.stage >= len(placement) or placement[part.stage] != rank:
                    raise cell.error(f"is on rank {rank}, which does not hold stage {part.stage}: move it there")
                if part.kind == Kind.REDUCE_GRAD and at < last.get(part.stage, -1):
                    raise cell.error(f"comes before the last backward of stage {part.stage}: put it after that")


def check_messages(ranks: Sequence[Sequence[Cell]], placement: Sequence[int], program: ProgramTables) -> None:
    """Check that sends and receives are exactly those that lowering derives, each where it can be run.

    Raises
    ------
    ScheduleError
        If one is missing, carries nothing, occurs twice, stands on the wrong side of the computation that it serves,
        or if a link's receives do not stand in the order of its sends.
    """
    for rank, cells in enumerate(ranks):
        _check_rank(rank, cells, program)
    _check_links(ranks, placement)


def _check_rank(rank: int, cells: Sequence[Cell], program: ProgramTables) -> None:
    """A rank's sends and receives are those that lowering derives, each on its side of what it serves."""
    served: dict[Action, Action] = {}  # message -> the computation that it leaves or feeds
    for row in program.rows_of(rank):
        if program.message_in[row] >= 0:
            served[program.message_action(int(program.message_in[row]), sending=False)] = program.action_of(row)
        if program.message_out[row] >= 0:
            served[program.message_action(int(program.message_out[row]), sending=True)] = program.action_of(row)
    computed: set[Action] = set()
    seen: set[Action] = set()
    for cell in cells:
        for part in cell.parts:
            if part.kind.computes:
                computed.add(part)
            elif part.kind in _MESSAGES:
                if part not in served:
                    raise cell.error(f"has nothing to carry on rank {rank}: leave it out")
                if part in seen:
                    raise cell.error("occurs twice: keep one")
                seen.add(part)
                if (part.kind in _SENDS) != (served[part] in computed):
                    side = "after" if part.kind in _SENDS else "before"
                    raise cell.error(f"must come {side} {served[part]}")
    missing = [message for message in served if message not in seen]
    if missing:
        raise ScheduleError(
            f"row {rank + 1}: {missing[0]} is missing, which {served[missing[0]]} needs; add it, or leave all "
            "communication out and it is derived"
        )


def _check_links(ranks: Sequence[Sequence[Cell]], placement: Sequence[int]) -> None:
    """The receives of each link stand in the order of its sends: PyTorch's messages are told apart by nothing else."""
    sent: dict[tuple[int, int], list[Action]] = {}
    received: dict[tuple[int, int], list[tuple[Cell, Action]]] = {}
    for rank, cells in enumerate(ranks):
        for cell in cells:
            for part in cell.parts:
                if part.kind not in _MESSAGES:
                    continue
                # The other end of SEND_F and RECV_B is on the next stage, that of SEND_B and RECV_F on the one before.
                other_stage = part.stage + (1 if part.kind in (Kind.SEND_F, Kind.RECV_B) else -1)
                peer = placement[other_stage]
                if part.kind in _SENDS:
                    arrives_as = Kind.RECV_F if part.kind == Kind.SEND_F else Kind.RECV_B
                    sent.setdefault((rank, peer), []).append(Action(other_stage, arrives_as, part.microbatch))
                else:
                    received.setdefault((peer, rank), []).append((cell, part))
    for link, arrivals in received.items():
        for (cell, part), expected in zip(arrivals, sent[link], strict=True):
            if part != expected:
                raise cell.error(f"stands where {expected} arrives: order receives as rank {link[0]} sends them")
