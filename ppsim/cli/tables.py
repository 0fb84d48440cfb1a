"""Tables: what the commands say of schedules and traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppsim.export.text_table import text_table
from ppsim.schedule.schedule import Schedule
from ppsim.trace.trace import Trace


def about_of(schedule: Schedule) -> dict[str, Any]:
    """What a schedule is, as JSON has it."""
    return {
        "name": schedule.name,
        "ranks": schedule.ranks,
        "stages": schedule.stages,
        "copies": schedule.copies,
        "microbatches": schedule.microbatches,
        "placement": schedule.placement,
    }


def results_of(trace: Trace) -> dict[str, Any]:
    """What a step takes, as JSON has it."""
    return {
        "clock": trace.clock,
        "makespan_s": trace.makespan_s,
        "bubble_fraction": trace.bubble_fraction,
        "bubble_s": trace.bubble_s,
        "rank_time_s": trace.rank_time_s,
        "compute_s": trace.compute_s,
        "peak_activation_bytes": trace.peak_activation_bytes,
        "memory": trace.memory.to_dict(),
        "conditions": trace.conditions.to_dict(),
        "details": trace.details,
        **_reductions_of(trace),
    }


def _reductions_of(trace: Trace) -> dict[str, Any]:
    """What replicas add, from the step's start; nothing without them."""
    if trace.reduce_start_s is None or trace.reduce_end_s is None:
        return {}
    begin_s = trace.start_s.min()
    return {
        "step_s": trace.step_s,
        "reduce_start_s": trace.reduce_start_s - begin_s,
        "reduce_end_s": trace.reduce_end_s - begin_s,
        "reduce_bytes": trace.reduce_bytes,
    }


def listed(numbers: Sequence[int]) -> str:
    """Numbers in a row, as far as one can read them."""
    shown = " ".join(str(number) for number in numbers[:64])
    return f"{shown} ..." if len(numbers) > 64 else shown


def table_of(trace: Trace) -> str:
    """What a step takes, as text."""
    peaks = trace.peak_activation_bytes
    held = [None] * trace.ranks if peaks is None else peaks.tolist()
    columns = (trace.rank_time_s.tolist(), trace.compute_s.tolist(), trace.bubble_s.tolist(), held)
    ranks = [
        {
            "rank": str(rank),
            "rank time (s)": f"{rank_time:.6g}",
            "compute (s)": f"{compute:.6g}",
            "bubble (s)": f"{bubble:.6g}",
            "peak activations (bytes)": peak,
        }
        for rank, (rank_time, compute, bubble, peak) in enumerate(zip(*columns, strict=True))
    ]
    lines = [
        str(trace.schedule),
        f"makespan         {trace.makespan_s:.6g} s",
        f"bubble fraction  {trace.bubble_fraction:.2%}",
        *([] if trace.reduce_end_s is None else [f"with reductions  {trace.step_s:.6g} s"]),
        *([f"not known        {', '.join(trace.unknown)}"] if trace.unknown else []),
        "",
        text_table(ranks),
    ]
    # Columns of memory that hold nothing are left out, and all of them where there are only activations.
    memory = {name: each for name, each in trace.memory.to_dict().items() if any(each)}
    if set(memory) - {"activation_bytes", "total_bytes"}:
        titles = {name: name.removesuffix("_bytes").replace("_", " ") for name in memory}
        kinds = [
            {"rank": str(rank), **{titles[name]: each[rank] for name, each in memory.items()}}
            for rank in range(trace.ranks)
        ]
        lines += ["", "peak bytes", text_table(kinds)]
    return "\n".join(lines)
