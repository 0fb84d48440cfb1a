"""Does a training go alike on every mesh, and on from a checkpoint after a move to another?

Question   N optimizer steps (AdamW) over dp x pp x tp: is the loss curve that of one process? Saved on one mesh and
           resumed on another: is the next loss the same?

Command    python studies/train.py
           python studies/train.py --dtype float64
           python studies/train.py --meshes 2x2x1:1f1b 1x4x1:zb-h1 --steps 50 --hidden 256 --tied --out DIR

Method     A small GPT learns the bytes of a text. All start from the same model (a parameter depends on seed, layer and
           name alone) and read the same global batch in each step; each mesh runs a schedule of its own. What rounding
           alone does to a training is measured, not guessed: a control, one process whose every parameter starts one
           rounding away, up or down. A mesh passes if no loss is farther from one process's than ten times the
           control's farthest so far (or four roundings of the loss), and never by more than a thousandth of it: a
           training that amplifies roundings beyond that shows nothing and fails. Each mesh saves half-way; the next in
           the list loads that and takes one step, held to the same.

Answer     Yes. On two cores (gloo, torch 2.13, float32), 30 steps of a 4-block GPT on five meshes, each with another
           schedule, took the loss from 5.58 to 3.55: a pipeline alone gives one process's curve bit by bit; with dp
           or tp every loss is within 4.9e-8 of it, where the control strays by 2.8e-8. From 2x2x1 on 1x4x1 the next
           loss is the same bit by bit; after any move it is within 1.4e-8. At three times the learning rate the
           training itself amplifies a rounding to 1.2e-3 of the loss, and the meshes stray half as far.

Writes DIR/report.html (curves, and their distance from one process's) and summary.json. Exit code 1 if any differ.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppexec.config.config import RunConfig
from ppexec.experiment.text import environment_rows
from ppexec.experiment.trainings import distance, train_on_meshes
from ppexec.machine.environment import describe_environment
from ppexec.study import Findings, StudyCommand, progress, study_main, without_advice
from ppsim.errors import InputError
from ppsim.export.html_report import Report
from ppsim.export.text_table import text_table
from ppsim.plots.loss_figure import loss_curves


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand, RunConfig):
    """Loss curves of several meshes over one process's, and resumed on each other's checkpoints."""

    meshes: tuple[str, ...] = ("1x2x1:afab", "1x2x2:zb-v", "2x2x1:1f1b", "1x4x1:zb-h1", "2x2x2:interleaved-1f1b")
    """Meshes to train on, each dp x pp x tp, with a schedule of its own behind a colon unless it takes --schedule."""
    model: str = "gpt"
    """Built-in model ("mlp", "gpt") or your own, package.module:factory."""
    schedule: str = "1f1b"
    """Schedule by name, of meshes that name none."""
    ranks: int = 1
    """Leave at 1: the meshes say it."""
    hidden: int = 64
    """Hidden size."""
    seq: int = 32
    """Sequence length."""
    steps: int = 30
    """Optimizer steps."""
    layers: int = 4
    """Number of layers, cut into the stages."""
    threads: int = 1
    """Threads of each process; the same on every mesh, since sums depend on it."""
    out: Path = Path("studies/out/train")
    """Directory for report.html and summary.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.dp, self.ranks, self.tp) != (1, 1, 1) or self.from_csv is not None:
            raise InputError("this study takes its meshes from --meshes and its schedule by name: leave the others out")
        if self.steps < 2:
            raise InputError(f"steps must be 2 or more, so that there is a half to resume from, got {self.steps}")
        if not self.meshes:
            raise InputError("meshes is empty: give at least one, such as 2x2x1")
        for mesh in self.meshes:
            self.on(mesh)

    def on(self, mesh: str) -> RunConfig:
        """The run on a mesh; its microbatches are the step's, shared out over dp as evenly as possible."""
        sizes, _, schedule = mesh.partition(":")
        try:
            dp, pp, tp = (int(size) for size in sizes.split("x"))
        except ValueError:
            raise InputError(f"a mesh is three sizes, dp x pp x tp, such as 2x2x1, got {mesh!r}") from None
        if not 1 <= dp <= self.microbatches:
            raise InputError(f"mesh {mesh} has {dp} replicas for {self.microbatches} microbatches: take 1 to that many")
        each, more = divmod(self.microbatches, dp)
        shares = ",".join(str(each + (replica < more)) for replica in range(dp))
        mesh_of = {"dp": dp, "ranks": pp, "tp": tp, "microbatches": 0, "replica_microbatches": shares}
        return replace(self.plain(), **mesh_of, schedule=schedule or self.schedule)

    def findings(self, directory: Path | None) -> Findings:
        """Train on every mesh, and go on from the checkpoints of another."""
        meshes = {mesh: self.on(mesh) for mesh in self.meshes}
        with without_advice(), progress(total=2 + 2 * len(meshes)) as bar:
            found = train_on_meshes(self.on("1x1x1"), meshes, advance=bar.update)
        summary = {**found, "config": self.to_dict(), "environment": describe_environment()}
        return Findings(summary=summary, page=report(summary), text=text_of(summary), holds=summary["equal"])


def text_of(summary: dict[str, Any]) -> str:
    """One process, the control, and a row for each mesh."""
    one, control = summary["one_process"], summary["control"]
    strayed = distance(control, one, summary["allowed"])["max_relative_difference"]
    return (
        f"one process: loss {one[0]:.6f} at step 0, {one[-1]:.6f} at step {len(one) - 1}\n"
        f"control, every parameter one rounding away: at most {strayed:.1e} of the loss off\n\n"
        f"{text_table(mesh_rows(summary))}"
    )


def mesh_rows(summary: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each mesh."""
    return [
        {
            "dp x pp x tp : schedule": row["mesh"],
            "curve off by": f"{row['max_relative_difference']:.1e}",
            "curve": verdict(row),
            "resumed from": row["resumed"]["from"],
            "next loss off by": f"{row['resumed']['max_relative_difference']:.1e}",
            "next loss": verdict(row["resumed"]),
        }
        for row in summary["meshes"]
    ]


def verdict(row: dict[str, Any]) -> str:
    """In a word."""
    return "equal" if row["equal"] else "DIFFERENT"


def report(summary: dict[str, Any]) -> Report:
    """Curves, the table, and where it ran."""
    count = len(summary["meshes"])
    page = Report(
        title="Training on several meshes",
        lead=f"{count} meshes, {len(summary['one_process'])} steps: curves and resumed losses are "
        + ("one process's within rounding." if summary["equal"] else "NOT all one process's: see the table."),
    )
    curves = {"control": summary["control"], **{row["mesh"]: row["losses"] for row in summary["meshes"]}}
    page.add(
        "Loss",
        text="Left the curves, right their distance from one process's.",
        figure=loss_curves(summary["one_process"], curves, allowed=summary["allowed"]),
    )
    page.add("Every mesh", text="Distances are relative to the loss.", table=mesh_rows(summary))
    page.add("Environment", definitions=environment_rows(summary["environment"]))
    return page


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
