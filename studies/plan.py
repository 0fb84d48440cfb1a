"""Is a training step as long as predicted before anything runs, and does the plan find the fastest way?

Question   How far are predicted steps from measured ones that were not fitted: on one node, on many nodes, and with one
           set of constants for both? For a model and a number of devices: is the fastest measured configuration among
           the three that are predicted to be fastest?

Command    python studies/plan.py
           python studies/plan.py --single FILE --multi FILE --json      (other steps, with the same columns)

Method     764 steps on A100 (published/vtrain): 720 on one node, 44 on many. Fitted are a machine's eleven constants,
           and for each layer shape that three steps or more have a factor on the time of its layers. One half of the
           steps, drawn by --seed, is fitted and the other half predicted; then the halves change places, so that each
           error is of a step that was not fitted. "Constants alone" is without factors. "Fitted to both" draws the
           halves from all 764 steps. "Many nodes, fitted to one node" fits all steps on one node.

Answer     The mean error is 0.6 % on one node, 5.6 % with constants alone. On many nodes it is 6.7 %, 4 % in the median
           (6.4 % over 8 draws of the halves, from 6.0 to 7.0); 6.3 % if fitted to both, 9 % if fitted to one node. The
           fastest measured configuration is among the predicted first three in every group of configurations of the
           same work.
           Times on one node seem to be composed, not measured: without a pipeline they are sums of profiles of one
           layer each, to 0.05 %. The layers of a shape take up to a quarter more or less than the constants say, with
           no pattern in hidden, tp or micro batch. That is what factors are for.
           On many nodes most steps are predicted within 4 %. Ten of the 44 took 10 to 58 % longer than predicted, nine
           of them with tp below 8. Some of them have the same layers as steps that are predicted well, with stages cut
           elsewhere, so that no constant can tell them apart.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ppexec.experiment.step_predictions import (
    error_rows,
    held_back_errors,
    ranking,
    same_devices,
    same_work,
)
from ppexec.study import Findings, StudyCommand, study_main
from ppsim import (
    Cluster,
    Machine,
    MeasuredStep,
    Plans,
    fit_machine,
    named_machine,
    plan,
    read_measured_steps,
)
from ppsim.estimate.machine import CONSTANTS
from ppsim.export.html_report import Report
from ppsim.export.text_table import text_table
from ppsim.planning.machine_fit import error_summary, prediction_errors
from ppsim.plots.plans_figure import time_against_memory

_DATA = Path(__file__).parent / "published" / "vtrain"


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand):
    """Predicted training steps against measured ones, and a plan explained."""

    single: Path = _DATA / "single_node.csv"
    """Measured steps on one node."""
    multi: Path = _DATA / "many_nodes.csv"
    """Measured steps on many nodes."""
    single_vocabulary: int = 50_257
    """Vocabulary of the models on one node."""
    multi_vocabulary: int = 51_200
    """Vocabulary of the models on many nodes."""
    device: str = "a100"
    """Name of the device from whose rates the fit starts."""
    seed: int = 0
    """Draws the halves."""

    def findings(self, directory: Path | None) -> Findings:
        """Fit, predict, rank, and plan."""
        start = named_machine(self.device, fitted=False)
        single = read_measured_steps(self.single, vocabulary=self.single_vocabulary, memory_bytes=start.memory_bytes)
        multi = read_measured_steps(self.multi, vocabulary=self.multi_vocabulary, memory_bytes=start.memory_bytes)
        kinds = {"one node": single, "many nodes": multi}
        found = {name: held_back_errors(each, start, seed=self.seed) for name, each in kinds.items()}
        alone = {name: held_back_errors(each, start, seed=self.seed, by_shape=False) for name, each in kinds.items()}
        both = held_back_errors([*single, *multi], start, seed=self.seed)
        joint = {"one node": both[: len(single)], "many nodes": both[len(single) :]}
        on_one = fit_machine(single, start).machine
        asked = prediction_errors(multi, on_one)
        machine = fit_machine([*single, *multi], start).machine
        rankings = {
            name: {
                "one global batch": asdict(ranking(each, found[name], same=same_work, per_sample=False)),
                "any global batch": asdict(ranking(each, found[name], same=same_devices, per_sample=True)),
            }
            for name, each in kinds.items()
        }
        plans = _example(multi, machine)
        summary: dict[str, Any] = {
            "errors": {name: error_summary(each) for name, each in found.items()},
            "constants_alone": {name: error_summary(each) for name, each in alone.items()},
            "one_machine_for_both": {name: error_summary(each) for name, each in joint.items()},
            "one_node_asked_for_many": error_summary(asked),
            "groups": {name: error_rows(each, found[name]) for name, each in kinds.items()},
            "ranking": rankings,
            "machine": {name: getattr(machine, name) for name in CONSTANTS},
            "spread": dict(machine.spread),
            "plan": [each.row for each in plans[:10]],
        }
        return Findings(summary=summary, page=_report(summary, plans), text=_text(summary, plans))


def _example(multi: Sequence[MeasuredStep], machine: Machine) -> Plans:
    """A plan for the largest measured model, its devices and its batch."""
    step = max((each.step for each in multi), key=lambda each: each.model.parameters)
    return plan(
        step.model,
        Cluster(machine=machine, devices=step.devices),
        global_batch=step.global_batch,
        seq=step.seq,
    )


def _error_table(summary: dict[str, Any]) -> list[dict[str, str]]:
    rows = dict(summary["errors"])
    rows |= {f"{name}, constants alone": each for name, each in summary["constants_alone"].items()}
    rows |= {f"{name}, fitted to both": each for name, each in summary["one_machine_for_both"].items()}
    rows["many nodes, fitted to one node"] = summary["one_node_asked_for_many"]
    return [
        {
            "steps not fitted": name,
            "number": str(each["steps"]),
            "mean error": f"{each['mean_error']:.1%}",
            "median": f"{each['median_error']:.1%}",
            "signed": f"{each['mean_signed_error']:+.1%}",
            "worst": f"{each['worst_error']:.1%}",
        }
        for name, each in rows.items()
    ]


def _group_table(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "group": f"{row['group']} {row['value']}",
            "steps": str(row["steps"]),
            "mean error": f"{row['mean_error']:.1%}",
            "signed": f"{row['mean_signed_error']:+.1%}",
        }
        for row in rows
    ]


def _ranking_table(rankings: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "measured on": name,
            "ways compared": what,
            "groups": str(each["groups"]),
            "fastest among the first three": f"{each['hits']} of {each['groups']}",
            "the predicted first is slower by": f"{each['lost']:.1%}",
        }
        for name, kinds in rankings.items()
        for what, each in kinds.items()
    ]


def _plan_table(plans: Plans) -> list[dict[str, str]]:
    return [
        {
            "tp x pp x dp": f"{each.step.tp} x {each.step.pp} x {each.step.dp}",
            "micro batch": str(each.step.micro_batch_size),
            "schedule": each.step.schedule,
            "recompute": each.step.recompute,
            "step (s)": f"{each.step_s:.3g}",
            "GB": f"{each.total_bytes / 1e9:.0f}",
            "why": each.reason,
        }
        for each in plans[:10]
    ]


def _text(summary: dict[str, Any], plans: Plans) -> str:
    parts = [text_table(_error_table(summary))]
    parts += [f"{name}\n{text_table(_group_table(rows))}" for name, rows in summary["groups"].items()]
    parts += [text_table(_ranking_table(summary["ranking"])), text_table(_plan_table(plans))]
    return "\n\n".join(parts)


def _report(summary: dict[str, Any], plans: Plans) -> Report:
    one, many = (summary["errors"][name]["mean_error"] for name in ("one node", "many nodes"))
    page = Report(
        title="Training steps predicted before anything runs",
        lead=f"Mean error of steps that were not fitted: {one:.1%} on one node, {many:.1%} on many.",
    )
    page.add("Errors", table=_error_table(summary))
    for name, rows in summary["groups"].items():
        page.add(f"Errors on {name}, by group", table=_group_table(rows))
    page.add("Is the fastest way found?", table=_ranking_table(summary["ranking"]))
    page.add("A plan for the largest of the models", table=_plan_table(plans), figure=time_against_memory(plans))
    return page


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
