"""Which schedule is fastest, which holds least, and does it keep its promise when it is run?

Question   All schedules at one configuration: step time, bubble and peak activation memory, predicted and measured.

Command    python studies/schedules.py
           python studies/schedules.py --ranks 2 --compute real --microbatches 16 --hidden 512
           python studies/schedules.py --only afab 1f1b zb-h1 zb-v --out DIR

Method     The model is profiled once. By default each schedule then runs with timed compute (every action waits its
           profiled time; messages and bookkeeping are real), so that four ranks on two cores show their bubbles, and
           once more with real compute, to compare its gradients with those of one process. `--compute real` measures
           real compute.

Answer     On two cores (AMD EPYC, gloo, torch 2.13), 4 ranks, 8 microbatches, all seventeen on equal layers (--costs
           studies/results/equal_layers.json): steps are predicted -1.3 to +1.4 % off the measured median (0.5 % in the
           median); peak memory is equal and all gradients bit-equal. For 5 % more memory than 1F1B's, zb-v takes 22 %
           less time; v-min takes 1F1B's time with half its memory.

Writes DIR/report.html (table, trade-off, timelines under each other) and summary.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

import ppexec
import ppsim
from ppexec.config.config import RunConfig
from ppexec.experiment.experiment import Outcome, predict_and_measure
from ppexec.experiment.profiling import profiling_config
from ppexec.experiment.text import environment_rows
from ppexec.study import Findings, StudyCommand, progress, study_main, without_advice
from ppsim.errors import InputError
from ppsim.export.html_report import Report
from ppsim.export.text_table import text_table
from ppsim.plots.small_multiples_figure import small_multiples
from ppsim.plots.timeline_figure import timeline
from ppsim.plots.trade_off_figure import memory_against_bubble


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand, RunConfig):
    """All schedules at one configuration, predicted and measured."""

    only: tuple[str, ...] = ()
    """Schedules to compare; all that allow this configuration unless given."""
    ranks: int = 4
    """Pipeline ranks."""
    hidden: int = 256
    """Hidden size."""
    steps: int = 5
    """Measured steps of each schedule."""
    compute: Literal["real", "timed"] = "timed"
    """Timed: waits of the profiled length with real messages. Real: computes."""
    verify: bool = True
    """Compare each schedule's gradients with one process, in a real run."""
    out: Path = Path("studies/out/schedules")
    """Directory for report.html and summary.json."""

    def findings(self, directory: Path | None) -> Findings:
        """Predict and measure every schedule."""
        configs = self.configurations()
        entries: list[dict[str, Any]] = []
        outcomes: dict[str, Outcome] = {}
        with ppexec.WorkerPool() as pool, without_advice():
            layers = self.profiled(pool) if self.compute == "timed" else None
            for name, config in progress(configs.items()):
                costs = None
                if layers is not None:
                    costs = ppsim.partition(layers, stages=config.pipeline.model_stages, method=config.layer_sizes)
                outcomes[name] = predict_and_measure(config, pool=pool, costs=costs, verify=False)
                equal = ppexec.verify(replace(config, compute="real"), pool=pool) if self.verify else None
                entries.append(entry_of(name, outcomes[name], equal))
        summary = {
            "schedules": entries,
            "config": self.to_dict(),
            "environment": next(iter(outcomes.values())).environment,
        }
        page = report(self, entries, outcomes)
        return Findings(summary=summary, page=page, text=text_table([row(entry) for entry in entries]))

    def configurations(self) -> dict[str, RunConfig]:
        """A configuration for each schedule; one that was asked for by name must be possible."""
        found = {}
        for name in self.only or ppsim.schedule_names():
            try:
                found[name] = replace(self.plain(), schedule=name, stages_per_rank=None)
            except ValueError as error:
                if self.only:
                    raise
                print(f"left out: {error}", file=sys.stderr)
        if not found:
            raise InputError(
                f"no schedule allows {self.ranks} ranks, {self.microbatches} microbatches and {self.layers} layers"
            )
        return found

    def profiled(self, pool: ppexec.WorkerPool) -> list[ppsim.LayerCost]:
        """The layers' costs, from the file or measured on as many processes as there are cores."""
        if self.layer_costs is not None:
            return self.layer_costs
        return ppexec.profile(profiling_config(self), pool=pool)


def entry_of(name: str, outcome: Outcome, equal: ppexec.VerifyReport | None) -> dict[str, Any]:
    """One schedule's figures as JSON values."""
    summary = outcome.summary()
    held = summary["activation_bytes"]
    return {
        "schedule": name,
        "stages_per_rank": outcome.config.pipeline.stages // outcome.config.ranks,
        "step_time_s": summary["step_time_s"],
        "bubble_fraction": summary["bubble_fraction"],
        "rank_time_s": {
            "predicted": float(outcome.predicted.rank_time_s.max()),
            "measured": float(np.median([trace.rank_time_s.max() for trace in outcome.measured])),
        },
        "peak_activation_bytes": {"predicted": max(held["predicted"]), "measured": max(held["measured"])},
        "gradients_bit_equal": None if equal is None else equal.gradients_bit_equal,
    }


def verdict(entry: dict[str, Any]) -> str:
    """Whether the gradients were those of one process."""
    equal = entry["gradients_bit_equal"]
    return "not compared" if equal is None else "bit-equal" if equal else "DIFFERENT"


def report(study: Study, entries: Sequence[dict[str, Any]], outcomes: dict[str, Outcome]) -> Report:
    """The table, the trade-off between memory and bubble, and all timelines."""
    errors = [abs(entry["step_time_s"]["relative_error"]) for entry in entries]
    equal = sum(entry["gradients_bit_equal"] is True for entry in entries)
    fastest = min(entries, key=lambda entry: entry["step_time_s"]["measured_median"])
    leanest = min(entries, key=lambda entry: entry["peak_activation_bytes"]["measured"])
    lead = (
        f"Of {len(entries)} schedules on {study.ranks} ranks with {study.microbatches} microbatches, "
        f"{fastest['schedule']} has the shortest measured step and {leanest['schedule']} holds least. "
        f"Predictions are off by {np.median(errors):.1%} in the median and {max(errors):.1%} at most."
    )
    if study.verify:
        lead += f" Gradients of {equal} of {len(entries)} are bit-equal to those of one process."
    page = Report(title="Schedules compared", subtitle=f"{study.compute} compute, {study.layers} layers", lead=lead)
    page.add("All schedules", table=[row(entry) for entry in entries])
    page.add(
        "Memory against bubble",
        text="Outlines are predicted, filled marks measured; lower left is better.",
        figure=memory_against_bubble(entries),
    )
    page.add(
        "At a glance",
        text="Predicted steps on one scale of time.",
        figure=small_multiples({name: o.predicted for name, o in outcomes.items()}),
    )
    page.add("Predicted timelines", figure=timeline({name: o.predicted for name, o in outcomes.items()}))
    page.add(
        "Measured timelines",
        text="The median step of each.",
        figure=timeline({name: o.median for name, o in outcomes.items()}),
    )
    page.add("Environment", definitions=environment_rows(next(iter(outcomes.values())).environment))
    page.add("Configuration", definitions=environment_rows(study.to_dict()))
    return page


def row(entry: dict[str, Any]) -> dict[str, Any]:
    """A schedule's figures as a row."""
    step, bubble, peak = entry["step_time_s"], entry["bubble_fraction"], entry["peak_activation_bytes"]
    return {
        "schedule": entry["schedule"],
        "stages per rank": entry["stages_per_rank"],
        "predicted": f"{step['predicted'] * 1e3:.2f} ms",
        "measured": f"{step['measured_median'] * 1e3:.2f} ms",
        "error": f"{step['relative_error']:+.2%}",
        "bubble, predicted": f"{bubble['predicted']:.2%}",
        "bubble, measured": f"{bubble['measured']:.2%}",
        "peak memory, predicted": f"{peak['predicted'] / 2**20:.2f} MiB",
        "peak memory, measured": f"{peak['measured'] / 2**20:.2f} MiB",
        "gradients": verdict(entry),
    }


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
