"""Does a pipeline step take as long, and hold as much, as the model predicts?

Question   Profile a model's layers, predict one step of a schedule with SimPy, run the very same schedule on real
           workers. How far apart are step time, bubble and activation memory? Are the gradients one process's?

Command    python studies/sim_vs_measured.py
           python studies/sim_vs_measured.py --schedule afab-eager --microbatches 16 --hidden 256 --out DIR

Answer     Within a few percent on two shared cores (AMD EPYC, one thread a rank, gloo, torch 2.13): five default runs
           predicted 1.1 to 2.5 % less than the median measured step, whose quartiles were 4 to 24 % apart. Activation
           bytes are equal on every rank, and outputs and gradients have the bits of one process.

Writes DIR/report.html (timelines on one axis, memory, bubbles, environment), summary.json, events.csv and
trace.json.gz (open it in Perfetto), picture.svg (the prediction above the measured step, as in the README); and both
steps, the measured one being the median, for further questions:
           ppsim compare DIR/predicted.trace.npz DIR/measured.trace.npz
           ppsim attribute DIR/measured.trace.npz
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas

import ppsim
from ppexec.config.config import RunConfig
from ppexec.experiment.experiment import Outcome, experiment_length, predict_and_measure
from ppexec.experiment.text import comparison_rows, environment_rows, memory_rows, memory_verdict, verdict
from ppexec.study import Findings, StudyCommand, progress, study_main
from ppsim.export.html_report import Report
from ppsim.export.perfetto import save_perfetto
from ppsim.export.svg_timeline import MOST_ROWS, svg_timelines
from ppsim.export.text_table import text_table
from ppsim.export.trace_files import write_trace
from ppsim.files import write_text
from ppsim.plots.attribution_figure import attribution
from ppsim.plots.bubble_figure import bubbles
from ppsim.plots.memory_figure import memory
from ppsim.plots.memory_parts_figure import memory_parts
from ppsim.plots.timeline_figure import timeline
from ppsim.plots.units import time_unit


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand, RunConfig):
    """Predict a step, run it for real, and lay the two side by side."""

    steps: int = 12
    """Measured steps."""
    out: Path = Path("studies/out/sim_vs_measured")
    """Directory for report.html, summary.json, events.csv, trace.json.gz and the two steps' traces."""

    def findings(self, directory: Path | None) -> Findings:
        """Predict and measure; the measured step that is shown is the median one."""
        with progress(total=experiment_length(self), desc=str(self.pipeline)) as bar:

            def advance(done: str) -> None:
                bar.set_postfix_str(done)
                bar.update()

            outcome = predict_and_measure(self, advance=advance)
        traces = {"predicted": outcome.predicted, "measured": outcome.median}
        return Findings(
            summary=outcome.summary(),
            page=report(outcome, traces),
            text=f"{outcome.config.pipeline}\n\n{text_table(comparison_rows(outcome))}",
            files=()
            if directory is None
            else write_files(traces, directory) + write_picture(outcome, traces, directory),
        )


def write_files(traces: dict[str, ppsim.Trace], directory: Path) -> tuple[str, ...]:
    """Write both steps for further questions; the names of the files."""
    frames = [trace.to_frame().assign(clock=name) for name, trace in traces.items()]
    write_text(directory / "events.csv", pandas.concat(frames).to_csv(index=False))
    save_perfetto(traces, directory / "trace.json.gz")
    for name, trace in traces.items():
        write_trace(trace, directory / f"{name}.trace.npz")
    return ("events.csv", "trace.json.gz", *(f"{name}.trace.npz" for name in traces))


def write_picture(outcome: Outcome, traces: dict[str, ppsim.Trace], directory: Path) -> tuple[str, ...]:
    """Draw the prediction above the measured step; the name of the file, or none if it would be a blur."""
    if sum(len(trace.start_s) for trace in traces.values()) > MOST_ROWS:
        return ()
    unit, names = time_unit(outcome.median.makespan_s), {"predicted": "Predicted", "measured": "Measured, median step"}
    titled = {
        f"{names[clock]}: {unit.text(trace.makespan_s)}, bubble {trace.bubble_fraction:.1%}": trace
        for clock, trace in traces.items()
    }
    config, environment = outcome.config, outcome.environment
    made_with = (
        f"{config.pipeline}; {config.compute} compute of {config.layers} layers of hidden size {config.hidden} over "
        f"{config.backend}; {environment['processor']}, {environment['cores']} cores, torch {environment['torch']}"
    )
    write_text(directory / "picture.svg", svg_timelines(titled, description=made_with))
    return ("picture.svg",)


def report(outcome: Outcome, traces: dict[str, ppsim.Trace]) -> Report:
    """The page one shows to others."""
    config, summary = outcome.config, outcome.summary()
    step = summary["step_time_s"]
    # With an even number of steps no one step takes the median of their times.
    which = "the median one" if config.steps % 2 else "the faster of the two in the middle"
    page = Report(
        title=f"{config.pipeline.name}: predicted and measured",
        subtitle=f"{config.ranks} ranks, {config.microbatches} microbatches, {config.layers} layers of hidden size "
        f"{config.hidden}, sequence {config.seq}, micro batch {config.micro_batch_size}, {config.dtype}",
        lead=verdict(outcome),
        facts={
            "predicted step": f"{step['predicted'] * 1e3:.1f} ms",
            "measured step (median)": f"{step['measured_median'] * 1e3:.1f} ms",
            "error": f"{outcome.step_time_error:+.1%}",
            "bubble": f"{summary['bubble_fraction']['measured']:.1%}",
        },
    )
    page.add("Predicted against measured", table=comparison_rows(outcome))
    copied = outcome.predicted.copy_bytes
    largest = 0 if copied is None else int(copied.max())
    page.add(
        "Timelines",
        text=f"One step on each clock, on one time axis. The measured step is {which}. Numbers are microbatches. "
        "The red line is the critical path: what it crosses made the step as long as it is."
        + (
            ""
            if outcome.predicted.reduce_end_s is None
            else " Hatched strips add up gradients over the replicas: predicted as measured alone, measured until the "
            "last replica has joined and all is there."
        )
        + (
            ""
            if outcome.host_link is None
            else " Copies of activations to host memory and back are predicted as they took while profiling: "
            f"{outcome.host_link.copy_s(largest) * 1e3:.3g} ms for the largest, of {largest / 2**20:.3g} MiB."
        ),
        figure=timeline(traces, critical_path=True),
    )
    page.add(
        "Activation memory",
        text="What each rank holds for its backward passes. Measured bytes are counted in a separate, untimed step on "
        f"what autograd keeps, and drawn at that step's times. {memory_verdict(outcome)}",
        figure=memory(traces),
    )
    page.add(
        "Memory in all",
        text="What each rank holds when it holds the most, the prediction beside the measurement. Gradients are there "
        "from a stage's first B or W on; receive buffers from posting to use; unfinished sends follow each clock's own "
        "times. What kernels need within an action is not in it.",
        figure=memory_parts(traces),
        table=memory_rows(outcome),
    )
    page.add("Bubbles", text="Each rank's time in the step without compute.", figure=bubbles(traces))
    page.add(
        "What the ranks waited for",
        text="The same bubbles by cause; the parts add up to the bubble exactly. Warm-up and drain are the pipeline "
        "filling and emptying, imbalance is other waiting for a rank that computes, straggler what is there because "
        "actions took longer than the same action usually does. Streams are what a message that is made waits for on "
        "its communicator, or until its receive is posted. `Device or dispatch` is the time in which everything "
        "was there and the action had not begun.",
        figure=attribution(traces),
    )
    compared = ppsim.compare(outcome.predicted, outcome.median)
    page.add(
        "Why the measured step takes as long as it does",
        text=compared.explain().replace("\n", "\n\n"),
        caption="All durations and delays are moved together from the predicted step's to the measured one's; what "
        "changes while it is on the critical path counts. The rows add up to the difference.",
        table=difference_rows(compared),
    )
    page.add(
        "Stage costs",
        text="Seconds were profiled layer by layer on all ranks at once, in turn with the measured steps, then added "
        "up by stage; bytes were counted on each stage as cut.",
        table=[
            {
                "stage": stage,
                "layers": config.layer_sizes[stage % len(config.layer_sizes)],
                "F (ms)": round(cost.forward_s * 1e3, 3),
                "B (ms)": round(cost.full_backward_s * 1e3, 3),
                **({} if cost.recompute_s is None else {"R (ms)": round(cost.recompute_s * 1e3, 3)}),
                "activations (MiB)": round(cost.activation_bytes / 2**20, 2),
                "message (KiB)": round(cost.output_bytes / 2**10, 1),
                "parameters (MiB)": round(cost.parameter_bytes / 2**20, 2),
            }
            for stage, cost in enumerate(outcome.largest_stages)
        ],
    )
    page.add("Environment", definitions=environment_rows(summary["environment"]))
    page.add("Configuration", definitions=environment_rows(summary["config"]))
    return page


def difference_rows(compared: ppsim.Comparison) -> list[dict[str, str]]:
    """The contributions to the difference in step time, largest first, and their sum."""
    step_s = compared.predicted.trace.makespan_s

    def row(name: str, seconds: float) -> dict[str, str]:
        return {"what": name, "ms": f"{seconds * 1e3:+.3f}", "of the predicted step": f"{seconds / step_s:+.2%}"}

    rows = [row(each.name, each.seconds) for each in compared.telling]
    return [*rows, row("measured - predicted", compared.difference_s)]


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
