"""Does cutting a GPT by cost beat cutting it evenly, and does prediction say by how much?

Question   A language model's head costs as much as several of its blocks, and its embedding next to nothing. Profile
           the layers, cut the chain evenly by blocks and by cost (the smallest largest stage), predict the step of
           both, then run both. How much shorter is the step, and was that foreseen? Is the smallest largest stage
           also the shortest step?

Command    python studies/partition.py
           python studies/partition.py --ranks 4 --layers 12 --compute timed --out DIR

Method     Every cut has workers of its own, and rounds of profiling and measured steps go round the cuts in turn, so
           that a machine whose speed drifts drifts under all alike. One set of layer costs, of all rounds, predicts
           every cut. Where cuts are few enough, every one is simulated with the costs that chose the optimal one, and
           the best of them is run too if it is another. Timed compute (each action waits what its layers were
           profiled to take; messages are real) shows more ranks than there are cores.

Answer     On two cores (AMD EPYC, torch 2.13): of 8 blocks and a head as dear as 5 of them, even gives stages of 45
           and 91 ms a microbatch, by cost 66 and 71. The step is 1.19 times as fast (quartiles 1.10 to 1.24), 1.22
           predicted; both steps were predicted 8 % too short in that run, whose steps had quartiles 13 % apart.
           With 4 ranks, 12 blocks and timed compute 1.393 times as fast, 1.397 predicted, steps within 0.9 %. No other
           cut of 9, or of 286, has a shorter simulated step. Activation bytes were as predicted.

Writes DIR/report.html and summary.json.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppexec.config.config import RunConfig
from ppexec.experiment.cuts import CutComparison, compare_cuts
from ppexec.experiment.text import environment_rows
from ppexec.study import Findings, StudyCommand, progress, study_main, without_advice
from ppsim.errors import InputError
from ppsim.export.html_report import Report
from ppsim.export.text_table import text_table
from ppsim.plots.cuts_figure import layer_times, steps_by_turn
from ppsim.plots.timeline_figure import timeline
from ppsim.trace.trace import median_step


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand, RunConfig):
    """A GPT cut evenly and by cost, predicted and measured."""

    model: str = "gpt"
    """Built-in model ("mlp", "gpt") or your own, package.module:factory."""
    schedule: str = "1f1b"
    """Schedule by name."""
    hidden: int = 256
    """Hidden size."""
    vocabulary: int = 16384
    """Rows of the embedding and the head; with the hidden size 256 the head has the parameters of 5.3 blocks, as in
    GPT-2 of 768 and 50,257."""
    partition: str = "even"
    """The cut that the optimal one is held against: even, or sizes such as 3,5."""
    steps: int = 12
    """Measured steps of each cut."""
    max_cuts: int = 2000
    """Simulate every cut if there are at most so many; 0 never does."""
    out: Path = Path("studies/out/partition")
    """Directory for report.html and summary.json."""

    def __post_init__(self) -> None:
        if self.model == "mlp" and self.vocabulary == Study.vocabulary:
            object.__setattr__(self, "vocabulary", 0)
        if self.partition == "optimal":
            raise InputError("partition is the cut that the optimal one is held against: take even, or sizes")
        if self.max_cuts < 0:
            raise InputError(f"max_cuts must be 0 or more, got {self.max_cuts}")
        super().__post_init__()

    def findings(self, directory: Path | None) -> Findings:
        """Choose the cuts, predict and measure them."""
        with without_advice(), progress(total=self.warmup + self.steps) as bar:
            found = compare_cuts(self, max_cuts=self.max_cuts, advance=bar.update)
        return Findings(summary=found.summary(), page=report(self, found), text=text_table(rows(found)))


def verdict(found: CutComparison) -> str:
    """The answer in words."""
    optimal = found.cuts[1]
    if optimal.sizes == found.cuts[0].sizes:
        return f"The cut {found.cuts[0].name} is the optimal one already: {optimal.sizes}."
    gain = found.speedup(optimal)
    text = (
        f"The optimal cut's step is {gain['measured_median']:.2f} times as fast as that of the cut "
        f"{found.cuts[0].name} (quartiles {gain['measured_p25']:.2f} to {gain['measured_p75']:.2f}), "
        f"{gain['predicted']:.2f} predicted."
    )
    best = found.best
    if best is None:
        return text
    if best is optimal:
        return f"{text} None of {found.simulated} cuts has a shorter simulated step."
    longer = optimal.simulated_s / best.simulated_s - 1
    return (
        f"{text} Of {found.simulated} simulated cuts {best.sizes} has the shortest step; that of the smallest largest "
        f"stage, {optimal.sizes}, is {longer:.2%} longer."
    )


def rows(found: CutComparison) -> list[dict[str, Any]]:
    """A cut's figures, for terminal and report."""
    lines = []
    for cut in found.cuts:
        summary, gain = cut.summary(), found.speedup(cut)
        step, held = summary["step_time_s"], summary["peak_activation_bytes"]
        lines.append(
            {
                "cut": cut.name,
                "layers": "+".join(map(str, cut.sizes)),
                "work of stages (ms)": " ".join(f"{value * 1e3:.1f}" for value in summary["work_s"]),
                "predicted": f"{step['predicted'] * 1e3:.1f} ms",
                "measured": f"{step['measured_median'] * 1e3:.1f} ms",
                "quartiles": f"{step['measured_p25'] * 1e3:.1f} to {step['measured_p75'] * 1e3:.1f}",
                "error": f"{step['relative_error']:+.1%}",
                "speedup predicted": f"{gain['predicted']:.3f}",
                "speedup measured": f"{gain['measured_median']:.3f}",
                "activations by rank (MiB)": " ".join(f"{value / 2**20:.1f}" for value in held["measured"]),
                "predicted equal": "yes" if held["predicted"] == held["measured"] else "no",
            }
        )
    return lines


def report(study: Study, found: CutComparison) -> Report:
    """The page: steps, layers, stages, timelines."""
    page = Report(
        title="Cut evenly or by cost",
        subtitle=f"{study.pipeline}, {study.layers} blocks of hidden size {study.hidden}, sequence {study.seq}, "
        f"vocabulary {study.vocabulary}, {study.compute} compute",
        lead=verdict(found),
    )
    page.add("The cuts", text="Layers count the embedding and the head.", table=rows(found))
    page.add(
        "Steps",
        text="Every measured step; lines are the predictions.",
        figure=steps_by_turn({cut.name: (cut.prediction.makespan_s, cut.times_s) for cut in found.cuts}),
    )
    layers_s = {layer.name: layer.work_s for layer in found.layers}
    page.add("Layers", text="Seconds of F and B of one microbatch.", figure=layer_times(layers_s))
    page.add("Predicted timelines", figure=timeline({cut.name: cut.prediction for cut in found.cuts}))
    page.add(
        "Measured timelines",
        text="The median step of each.",
        figure=timeline({cut.name: median_step(cut.measured) for cut in found.cuts}),
    )
    page.add("Environment", definitions=environment_rows(found.environment))
    page.add("Configuration", definitions=environment_rows(study.to_dict()))
    return page


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
