"""Megatron: what Megatron-LM prints of its timers, with `--timing-log-level 2 --timing-log-option all`.

After each logged iteration its last rank prints `times across ranks (ms):`, then for each timer a line with its name
and for each rank a line `rank  3: 1234.56`: the seconds of one step in all, a mean over the iterations since the last
log (megatron/core/timers.py, `Timers.log`). Rank 0 prints all arguments before, `name ....... value` on a line each.
With the option "minmax" or "max" only the least and the most over all ranks are there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ppsim.checks import shown
from ppsim.costs.stage_cost import StageCost
from ppsim.errors import InputError
from ppsim.files import read_text
from ppsim.runs.run import Run
from ppsim.schedule.named.registry import build_schedule
from ppsim.schedule.schedule import Schedule
from ppsim.simulation.simulate import simulate
from ppsim.trace.trace import Trace

_SUFFIXES = (".log", ".txt", ".out")
_HEADER = "across ranks (ms):"
# Launchers put a process's number before its lines.
_PREFIX = re.compile(r"^(?:\s*\[\w*?\d+\]:\s?|\d+: )")
_ARGUMENT = re.compile(r"^\s*(\w+) \.{2,} (.*)$")
_ITERATION = re.compile(r"iteration\s+(\d{1,18})\s*/\s*\d+ \|")
_ELAPSED = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")
_BATCH = re.compile(r"global batch size:\s*(\d{1,18})\b")
_TIMER = re.compile(r"^\s+([\w/-]+):$")
_RANK = re.compile(r"^\s+rank\s+(\d{1,18}): ([\d.]+)$")
_RANGE = re.compile(r"^\s+([\w/-]+) \.+: (?:\(([\d.]+), ([\d.]+)\)|([\d.]+))$")
_MEMORY = re.compile(r"\[Rank (\d{1,18})\] \(after \d+ iterations\) memory \(MB\) \|.* max allocated: ([\d.]+)")
_FORWARD, _BACKWARD, _WHOLE = "forward-compute", "backward-compute", "forward-backward"
_REMEDY = "log with --timing-log-level 2 --timing-log-option all"
_EQUAL = 1.02  # chosen: ranks whose most over least is no larger are taken to be equal

# What sums cannot tell; for texts.
_UNKNOWN = (
    "when each action ran (timers give what a rank's forwards and backwards of a step take in all: they are taken to "
    "last equally long, and laid out as the schedule orders them, with messages that take no time)",
    "what each chunk of a rank takes, where it has several",
)


@dataclass
class _Step:
    """What was printed of an iteration: seconds of each timer, by rank, or the least and the most over ranks."""

    iteration: int
    place: str
    elapsed_s: float | None = None
    global_batch: int | None = None
    by_rank: dict[str, dict[int, float]] = field(default_factory=dict)
    over_ranks: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass
class _Log:
    """What was found in a job's files."""

    arguments: dict[str, str] = field(default_factory=dict)
    steps: dict[int, _Step] = field(default_factory=dict)
    memory_bytes: dict[int, int] = field(default_factory=dict)


def is_megatron(path: Path) -> bool:
    """Whether this is such a log, or a folder with one."""
    try:
        return any(_HEADER in read_text(each) for each in _files(path))
    except InputError:  # no text
        return False


def read_megatron(path: Path) -> Run:
    """Read such a log, or a folder of those of one job.

    Raises
    ------
    InputError
        Names the argument, the iteration or the rank that is missing.
    OSError
        If a file cannot be read.
    """
    log = _Log()
    for each in _files(path):
        _read(each, log)
    steps = [step for _, step in sorted(log.steps.items()) if _FORWARD in {**step.by_rank, **step.over_ranks}]
    if not steps:
        raise InputError(f"{path} has no {_FORWARD} of any iteration: {_REMEDY}")
    job = _Job(path, log.arguments)
    traces = [job.trace(step, log.memory_bytes) for step in steps]
    return Run(
        traces=traces,
        steps=[step.iteration for step in steps],
        environment={"format": "megatron", **job.environment, "unknown": [*_UNKNOWN, *_beyond(traces)]},
        source=str(path),
    )


def _beyond(traces: list[Trace]) -> list[str]:
    """What steps took beyond their computations, if that is there."""
    over_s = [
        whole_s - trace.makespan_s for trace in traces if (whole_s := trace.details["forward_backward_s"]) is not None
    ]
    if not over_s:
        return []
    return [
        f"what messages and waiting for them cost ({_WHOLE} takes {np.median(over_s):.4g} s more than the step laid "
        "out so, on the median)"
    ]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.suffix in _SUFFIXES else []
    return sorted(each for each in path.iterdir() if each.suffix in _SUFFIXES and each.is_file())


def _read(path: Path, log: _Log) -> None:
    """Add what a file says."""
    step = _Step(0, str(path))
    timer: str | None = None
    for number, raw in enumerate(read_text(path).splitlines(), start=1):
        line, where = _PREFIX.sub("", raw).rstrip(), f"{path}, line {number}"
        if match := _ITERATION.search(line):
            step = _Step(int(match[1]), f"{where}, iteration {int(match[1])}")
            log.steps[step.iteration] = step
            if elapsed := _ELAPSED.search(line):
                step.elapsed_s = _number(elapsed[1], where) / 1e3
            if batch := _BATCH.search(line):
                step.global_batch = int(batch[1])
        elif match := _MEMORY.search(line):
            log.memory_bytes[int(match[1])] = round(_number(match[2], where) * 2**20)
        elif match := _RANK.match(line):
            if timer is not None:
                step.by_rank.setdefault(timer, {})[int(match[1])] = _number(match[2], where) / 1e3
        elif match := _TIMER.match(line):
            timer = match[1]
        elif match := _RANGE.match(line):
            least, most = (match[2], match[3]) if match[2] else ("0", match[4])
            step.over_ranks[match[1]] = (_number(least, where) / 1e3, _number(most, where) / 1e3)
        elif match := _ARGUMENT.match(line):
            log.arguments.setdefault(match[1], match[2].strip())


def _number(text: str, where: str) -> float:
    """Processes that print at once may mix their digits."""
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if not value < 2**40:  # milliseconds of 34 years, or MB beyond any device's
        raise InputError(f"{where}: {shown(text)} is no number of milliseconds or MB: mend the line or take it out")
    return value


class _Job:
    """How the job was spread, by its arguments."""

    def __init__(self, path: Path, arguments: Mapping[str, str]) -> None:
        self._path, self._arguments = path, arguments
        self.ranks = self._whole("pipeline_model_parallel_size")
        self.replicas = self._whole("data_parallel_size")
        self.micro_batch = self._whole("micro_batch_size")
        chunks = arguments.get("virtual_pipeline_model_parallel_size", "None")
        self.chunks = 1 if chunks == "None" else self._whole("virtual_pipeline_model_parallel_size")
        self._schedules: dict[int, Schedule] = {}

    @property
    def environment(self) -> dict[str, Any]:
        """For the run."""
        return {
            "pp_size": self.ranks,
            "vp_size": self.chunks,
            "data_parallel_size": self.replicas,
            "micro_batch_size": self.micro_batch,
        }

    def trace(self, step: _Step, memory_bytes: Mapping[int, int]) -> Trace:
        """A step whose actions take their share of what their rank's timer says, as the schedule orders them."""
        microbatches = self._microbatches(step)
        schedule = self._schedules.get(microbatches)
        if schedule is None:
            name = "1f1b" if self.chunks == 1 else "interleaved-1f1b"
            schedule = build_schedule(name, ranks=self.ranks, microbatches=microbatches, stages_per_rank=self.chunks)
            self._schedules[microbatches] = schedule
        turns = microbatches * self.chunks
        forward_s, backward_s = (self._by_stage_rank(step, name) / turns for name in (_FORWARD, _BACKWARD))
        stages = [
            StageCost(
                forward_s=float(forward_s[rank]),
                backward_input_s=0.0,
                backward_weight_s=0.0,
                backward_s=float(backward_s[rank]),
            )
            for rank in schedule.placement
        ]
        whole_s = max(step.by_rank.get(_WHOLE, {0: step.over_ranks.get(_WHOLE, (0.0, 0.0))[1]}).values())
        details = {"iteration": step.iteration, "forward_backward_s": whole_s or None, "iteration_s": step.elapsed_s}
        laid_out = simulate(schedule, stages, engine="compiled")
        return replace(
            laid_out,
            details={**laid_out.details, **details},
            total_peak_bytes=self._peaks(memory_bytes),
            **cast(dict[str, Any], dict.fromkeys(_NOT_KNOWN)),
        )

    def _microbatches(self, step: _Step) -> int:
        batch = self._whole("global_batch_size") if step.global_batch is None else step.global_batch
        samples = self.micro_batch * self.replicas
        if batch % samples:
            raise InputError(
                f"{step.place}: global batch {batch} is no multiple of micro_batch_size x data_parallel_size = "
                f"{samples}: give the arguments of this job"
            )
        return batch // samples

    def _by_stage_rank(self, step: _Step, timer: str) -> npt.NDArray[np.float64]:
        """Seconds of a timer on each pipeline rank, shape (p,): the median of the ranks that share its stages."""
        by_rank = step.by_rank.get(timer)
        if by_rank is None:
            return self._equal(step, timer)
        world = self._whole("world_size")
        if world % self.ranks or max(by_rank) >= world:
            raise InputError(
                f"{step.place}: {timer} has rank {max(by_rank)}, and the arguments say {world} ranks in "
                f"{self.ranks} pipeline stages: give the log of one job"
            )
        # Pipeline ranks are numbered last (megatron/core/parallel_state.py, order tp-cp-ep-dp-pp).
        share = world // self.ranks
        found = np.zeros(self.ranks)
        for rank in range(self.ranks):
            seconds = [by_rank[each] for each in range(rank * share, (rank + 1) * share) if each in by_rank]
            if not seconds:
                raise InputError(f"{step.place}: {timer} has no rank of pipeline rank {rank}: {_REMEDY}")
            found[rank] = np.median(seconds)
        return found

    def _equal(self, step: _Step, timer: str) -> npt.NDArray[np.float64]:
        """From the least and the most over all ranks, if these are about equal."""
        if timer not in step.over_ranks:
            raise InputError(f"{step.place}: {timer} is missing: {_REMEDY}")
        least, most = step.over_ranks[timer]
        if self.ranks > 1 and most > _EQUAL * least:
            raise InputError(
                f"{step.place}: of {timer} only the extremes over ranks are there ({least:.4g} and {most:.4g} s), and "
                f"which rank took what is not: {_REMEDY}"
            )
        return np.full(self.ranks, most if least == 0 else (least + most) / 2)

    def _peaks(self, memory_bytes: Mapping[int, int]) -> npt.NDArray[np.int64] | None:
        """The most that each pipeline rank has allocated so far; None unless all are there."""
        if not memory_bytes or "world_size" not in self._arguments:
            return None
        share = max(self._whole("world_size") // self.ranks, 1)
        most: dict[int, int] = {}
        for rank, size in memory_bytes.items():
            most[rank // share] = max(most.get(rank // share, 0), size)
        if sorted(most) != list(range(self.ranks)):
            return None
        return np.array([most[rank] for rank in range(self.ranks)], np.int64)

    def _whole(self, name: str) -> int:
        value = self._arguments.get(name)
        if value is None:
            raise InputError(
                f"{self._path}: the argument {name} is missing, which rank 0 prints before it trains: add its log"
            )
        if not value.isdecimal() or len(value) > 18 or int(value) < 1:
            raise InputError(
                f"{self._path}: the argument {name} must be a whole number of 1 or more and 18 digits at most, got "
                f"{shown(value)}"
            )
        return int(value)


# Columns of a simulated trace that timers say nothing of.
_NOT_KNOWN = (
    "activation_bytes",
    "message_bytes",
    "message_start_s",
    "message_left_s",
    "message_arrival_s",
    "receive_buffer_bytes",
    "gradient_bytes",
    "parameter_bytes",
)
