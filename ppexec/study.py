"""Study: what all studies share: output flags, files, progress bar and exit code."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ppexec.cli import save_partial_trace, show_warning
from ppexec.workers.watched_run import WorkerError
from ppsim.cli import command, ending
from ppsim.errors import InputError
from ppsim.essential import Essential
from ppsim.export.figure_file import check_figure_path
from ppsim.export.html_report import Report
from ppsim.files import check_directory, write_text


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a study found.

    Parameters
    ----------
    summary : dict
        JSON values: summary.json, and what --json prints.
    page : Report
        report.html. Its lead is the study's conclusion: a sentence with its number.
    text : str
        What is printed below the conclusion without --json.
    files : tuple of str
        Further files that the study wrote to its directory.
    holds : bool
        False ends the command with exit code 1.
    """

    summary: dict[str, Any]
    page: Report
    text: str
    files: tuple[str, ...] = ()
    holds: bool = True


@dataclass(frozen=True, kw_only=True)
class StudyCommand:
    """Where a study's results go.

    Each study derives from it, adds its flags as fields, and implements `findings`.
    """

    out: Essential[Path | None] = None
    """Directory for report.html and summary.json; nothing is written without one."""
    json: Essential[bool] = False
    """Print summary.json's object and nothing else on standard output."""
    svg: bool = False
    """Write the report's figures as .svg beside it, where kaleido and Chromium are installed."""
    png: bool = False
    """Write them as .png."""

    def findings(self, directory: Path | None) -> Findings:
        """Do the study. The directory is that of --out, and exists."""
        raise NotImplementedError(f"{type(self).__name__} has no findings")

    def _picture_endings(self) -> list[str]:
        """The endings of pictures that are asked for. Raises InputError, before the work, if none can be made."""
        endings = [ending for ending, is_wanted in ((".svg", self.svg), (".png", self.png)) if is_wanted]
        if endings and self.out is None:
            raise InputError("pictures of a report are written beside it: give --out DIR too")
        for suffix in endings:
            check_figure_path(Path(f"figure{suffix}"))
        return endings

    def execute(self) -> None:
        """Do the study, write its files and print its text. Raises SystemExit(1) if the findings do not hold."""
        directory = self.out
        endings, pictures = self._picture_endings(), []
        with _made(directory):
            found = self.findings(directory)
        if directory is not None:
            text = json.dumps(found.summary, indent=1)
            write_text(directory / "summary.json", f"{text}\n")
            found.page.save(directory / "report.html")
            pictures = [name for ending in endings for name in found.page.save_figures(directory, ending)]
        if self.json:
            ending.print_json(found.summary)
        else:
            print(f"{found.page.lead}\n\n{found.text}")
            if directory is not None:
                print(
                    f"\nwritten to {directory}: {', '.join(['report.html', 'summary.json', *found.files, *pictures])}"
                )
        if not found.holds:
            raise SystemExit(1)


def study_main(study: type[StudyCommand], documentation: str | None) -> int:
    """Run a study with the flags of the command line.

    Parameters
    ----------
    study : type
        A dataclass whose fields are the flags.
    documentation : str
        The docstring of its module; the first line is the question.

    Returns
    -------
    int
        The exit code: 0, 1 where the findings do not hold, 2 for bad input.
    """
    script = Path(sys.argv[0]).name

    def work() -> None:
        warnings.showwarning = show_warning
        chosen = command.parse(study, prog=script, description=_description(documentation or ""))
        try:
            chosen.execute()
        except WorkerError as error:
            save_partial_trace(error, chosen.out)
            raise

    return ending.run(work, prog=script)


def _description(documentation: str) -> str:
    """What help says of a study: its question, and its command lines."""
    question, *paragraphs = documentation.split("\n\n")
    lines = [each for each in paragraphs if each.startswith("Command ")]
    return "\n\n".join([question, *(each.replace("Command ", "Example ", 1) for each in lines)])


def progress(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """A bar on standard error; the options are tqdm's."""
    return tqdm(items, file=sys.stderr, leave=False, **options)


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """A context without warnings of few microbatches, which every run of a study would repeat."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _made(path: Path | None) -> Iterator[None]:
    """A context in which a directory for results exists. Bad input leaves none behind that was not there before.

    Raises InputError if something else has its name, or it cannot be written to.
    """
    missing = [each for each in (path, *path.parents) if not each.exists()] if path else []
    if path:
        check_directory(path)
        path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except InputError:
        with contextlib.suppress(OSError):  # it holds something
            for each in missing:
                each.rmdir()
        raise
