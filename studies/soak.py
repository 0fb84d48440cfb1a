"""Does anything break, stray or grow when random runs follow one another for hours?

Question   Random schedules, meshes, models and faults: are all gradients and bytes right, and does every run that
           cannot end say who is to blame? Do the workers' memory and open files stay as they are?

Command    python studies/soak.py --minutes 60
           python studies/soak.py --seed 7 --first 123 --rounds 1      # one round again

Method     Each round is drawn from the seed and its number: one of the twelve schedules, one to four processes as
           replicas, ranks and tensor-parallel ranks, a model of `ppexec.experiment.soak_models` or a built-in one,
           recomputation, type, transport and device. Outputs and gradients are compared with one process, and the
           bytes after every action with the prediction. In every fifth round a rank is killed, stopped, raises, leaves
           or runs out of memory at a random action: the run must end within 10 s and name it. One pool serves all
           rounds without a fault.

Writes DIR/report.html and summary.json.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

import ppexec
from ppexec.experiment.soak import Footprint, Verdict, counts, draw, growth, run_round
from ppexec.experiment.text import environment_rows
from ppexec.study import Findings, StudyCommand, progress, study_main, without_advice
from ppsim.errors import InputError
from ppsim.export.html_report import Report
from ppsim.export.text_table import text_table
from ppsim.plots.growth_figure import growth_figure

_EVERY = 10  # rounds between two looks at memory and files
_KERNELS = "64"
"""How many kernels the oneDNN library of PyTorch keeps in a worker. By itself it keeps up to 1,024, some of which take
0.4 MB, with one or more for each shape. Random rounds would fill that for hours, and hide what does leak."""


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand):
    """Random runs for a given time."""

    minutes: float = 10.0
    """How long to go on."""
    rounds: int = 0
    """How many rounds; 0 goes on for the time given."""
    seed: int = 0
    """What rounds are drawn from."""
    first: int = 0
    """Number of the first round."""
    out: Path = Path("studies/out/soak")
    """Directory for report.html and summary.json."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < 1e6:
            raise InputError(f"minutes must be a number > 0 (and below 1e6), got {self.minutes}")
        for name in ("rounds", "seed", "first"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)}")

    def findings(self, directory: Path | None) -> Findings:
        """Run rounds until the time is over."""
        verdicts: list[Verdict] = []
        footprints: list[Footprint] = []
        began_s = time.monotonic()
        with ppexec.WorkerPool() as pool, ppexec.WorkerPool() as breakable, without_advice(), progress() as bar:
            while self._goes_on(len(verdicts), time.monotonic() - began_s):
                verdict = run_round(draw(self.seed, self.first + len(verdicts)), pool, breakable)
                verdicts.append(verdict)
                if verdict.complaint:
                    print(f"\nseed {self.seed}, {verdict.round}: {verdict.complaint}", file=sys.stderr, flush=True)
                if len(verdicts) % _EVERY == 0:
                    now_s = time.monotonic() - began_s
                    footprints.append(Footprint.now(now_s, len(verdicts), pool.process_ids))
                bar.update()
        summary: dict[str, Any] = {
            "seed": self.seed,
            "first": self.first,
            "seconds": time.monotonic() - began_s,
            **counts(verdicts),
            "growth": growth(footprints) if len(footprints) >= 4 else None,
            "failed": [{"round": str(each.round), "complaint": each.complaint} for each in verdicts if each.complaint],
            "footprints": [asdict(each) for each in footprints],
        }
        return Findings(
            summary=summary, page=report(summary, footprints), text=text(summary), holds=not summary["failures"]
        )

    def _goes_on(self, done: int, seconds: float) -> bool:
        return done < self.rounds if self.rounds else seconds < 60 * self.minutes


def rows(summary: dict[str, Any]) -> list[dict[str, str]]:
    """What was done and what came out."""
    table = {
        "rounds": f"{summary['rounds']} in {summary['seconds'] / 60:.1f} minutes",
        "compared with one process": f"{summary['compared']}, bit-equal {summary['bit_equal']}",
        "faults injected": str(summary["faults"]),
        "failures": str(summary["failures"]),
    }
    for name, said in (("own", "this process"), ("workers", "all workers")):
        for what, unit in (("bytes", 2**20), ("files", 1)):
            if summary["growth"]:
                found = summary["growth"][f"{name}_{what}"]
                shown = f"{found['begin'] / unit:.0f} to {found['end'] / unit:.0f}{' MiB' if what == 'bytes' else ''}"
                table[f"{what if what == 'files' else 'memory'} of {said}"] = f"{shown} ({found['grown']:+.1%})"
    return [{"what": name, "found": value} for name, value in table.items()]


def text(summary: dict[str, Any]) -> str:
    """The table, and what failed."""
    failed = [f"{each['round']}: {each['complaint']}" for each in summary["failed"]]
    return "\n".join([text_table(rows(summary)), *(["", *failed] if failed else [])])


def report(summary: dict[str, Any], footprints: list[Footprint]) -> Report:
    """The table, memory and files over time, and how often each kind was drawn."""
    failures = summary["failures"]
    page = Report(title="Random runs, one after another", lead=f"{summary['rounds']} rounds, {failures} failures.")
    page.add("What was found", table=rows(summary))
    if footprints:
        page.add("Memory and open files over time", figure=_growth(footprints))
    for name in ("schedule", "model", "fault"):
        page.add(f"Rounds by {name}", definitions=environment_rows(summary[f"by_{name}"]))
    if summary["failed"]:
        page.add("Failures", table=summary["failed"])
    return page


def _growth(footprints: list[Footprint]) -> go.Figure:
    return growth_figure(
        [each.seconds for each in footprints],
        memory_bytes={
            "this process": [each.own_bytes for each in footprints],
            "all workers": [each.workers_bytes for each in footprints],
        },
        files={
            "this process": [each.own_files for each in footprints],
            "all workers": [each.workers_files for each in footprints],
        },
    )


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS)
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
