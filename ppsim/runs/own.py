"""Own: a run as this project writes it: a folder of `step_<n>.trace` and `run.json`, or a single saved trace."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ppsim.checks import shown
from ppsim.errors import InputError
from ppsim.files import check_directory, read_json, write_text
from ppsim.runs.run import Run
from ppsim.trace.trace import Trace

_NAME = re.compile(r"step_(0|[1-9]\d*)\.trace", re.ASCII)


def is_own(path: Path) -> bool:
    """Whether this is a saved trace, or a folder of them."""
    return _steps(path) != {} if path.is_dir() else path.suffix == ".trace"


def read_own(path: Path) -> Run:
    """Read such a folder or trace. Raises InputError, or OSError if a file cannot be read."""
    if not path.is_dir():
        return Run(traces=[Trace.load(path)], steps=[0], environment={"format": "ppsim"}, source=str(path))
    steps = _steps(path)
    if not steps:
        raise InputError(f"{path} has no step_<n>.trace: give a folder that `ppsim import` or `write_run` wrote")
    environment = {"format": "ppsim"}
    if (path / "run.json").exists():
        environment = read_json(path / "run.json")
        if not isinstance(environment, dict):
            raise InputError(f"{path / 'run.json'} must be an object, got {shown(environment)}")
    return Run(
        traces=[Trace.load(each) for each in steps.values()],
        steps=list(steps),
        environment=environment,
        source=str(path),
    )


def write_run(run: Run, path: Path) -> None:
    """Write a folder that `read_own` reads, with the schedule as CSV beside the steps."""
    check_directory(path)
    path.mkdir(parents=True, exist_ok=True)
    for step, written in _steps(path).items():
        if step not in run.steps:  # of an earlier import: it would be read as a step of this run
            written.unlink()
    for step, trace in zip(run.steps, run.traces, strict=True):
        trace.save(path / f"step_{step}.trace")
    write_text(path / "run.json", json.dumps({**run.environment, "source": run.source}, indent=1) + "\n")
    write_text(path / "schedule.csv", run.schedule.to_csv())


def _steps(path: Path) -> dict[int, Path]:
    found = {int(match[1]): each for each in path.iterdir() if (match := _NAME.fullmatch(each.name))}
    return dict(sorted(found.items()))
