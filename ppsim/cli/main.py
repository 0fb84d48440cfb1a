"""The command line `ppsim`: a thin face of build_schedule, Schedule.check, simulate, search and estimate_costs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ppsim.cli import command, ending
from ppsim.cli.advise_command import AdviseCommand
from ppsim.cli.colour import painter
from ppsim.cli.command import OptionalFile, OptionalReal
from ppsim.cli.estimate_command import EstimateCommand
from ppsim.cli.examples import EXAMPLES
from ppsim.cli.explore_command import ExploreCommand
from ppsim.cli.figure_flag import FigureFlag
from ppsim.cli.flags import MOST_ACTIONS, CostFlags, NetworkFlags, ScheduleFlags
from ppsim.cli.machine_command import FitMachineCommand
from ppsim.cli.offload_flags import CopyFlags
from ppsim.cli.plan_command import PlanCommand
from ppsim.cli.run_commands import ImportCommand
from ppsim.cli.simulate_command import SimulateCommand
from ppsim.cli.tables import about_of, listed, results_of, table_of
from ppsim.cli.trace_commands import AttributeCommand, CompareCommand
from ppsim.errors import InputError
from ppsim.export.staircase import staircase, unit_trace
from ppsim.export.trace_files import write_trace
from ppsim.files import check_files, write_text
from ppsim.order_search.search import search
from ppsim.schedule.action import Kind
from ppsim.schedule.deadlock import smallest_receive_window
from ppsim.schedule.schedule import Schedule
from ppsim.schedule.streams import Streams
from ppsim.trace.trace import known

_DESCRIPTION = "Predict a pipeline schedule's step time, bubble and activation memory."
_INTRO = "ppsim predicts a pipeline schedule's step time, bubble and memory."
_MOST_DRAWN = (64, 400)  # ranks, units of time


@dataclass(frozen=True, kw_only=True)
class ScheduleCommand(FigureFlag, ScheduleFlags):
    """Build or read a schedule, check it, and draw it with unit costs (F = I = W = 1, B = 2, free messages)."""

    csv: OptionalFile = None
    """Write the schedule in PyTorch's CSV format."""
    messages: bool = False
    """Write sends, receives and reductions too, as PyTorch's runtime runs them; with --csv."""
    streams: Streams = "link"
    """Check that it cannot hang where each link, each pair of ranks or each rank has a communicator."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Check the schedule, then print or write what the flags ask for."""
        check_files(self.csv)
        self.check_figure()
        schedule = self.load_schedule()
        schedule.check(self.streams)
        self.draw(schedule.plot)
        if self.csv is not None:
            write_text(self.csv, schedule.to_csv(messages=self.messages))
        about = {
            **about_of(schedule),
            "is_forward_only": schedule.is_forward_only,
            "actions": schedule.program.actions,
            "messages": len(schedule.program.messages),
            "links": len(schedule.program.links()),
            "receive_window": smallest_receive_window(schedule.program),
            "checked": True,
        }
        if self.json:
            ending.print_json(about)
            return
        print(schedule)
        print(f"placement  stage 0 to {schedule.stages - 1} on rank {listed(schedule.placement)}")
        print(f"actions    {about['actions']}, with {about['messages']} messages on {about['links']} links")
        print(f"receives   at least {about['receive_window']} to be posted ahead on a link")
        print(f"check      complete, in order, cannot hang with a communicator for each {self.streams}")
        print(f"\n{_drawn(schedule)}")


@dataclass(frozen=True, kw_only=True)
class SearchCommand(FigureFlag, CopyFlags, NetworkFlags, CostFlags):
    """Find the order with the shortest step (or rank time) under an activation limit, and what no order can beat."""

    ranks: int
    """p, the number of pipeline ranks."""
    microbatches: int
    """m, the number of microbatches of a step."""
    stages_per_rank: int = 1
    """v, the number of stages on each rank."""
    placement: Literal["loop", "v"] = "loop"
    """Where stages live: loop (stage s on rank s mod p), or v (there and back; two stages per rank)."""
    objective: Literal["makespan", "rank_time"] = "makespan"
    """What is to be short: the step, or the longest time of a single rank."""
    memory_limit_bytes: OptionalReal = None
    """The most activation bytes that a rank may hold (default: no limit)."""
    prove: bool = False
    """Go on through all orders that may still be better: the result is the best of all, if the time suffices."""
    time_limit_s: float = 60.0
    """The most seconds that --prove may add."""
    recompute: bool = False
    """Allow forwards to be computed once more where memory is short. With a rate of copies, activations may also go to
    host memory."""
    csv: OptionalFile = None
    """Write the schedule found in PyTorch's CSV format."""
    out: OptionalFile = None
    """Write its trace: .json or .json.gz for ui.perfetto.dev, .csv as a table, any other name for ppsim.Trace.load."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Search, then print or write what the flags ask for."""
        check_files(self.csv, self.out)
        self.check_figure()
        for name in ("ranks", "microbatches", "stages_per_rank"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}")
        stages = self.ranks * self.stages_per_rank
        if 3 * stages * self.microbatches > MOST_ACTIONS:
            raise InputError(
                f"{stages} stages and {self.microbatches} microbatches make {3 * stages * self.microbatches} actions, "
                f"at most {MOST_ACTIONS} can be searched: take fewer"
            )
        found = search(
            self.stage_costs(stages, {Kind.F, Kind.I, Kind.W}),
            ranks=self.ranks,
            microbatches=self.microbatches,
            network=self.load_network(self.ranks),
            memory_limit_bytes=self.memory_limit_bytes,
            stages_per_rank=self.stages_per_rank,
            placement=self.placement,
            objective=self.objective,
            prove=self.prove,
            time_limit_s=self.time_limit_s,
            recompute=self.recompute,
            offload=self.host_link,
        )
        if self.csv is not None:
            write_text(self.csv, found.schedule.to_csv(offload=True))
        if self.out is not None:
            write_trace(found.trace, self.out)
        trace = found.trace
        self.draw(trace.plot)
        reached_s = trace.makespan_s if self.objective == "makespan" else float(trace.rank_time_s.max())
        if self.json:
            results = {"objective": self.objective, "objective_s": reached_s, "lower_bound_s": found.lower_bound_s}
            ending.print_json({**about_of(found.schedule), **results, **results_of(trace)})
            return
        gap = reached_s / found.lower_bound_s - 1 if found.lower_bound_s > 0 else 0.0
        print(
            f"{self.objective.replace('_', ' ')} {reached_s:.6g} s; no order is below {found.lower_bound_s:.6g} s",
            end="",
        )
        print(" (optimal)\n" if gap < 1e-12 else f" (at most {gap:.2%} above the optimum)\n")
        print(table_of(trace))


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
        f"activations held at most per rank: {listed(known(trace.peak_activation_bytes).tolist())}"
    )
    if trace.makespan_s > most_units:
        return f"{summary}\nnot drawn: {trace.makespan_s:g} units of time; drawings end at {most_units}"
    return f"{summary}\n\n{staircase(trace, painter(sys.stdout))}"


COMMANDS: dict[str, type] = {
    "schedule": ScheduleCommand,
    "simulate": SimulateCommand,
    "search": SearchCommand,
    "estimate": EstimateCommand,
    "plan": PlanCommand,
    "fit-machine": FitMachineCommand,
    "attribute": AttributeCommand,
    "compare": CompareCommand,
    "import": ImportCommand,
    "explore": ExploreCommand,
    "advise": AdviseCommand,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (see `command.run`)."""

    def work() -> None:
        words = list(sys.argv[1:] if args is None else args)
        if not words:
            print(command.welcome(_INTRO, EXAMPLES, prog="ppsim", first=("schedule", "explore")))
            return
        lines = {name: line for name, (_, line) in EXAMPLES.items()}
        chosen: Any = command.parse(COMMANDS, prog="ppsim", description=_DESCRIPTION, examples=lines, args=words)
        chosen.run()

    return ending.run(work, prog="ppsim", args=args)


if __name__ == "__main__":
    sys.exit(main())
