"""What others measured: does this model predict it?

Question   How far are predictions from steps and memory that other people measured, on machines that nobody here has?

Command    python studies/public_runs.py
           python studies/public_runs.py --out DIR

Method     Primus's run of 1F1B on 8 GPUs (20 iterations): each step from its own durations and the usual handover
           between actions, and from the costs of all other steps; memory of each rank from a line over the ranks.
           Megatron-LM's four models, 22B to 1T: activations from shapes alone; step times from shapes and a machine
           whose constants are fitted to the other three sizes. DeepSeek's overlapped pair: the longer of its
           computation and its communication. Files and sources are in published/.

Answer     Primus: a step is predicted from its own durations to 0.12 % and from other steps to 0.3 % (medians), 0.6 %
           at worst but for two disturbed ones, which nothing in the others foretells (-6 and -7 %). Its memory is
           within 0.4 %. Megatron-LM's activations are within 2.3 %, its times within 5.1 % (3.5 % on average).
           DeepSeek's pair takes 4 % longer than if all of its communication were hidden.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ppexec.experiment.public_runs import PublicRow, public_rows
from ppexec.study import Findings, StudyCommand, progress, study_main
from ppsim.export.html_report import Report
from ppsim.export.text_table import text_table
from ppsim.plots.accuracy_figure import accuracy, errors

_DATA = Path(__file__).parent / "published"


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand):
    """What others measured, row by row, against what is predicted."""

    data: Path = _DATA
    """Folder with primus_pp8/, megatron_2022.json and deepseek_pair.json."""

    def findings(self, directory: Path | None) -> Findings:
        """Predict every row."""
        rows = list(progress(public_rows(self.data), unit=" rows"))
        summary = {"rows": [row.to_dict() for row in rows], "groups": _groups(rows)}
        text = f"{text_table(_table(rows))}\n\n{text_table(_groups(rows))}"
        return Findings(summary=summary, page=_report(rows), text=text)


def _table(rows: Sequence[PublicRow]) -> list[dict[str, str]]:
    return [
        {
            "source": row.source,
            "what": row.what,
            "published": f"{row.published:.4g} {row.unit}",
            "predicted": f"{row.predicted:.4g} {row.unit}",
            "error": f"{row.error:+.2%}",
            "from": row.from_what,
        }
        for row in rows
    ]


def _groups(rows: Sequence[PublicRow]) -> list[dict[str, str | int]]:
    """Rows of one source, unit and kind of prediction together: median and worst error."""
    kinds = dict.fromkeys((row.source, row.unit, row.from_what) for row in rows)
    found: list[dict[str, str | int]] = []
    for source, unit, from_what in kinds:
        every = [row for row in rows if (row.source, row.unit, row.from_what) == (source, unit, from_what)]
        off = np.array([row.error for row in every])
        calm = np.array([row.error for row in every if "disturbed" not in row.what])
        found.append(
            {
                "source": source,
                "of": {"s": "time", "GiB": "memory"}[unit],
                "from": from_what,
                "rows": len(every),
                "median": f"{np.median(off):+.2%}",
                "mean size": f"{np.abs(off).mean():.2%}",
                "worst": f"{off[np.argmax(np.abs(off))]:+.2%}",
                "worst undisturbed": f"{calm[np.argmax(np.abs(calm))]:+.2%}",
            }
        )
    return found


def _report(rows: Sequence[PublicRow]) -> Report:
    times = [row for row in rows if row.unit == "s"]
    series = {
        source: [(row.predicted, row.published) for row in times if row.source == source]
        for source in dict.fromkeys(row.source for row in times)
    }
    labels = {
        source: [f"{row.what}, from {row.from_what}" for row in times if row.source == source] for source in series
    }
    off = [abs(row.error) for row in rows]
    page = Report(
        title="What others measured, predicted",
        lead=f"{len(rows)} figures of {len(series)} sources are predicted {np.median(off):.1%} off in the median, and "
        f"{max(off):.1%} at most.",
    )
    page.add("Errors", table=_groups(rows))
    page.add("Predicted against published times", figure=accuracy(series, labels=labels))
    page.add("How errors are distributed", figure=errors(series))
    return page.add("Every figure", table=_table(rows))


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
