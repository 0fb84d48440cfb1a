"""Run commands: the subcommands of `ppsim` that read what other frameworks measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from ppsim.cli import ending
from ppsim.cli.command import OptionalFolder
from ppsim.cli.tables import about_of
from ppsim.export.text_table import text_table
from ppsim.files import check_directory
from ppsim.runs.own import write_run
from ppsim.runs.read_run import formats, read_run
from ppsim.runs.run import Run

FORMAT_HELP = tyro.conf.arg(help=f"What wrote the files: auto (looks), {', '.join(formats())}.")
_STEPS = 12  # shown


@dataclass(frozen=True, kw_only=True)
class ImportCommand:
    """Read the steps that another framework measured, and write each as a trace for attribute, compare and advise."""

    path: tyro.conf.Positional[Path]
    """A folder with a file for each pipeline rank."""
    format: Annotated[str, FORMAT_HELP] = "auto"
    out: OptionalFolder = None
    """Folder to write step_<n>.trace, run.json and schedule.csv to."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Read, write and describe the run."""
        if self.out is not None:
            check_directory(self.out)
        found = read_run(self.path, self.format)
        if self.out is not None:
            write_run(found, self.out)
        if self.json:
            ending.print_json(describe(found))
        else:
            print(describe_text(found))


def describe(run: Run) -> dict[str, Any]:
    """What a run is, as JSON has it."""
    return {
        **about_of(run.schedule),
        "source": run.source,
        "environment": run.environment,
        "unknown": run.unknown,
        "steps": [
            {"step": step, "makespan_s": trace.makespan_s, "bubble_fraction": trace.bubble_fraction}
            for step, trace in zip(run.steps, run.traces, strict=True)
        ],
    }


def describe_text(run: Run) -> str:
    """What a run is, as text."""
    lengths_s = np.array([trace.makespan_s for trace in run.traces])
    rows = [
        {"step": str(step), "makespan (s)": f"{trace.makespan_s:.6g}", "bubble": f"{trace.bubble_fraction:.2%}"}
        for step, trace in zip(run.steps, run.traces, strict=True)
    ]
    return "\n".join(
        [
            str(run.schedule),
            f"read from  {run.source} ({run.environment.get('format', 'unknown format')})",
            f"steps      {len(run.traces)}, median {np.median(lengths_s):.6g} s, from {lengths_s.min():.6g} to "
            f"{lengths_s.max():.6g} s",
            f"not known  {'; '.join(run.unknown) or 'nothing'}",
            "",
            text_table(rows[:_STEPS]),
            *([f"... and {len(rows) - _STEPS} more"] if len(rows) > _STEPS else []),
        ]
    )
