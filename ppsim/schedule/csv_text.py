"""CSV files: a schedule in PyTorch's format, a row per rank and a cell per action, with or without communication."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from ppsim.errors import ScheduleError
from ppsim.schedule.action import Action, Kind, OverlappedPair, parse_action
from ppsim.schedule.schedule import Schedule

_SENDS = (Kind.SEND_F, Kind.SEND_B)
_MESSAGES = (*_SENDS, Kind.RECV_F, Kind.RECV_B)


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """A cell that holds something; row and column as a person counts them, from 1."""

    row: int
    column: int
    action: Action | OverlappedPair

    @property
    def parts(self) -> tuple[Action, ...]:
        return tuple(self.action) if isinstance(self.action, OverlappedPair) else (self.action,)

    def error(self, message: str) -> ScheduleError:
        return ScheduleError(f"row {self.row}, column {self.column}: {self.action} {message}")


def write_csv(schedule: Schedule, *, messages: bool = False) -> str:
    """The schedule as CSV. Idle time is left out: it follows from the costs.

    messages: add communication as PyTorch's runtime runs it ("compute_comms"): receives before and sends after the
    action they serve, and REDUCE_GRAD after the last backward of each stage. Raises ScheduleError for a schedule that
    cannot be lowered, if messages are wanted.
    """
    ranks: list[list[Action | OverlappedPair]]
    if messages:
        ranks = [_with_reductions(schedule.program.order_with_messages(rank)) for rank in range(schedule.ranks)]
    else:
        ranks = [list(order) for order in schedule.orders]
    text = io.StringIO()
    # One empty cell for a rank without actions: a line with nothing on it would be lost at the end of a file.
    csv.writer(text, lineterminator="\n").writerows([str(action) for action in rank] or [""] for rank in ranks)
    return text.getvalue()


def _with_reductions(actions: list[Action | OverlappedPair]) -> list[Action | OverlappedPair]:
    """REDUCE_GRAD after each stage's last gradient and what is sent then, so that nobody waits for the reduction."""
    last: dict[int, int] = {}
    for at, action in enumerate(actions):
        for part in action if isinstance(action, OverlappedPair) else (action,):
            if part.kind in (Kind.B, Kind.W):
                last[part.stage] = at
    after: dict[int, int] = {}
    for stage, at in last.items():
        while at + 1 < len(actions) and isinstance(sent := actions[at + 1], Action) and sent.kind in _SENDS:
            at += 1
        after[at] = stage
    result: list[Action | OverlappedPair] = []
    for at, action in enumerate(actions):
        result.append(action)
        if at in after:
            result.append(Action(after[at], Kind.REDUCE_GRAD, None))
    return result


def read_csv(text: str, *, name: str = "custom") -> Schedule:
    """A schedule from CSV; an empty cell is idle, blank lines at the end are no ranks.

    If the file holds any send or receive it must hold all of them, each send after what it sends and each receive
    before what it serves; REDUCE_GRAD comes after its stage's last backward. They are checked and left out, since
    lowering derives them; UNSHARD and RESHARD are left out too. Raises ScheduleError that names row, column and cell.
    """
    try:
        rows = list(csv.reader(io.StringIO(text, newline=None)))
    except csv.Error as error:
        raise ScheduleError(f"the schedule is not CSV: {error}") from None
    while rows and not rows[-1]:
        rows.pop()
    ranks = [_read_row(number, cells) for number, cells in enumerate(rows, start=1)]
    schedule = Schedule.of(
        ([cell.action for cell in cells if all(part.kind.computes for part in cell.parts)] for cells in ranks),
        name=name,
    )
    for rank, cells in enumerate(ranks):
        _check_whole_stages(schedule, rank, cells)
    if any(part.kind in _MESSAGES for cells in ranks for cell in cells for part in cell.parts):
        for rank, cells in enumerate(ranks):
            _check_messages(schedule, rank, cells)
        _check_links(schedule, ranks)
    return schedule


def _read_row(row: int, cells: list[str]) -> list[_Cell]:
    result = []
    for column, cell in enumerate(cells, start=1):
        if cell.strip():
            try:
                action = parse_action(cell.strip())
            except ScheduleError as error:
                raise ScheduleError(f"row {row}, column {column}: {error}") from None
            result.append(_Cell(row=row, column=column, action=action))
    return result


def _check_whole_stages(schedule: Schedule, rank: int, cells: list[_Cell]) -> None:
    """REDUCE_GRAD, UNSHARD and RESHARD concern a stage of this rank; a reduction comes after its last gradient."""
    last = {part.stage: at for at, cell in enumerate(cells) for part in cell.parts if part.kind in (Kind.B, Kind.W)}
    for at, cell in enumerate(cells):
        for part in cell.parts:
            if part.microbatch is not None:
                continue
            if part.stage not in schedule.stages_of(rank):
                raise cell.error(f"is on rank {rank}, which does not hold stage {part.stage}: move it there")
            if part.kind == Kind.REDUCE_GRAD and at < last.get(part.stage, -1):
                raise cell.error(f"comes before the last backward of stage {part.stage}: put it after that")


def _check_messages(schedule: Schedule, rank: int, cells: list[_Cell]) -> None:
    """The rank's sends and receives are those that lowering derives, each on its side of what it serves."""
    served: dict[Action, Action] = {}  # message -> the computation it leaves or feeds
    program = schedule.program
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


def _check_links(schedule: Schedule, ranks: list[list[_Cell]]) -> None:
    """Each link's receives stand in the order of its sends: PyTorch's messages have no names to be told by."""
    sent: dict[tuple[int, int], list[Action]] = {}
    received: dict[tuple[int, int], list[tuple[_Cell, Action]]] = {}
    for rank, cells in enumerate(ranks):
        for cell in cells:
            for part in cell.parts:
                if part.kind not in _MESSAGES:
                    continue
                is_send = part.kind in _SENDS
                ahead = part.kind in (Kind.SEND_F, Kind.RECV_B)  # the other end is the stage after
                peer = schedule.placement[part.stage + (1 if ahead else -1)]
                if is_send:
                    other = Kind.RECV_F if part.kind == Kind.SEND_F else Kind.RECV_B
                    arrives = Action(part.stage + (1 if ahead else -1), other, part.microbatch)
                    sent.setdefault((rank, peer), []).append(arrives)
                else:
                    received.setdefault((peer, rank), []).append((cell, part))
    for link, arrivals in received.items():
        for (cell, part), expected in zip(arrivals, sent[link], strict=True):
            if part != expected:
                raise cell.error(f"stands where {expected} arrives: order receives as rank {link[0]} sends them")
