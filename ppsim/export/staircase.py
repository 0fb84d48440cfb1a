"""Staircase: a schedule drawn as text, with unit costs and free messages."""

from __future__ import annotations

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


def staircase(trace: Trace) -> str:
    """Draw a trace of `unit_trace`: a line per rank, a column per unit of time.

    ```
    rank 0  F0 F1  .  . B0 B0 B1 B1
    rank 1     F0 F1 B0 B0 B1 B1
    ```
    Idle units between a rank's actions are dots. A B fills two columns, an overlapped pair its F's and then its B's.
    Where a rank holds several stages the stage stands first, as in 2F0.
    """
    program = trace.program
    shows_stage = program.schedule.stages > program.ranks
    names = [kind.name for kind in Kind]
    labels = [
        f"{stage if shows_stage else ''}{names[kind]}{microbatch}"
        for stage, kind, microbatch in zip(
            program.stage.tolist(), program.kind.tolist(), program.microbatch.tolist(), strict=True
        )
    ]
    width = max(map(len, labels))
    starts, ends = trace.start_s.astype(int).tolist(), trace.end_s.astype(int).tolist()
    title_width = len(f"rank {program.ranks - 1}")
    lines = []
    for rank in range(program.ranks):
        cells: list[str] = []
        for row in program.rows_of(rank):
            cells += ["." if cells else ""] * (starts[row] - len(cells))
            cells += [labels[row]] * (ends[row] - starts[row])
        # A first idle stretch is blank: "." is chosen above only once the rank has begun.
        lines.append(f"{f'rank {rank}':{title_width}}  " + " ".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)
