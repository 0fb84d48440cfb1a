"""A rank's part of a program: its rows, and what stands between its actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ppexec.stage.stage import Stage
from ppexec.stage.timed import TimedStage
from ppsim import Kind, Program


class RankRow(NamedTuple):
    """One row of the program, as its rank needs it: an action, or one of the two parts of an overlapped pair.

    Rows and messages are numbers; -1 stands for none. local_input: the row on this rank whose result this row takes.
    local_output: whether another row on this rank takes this row's result. is_split: whether the microbatch's backward
    is split into I and W. is_recomputed: whether an R computes the microbatch's forward once more. is_moved: whether
    the microbatch's activations go to host memory. reduces: whether this is the stage's last backward of the step,
    after which its gradients are added up over replicas and copies of the stage.
    """

    row: int
    kind: Kind
    stage: Stage | TimedStage
    microbatch: int
    local_input: int
    message_in: int
    message_out: int
    local_output: bool
    is_split: bool
    is_recomputed: bool
    is_moved: bool
    reduces: bool


def spelled(rows: Sequence[RankRow]) -> str:
    """An action as text, for errors: "2F0", or "0F3 and 3B1" for an overlapped pair."""
    return " and ".join(f"{row.stage.index}{row.kind.name}{row.microbatch}" for row in rows)


def actions_of(program: Program, rank: int, stages: Mapping[int, Stage | TimedStage]) -> list[list[RankRow]]:
    """The rows of each of a rank's actions, in sequence."""
    # Rows whose result another row of this rank takes without a message.
    needed_here = {
        int(program.needs[row])
        for row in program.rows_of(rank)
        if program.needs[row] >= 0 and program.message_in[row] < 0
    }
    weight_rows = [row for row in program.rows_of(rank) if program.kind[row] == Kind.W]
    split = {(int(program.stage[row]), int(program.microbatch[row])) for row in weight_rows}
    moved = set(zip(program.offload.stage.tolist(), program.offload.microbatch.tolist(), strict=True))
    return [
        [
            RankRow(
                row=row,
                kind=Kind(int(program.kind[row])),
                stage=stages[int(program.stage[row])],
                microbatch=int(program.microbatch[row]),
                local_input=int(program.needs[row]) if program.message_in[row] < 0 else -1,
                message_in=int(program.message_in[row]),
                message_out=int(program.message_out[row]),
                local_output=row in needed_here,
                reduces=int(program.last_gradient_row[program.stage[row]]) == row,
                is_split=(int(program.stage[row]), int(program.microbatch[row])) in split,
                is_recomputed=bool(program.is_recomputed[row]),
                is_moved=(int(program.stage[row]), int(program.microbatch[row])) in moved,
            )
            for row in range(int(program.action_start[action]), int(program.action_start[action + 1]))
        ]
        for action in range(int(program.rank_actions[rank]), int(program.rank_actions[rank + 1]))
    ]


def sharding_of(program: Program, rank: int) -> dict[int, list[tuple[Kind, int]]]:
    """What a rank gathers, frees and reduces, by place: 0 before the first action, k after k actions."""
    found: dict[int, list[tuple[Kind, int]]] = {}
    if program.schedule.sharding is not None:
        for place, action in program.schedule.sharding[rank]:
            found.setdefault(place, []).append((action.kind, action.stage))
    return found


def offload_of(program: Program, rank: int) -> dict[int, list[tuple[int, Kind, int, int]]]:
    """What a rank copies to host memory and back, by place as in `sharding_of`: number, kind, stage and microbatch.

    The number is the copy's position in the rank's `Offload`.
    """
    found: dict[int, list[tuple[int, Kind, int, int]]] = {}
    if program.schedule.offload is not None:
        for number, (place, action) in enumerate(program.schedule.offload[rank]):
            # An O or L always has a microbatch.
            found.setdefault(place, []).append((number, action.kind, action.stage, action.microbatch or 0))
    return found
