"""Staircase: a schedule drawn as text, with unit costs and free messages."""

from __future__ import annotations

from collections.abc import Callable

from ppsim.costs.stage_cost import StageCost
from ppsim.schedule.action import Kind
from ppsim.schedule.schedule import Schedule
from ppsim.simulation.simulate import simulate
from ppsim.trace.trace import Trace

UNIT_COST = StageCost(
    forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=1, weight_activation_bytes=1
)


def unit_trace(schedule: Schedule) -> Trace:
    """The step when F, I and W take 1, B takes 2, messages are free and a microbatch holds 1 on each stage."""
    return simulate(schedule, [UNIT_COST] * schedule.stages)


def staircase(trace: Trace, paint: Callable[[str, Kind], str] | None = None) -> str:
    """Draw a trace of `unit_trace`: a line per rank, a column per unit of time.

    ```
    rank 0  F0 F1  .  . B0 B0 B1 B1
    rank 1     F0 F1 B0 B0 B1 B1
    ```
    Idle units between a rank's actions are dots. A B fills two columns, an overlapped pair its F's and then its B's.
    Where a rank holds several stages the stage stands first, as in 2F0. `paint` colours a cell by its action's kind.
    """
    program = trace.program
    shows_stage = program.schedule.stages > program.ranks
    kinds = [Kind(kind) for kind in program.kind.tolist()]
    labels = [
        f"{stage if shows_stage else ''}{kind.name}{microbatch}"
        for stage, kind, microbatch in zip(program.stage.tolist(), kinds, program.microbatch.tolist(), strict=True)
    ]
    width = max(map(len, labels))
    cells_of = [f"{label:>{width}}" for label in labels]
    if paint is not None:
        cells_of = list(map(paint, cells_of, kinds))
    blank, idle = " " * width, f"{'.':>{width}}"
    starts, ends = trace.start_s.astype(int).tolist(), trace.end_s.astype(int).tolist()
    title_width = len(f"rank {program.ranks - 1}")
    lines = []
    for rank in range(program.ranks):
        cells: list[str] = []
        for row in program.rows_of(rank):
            # A first idle stretch is blank: dots are chosen only once the rank has begun.
            cells += [idle if cells else blank] * (starts[row] - len(cells))
            cells += [cells_of[row]] * (ends[row] - starts[row])
        lines.append(f"{f'rank {rank}':{title_width}}  " + " ".join(cells))
    return "\n".join(line.rstrip() for line in lines)
