"""What does running a schedule cost beside the computation, and what does PyTorch's own executor cost?

Question   The same model, the same workers, the same messages: how much longer than its computations is a step?

Command    python studies/executor_overhead.py
           python studies/executor_overhead.py --hidden 512 --seq 256 --layers 4 --json

Method     PyTorch's ScheduleGPipe, Schedule1F1B and schedule runtime and ours run in turn, step by step, in one run.
           The floor is the prediction from F and B alone, each measured in a plain loop without messages in between. A
           step is timed from the barrier before it to the last rank's end. Overhead is (step - floor) / microbatches.

Answer     On two cores (AMD EPYC, torch 2.13), tiny tensors, five runs: AFAB costs 129 to 183 us a microbatch beside
           its computations, 0.08 to 0.11 of ScheduleGPipe's 1.6 to 1.8 ms; 1F1B 163 to 223 us, 0.15 to 0.28 of
           Schedule1F1B's 0.8 to 1.1 ms. Of a step of 25 ms that is a fifth; PyTorch's steps are two to three times as
           long. With stages that take no time the runtime and its messages take 34 to 46 us a microbatch. With hidden
           512 and seq 256 a step takes 0.99 to 1.07 of the floor. Most of the difference is in how messages travel:
           small ones between ranks of one machine go through shared memory, two copies and a flag that a waiting rank
           looks at. Over gloo (as `--receive-window 64` asks for) AFAB costs 0.37 ms and 1F1B 1.10 ms: a message wakes
           a thread of gloo's and then a sleeping receiver, which takes 0.1 to 0.3 ms.

Writes DIR/report.html and summary.json.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ppexec
from ppexec.config.config import RunConfig
from ppexec.experiment.overhead import PEER_OF, measure_overhead
from ppexec.experiment.text import environment_rows
from ppexec.study import Findings, StudyCommand, progress, study_main, without_advice
from ppsim.export.html_report import Report
from ppsim.export.text_table import text_table


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand, RunConfig):
    """The cost of running AFAB and 1F1B beside their computations: ours and PyTorch's."""

    layers: int = 2
    """Number of layers."""
    hidden: int = 8
    """Hidden size; tiny, so that all there is is overhead."""
    seq: int = 2
    """Sequence length."""
    micro_batch_size: int = 1
    """Samples of a microbatch."""
    microbatches: int = 32
    """Microbatches of a step."""
    steps: int = 30
    """Measured steps of each executor."""
    warmup: int = 5
    """Steps of each executor before."""
    out: Path = Path("studies/out/executor_overhead")
    """Directory for report.html and summary.json."""

    def findings(self, directory: Path | None) -> Findings:
        """Measure both schedules with every executor."""
        with ppexec.WorkerPool() as pool, without_advice():
            with progress(total=2 * (self.steps + self.warmup)) as bar:
                found = {
                    name: measure_overhead(replace(self.plain(), schedule=name), pool=pool, advance=bar.update)
                    for name in PEER_OF
                }
            with ppexec.Session(replace(self.plain(), schedule="afab"), pool=pool) as session:
                environment = session.environment()
        summary = {
            "step_time_s": {name: measured.step_s for name, measured in found.items()},
            "step_time_quartiles_s": {name: measured.quartiles_s for name, measured in found.items()},
            "floor_s": {name: measured.floor_s for name, measured in found.items()},
            "overhead_us": {name: measured.overhead_us for name, measured in found.items()},
            "overhead_ratio": {name: measured.ratio for name, measured in found.items()},
            "ours_over_floor": {name: measured.step_s["ours"] / measured.floor_s for name, measured in found.items()},
            "config": self.to_dict(),
            "environment": environment,
        }
        text = (
            f"{text_table(rows(summary))}\n\n"
            f"overhead, ours / PyTorch's: { {k: round(v, 3) for k, v in summary['overhead_ratio'].items()} }\n"
            f"step, ours / floor:         { {k: round(v, 3) for k, v in summary['ours_over_floor'].items()} }"
        )
        return Findings(summary=summary, page=report(summary), text=text)


def rows(summary: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each schedule and executor."""
    table = []
    for schedule, steps in summary["step_time_s"].items():
        for name, step_s in {**steps, "floor": summary["floor_s"][schedule]}.items():
            over_us = summary["overhead_us"][schedule].get(name)
            table.append(
                {
                    "schedule": schedule,
                    "executor": name,
                    "step (ms)": f"{step_s * 1e3:.3f}",
                    "over floor (us)": "" if over_us is None else f"{over_us:.1f}",
                }
            )
    return table


def report(summary: dict[str, Any]) -> Report:
    """The table and where it was measured."""
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in summary["overhead_ratio"].items())
    page = Report(
        title="What running a schedule costs", lead=f"Overhead beside the computation, ours over PyTorch's: {ratios}."
    )
    page.add("Every executor", table=rows(summary))
    page.add("Environment", definitions=environment_rows(summary["environment"]))
    page.add("Configuration", definitions=environment_rows(summary["config"]))
    return page


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
