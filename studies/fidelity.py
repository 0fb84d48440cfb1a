"""How far is a predicted step from the measured one, and what is left of the error?

Question   All schedules, several numbers of ranks and microbatches and sizes, real and timed compute: how far off is
           the predicted step time, beside the machine's own spread? Are activation bytes equal at every action?

Command    python studies/fidelity.py
           python studies/fidelity.py --only timed --limit-s 500 --out DIR      (again, to go on where it stopped)

Method     With real compute ranks run their layers, with timed compute each action waits for a set time. Configurations
           run one after another. Profiling, measured steps and calibration runs take turns. Steps during which other
           programs used the machine are marked, left out and counted. Calibration runs ("known runs") are 1F1B and a
           zero-bubble schedule with timed compute, on the same number of ranks. The gaps between their actions give the
           cost of the runtime and of messages (`ppexec.calibrate.calibration`). The lengths of their whole steps tell
           how much of this cost varies on each rank by itself, and how much on all alike
           (`ppexec.calibrate.step_fit`). Nothing is fitted to what is predicted. 4 ranks on 2 cores are predicted with
           `simulate(cores=2, sharing="fair", sharing_efficiency=...)`. Their stage costs are CPU times, and some of
           their known runs keep the cores busy instead of waiting.

Answer     216 configurations on two cores (Intel Xeon, torch 2.13), 42 minutes. Errors of the
           predicted step: their median, p90 (90 % of configurations are within it) and worst, and the targets for
           median and worst. For real compute a target is raised to the steps' own spread where that is larger. Spread:
           the interquartile range of the measured steps over their median, in the median of the configurations.
                                             n   median     p90   worst   wanted           spread   disturbed steps
             timed, 2 ranks                 48   0.13 %   0.30 %  0.64 %  0.5 % / 1.5 %    0.3 %    2
             timed, 4 ranks                 48   0.25 %   0.53 %  0.93 %  0.5 % / 1.5 %    0.2 %    1
             timed, 8 ranks                 48   0.25 %   0.55 %  1.08 %  0.5 % / 1.5 %    0.2 %    0
             real, 2 ranks                  48   0.73 %   2.4 %   4.6 %   3 % / 6 %        3.6 %    1
             real, 4 ranks on 2 cores       24   1.5 %    5.2 %   7.9 %   8 % / 15 %       4.0 %    6
           Predicted and measured activation bytes were equal at every action of every configuration.

           What is left of the error, and how that is known:
           - Timed compute: most of it is the model's. Repeated four times (one of them three times), the errors of
             seven of the eight configurations of zb-v and zb-h1 on 8 ranks repeat within 0.1 %, the eighth's within 0.3
             %. zb-v with 8 ranks and 16 microbatches is 1.03 +- 0.06 % too long, the other seven -0.12 to +0.27 %. The
             model takes one share of independent variation for all schedules, and the known runs show that schedules
             differ in it. With the same calibration interleaved-1F1B is predicted 0.3 % too short and zb-v 0.5 % too
             long. Errors are 0.3 % with actions of 10 ms and 0.2 % with 25 ms (4 and 8 ranks).
           - Real compute: most of it is the machine's. Each of the 48 errors is smaller than the interquartile range of
             that configuration's own steps. Eight configurations of AFAB and DualPipe-V were repeated four times. The
             measured step varied by 2 to 11 %. The predicted step varied with it, since profiling and measuring
             alternate, so that the error varied by 0.2 to 1.9 % only. On average it was within 0.8 % in seven of them,
             and -2.1 +- 1.0 % in one.
           - 4 ranks on 2 cores: predictions are too short by 2.6 % (median) with actions of 1 ms and by 0.8 % with 8
             ms, and most in schedules with whole backwards (AFAB with 1 ms three times: 7.0, 8.7 and 8.1 %). With
             sharing_efficiency=1 they would be 10 % and 4 % too short: the model's cores are then never idle, and the
             real ones were idle for 5 to 16 % of a step, by the processes' CPU time. In AFAB, 1F1B and V-Min, steps
             used 3 to 6 % more CPU time than profile and dispatch add up to with actions of 1 ms, and up to 2 % more
             with 8 ms. The model has no term for this. Cold caches may be the cause, but that is a guess: yielding the
             core before each profiled action made the profile no more than 2 % longer.

Writes DIR/report.html, summary.json and results.sqlite, which keeps the results, so that a later call goes on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ppsim
from ppexec.experiment import accuracy
from ppexec.experiment.cases import GROUPS, Group, cases, measure_missing, stored_rows
from ppexec.experiment.text import environment_rows
from ppexec.machine.environment import describe_environment, usable_cores
from ppexec.study import Findings, StudyCommand, progress, study_main, without_advice
from ppsim.errors import InputError
from ppsim.export.html_report import Report
from ppsim.export.text_table import text_table
from ppsim.parameter_sweep.store import Store
from ppsim.plots import accuracy_figure


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand):
    """Predict and measure many configurations, and say how far off the predictions are."""

    only: Group | None = None
    """One group: timed, real (each rank has a core), or shared-cores (two ranks for each core). By default all."""
    schedules: tuple[str, ...] = ()
    """Schedules to measure (default: all)."""
    ranks: tuple[int, ...] = ()
    """Numbers of ranks to measure (default: all)."""
    steps: int = 0
    """Measured steps of each configuration; 0: 7 where compute is timed, 15 where real, 9 where cores are shared."""
    repeats: int = 1
    """How often each configuration is predicted and measured anew, to see how much of an error is the machine's."""
    limit_s: float = 0.0
    """Stop after this long, to go on when called again; 0 goes on to the end."""
    out: Path = Path("studies/out/fidelity")
    """Directory for report.html, summary.json and results.sqlite."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise InputError(f"steps must be 0 or more, got {self.steps}")
        if self.repeats < 1:
            raise InputError(f"repeats must be 1 or more, got {self.repeats}")
        if not 0 <= self.limit_s < 1e9:
            raise InputError(f"limit_s must be seconds >= 0 (and below 1e9), got {self.limit_s}")
        if unknown := set(self.schedules) - set(ppsim.schedule_names()):
            raise InputError(f"no schedule {min(unknown)!r}: take from {', '.join(ppsim.schedule_names())}")

    def findings(self, directory: Path | None) -> Findings:
        """Measure the configurations that the store lacks, and judge all that it has."""
        wanted = [
            case
            for case in cases((self.only,) if self.only else GROUPS, self.steps, usable_cores(), self.repeats)
            if case.schedule in (self.schedules or (case.schedule,)) and case.ranks in (self.ranks or (case.ranks,))
        ]
        if not wanted:
            raise InputError(
                "nothing to measure: no configuration has this --only, --schedules and --ranks on "
                f"{usable_cores()} cores; leave one of these out"
            )
        with Store(None if directory is None else directory / "results.sqlite") as store:
            with without_advice():
                measure_missing(wanted, store, limit_s=self.limit_s, progress=progress)
            rows, failed = stored_rows(wanted, store)
        summary = {
            "groups": accuracy.table(rows, GROUPS),
            "repeated": accuracy.repeated(rows),
            "missing": len(wanted) - len(rows) - len(failed),
            "failed": failed,
            "configurations": rows,
            "environment": describe_environment(),
        }
        return Findings(summary=summary, page=report(summary), text=text_of(summary), files=("results.sqlite",))


def text_of(summary: dict[str, Any]) -> str:
    """A line for each group, then what is missing."""
    lines = [text_table(accuracy.text_rows(summary["groups"]))] if summary["groups"] else []
    lines += [f"left out: {failure}" for failure in summary["failed"]]
    if summary["missing"]:
        lines.append(f"{summary['missing']} configurations are missing: run again to go on")
    return "\n".join(lines)


def report(summary: dict[str, Any]) -> Report:
    """The table, predicted against measured, and how the errors are distributed."""
    rows = summary["configurations"]
    errors = np.abs([entry["relative_error"] for entry in rows])
    lead = f"{len(rows)} configurations were predicted and measured, {summary['missing']} are missing."
    if rows:
        lead += f" Predictions are off by {np.median(errors):.2%} in the median and {errors.max():.2%} at most."
    page = Report(title="Fidelity", subtitle="predicted against measured step times", lead=lead)
    if rows:
        pairs: dict[str, list[tuple[float, float]]] = {}
        labels: dict[str, list[str]] = {}
        for entry in rows:
            pairs.setdefault(entry["group"], []).append((entry["predicted_s"], entry["measured_s"]))
            labels.setdefault(entry["group"], []).append(f"{entry['schedule']}, {entry['ranks']} ranks")
        page.add(
            "Errors by group",
            text="Beside what was wanted (median/worst) and the quartile spread of the steps themselves.",
            table=accuracy.text_rows(summary["groups"]),
        )
        page.add(
            "Predicted against measured",
            text="Points on the line are exact predictions.",
            figure=accuracy_figure.accuracy(pairs, labels=labels),
        )
        page.add("Errors", text="Left of zero predictions are too short.", figure=accuracy_figure.errors(pairs))
        if summary["repeated"]:
            page.add(
                "Done several times",
                text="The mean error is the model's; what varies from time to time is the machine's.",
                table=accuracy.repeated_text(summary["repeated"]),
            )
        page.add("All configurations", table=[configuration_row(entry) for entry in rows])
    page.add("Environment", definitions=environment_rows(summary["environment"]))
    return page


def configuration_row(entry: dict[str, Any]) -> dict[str, str]:
    """One configuration for the report's table."""
    return {
        **{name: str(entry[name]) for name in ("group", "schedule", "ranks", "microbatches", "size")},
        "predicted": f"{entry['predicted_s'] * 1e3:.2f} ms",
        "measured": f"{entry['measured_s'] * 1e3:.2f} ms",
        "error": f"{entry['relative_error']:+.2%}",
        "spread": f"{entry['spread']:.2%}",
        "disturbed": str(entry["disturbed_steps"]),
    }


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
