"""How far is a predicted step from the measured one, and what is left of the error?

Question   All schedules, several numbers of ranks and microbatches and sizes, real and timed compute: how far off is
           the predicted step time, beside the machine's own spread? Are activation bytes equal at every action?

Command    python studies/fidelity.py
           python studies/fidelity.py --only timed --limit-s 500 --out DIR      (again, to go on where it stopped)

Method     Each configuration by itself, never two at a time. Profile, steps and exercises take turns; steps while
           others used the machine are marked, left out and counted. The exercises are 1F1B and a zero-bubble schedule
           of known waits on as many ranks: what the runtime and messages cost is read off the gaps between their
           actions (`ppexec.calibrate.calibration`), how much of it varies for each rank alone off their length
           (`ppexec.calibrate.step_fit`). Nothing is fitted to what is predicted. 4 ranks on 2 cores are predicted with
           `simulate(cores=2, sharing="fair", sharing_efficiency=...)`, from CPU time, and from exercises that keep
           cores busy.

Answer     216 configurations on two cores (Intel Xeon, torch 2.13), 42 minutes: error of the predicted step, beside the
           median quartile spread of the steps themselves:
                                             n   median     p90   worst   wanted           spread   disturbed steps
             timed, 2 ranks                 48   0.13 %   0.30 %  0.64 %  0.5 % / 1.5 %    0.3 %    2
             timed, 4 ranks                 48   0.25 %   0.53 %  0.93 %                   0.2 %    1
             timed, 8 ranks                 48   0.25 %   0.55 %  1.08 %                   0.2 %    0
             real, 2 ranks                  48   0.73 %   2.4 %   4.6 %   3 % / 6 %        3.6 %    1
             real, 4 ranks on 2 cores       24   1.5 %    5.2 %   7.9 %   8 % / 15 %       4.0 %    6
           Activation bytes were equal at every action of all. What is left, and how it is known:
           - Timed: the model, mostly. With `--repeats 4` the errors of zb-v and zb-h1 on 8 ranks come back, 0.1 % apart
             (0.3 % in one; one was done three times): zb-v 8 x 16 is 1.03 +- 0.06 % too long, the seven others -0.12 to
             +0.27 %. What varies is drawn with one share of independence for all schedules; the exercises themselves
             say that it differs: with the same calibration interleaved-1F1B comes out 0.3 % too short and zb-v 0.5 %
             too long, which means cancel and zb-v does not. 10 ms actions are 0.3 % off, 25 ms actions 0.2 % (4 and 8
             ranks).
           - Real: the machine, mostly. All 48 errors are within the spread of the steps they are errors of. Eight
             configurations of AFAB and DualPipe-V done four times each: the measured step varied by 2 to 11 %, the
             predicted one with it, since both are taken in turn, the error by 0.2 to 1.9 %; on average it was within
             0.8 % in seven and -2.1 +- 1.0 % in one.
           - 4 ranks on 2 cores: too short by 2.6 % (median) with actions of 1 ms, 0.8 % with 8 ms, and most where
             backwards are whole (AFAB with 1 ms three times: 7.0, 8.7 and 8.1 %). Where efficiency is taken as 1 it is
             10 % and 4 %: cores were idle for 5 to 16 % of a step, by the CPU time of the processes, and the model's
             never are. There (AFAB, 1F1B, V-Min) steps took 3 to 6 % more CPU time than their profile and dispatch with
             actions of 1 ms, up to 2 % with 8 ms, which no part of the model has. That caches grown cold are the cause
             is a guess: yielding the core before each profiled action made the profile no more than 2 % longer.

Writes DIR/report.html, summary.json and results.sqlite, in which what was measured is found again.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

import ppexec
import ppsim
from ppexec.cli import existing_directory, study_main
from ppexec.config.config import RunConfig
from ppexec.experiment import accuracy
from ppexec.experiment.experiment import Outcome, predict_and_measure
from ppexec.experiment.text import environment_rows
from ppexec.machine.environment import describe_environment, usable_cores
from ppexec.machine.outside_load import OutsideLoad
from ppsim import StageCost
from ppsim.cli import command
from ppsim.export.html_report import Report
from ppsim.plots import accuracy_figure
from ppsim.sweep.key import canonical_json, digest
from ppsim.sweep.store import PointOutcome, Store

Group = Literal["timed", "real", "shared-cores"]
_GROUPS: tuple[Group, ...] = ("timed", "real", "shared-cores")
_KEY = "studies.fidelity.5"  # another number where what is measured means something else
_TIMED = {"small": (0.010, 64 << 10), "large": (0.025, 512 << 10)}  # a rank's forward, bytes of a message
_STEPS = {"timed": 7, "real": 15, "shared-cores": 9}
_REAL = {"small": (256, 64), "large": (512, 128)}  # hidden, sequence


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration, and what its results are kept under. repeat: which time it is predicted and measured."""

    group: Group
    schedule: str
    ranks: int
    microbatches: int
    size: str
    steps: int
    repeat: int = 0

    def config(self) -> RunConfig:
        """What to run. Raises ValueError where the schedule does not allow it."""
        hidden, seq = _REAL[self.size]
        schedule = ppsim.build_schedule(self.schedule, ranks=self.ranks, microbatches=self.microbatches)
        return RunConfig(
            schedule=self.schedule,
            ranks=self.ranks,
            microbatches=self.microbatches,
            layers=max(schedule.stages, 4),
            hidden=hidden,
            seq=seq,
            micro_batch_size=2,
            threads=1,
            steps=self.steps,
            warmup=1,
        )

    def costs(self) -> list[StageCost] | None:
        """What each stage of timed compute takes: a rank's share by its stages; None for real compute."""
        if self.group != "timed":
            return None
        rank_forward_s, size_bytes = _TIMED[self.size]
        stages = self.config().pipeline.stages
        part_s = rank_forward_s * self.ranks / stages
        cost = StageCost(
            forward_s=part_s,
            backward_input_s=part_s,
            backward_weight_s=part_s,
            activation_bytes=10 * size_bytes,
            weight_activation_bytes=6 * size_bytes,
            output_bytes=size_bytes,
        )
        return [cost] * stages


def cases(groups: Sequence[Group], steps: int, cores: int, repeats: int = 1) -> list[Case]:
    """All that the schedules allow; real compute where the ranks have a core each, or twice as many as cores."""
    ranks = {
        "timed": (2, 4, 8),
        "real": tuple(p for p in (2, 4, 8) if p <= cores),
        "shared-cores": tuple(p for p in (4, 8) if p == 2 * cores),
    }
    microbatches: dict[str, Callable[[int], tuple[int, ...]]] = {
        "timed": lambda p: (p, 2 * p),
        "real": lambda p: (2 * p, 4 * p),
        "shared-cores": lambda p: (2 * p,),
    }
    found = [
        Case(
            group=group,
            schedule=schedule,
            ranks=p,
            microbatches=m,
            size=size,
            steps=steps or _STEPS[group],
            repeat=repeat,
        )
        for repeat in range(repeats)
        for group in groups
        for p in ranks[group]
        for m in microbatches[group](p)
        for size in _TIMED
        for schedule in ppsim.schedule_names()
    ]
    return [case for case in found if _is_possible(case)]


def _is_possible(case: Case) -> bool:
    try:
        case.config()
    except ValueError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Study:
    """Predict and measure many configurations, and say how far off the predictions are."""

    only: Group | None = None
    """One group: timed, real (ranks have a core each), or shared-cores (twice as many); all unless given."""
    schedules: tuple[str, ...] = ()
    """These alone; all unless given."""
    ranks: tuple[int, ...] = ()
    """These numbers of ranks alone; all unless given."""
    steps: int = 0
    """Measured steps of each configuration; 0: 7 where compute is timed, 15 where real, 9 where cores are shared."""
    repeats: int = 1
    """How often each configuration is predicted and measured anew, to see how much of an error is the machine's."""
    limit_s: float = 0.0
    """Stop after this long, to go on when called again; 0 goes on to the end."""
    out: Path = Path("studies/out/fidelity")
    """Directory for report.html, summary.json and results.sqlite."""
    json: bool = False
    """Print summary.json's object and nothing else on standard output."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must be 0 or more, got {self.steps}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be 1 or more, got {self.repeats}")
        if not 0 <= self.limit_s < float("inf"):
            raise ValueError(f"limit_s must be seconds, finite and >= 0, got {self.limit_s}")
        if unknown := set(self.schedules) - set(ppsim.schedule_names()):
            raise ValueError(f"no schedule {min(unknown)!r}: take from {', '.join(ppsim.schedule_names())}")

    def execute(self) -> None:
        """Measure what is missing, print the table and write the report."""
        directory = existing_directory(self.out)
        wanted = [
            case
            for case in cases((self.only,) if self.only else _GROUPS, self.steps, usable_cores(), self.repeats)
            if case.schedule in (self.schedules or (case.schedule,)) and case.ranks in (self.ranks or (case.ranks,))
        ]
        if not wanted:
            raise ValueError("nothing to measure: no schedule allows these ranks on this machine's cores")
        with Store(directory / "results.sqlite") as store:
            measure_missing(wanted, store, limit_s=self.limit_s)
            rows, failed = stored_rows(wanted, store)
        summary = {
            "groups": accuracy.table(rows, _GROUPS),
            "repeated": accuracy.repeated(rows),
            "missing": len(wanted) - len(rows),
            "failed": failed,
            "configurations": rows,
            "environment": describe_environment(),
        }
        (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        report(summary).save(directory / "report.html")
        if self.json:
            command.print_json(summary)
        else:
            print_table(summary)
            print(f"\nwritten to {directory}: report.html, summary.json, results.sqlite")


def key_of(case: Case) -> tuple[bytes, str]:
    """Under what a case is kept, and its configuration as text."""
    fields = asdict(case)
    if not case.repeat:
        del fields["repeat"]
    text = canonical_json(fields)
    return digest(_KEY, text), text


def measure_missing(wanted: Sequence[Case], store: Store, *, limit_s: float, watch: OutsideLoad | None = None) -> None:
    """Measure and keep what the store lacks, one after another, for `limit_s` seconds (0: to the end)
    but one at least."""
    missing = [case for case in wanted if not store.has_result(key_of(case)[0])]
    if not missing:
        return
    began_s = time.monotonic()
    with ppexec.WorkerPool() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every schedule would repeat the same advice on microbatches
        for number, case in enumerate(tqdm(missing, file=sys.stderr, leave=False)):
            if number and limit_s and time.monotonic() - began_s > limit_s:
                return
            key, text = key_of(case)
            case_began_s = time.monotonic()
            try:
                outcome = run_case(case, pool, watch or OutsideLoad())
                stored = PointOutcome(result=json.dumps(row(case, outcome)), took_s=time.monotonic() - case_began_s)
            except ValueError as error:  # disturbed throughout: tried again next time
                stored = PointOutcome(error=str(error), took_s=time.monotonic() - case_began_s)
            store.write(key, _KEY, text, stored)


def run_case(case: Case, pool: ppexec.WorkerPool, watch: OutsideLoad) -> Outcome:
    """Predict and measure one."""
    return predict_and_measure(case.config(), pool=pool, costs=case.costs(), verify=False, watch=watch)


def row(case: Case, outcome: Outcome) -> dict[str, Any]:
    """One configuration's figures as JSON values."""
    times_s = outcome.step_times_s
    middle_s = float(np.median(times_s))
    compared = ppsim.compare(outcome.predicted, outcome.median)
    summary = outcome.summary()
    return {
        **asdict(case),
        "predicted_s": outcome.predicted.makespan_s,
        "measured_s": middle_s,
        "relative_error": outcome.step_time_error,
        "spread": float(np.subtract(*np.quantile(times_s, [0.75, 0.25]))) / middle_s,
        "steps_s": times_s.tolist(),
        "disturbed_steps": len(outcome.disturbed),
        "bytes_equal_at_every_action": summary["memory"]["equal_at_every_action"],
        "calibration": outcome.calibration.to_dict(),
        "predicted_spread": float(np.subtract(*np.quantile(outcome.likely.makespan_s, [0.75, 0.25])))
        / outcome.predicted.makespan_s,
        "explained": str(compared),
    }


def stored_rows(wanted: Sequence[Case], store: Store) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows that the store has, in order; and why others failed."""
    rows, failed = [], []
    for case in wanted:
        found = store.read(key_of(case)[0])
        if found is None:
            continue
        if found.result is None:
            failed.append(f"{case.schedule}, {case.ranks} ranks: {found.error}")
        else:
            rows.append(json.loads(found.result))
    return rows, failed


def print_table(summary: dict[str, Any]) -> None:
    """A line for each group."""
    rows = accuracy.text_rows(summary["groups"])
    if rows:
        widths = {name: max(len(name), *(len(entry[name]) for entry in rows)) for name in rows[0]}
        for cells in [{name: name for name in widths}, *rows]:
            print("  ".join(cells[name].rjust(width) for name, width in widths.items()))
    for failure in summary["failed"]:
        print(f"left out: {failure}")
    if summary["missing"]:
        print(f"{summary['missing']} configurations are missing: run again to go on")


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
            text="On the line they are equal.",
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
