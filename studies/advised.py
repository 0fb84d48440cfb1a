"""Is a step as long as advised, on another runtime that was profiled with another schedule?

Question   A job runs 1F1B on PyTorch's own pipeline runtime. From its profile alone: how long would its step be with
           other schedules? Loaded into that runtime, do they take so long?

Command    python studies/advised.py
           python studies/advised.py --ranks 8 --microbatches 16 --layer-s 0.02 --out studies/out/advised

Method     PyTorch's `_PipelineScheduleRuntime` runs 1F1B over gloo under torch.profiler, with layers that sleep.
           `ppsim.read_run` reads the Chrome traces, and `ppsim.advise` predicts named and searched schedules. The CSV
           of each goes into the runtime, and its profile is read again. A step is the median over profiled ones.

Answer     On 4 ranks and two cores (torch 2.13, gloo) the profiled schedule itself is predicted to 0.1 %. Of the
           others, searched ones are 0.9 and 1.8 % off, ZB-H2 1.2, ZB-V 2.3, interleaved 1F1B 2.6, ZB-H1 4.9 %. The
           one advised, searched with two stages per rank, is the fastest of all: 0.79 of 1F1B's step. Where other work
           took the cores, steps of 8 stages took up to 12 % longer than predicted.

Writes DIR/report.html and summary.json.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import ppsim
from ppexec.experiment.torch_job import profile_schedules
from ppexec.study import Findings, StudyCommand, study_main
from ppsim.advice.candidate import Candidate
from ppsim.export.html_report import Report
from ppsim.export.text_table import text_table
from ppsim.plots.timeline_figure import timeline
from ppsim.schedule.named.registry import natural_stages_per_rank


@dataclass(frozen=True, kw_only=True)
class Row:
    """A schedule, its step as predicted from the profile of another, and as measured."""

    schedule: str
    stages: int
    predicted_s: float
    least_s: float
    most_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_s / self.measured_s - 1

    @property
    def cells(self) -> dict[str, str]:
        """A row of the table."""
        return {
            "schedule": self.schedule,
            "stages": str(self.stages),
            "predicted (s)": f"{self.predicted_s:.4f}",
            "range (s)": f"{self.least_s:.4f} to {self.most_s:.4f}",
            "measured (s)": f"{self.measured_s:.4f}",
            "error": f"{self.error:+.1%}",
        }


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand):
    """Advised schedules on PyTorch's runtime, predicted from its profile of 1F1B."""

    ranks: int = 4
    """Ranks."""
    microbatches: int = 8
    """Microbatches of a step."""
    layer_s: float = 0.01
    """Seconds that F, I and W of each of two layers per rank sleep."""
    only: tuple[str, ...] = ("zb-h1", "zb-h2", "interleaved-1f1b", "zb-v")
    """Named schedules to predict and run; the searched ones are too."""
    search: bool = True
    """Run what the search finds, too."""
    steps: int = 5
    """Profiled steps of each."""
    out: Path = Path("studies/out/advised")
    """Directory for report.html and summary.json."""

    def findings(self, directory: Path | None) -> Findings:
        """Profile, advise, and run what was advised."""
        for name in self.only:
            natural_stages_per_rank(name)  # refuses names that there are not
        known = ppsim.build_schedule("1f1b", ranks=self.ranks, microbatches=self.microbatches)
        with tempfile.TemporaryDirectory() as folder:
            before = self.profiled({"before": known}, Path(folder))["before"]
            advice = ppsim.advise(before, with_search=self.search)
            tried = [advice.current, *(each for each in advice.candidates if self.is_tried(each))]
            for name in set(self.only) & advice.left_out.keys():
                print(f"left out: {name}: {advice.left_out[name]}", file=sys.stderr)
            after = self.profiled({f"run{number}": each.schedule for number, each in enumerate(tried)}, Path(folder))
        rows = [_row(each, run) for each, run in zip(tried, after.values(), strict=True)]
        summary = {
            "profiled_s": before.median.makespan_s,
            "rows": [asdict(row) | {"error": row.error} for row in rows],
            "advice": advice.to_dict(),
            "environment": dict(before.environment),
        }
        figures = {}
        for each, run in zip(tried, after.values(), strict=True):
            figures |= {f"{each.name}, predicted": each.trace, f"{each.name}, measured": run.median}
        return Findings(summary=summary, page=_report(rows, figures), text=text_table([row.cells for row in rows]))

    def is_tried(self, found: Candidate) -> bool:
        """Whether this candidate is run."""
        return found.name in self.only or found.name.startswith("searched")

    def profiled(self, schedules: dict[str, ppsim.Schedule], folder: Path) -> dict[str, ppsim.Run]:
        """What PyTorch's runtime takes for each."""
        return profile_schedules(schedules, folder, layers=2 * self.ranks, layer_s=self.layer_s, steps=self.steps)


def _row(found: Candidate, run: ppsim.Run) -> Row:
    return Row(
        schedule=found.name,
        stages=found.schedule.stages,
        predicted_s=found.step_s,
        least_s=found.range_s[0],
        most_s=found.range_s[1],
        measured_s=run.median.makespan_s,
    )


def _report(rows: list[Row], figures: dict[str, ppsim.Trace]) -> Report:
    worst = max(rows, key=lambda row: abs(row.error))
    page = Report(
        title="Advised schedules on PyTorch's runtime",
        lead=f"Steps predicted from a profile of 1F1B are {abs(worst.error):.1%} off at most, of {len(rows)} tried "
        f"({worst.schedule}).",
    )
    page.add("Predicted and measured", table=[row.cells for row in rows])
    page.add("Timelines", text="Each as predicted, and below as measured.", figure=timeline(figures))
    return page


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
