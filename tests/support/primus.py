"""Primus's files written from simulated steps, as a cluster whose ranks start apart would have written them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ppsim import Kind, Trace

PUBLISHED = Path(__file__).parents[2] / "studies" / "published" / "primus_pp8"
SERIES = {Kind.F: "fwd", Kind.B: "bwd", Kind.I: "bwd", Kind.W: "wgrad"}


def write_primus(
    steps: Sequence[Trace], path: Path, *, behind_s: Sequence[float], numbered: bool = True, memory: bool = True
) -> None:
    """Write a folder. `behind_s`: by how much each rank's clock is behind. `numbered`: write chunk and microbatch."""
    path.mkdir(parents=True, exist_ok=True)
    schedule = steps[0].schedule
    program = schedule.program
    chunks = schedule.stages // schedule.ranks
    (path / "config.json").write_text(
        json.dumps({"pp_size": schedule.ranks, "vp_size": chunks, "num_mbs": schedule.microbatches})
    )
    for rank in range(schedule.ranks):
        held = list(schedule.stages_of(rank))
        document = {}
        for number, trace in enumerate(steps, start=1):
            entry: dict[str, list | float] = {"total": 1e3 * trace.makespan_s}
            if memory and trace.memory.total_bytes is not None:
                entry["memory"] = int(trace.memory.total_bytes[rank]) / 2**30
            for name in dict.fromkeys(SERIES.values()):
                rows = [row for row in program.rows_of(rank) if SERIES[Kind(int(program.kind[row]))] == name]
                # An overlapped pair is written as both, with one interval.
                first, last = program.action_start[:-1], program.action_start[1:] - 1
                begin = trace.start_s[first][program.row_action[rows]] - behind_s[rank]
                end = trace.end_s[last][program.row_action[rows]] - behind_s[rank]
                entry[f"{name}_start"], entry[f"{name}_end"] = (1e3 * begin).tolist(), (1e3 * end).tolist()
                if numbered:
                    entry[f"{name}_minibatch"] = program.microbatch[rows].tolist()
                    entry[f"{name}_chunk"] = [held.index(int(stage)) for stage in program.stage[rows]]
            document[str(number)] = entry
        (path / f"pp_rank_{rank}.json").write_text(json.dumps(document))


def apart(ranks: int, seed: int = 0) -> list[float]:
    """Clocks that differ by seconds."""
    return np.random.default_rng(seed).normal(0, 3, ranks).tolist()
