"""Primus: the JSON that AMD's Primus writes for each pipeline rank (`--dump_pp_data`).

A folder with `config.json` (`pp_size`, `vp_size`, `num_mbs`; once `vpp_size`, `micro_batches`) and
`pp_rank_<r>.json` for every rank: `{"<iteration>": {"total", "memory", "fwd_start", "fwd_end", "bwd_start",
"bwd_end"}}`, in milliseconds since that rank's own start of the step, and the most memory reserved so far, in GiB.
Newer files add `wgrad_start`, `wgrad_end` and, for all three, `_minibatch` and `_chunk`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppsim.checks import is_finite, shown
from ppsim.errors import InputError
from ppsim.files import read_json
from ppsim.runs.recording import Recorded, assemble
from ppsim.runs.run import Run
from ppsim.schedule.action import Action, Kind, OverlappedPair
from ppsim.schedule.placement import loop_placement, v_placement
from ppsim.trace.trace import Trace

_NAME = re.compile(r"pp_rank_(0|[1-9]\d*)\.json", re.ASCII)  # one name for each rank


def is_primus(path: Path) -> bool:
    """Whether this is such a folder."""
    return path.is_dir() and any(_NAME.fullmatch(each.name) for each in path.iterdir())


def read_primus(path: Path) -> Run:
    """Read such a folder.

    Raises
    ------
    InputError
        Names the rank, iteration and list that are missing or do not fit.
    OSError
        If a file cannot be read.
    """
    present = {int(match[1]) for each in path.iterdir() if (match := _NAME.fullmatch(each.name))}
    config = _config(path, present)
    ranks = _whole(path, config, "pp_size")
    for rank in range(ranks):
        if rank not in present:
            raise InputError(f"{path}: rank {rank} of {ranks} is missing: add pp_rank_{rank}.json")
    logs = [_Log(path / f"pp_rank_{rank}.json", rank, config) for rank in range(ranks)]
    iterations = sorted({number for log in logs for number in log.iterations})
    traces = [_trace(path, logs, number) for number in iterations]
    return Run(
        traces=traces,
        steps=iterations,
        environment={"format": "primus", **config},
        source=str(path),
    )


def _config(path: Path, present: set[int]) -> dict[str, Any]:
    if not (path / "config.json").exists():
        raise InputError(f"{path}: config.json is missing, which says how many microbatches there are: add it")
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{path / 'config.json'} must be an object, got {shown(config)}")
    renamed = {"vpp_size": "vp_size", "micro_batches": "num_mbs"}
    config = {renamed.get(name, name): value for name, value in config.items()}
    return {"pp_size": len(present), **config, "vp_size": config.get("vp_size") or 1}


def _whole(path: Path, config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{path / 'config.json'}: {name} must be a whole number of 1 or more, got {shown(value)}")
    return value


class _Span(NamedTuple):
    """An action of a series, and its times in seconds."""

    chunk: int
    microbatch: int
    start_s: float
    end_s: float

    @property
    def of(self) -> tuple[int, int]:
        return self.chunk, self.microbatch

    @property
    def times_s(self) -> tuple[float, float]:
        return self.start_s, self.end_s


class _Log:
    """One rank's file."""

    def __init__(self, path: Path, rank: int, config: Mapping[str, Any]) -> None:
        self.path, self.rank = path, rank
        self.ranks, self.chunks, self.microbatches = (
            _whole(path.parent, config, name) for name in ("pp_size", "vp_size", "num_mbs")
        )
        content = read_json(path)
        if (
            not isinstance(content, dict)
            or not content
            or not all(name.isdecimal() and len(name) < 19 for name in content)
        ):
            raise InputError(
                f"{path} must be an object with a key for each iteration: give the file as Primus wrote it"
            )
        self.iterations = {int(name): each for name, each in content.items()}

    def recorded(self, iteration: int, placement: Sequence[int]) -> list[Recorded]:
        """The rank's actions, on its own clock. Chunk c of a rank is its c-th stage."""
        step = self.iteration(iteration)
        held = [stage for stage, rank in enumerate(placement) if rank == self.rank]
        forward, backward = self._spans(iteration, step, "fwd"), self._spans(iteration, step, "bwd")
        weight = self._spans(iteration, step, "wgrad") if step.get("wgrad_start") else []
        split = {each.of for each in weight}
        found = [Recorded(Action(held[each.chunk], Kind.W, each.microbatch), *each.times_s) for each in weight]
        by_times = {each.times_s: each for each in forward}
        actions = {each: Action(held[each.chunk], Kind.F, each.microbatch) for each in forward}
        for each in backward:
            action = Action(held[each.chunk], Kind.I if each.of in split else Kind.B, each.microbatch)
            # What ran as one is written as both, with one interval.
            partner = by_times.get(each.times_s)
            if partner is None or action.kind != Kind.B:
                found.append(Recorded(action, *each.times_s))
            else:
                found.append(Recorded(OverlappedPair(actions.pop(partner), action), *each.times_s))
        return [*found, *(Recorded(action, *each.times_s) for each, action in actions.items())]

    def iteration(self, number: int) -> dict[str, Any]:
        """What was written of a step."""
        step = self.iterations.get(number)
        if step is None:
            raise InputError(f"{self.path}: rank {self.rank} has no iteration {number}, which other ranks have: add it")
        if not isinstance(step, dict):
            raise InputError(f"{self.path}, iteration {number}: must be an object, got {shown(step)}")
        return step

    def memory_bytes(self, number: int) -> int | None:
        """The most that was reserved up to the end of a step."""
        value = self.iteration(number).get("memory")
        return round(value * 2**30) if is_finite(value) and 0 <= value < 2**33 else None

    def _spans(self, number: int, step: Mapping[str, Any], series: str) -> list[_Span]:
        """Each action of a series. Only some backwards may be split, so that there may be fewer of "wgrad"."""
        wanted = self.chunks * self.microbatches
        if series == "wgrad" and step.get("wgrad_minibatch") and isinstance(chunks := step.get("wgrad_chunk"), list):
            wanted = len(chunks) or wanted
        columns = []
        for edge in ("start", "end"):
            times = step.get(f"{series}_{edge}")
            where = f"{self.path}, iteration {number}: {series}_{edge}"
            if not isinstance(times, list) or not all(map(is_finite, times)):
                raise InputError(f"{where} must be a list of milliseconds, got {shown(times)}")
            if len(times) != wanted:
                raise InputError(
                    f"{where} has {len(times)} times for {self.microbatches} microbatches of {self.chunks} chunks on "
                    f"rank {self.rank}: {wanted} are needed"
                )
            columns.append([each / 1e3 for each in times])
        chunks, microbatches = self._numbers(number, step, series, wanted)
        return [_Span(*each) for each in zip(chunks, microbatches, *columns, strict=True)]

    def _numbers(self, number: int, step: Mapping[str, Any], series: str, wanted: int) -> tuple[list[int], list[int]]:
        """Chunk and microbatch of each action: as written, else in Megatron's order."""
        written = []
        for what, most in (("chunk", self.chunks), ("minibatch", self.microbatches)):
            values = step.get(f"{series}_{what}") or []
            where = f"{self.path}, iteration {number}: {series}_{what}"
            if not isinstance(values, list):
                raise InputError(f"{where} must be a list of numbers, got {shown(values)}")
            if values and len(values) != wanted:
                raise InputError(f"{where} has {len(values)} numbers: {wanted} are needed")
            if not all(isinstance(each, int) and 0 <= each < most for each in values):
                raise InputError(f"{where} must be numbers from 0 to {most - 1}, got {shown(values)}")
            written.append(values)
        chunks, microbatches = written
        if chunks and microbatches:
            return chunks, microbatches
        if self.microbatches % self.ranks and self.chunks > 1:
            raise InputError(
                f"{self.path}, iteration {number}: {series}_chunk and {series}_minibatch are missing, and without them "
                f"the {self.microbatches} microbatches of an interleaved schedule must be a multiple of the "
                f"{self.ranks} ranks: write both"
            )
        usual = _megatron_order(self.ranks, self.chunks, self.microbatches, backward=series != "fwd")
        return chunks or [each[0] for each in usual], microbatches or [each[1] for each in usual]


def _megatron_order(ranks: int, chunks: int, microbatches: int, *, backward: bool) -> list[tuple[int, int]]:
    """Chunk and microbatch by turn: groups of p microbatches pass through one chunk after the other."""
    if chunks == 1:
        return [(0, microbatch) for microbatch in range(microbatches)]
    sequence = range(chunks)[::-1] if backward else range(chunks)
    groups = range(0, microbatches, ranks)
    return [(chunk, first + each) for first, chunk, each in product(groups, sequence, range(ranks))]


def _trace(path: Path, logs: Sequence[_Log], number: int) -> Trace:
    """A step. Where a rank has two chunks, its stages stand in a loop or in a V: whichever the times allow."""
    first = logs[0]
    placements = [loop_placement(first.ranks, first.chunks)]
    if first.chunks == 2 and first.ranks > 1:
        placements.append(v_placement(first.ranks, 2))
    memory = [log.memory_bytes(number) for log in logs]
    known = [each for each in memory if each is not None]
    found: list[Trace] = []
    failed: list[InputError] = []
    for placement in placements:
        try:
            found.append(
                assemble(
                    [log.recorded(number, placement) for log in logs],
                    where=f"{path}, iteration {number}",
                    has_common_clock=False,
                    details={"iteration": number},
                    total_peak_bytes=np.array(known, np.int64) if len(known) == len(logs) else None,
                )
            )
        except InputError as error:
            failed.append(error)
    if not found:
        raise failed[0]
    return min(found, key=_early_s)


def _early_s(trace: Trace) -> float:
    """By how much some action starts before its input was made, beyond what clocks are read to."""
    messages = trace.program.messages
    early_s = trace.end_s[messages.producer] - trace.start_s[messages.consumer]
    return max(float(early_s.max(initial=0.0)) - 1e-3 * trace.makespan_s, 0.0)
