"""Does ppsim reproduce published figures?

Question   Does it reproduce, row by row, the tables of the zero-bubble paper, the closed forms of the papers of other
           schedules, and GPipe's speed-ups?

Command    python studies/published.py
           python studies/published.py --json

Method     Every published figure is simulated from the costs stated beside it (published/*.json, facts copied from the
           papers). Fixed schedules must match to the printed digits, but for interleaved 1F1B, which may be up to 0.01
           above. Searched orders must be equal or better, closed forms must match but for rounding. GPipe's speed-ups
           were measured on hardware: the ideal speed-up must be at least as high, and the gap is shown.

Answer     Every row meets its demand; the study exits with 1 if one does not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ppexec.experiment.published import PublishedRow, published_rows
from ppexec.study import Findings, StudyCommand, progress, study_main
from ppsim.export.html_report import Report
from ppsim.export.text_table import text_table

_DATA = Path(__file__).parent / "published"


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand):
    """Published figures against this model's, row by row."""

    search: bool = True
    """Search for orders under the papers' memory limits too (ZB-1p, ZB-2p); some seconds a row."""

    def findings(self, directory: Path | None) -> Findings:
        """Compute every row."""
        rows = list(progress(published_rows(_DATA, with_search=self.search), unit=" rows"))
        documents = [{**asdict(row), "difference": row.difference} for row in rows]
        holds = all(row.holds for row in rows)
        table = [{"": "ok" if row.holds else "OFF", "source": row.source, **row.cells} for row in rows]
        text = f"{text_table(table)}\n\n{sum(row.holds for row in rows)} of {len(rows)} rows hold"
        return Findings(summary={"rows": documents, "holds": holds}, page=report(rows), text=text, holds=holds)


def report(rows: Sequence[PublishedRow]) -> Report:
    """All rows as a page."""
    off = [row for row in rows if not row.holds]
    page = Report(
        title="Published figures, computed anew",
        lead=f"{len(rows) - len(off)} of {len(rows)} rows hold their stated tolerance.",
    )
    for source in dict.fromkeys(row.source for row in rows):
        chosen = [row for row in rows if row.source == source]
        page.add(source, table=[{**row.cells, "holds": "yes" if row.holds else "NO"} for row in chosen])
    return page


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
