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

import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from tqdm import tqdm

import ppexec
import ppsim
from ppexec.cli import existing_directory, study_main
from ppexec.experiment.text import environment_rows
from ppexec.measure.assemble import median_step, with_memory
from ppsim.cli import command
from ppsim.export.html_report import Report
from ppsim.plots.style import layout, series_colour
from ppsim.plots.timeline_figure import timeline
from ppsim.simulation.memory_columns import with_columns

_TIMES = ("forward_s", "backward_s", "backward_input_s", "backward_weight_s")
_CHOOSING_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Study(ppexec.RunConfig):
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
    most_cuts: int = 2000
    """Simulate every cut if there are at most so many; 0 never does."""
    out: Path = Path("studies/out/partition")
    """Directory for report.html and summary.json."""
    json: bool = False
    """Print summary.json's object and nothing else on standard output."""

    def __post_init__(self) -> None:
        if self.model == "mlp" and self.vocabulary == Study.vocabulary:
            object.__setattr__(self, "vocabulary", 0)
        if self.partition == "optimal":
            raise ValueError("partition is the cut that the optimal one is held against: take even, or sizes")
        if self.most_cuts < 0:
            raise ValueError(f"most_cuts must be 0 or more, got {self.most_cuts}")
        super().__post_init__()

    def execute(self) -> None:
        """Run the study, print its table and write the report."""
        directory = existing_directory(self.out)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # every session would repeat the same advice on microbatches
            found = compare_cuts(self)
        summary = found.summary()
        (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        report(self, found).save(directory / "report.html")
        if self.json:
            command.print_json(summary)
            return
        for line in table(found):
            print(line)
        print(f"\n{verdict(found)}\n\nwritten to {directory}: report.html, summary.json")


@dataclass(kw_only=True)
class Cut:
    """One way of cutting the chain, and what became of it.

    sizes: layers of each stage. foreseen_s: the step simulated with the costs that chose the cut.
    """

    name: str
    sizes: list[int]
    foreseen_s: float
    rounds: list[list[Any]] = field(default_factory=list)
    measured: list[ppsim.Trace] = field(default_factory=list)
    stages: list[ppsim.StageCost] = field(default_factory=list)
    predicted: ppsim.Trace | None = None

    @property
    def prediction(self) -> ppsim.Trace:
        """The predicted step, once there is one."""
        if self.predicted is None:
            raise ValueError(f"the cut {self.name} has not been predicted yet")
        return self.predicted

    @property
    def times_s(self) -> np.ndarray:
        """Every measured step."""
        return np.array([trace.makespan_s for trace in self.measured])

    def summary(self) -> dict[str, Any]:
        """The cut as JSON values; seconds and bytes."""
        low, middle, high = np.quantile(self.times_s, [0.25, 0.5, 0.75])
        predicted_s, held = self.prediction.makespan_s, median_step(self.measured)
        return {
            "cut": self.name,
            "layers": self.sizes,
            "work_s": [stage.work_s for stage in self.stages],
            "step_time_s": {
                "predicted": predicted_s,
                "measured_median": float(middle),
                "measured_p25": float(low),
                "measured_p75": float(high),
                "relative_error": (predicted_s - float(middle)) / float(middle),
                "measured": self.times_s.tolist(),
            },
            "bubble_fraction": {
                "predicted": self.prediction.bubble_fraction,
                "measured": float(np.median([trace.bubble_fraction for trace in self.measured])),
            },
            "peak_activation_bytes": {
                "predicted": self.prediction.peak_activation_bytes.tolist(),
                "measured": held.peak_activation_bytes.tolist(),
            },
            "memory": {"predicted": self.prediction.memory.to_dict(), "measured": held.memory.to_dict()},
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The cuts, the first of them the one that the others are held against; simulated: how many cuts were, or None."""

    cuts: list[Cut]
    layers: list[ppsim.LayerCost]
    simulated: int | None
    best: Cut | None
    environment: dict[str, Any]
    config: dict[str, Any]

    def speedup(self, cut: Cut) -> dict[str, float]:
        """How many times as fast as the first cut; measured step by step, each against the one beside it."""
        low, middle, high = np.quantile(self.cuts[0].times_s / cut.times_s, [0.25, 0.5, 0.75])
        predicted = self.cuts[0].prediction.makespan_s / cut.prediction.makespan_s
        return {"predicted": predicted, "measured_median": middle, "measured_p25": low, "measured_p75": high}

    def summary(self) -> dict[str, Any]:
        """Everything as JSON values."""
        best = self.best
        return {
            "cuts": [{**cut.summary(), "speedup": self.speedup(cut)} for cut in self.cuts],
            "layers": [{"layer": layer.name, "work_s": layer.work_s} for layer in self.layers],
            "every_cut": None
            if best is None
            else {
                "simulated": self.simulated,
                "best": best.sizes,
                "best_s": best.foreseen_s,
                "optimal": self.cuts[1].sizes,
                "optimal_s": self.cuts[1].foreseen_s,
            },
            "config": self.config,
            "environment": self.environment,
        }


def compare_cuts(study: Study) -> Comparison:
    """Choose the cuts from a profile, then profile and measure them in turn."""
    plain = study.plain()
    with ExitStack() as stack:
        pool = stack.enter_context(ppexec.WorkerPool())
        timed = study.compute == "timed"
        layers = study.layer_costs or choosing_profile(plain, pool)
        cuts, simulated, best = choose(study, layers)
        sessions = []
        for number, cut in enumerate(cuts):
            config = replace(plain, partition=blocks(plain, cut.sizes), costs=None)
            workers = pool if number == 0 else stack.enter_context(ppexec.WorkerPool())
            costs = ppsim.partition(layers, stages=len(cut.sizes), method=cut.sizes) if timed else None
            sessions.append(stack.enter_context(ppexec.Session(config, pool=workers, costs=costs)))
            cut.rounds = [[] for _ in range(config.world_size)]
            cut.stages = costs or []
        for step in tqdm(range(-study.warmup, study.steps), file=sys.stderr, leave=False):
            for cut, session in zip(cuts, sessions, strict=True):
                rounds = [] if timed else session.profile_rounds(1, first_step=max(step, 0))
                traces = session.measure(1, first_step=max(step, 0))
                if step >= 0:
                    cut.measured += traces
                    for gathered, new in zip(cut.rounds, rounds, strict=False):
                        gathered += new
        if not timed:
            together = [[each for cut in cuts for each in cut.rounds[rank]] for rank in range(plain.world_size)]
            layers = sessions[0].summarise(together).layers
        for cut, session in zip(cuts, sessions, strict=True):
            if not timed:
                cut.stages = as_cut(layers, cut.sizes, session.summarise(cut.rounds).stages)
            simulated_step = ppsim.simulate(plain.pipeline, cut.stages, network=session.probe_network())
            cut.predicted = with_columns(simulated_step, receive_window=session.receive_window)
            memory = session.memory()
            cut.measured = [with_memory(trace, memory) for trace in cut.measured]
        return Comparison(
            cuts=cuts,
            layers=layers,
            simulated=simulated,
            best=best,
            environment=sessions[0].environment(),
            config=study.to_dict(),
        )


def as_cut(
    layers: Sequence[ppsim.LayerCost], sizes: Sequence[int], counted: Sequence[ppsim.StageCost]
) -> list[ppsim.StageCost]:
    """Stages with the seconds of `layers` and the bytes counted on each stage as cut."""
    summed = ppsim.partition(layers, stages=len(sizes), method=sizes)
    return [
        replace(stage, **{name: getattr(of, name) for name in _TIMES})
        for stage, of in zip(counted, summed, strict=True)
    ]


def choosing_profile(config: ppexec.RunConfig, pool: ppexec.WorkerPool) -> list[ppsim.LayerCost]:
    """The layers' costs on as many processes as will compute at once: the run's, or for timed compute the cores."""
    real = replace(config, compute="real", costs=None)
    if config.compute == "timed":
        cores = min(config.ranks, os.cpu_count() or 1)
        ranks = max(n for n in range(1, cores + 1) if config.layers % n == 0)
        real = replace(real, ranks=ranks, schedule="zb-h1", stages_per_rank=None, partition="even", threads=1)
    with ppexec.Session(real, pool=pool) as session:
        session.profile_rounds(1)
        return session.profile(_CHOOSING_ROUNDS).layers


def choose(study: Study, layers: Sequence[ppsim.LayerCost]) -> tuple[list[Cut], int | None, Cut | None]:
    """The given cut, the optimal one, and the best of all by simulation where it is another; how many were simulated.

    The optimal cut has the smallest largest stage; of the simulated, messages cost nothing, as in choosing it.
    """
    pipeline = study.pipeline

    def simulated_s(sizes: Sequence[int]) -> float:
        stages = ppsim.partition(layers, stages=pipeline.stages, method=sizes)
        return ppsim.simulate(pipeline, stages, engine="compiled").makespan_s

    work_s = [layer.work_s for layer in layers]
    optimal = ppsim.partition_sizes(len(layers), stages=pipeline.stages, method="optimal", work_s=work_s)
    found = [
        Cut(name=name, sizes=sizes, foreseen_s=simulated_s(sizes))
        for name, sizes in ((study.partition, study.layer_sizes), ("optimal", optimal))
    ]
    count = math.comb(len(layers) - 1, pipeline.stages - 1)
    if count > study.most_cuts:
        return found, None, None
    steps_s = {sizes: simulated_s(sizes) for sizes in every_cut(len(layers), pipeline.stages)}
    sizes = min(steps_s, key=steps_s.__getitem__)
    if steps_s[sizes] >= found[1].foreseen_s:
        return found, count, found[1]
    best = next((cut for cut in found if cut.sizes == list(sizes)), None)
    if best is None:
        best = Cut(name="best simulated", sizes=list(sizes), foreseen_s=steps_s[sizes])
        found.append(best)
    return found, count, best


def every_cut(layers: int, stages: int) -> list[tuple[int, ...]]:
    """All ways to cut so many layers into so many runs of at least one."""
    return [
        tuple(stop - start for start, stop in pairwise((0, *inner, layers)))
        for inner in combinations(range(1, layers), stages - 1)
    ]


def blocks(config: ppexec.RunConfig, sizes: Sequence[int]) -> str:
    """Stage sizes as the flag `--partition` counts them: a GPT's embedding and head left out."""
    counted = list(sizes)
    if config.chain_length > config.layers:
        counted[0] -= 1
        counted[-1] -= 1
    return ",".join(map(str, counted))


def verdict(found: Comparison) -> str:
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
    longer = optimal.foreseen_s / best.foreseen_s - 1
    return (
        f"{text} Of {found.simulated} simulated cuts {best.sizes} has the shortest step; that of the smallest largest "
        f"stage, {optimal.sizes}, is {longer:.2%} longer."
    )


def rows(found: Comparison) -> list[dict[str, Any]]:
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


def table(found: Comparison) -> list[str]:
    """The rows as aligned lines."""
    cells = rows(found)
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in cells[0]}
    return [
        "  ".join(row[name].ljust(width) for name, width in widths.items()).rstrip()
        for row in [{name: name for name in widths}, *cells]
    ]


def report(study: Study, found: Comparison) -> Report:
    """The page: steps, layers, stages, timelines."""
    page = Report(
        title="Cut evenly or by cost",
        subtitle=f"{study.pipeline}, {study.layers} blocks of hidden size {study.hidden}, sequence {study.seq}, "
        f"vocabulary {study.vocabulary}, {study.compute} compute",
        lead=verdict(found),
    )
    page.add("The cuts", text="Layers count the embedding and the head.", table=rows(found))
    page.add("Steps", text="Every measured step; lines are the predictions.", figure=steps_figure(found))
    page.add("Layers", text="Seconds of F and B of one microbatch.", figure=layers_figure(found))
    page.add("Predicted timelines", figure=timeline({cut.name: cut.prediction for cut in found.cuts}))
    page.add(
        "Measured timelines",
        text="The median step of each.",
        figure=timeline({cut.name: median_step(cut.measured) for cut in found.cuts}),
    )
    page.add("Environment", definitions=environment_rows(found.environment))
    page.add("Configuration", definitions=environment_rows(study.to_dict()))
    return page


def steps_figure(found: Comparison) -> go.Figure:
    """Step time against the turn, a colour for each cut."""
    picture = go.Figure(layout=layout(height=320, title=None, bottom=60, entries=2 * len(found.cuts)))
    for number, cut in enumerate(found.cuts):
        turns = list(range(len(cut.measured)))
        colour = series_colour(number)
        picture.add_scatter(
            x=turns, y=cut.times_s * 1e3, mode="markers", name=f"{cut.name}, measured", marker={"color": colour}
        )
        predicted_ms = cut.prediction.makespan_s * 1e3
        picture.add_scatter(
            x=turns, y=[predicted_ms] * len(turns), mode="lines", name=f"{cut.name}, predicted", line={"color": colour}
        )
    picture.update_xaxes(title_text="turn")
    picture.update_yaxes(title_text="step [ms]", rangemode="tozero")
    return picture


def layers_figure(found: Comparison) -> go.Figure:
    """A bar for each layer of the chain."""
    picture = go.Figure(layout=layout(height=260, title=None, bottom=90))
    picture.add_bar(
        x=[layer.name for layer in found.layers],
        y=[layer.work_s * 1e3 for layer in found.layers],
        marker={"color": series_colour(0)},
    )
    picture.update_yaxes(title_text="F + B [ms]", rangemode="tozero")
    return picture


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
