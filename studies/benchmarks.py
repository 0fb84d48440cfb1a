"""How fast are prediction, search, sweeps and execution, beside what they are measured against?

Question   What does an answer cost: a simulated step, a million of them, a searched order, a sweep, an executed action?

Command    python studies/benchmarks.py
           python studies/benchmarks.py --only engines scale --json

Method     Medians with quartiles. Where there is something to compare with, both run in turn, and their ratio counts.
           engines: 1F1B on 32 ranks with 256 microbatches and latency, whole `simulate` calls with their trace, in turn
           with as many bare SimPy timeouts. scale: seconds to build, check and predict small and large 1F1B schedules
           (the largest in a process of its own, whose peak memory is read), and to search an order. pytorch: PyTorch's
           own lowering and tick simulator on the same orders, in turn with ours. sweep: 2,000 simulations in a plain
           loop, then through a store in SQLite, once each. executor: see executor_overhead.py.

Answer     On two cores (AMD EPYC, torch 2.13): SimPy's engine runs at 0.54 to 0.56 of the rate of bare timeouts, 0.6 M
           actions/s with lowering and trace, 4.7 times PyTorch's lowering and tick simulator; the compiled engine does
           59 M actions/s. 1F1B on 64 ranks with 1,024 microbatches is built, checked and predicted in 0.05 s, on 1,024
           ranks with 4,096 in 4 to 5 s and 1.9 GB. The other figures are of a slower machine, where these took 0.05 s
           and 8 s: 8 ranks with 32 microbatches take 2.1 ms the first time, and 0.44 ms again once the schedule is
           kept; a search at 64 x 1,024 takes 0.49 s. A sweep of simulations of 3 ms is 1.1 times as fast on two cores,
           starting its processes included, and finds 46,000 points/s in its store. With tensors of a few elements the
           runtime costs 0.05 to 0.09 ms a microbatch beside its computations, 0.05 to 0.16 of PyTorch's.

Where the time goes, and why it cannot go much lower
  SimPy engine   An event costs SimPy itself 0.9 us (made, pushed on a heap, popped, its callback called), and an action
                 costs one event at most. The engine adds 0.5 us to each action for lists that it reads and writes, and
                 lowering adds 0.1 us. With a process per rank, resumed by SimPy, simulating the same step took 1.6
                 times as long, and an event for each message cost as much as one for each action: both were removed.
  compiled       The engine is one pass over the actions, in an order in which each comes after what it needs. The pass
                 alone takes 8 ns an action while its tables are in the cache, a whole `simulate` call 17 ns. Beyond the
                 cache (131,072 actions: 10 MB) the pass waits for memory, 20 to 40 ns an action: 1F1B alternates
                 between ranks, so each action touches lines of another rank's tables.
  scale          Of 8.4 million actions lowering takes a third to a half (a sort by link, tables of rows by stage and
                 microbatch), the proof that the schedule ends a twentieth, the pass and the trace's columns the rest.
                 All of these are passes over arrays that no cache holds.
  executor       A gloo message costs its receiver 0.1 to 0.3 ms of waking up; through shared memory nobody is woken. A
                 small send takes 1.1 us and a receive 1.5 us (two copies and a flag), and F and B of a stage 13 us more
                 than the same calls in a plain loop, most of it holding and handing over tensors. The rest of a
                 microbatch's overhead is the runtime's loop and waiting for a neighbour's flag; it has not been taken
                 apart further.

Writes DIR/report.html and summary.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ppsim
from ppexec.experiment.benchmarks import engine_rates, executor_overheads, large_schedules, pytorch_rates, sweep_rates
from ppexec.experiment.text import environment_rows
from ppexec.experiment.timing import BenchmarkRow
from ppexec.machine.environment import describe_environment
from ppexec.study import Findings, StudyCommand, progress, study_main, without_advice
from ppsim.errors import InputError
from ppsim.export.html_report import Report
from ppsim.export.text_table import text_table

Part = Literal["engines", "scale", "pytorch", "sweep", "executor"]
_PARTS: tuple[Part, ...] = ("engines", "scale", "pytorch", "sweep", "executor")


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand):
    """What answers cost, as ratios taken in one run."""

    only: tuple[Part, ...] = _PARTS
    """Parts to run."""
    turns: int = 9
    """Number of turns. What takes a few milliseconds is measured a multiple of it."""
    quick: bool = False
    """Smaller sizes: to see that it runs, not to be quoted."""
    out: Path = Path("studies/out/benchmarks")
    """Directory for report.html and summary.json."""

    def findings(self, directory: Path | None) -> Findings:
        """Measure every part that is wanted."""
        if self.turns < 1:
            raise InputError(f"turns must be 1 or more, got {self.turns}")
        turns, quick = self.turns, self.quick
        parts: dict[Part, Callable[[], list[BenchmarkRow]]] = {
            "engines": lambda: engine_rates(turns, quick=quick),
            "scale": lambda: large_schedules(turns, quick=quick),
            "pytorch": lambda: pytorch_rates(turns, quick=quick),
            "sweep": lambda: sweep_rates(makespan, quick=quick),
            "executor": lambda: executor_overheads(turns, quick=quick),
        }
        found: list[BenchmarkRow] = []
        with without_advice():
            for part in progress([name for name in _PARTS if name in self.only]):
                found += parts[part]()
        # No rank computes in this process.
        environment = describe_environment(ranks=0, processes=1, threads_per_rank=1, backend="", worker_allocator={})
        summary = {"rows": [vars(row) for row in found], "quick": quick, "environment": environment}
        table = [row.cells for row in found]
        page = Report(title="What answers cost", lead=verdict(found))
        page.add("Figures", text="Medians, with quartiles of the turns beside them.", table=table)
        page.add("Environment", definitions=environment_rows(environment))
        return Findings(summary=summary, page=page, text=text_table(table))


def verdict(found: Sequence[BenchmarkRow]) -> str:
    """How many figures meet their targets, and which do not."""
    asked = [row for row in found if row.target]
    missed = [f"{row.what} ({row.value:.4g} {row.unit}, {row.target})" for row in asked if not row.meets_target]
    text = f"{len(asked) - len(missed)} of {len(asked)} figures that have a target meet it."
    return f"{text} The others: {'; '.join(missed)}." if missed else text


def makespan(forward_s: float) -> float:
    """One step of 1F1B on 8 ranks with 32 microbatches: what is swept.

    It stands here because a function of the main script is pickled by value: processes of a sweep then load no torch.
    """
    cost = ppsim.StageCost(forward_s=forward_s, backward_input_s=1e-3, backward_weight_s=0.8e-3)
    schedule = ppsim.build_schedule("1f1b", ranks=8, microbatches=32)
    return ppsim.simulate(schedule, [cost] * 8, network=ppsim.Network(latency_s=1e-5, bytes_per_s=25e9)).makespan_s


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
