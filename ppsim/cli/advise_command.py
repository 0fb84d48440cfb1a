"""The command `ppsim advise`: what a measured job loses, and which schedule would lose less."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ppsim.advice.advise import Advice, advise
from ppsim.advice.candidate import Candidate
from ppsim.cli import ending
from ppsim.cli.command import OptionalFile, OptionalFolder, OptionalName, OptionalReal
from ppsim.cli.run_commands import FORMAT_HELP
from ppsim.errors import InputError
from ppsim.files import check_directory, check_files, write_text
from ppsim.runs.read_run import read_run

if TYPE_CHECKING:  # it imports plotly, which no help needs
    from ppsim.export.html_report import Report


@dataclass(frozen=True, kw_only=True)
class AdviseCommand:
    """Say what a measured step loses and which schedules of the same job would lose less. Write a schedule's CSV."""

    run_path: tyro.conf.Positional[Path]
    """A folder with a file for each pipeline rank, as `ppsim import` reads it."""
    format: Annotated[str, FORMAT_HELP] = "auto"
    memory_limit_bytes: OptionalReal = None
    """The most bytes that a rank may hold in all (default: no limit)."""
    search: bool = True
    """Search for orders beyond the named schedules: some seconds more."""
    choose: OptionalName = None
    """Schedule of the table to write, by name (default: the best that fits)."""
    csv: OptionalFile = None
    """File to write the chosen schedule to, in PyTorch's CSV format."""
    out: OptionalFolder = None
    """Folder to write advice.html (with timelines and the bubble by cause) and schedule.csv to."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Advise, then print or write what the flags ask for."""
        if self.out is not None:
            check_directory(self.out)
        check_files(self.csv)
        found = advise(
            read_run(self.run_path, self.format), memory_limit_bytes=self.memory_limit_bytes, with_search=self.search
        )
        chosen = _chosen(found, self.choose)
        text = chosen.schedule.to_csv()
        path = self.csv or (None if self.out is None else self.out / "schedule.csv")
        if self.csv is not None:
            write_text(self.csv, text)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            write_text(self.out / "schedule.csv", text)
            page(found, chosen).save(self.out / "advice.html")
        if self.json:
            ending.print_json({**found.to_dict(), "chosen": chosen.name, "csv": text})
            return
        print(found)
        print(f"\n{found.how_to_load(str(path or 'schedule.csv'), chosen)}")
        if path is None:
            print("  (--csv FILE writes it)")


def _chosen(found: Advice, name: str | None) -> Candidate:
    # The run's own schedule comes last: if a candidate has the same name, the name means the run's own.
    every = {each.name: each for each in (*found.candidates, found.current)}
    if name is None:
        return found.best or found.current
    if name not in every:
        raise InputError(f"--choose {name}: the table has {', '.join(every)}")
    return every[name]


def page(found: Advice, chosen: Candidate) -> Report:
    """The advice as a page: what is lost, the schedules, and the measured step beside the chosen one as predicted."""
    from ppsim.export.html_report import Report
    from ppsim.plots.attribution_figure import attribution
    from ppsim.plots.timeline_figure import timeline

    traces = {"measured": found.measured, f"{chosen.name}, predicted": chosen.trace}
    report = Report(
        title="What a measured step loses, and what would lose less",
        subtitle=f"{found.run.schedule}, {found.run.source}",
        lead="\n\n".join(found.sentences()),
        facts={"step": f"{found.measured.makespan_s:.4g} s", "bubble": f"{found.measured.bubble_fraction:.1%}"},
    )
    report.add("The bubble by cause", figure=attribution(traces), table=found.lost())
    # A page parts paragraphs at blank lines.
    uncertain = "\n\n".join(["Uncertain:", *found.notes()]) if found.notes() else ""
    report.add("Schedules of the same job", table=found.rows(), text=uncertain)
    report.add(f"The measured step, and {chosen.name} as predicted", figure=timeline(traces))
    return report.add("How to load it", text=found.how_to_load("schedule.csv", chosen).replace("\n", "\n\n"))
