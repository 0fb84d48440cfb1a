"""Where may a receive be posted: when does it hold up a send, and when does it hang?

Question   One order of computations, its receives posted in four places: step times on communicators of links, of pairs
           of ranks and of ranks, and which of them hang.

Command    python studies/streams.py
           python studies/streams.py --no-measure --json
           python studies/streams.py --ranks 16 --microbatches 32

Method     Interleaved 1F1B as in two reports to PyTorch: two ranks with four microbatches (issue 172668), and eight
           ranks (issue 188833), two stages on each. Receives are posted ahead of the step (each link by itself); when
           the message is sent, which is where PyTorch's `_add_send_recv` puts them; where its `_defer_recv_ops` moves
           them from there; and at their use. Each is checked and simulated, with equal stages and B = 2 F. What does
           not hang is then run over gloo, with actions that wait for as long as they should take.

Answer     With one communicator for each rank, receives that stand where their messages are sent (PyTorch's placement)
           hang nowhere, but hold up sends: on eight ranks a step takes 1.45 times as long as with a communicator for
           each link, and 1.47 measured; on four ranks 1.10, and 1.10 measured (`--ranks 4`, two cores). Steps are
           predicted 1 to 6 % short where receives stand ahead of their use, and up to 10 % at their use on eight ranks.
           Receives at their use, and those that `_defer_recv_ops` moves, hang on communicators of pairs and of ranks:
           two ranks that send to each other both send first. A communicator for each link (or pair, with receives when
           sent) costs nothing. The report's 9,700 against 7,300 tokens/s is a ratio of 1.33, from two ranks whose
           computation communicates too, which is not modelled here.

Writes DIR/report.html and summary.json.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import ppsim
from ppexec import RunConfig, WorkerPool
from ppexec.experiment.placements import PlacementRow, measured, predict_placements
from ppexec.study import Findings, StudyCommand, progress, study_main, without_advice
from ppsim import Network, Schedule, StageCost
from ppsim.export.html_report import Report
from ppsim.export.text_table import text_table
from ppsim.plots.timeline_figure import timeline


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand):
    """Step times and hangs by where receives are posted."""

    ranks: int = 8
    """Ranks of the second case; the first has two."""
    microbatches: int = 16
    """Its microbatches."""
    forward_s: float = 0.01
    """F of each stage, in seconds; I and W take as long each."""
    output_bytes: int = 2**16
    """Bytes of a message."""
    latency_s: float = 0.0003
    """What a message takes, in seconds, for the predictions."""
    measure: bool = True
    """Run what does not hang, too."""
    steps: int = 5
    """Measured steps of each."""
    out: Path = Path("studies/out/streams")
    """Directory for report.html and summary.json."""

    def findings(self, directory: Path | None) -> Findings:
        """Check, simulate and run every placement."""
        cost = StageCost(
            forward_s=self.forward_s,
            backward_input_s=self.forward_s,
            backward_weight_s=self.forward_s,
            output_bytes=self.output_bytes,
        )
        network = Network(latency_s=self.latency_s)
        cases = {
            "172668": ppsim.build_schedule("interleaved-1f1b", ranks=2, microbatches=4),
            "188833": ppsim.build_schedule("interleaved-1f1b", ranks=self.ranks, microbatches=self.microbatches),
        }
        rows: list[PlacementRow] = []
        traces: dict[str, ppsim.Trace] = {}
        with WorkerPool() as pool, without_advice():
            for case, schedule in cases.items():
                stages = [cost] * schedule.stages
                for row, placed in progress(list(predict_placements(case, schedule, stages, network)), desc=case):
                    if placed is not None and case == "188833" and row.streams in ("link", "rank"):
                        trace = ppsim.simulate(placed, stages, network=network, streams=row.streams)
                        traces[f"{row.place}, a communicator for each {row.streams}"] = trace
                    if self.measure and placed is not None:
                        row = self.run_of(row, placed, stages, pool)
                    rows.append(row)
        summary = {"rows": [asdict(row) for row in rows]}
        return Findings(summary=summary, page=report(rows, traces), text=text_table([row.cells for row in rows]))

    def run_of(self, row: PlacementRow, placed: Schedule, stages: list[StageCost], pool: WorkerPool) -> PlacementRow:
        """The row with what real steps took."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "placed.csv"
            path.write_text(placed.to_csv(messages=placed.communication is not None))
            config = RunConfig(
                from_csv=path,
                streams=row.streams,
                device="threads",
                layers=placed.stages,
                compute="timed",
                steps=self.steps,
                warmup=1,
            )
            return measured(row, placed, config, stages, pool)


def report(rows: list[PlacementRow], traces: dict[str, ppsim.Trace]) -> Report:
    """All rows, who waits for whom where it hangs, and the timelines of the second case."""
    hung = [row for row in rows if row.predicted_s is None]
    ended_s = [row.predicted_s for row in rows if row.predicted_s is not None and row.case == rows[-1].case]
    page = Report(
        title="Where receives are posted",
        lead=f"{len(hung)} of {len(rows)} placements hang, or bring a wrong tensor. The slowest of the others takes "
        f"{max(ended_s) / min(ended_s):.2f} times as long as the fastest ({rows[-1].case}).",
    )
    page.add("All placements", text="Cases are issues of PyTorch.", table=[row.cells for row in rows])
    page.add(
        "Who waits for whom",
        table=[{"case": row.case, "receives": row.place, "communicator": row.streams, "": row.why} for row in hung],
    )
    page.add("Timelines", text="The second case; grey is waiting.", figure=timeline(traces))
    return page


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
