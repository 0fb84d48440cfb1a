"""The command line `ppsim`: a thin face of build_schedule, Schedule.check and simulate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ppsim import command
from ppsim.check import smallest_receive_window
from ppsim.command import OptionalFile, Real
from ppsim.flags import CostFlags, NetworkFlags, ScheduleFlags
from ppsim.schedule import Schedule
from ppsim.simulate import simulate
from ppsim.staircase import staircase, unit_trace
from ppsim.trace import Trace

_DESCRIPTION = "Predict a pipeline schedule's step time, bubble and activation memory."
_MOST_DRAWN = (64, 400)  # ranks, units of time


@dataclass(frozen=True, kw_only=True)
class ScheduleCommand(ScheduleFlags):
    """Build or read a schedule, check it, and draw it with unit costs (F = I = W = 1, B = 2, free messages)."""

    csv: OptionalFile = None
    """Write the schedule in PyTorch's CSV format."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Do it."""
        schedule = self.load_schedule()
        if self.csv is not None:
            self.csv.write_text(schedule.to_csv(), encoding="utf-8")
        about = {
            **_about(schedule),
            "is_forward_only": schedule.is_forward_only,
            "actions": schedule.program.actions,
            "messages": len(schedule.program.messages),
            "links": len(schedule.program.links()),
            "receive_window": smallest_receive_window(schedule.program),
            "checked": True,
        }
        if self.json:
            command.print_json(about)
            return
        print(schedule)
        print(f"placement  stage 0 to {schedule.stages - 1} on rank {_listed(schedule.placement)}")
        print(f"actions    {about['actions']}, with {about['messages']} messages on {about['links']} links")
        print(f"receives   at least {about['receive_window']} to be posted ahead on a link")
        print("check      complete, in order, cannot hang")
        print(f"\n{_drawn(schedule)}")


@dataclass(frozen=True, kw_only=True)
class SimulateCommand(NetworkFlags, CostFlags, ScheduleFlags):
    """Predict one step. Costs are of one microbatch: one set for all stages, or a file of layers to be partitioned."""

    overlap: Real = 1.0
    """An overlapped forward and backward take this share of the sum of both."""
    forward_only: bool = False
    """Leave the backwards out, as an evaluation does."""
    engine: str = "simpy"
    """What computes the times: simpy, or compiled for the same answer sooner."""
    out: OptionalFile = None
    """Write the trace: .json or .json.gz for ui.perfetto.dev, .csv as a table, any other name for ppsim.Trace.load."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Do it."""
        schedule = self.load_schedule()
        if self.forward_only:
            schedule = schedule.forward_only()
        trace = simulate(
            schedule,
            self.stage_costs(schedule),
            network=self.network(),
            engine=self.engine,
            overlap=self.overlap,
        )
        if self.out is not None:
            _write(trace, self.out)
        if self.json:
            command.print_json({**_about(schedule), **_results(trace)})
        else:
            print(_table(trace))


def _write(trace: Trace, path: Path) -> None:
    """In the format that the name's ending asks for."""
    if path.name.endswith((".json", ".json.gz")):
        from ppsim.export.perfetto import save_perfetto

        save_perfetto({"predicted": trace}, path)
    elif path.name.endswith(".csv"):
        path.write_text(trace.to_frame().to_csv(index=False), encoding="utf-8")
    else:
        trace.save(path)


def _about(schedule: Schedule) -> dict[str, Any]:
    return {
        "name": schedule.name,
        "ranks": schedule.ranks,
        "stages": schedule.stages,
        "microbatches": schedule.microbatches,
        "placement": schedule.placement,
    }


def _results(trace: Trace) -> dict[str, Any]:
    return {
        "clock": trace.clock,
        "makespan_s": trace.makespan_s,
        "bubble_fraction": trace.bubble_fraction,
        "bubble_s": trace.bubble_s,
        "rank_time_s": trace.rank_time_s,
        "compute_s": trace.compute_s,
        "peak_activation_bytes": trace.peak_activation_bytes,
        "details": trace.details,
    }


def _listed(numbers: Sequence[int]) -> str:
    shown = " ".join(str(number) for number in numbers[:64])
    return f"{shown} ..." if len(numbers) > 64 else shown


def _drawn(schedule: Schedule) -> str:
    most_ranks, most_units = _MOST_DRAWN
    longest = max(len(order) for order in schedule.orders)
    if schedule.ranks > most_ranks or longest > most_units:
        return (
            f"not drawn: {schedule.ranks} ranks with up to {longest} actions each; drawings end at {most_ranks} ranks "
            f"and {most_units} units of time"
        )
    trace = unit_trace(schedule)
    summary = (
        "With F = I = W = 1, B = 2 and free messages:\n"
        f"makespan {trace.makespan_s:g}, bubble {trace.bubble_fraction:.1%}, "
        f"activations held at most per rank: {_listed(trace.peak_activation_bytes.tolist())}"
    )
    if trace.makespan_s > most_units:
        return f"{summary}\nnot drawn: {trace.makespan_s:g} units of time; drawings end at {most_units}"
    return f"{summary}\n\n{staircase(trace)}"


def _table(trace: Trace) -> str:
    lines = [
        str(trace.schedule),
        f"makespan         {trace.makespan_s:.6g} s",
        f"bubble fraction  {trace.bubble_fraction:.2%}",
        "",
        "rank   rank time (s)     compute (s)      bubble (s)  peak activations (bytes)",
    ]
    columns = (trace.rank_time_s, trace.compute_s, trace.bubble_s, trace.peak_activation_bytes)
    for rank, (rank_time, compute, bubble, peak) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        lines.append(f"{rank:>4}  {rank_time:>14.6g}  {compute:>14.6g}  {bubble:>14.6g}  {peak:>24,}")
    return "\n".join(lines)


Command = (
    Annotated[ScheduleCommand, tyro.conf.subcommand("schedule")]
    | Annotated[SimulateCommand, tyro.conf.subcommand("simulate")]
)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (see `command.run`)."""

    def work() -> None:
        chosen: ScheduleCommand | SimulateCommand = command.parse(
            Command, prog="ppsim", description=_DESCRIPTION, args=args
        )
        chosen.run()

    return command.run(work, prog="ppsim")


if __name__ == "__main__":
    sys.exit(main())
