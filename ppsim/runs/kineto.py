"""Kineto: the Chrome traces that `torch.profiler` writes, one for each rank of a job on PyTorch's pipeline runtime.

The runtime names a range for every action: `PP:0F1`, `PP:2RECV_F0`, `PP:(0F7;7B3)OVERLAP_F_B`. A range of a computation
begins with the wait for its input, so the computation is taken to begin with the range's first operation. Where kernels
were recorded, it begins with the first and ends with the last kernel that was launched inside the range, those of NCCL
left out.
"""

from __future__ import annotations

import math
import re
import zlib
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppsim.checks import is_finite, shown
from ppsim.errors import InputError
from ppsim.files import MOST_BYTES, parse_json, read_bytes
from ppsim.runs.recording import Recorded, assemble
from ppsim.runs.run import Run
from ppsim.schedule.action import Action, Kind, OverlappedPair, parse_action

_ENDINGS = (".json", ".json.gz")
_RANGE = "PP:"
_ALONE = re.compile(r"(Forward|Backward) (\d+)")  # PyTorch's schedules of one stage per rank
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def is_kineto(path: Path) -> bool:
    """Whether this is a folder with traces of that kind by their names."""
    return path.is_dir() and any(_traces(path))


def read_kineto(path: Path) -> Run:
    """Read a folder of such traces.

    Raises
    ------
    InputError
        Names the rank, range or step that is missing.
    OSError
        If a file cannot be read.
    """
    files = _traces(path) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} has no .json or .json.gz: give a folder with a Chrome trace of each rank")
    profiles: dict[int, _Profile] = {}
    origin_ns = None  # of all times; seconds since 1970 would leave no digits for nanoseconds
    for each in files:
        profile = _Profile(each, origin_ns)
        origin_ns = profile.origin_ns
        if profile.rank in profiles:
            raise InputError(
                f"{each} and {profiles[profile.rank].path} are both of rank {profile.rank}: keep one trace of each rank"
            )
        profiles[profile.rank] = profile
    # Of ranks that hold the same stages (replicas, shards) one is enough.
    by_stage: dict[tuple[int, ...], _Profile] = {}
    for rank in sorted(profiles):
        if profiles[rank].stages:
            by_stage.setdefault(profiles[rank].stages, profiles[rank])
    if not by_stage:
        raise InputError(
            f"{path}: no trace has ranges named PP:0F1 and the like: profile a step of PyTorch's pipeline runtime"
        )
    ranked = sorted(by_stage.values(), key=lambda each: each.stages)
    _check_stages(path, ranked)
    steps = _step_count(ranked)
    return Run(
        traces=[
            assemble(
                [each.recorded(step) for each in ranked],
                where=f"{path}, step {step}",
                has_common_clock=True,
                sent_s=_sent_s(ranked, step),
                details={"step": step},
                total_peak_bytes=_peaks(ranked, step),
            )
            for step in range(steps)
        ],
        steps=range(steps),
        environment={"format": "kineto", **ranked[0].environment, "files": [each.path.name for each in ranked]},
        source=str(path),
    )


def _traces(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.name.endswith(_ENDINGS))


class _Span(NamedTuple):
    """A range of one action."""

    start_s: float
    end_s: float


class _Profile:
    """One rank's trace: the ranges of each action, in the order of time."""

    def __init__(self, path: Path, origin_ns: int | None) -> None:
        self.path = path
        document = _document(path)
        events = document.get("traceEvents") if isinstance(document, dict) else document
        if not isinstance(events, list):
            raise InputError(f"{path} has no list traceEvents: give a Chrome trace as torch.profiler writes it")
        about = document.get("distributedInfo") if isinstance(document, dict) else None
        self.about = about if isinstance(about, dict) else {}
        base_ns = document.get("baseTimeNanoseconds", 0) if isinstance(document, dict) else 0
        if not isinstance(base_ns, int):
            raise InputError(f"{path}: baseTimeNanoseconds must be a whole number, got {shown(base_ns)}")
        self.origin_ns = base_ns if origin_ns is None else origin_ns
        base_s = (base_ns - self.origin_ns) / 1e9
        complete = [each for each in events if isinstance(each, dict) and each.get("ph") == "X" and _is_timed(each)]
        self.rank = self._rank_of()
        self.spans: dict[Action | OverlappedPair, list[_Span]] = defaultdict(list)
        operations = sorted(each["ts"] for each in complete if _is_operation(each))
        kernels = _Kernels(complete)
        ranges = [(event["ts"], event["ts"] + event["dur"], action) for event, action in self._ranges(complete)]
        for begin, end, action in sorted(ranges, key=lambda each: each[:2]):
            if isinstance(action, OverlappedPair) or action.kind.computes:
                first = bisect_left(operations, begin)
                started = operations[first] if first < len(operations) and operations[first] < end else begin
                started, end = kernels.inside(begin, end) or (started, end)
            else:
                started = begin
            self.spans[action].append(_Span(started / 1e6 + base_s, end / 1e6 + base_s))
        self._allocated = sorted(
            (each["ts"] / 1e6 + base_s, amount)
            for each in events
            if isinstance(each, dict) and (amount := _allocated(each)) is not None
        )
        self.environment = {
            name: document[name]
            for name in ("deviceProperties", "host_name", "schemaVersion")
            if isinstance(document, dict) and document.get(name)
        }

    def _rank_of(self) -> int:
        rank = self.about.get("rank")
        if isinstance(rank, int) and not isinstance(rank, bool):
            return rank
        numbers = re.findall(r"\d+", self.path.name)
        if not numbers:
            raise InputError(
                f"{self.path} does not say its rank: profile after init_process_group, or put the rank into its name"
            )
        return int(numbers[0])

    def _ranges(
        self, events: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[Mapping[str, Any], Action | OverlappedPair]]:
        """The ranges of actions. On a GPU each has a twin on the device's timeline, which is left out."""
        for event in events:
            name = event.get("name")
            if not isinstance(name, str) or event.get("cat") == "gpu_user_annotation":
                continue
            if name.startswith(_RANGE):
                try:
                    yield event, parse_action(name.removeprefix(_RANGE))
                except InputError as error:
                    raise InputError(f"{self.path}: range {shown(name)}: {error}") from None
            elif match := _ALONE.fullmatch(name):
                yield event, Action(self._only_stage, Kind.F if match[1] == "Forward" else Kind.B, int(match[2]))

    @cached_property
    def _only_stage(self) -> int:
        """The stage of a rank whose ranges name none: its place in the pipeline's group, or its rank if it is all."""
        groups = self.about.get("pg_config")
        named = [
            (re.split("[^a-z]+", str(each.get("pg_desc", "")).lower()), each["ranks"])
            for each in (groups if isinstance(groups, list) else [])
            if isinstance(each, dict) and isinstance(each.get("ranks"), list) and self.rank in each["ranks"]
        ]
        for words, ranks in named:
            if {"pp", "pipeline"} & set(words):
                return int(ranks.index(self.rank))
        whole = max((len(ranks) for _, ranks in named), default=1)
        if any(1 < len(ranks) < whole for _, ranks in named):
            raise InputError(
                f"{self.path}: its ranges name no stage, and the job has other groups than the pipeline's: name the "
                "mesh's dimension pp, or profile a schedule of several stages, whose ranges name theirs"
            )
        return self.rank

    @cached_property
    def computations(self) -> dict[Action | OverlappedPair, list[_Span]]:
        """The spans of what is computed."""
        return {
            action: spans
            for action, spans in self.spans.items()
            if isinstance(action, OverlappedPair) or action.kind.computes
        }

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """The stages that compute on this rank."""
        return tuple(sorted({part.stage for action in self.computations for part in _parts(action)}))

    def recorded(self, step: int) -> list[Recorded]:
        """What ran in a step, by the ranges' turns."""
        return [Recorded(action, *spans[step]) for action, spans in self.computations.items()]

    def peak_bytes(self, step: int) -> int | None:
        """The most allocated between the first start and the last end of a step."""
        recorded = self.recorded(step)
        begin, end = min(each.start_s for each in recorded), max(each.end_s for each in recorded)
        first, last = bisect_left(self._allocated, (begin, -1)), bisect_right(self._allocated, (end, 2**63))
        return max((amount for _, amount in self._allocated[first:last]), default=None)


class _Kernels:
    """The kernels by when they were launched."""

    def __init__(self, events: Sequence[Mapping[str, Any]]) -> None:
        spans: dict[int | None, tuple[float, float]] = {}
        for event in events:
            if event.get("cat") in _ON_DEVICE and "nccl" not in str(event.get("name", "")).lower():
                key = _correlation(event)
                if key is not None:  # a graph's kernels have one launch
                    begin, end = spans.get(key, (math.inf, -math.inf))
                    spans[key] = (min(begin, event["ts"]), max(end, event["ts"] + event["dur"]))
        self._launched = sorted(
            (event["ts"], *spans[key])
            for event in events
            if event.get("cat") in _LAUNCHES and (key := _correlation(event)) in spans
        )
        self._moments = [each[0] for each in self._launched]

    def inside(self, begin: float, end: float) -> tuple[float, float] | None:
        """From the first start to the last end of what was launched in between; None if nothing was."""
        chosen = self._launched[bisect_left(self._moments, begin) : bisect_left(self._moments, end)]
        return (min(each[1] for each in chosen), max(each[2] for each in chosen)) if chosen else None


def _document(path: Path) -> Any:
    data = read_bytes(path)
    if path.name.endswith(".gz"):
        try:
            unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
            data = unpacker.decompress(data, MOST_BYTES)
        except zlib.error as error:
            raise InputError(f"{path} is not compressed by gzip: {error}") from None
        if unpacker.unconsumed_tail:
            raise InputError(f"{path} unpacks to more than {MOST_BYTES / 2**30:g} GiB: profile fewer steps")
    return parse_json(path, data.decode("utf-8", errors="replace"))


def _is_timed(event: Mapping[str, Any]) -> bool:
    return all(is_finite(event.get(name)) for name in ("ts", "dur"))


def _is_operation(event: Mapping[str, Any]) -> bool:
    """Whether it is a computation on the host, which a wait for a message is not."""
    return event.get("cat") == "cpu_op" and not str(event.get("name", "")).startswith("c10d::")


def _correlation(event: Mapping[str, Any]) -> int | None:
    """The number that a launch and its kernels share."""
    arguments = event.get("args")
    found = arguments.get("correlation") if isinstance(arguments, dict) else None
    return found if isinstance(found, int) else None


def _allocated(event: Mapping[str, Any]) -> int | None:
    """What is allocated in all after an event of the allocator."""
    arguments = event.get("args")
    if event.get("name") != "[memory]" or not isinstance(arguments, dict) or not is_finite(event.get("ts")):
        return None
    amount = arguments.get("Total Allocated")
    return amount if isinstance(amount, int) and not isinstance(amount, bool) and 0 <= amount < 2**63 else None


def _parts(action: Action | OverlappedPair) -> tuple[Action, ...]:
    return (action.forward, action.backward) if isinstance(action, OverlappedPair) else (action,)


def _check_stages(path: Path, ranked: Sequence[_Profile]) -> None:
    held: dict[int, _Profile] = {}
    for profile in ranked:
        for stage in profile.stages:
            if stage in held:
                raise InputError(
                    f"{path}: {held[stage].path.name} and {profile.path.name} both hold stage {stage}: keep one"
                )
            held[stage] = profile
    missing = next((stage for stage in range(max(held) + 1) if stage not in held), None)
    if missing is not None:
        raise InputError(f"{path}: no trace has ranges of stage {missing}: add the trace of the rank that holds it")


def _step_count(ranked: Sequence[_Profile]) -> int:
    """How often every action ran."""
    counts = {
        (profile.rank, action): len(spans) for profile in ranked for action, spans in profile.computations.items()
    }
    most = max(counts.values())
    for (rank, action), count in counts.items():
        if count != most:
            raise InputError(
                f"rank {rank} has {count} ranges PP:{action} where other actions have {most}: profile whole steps, the "
                "same on every rank"
            )
    return most


def _sent_s(ranked: Sequence[_Profile], step: int) -> dict[Action, float] | None:
    """When each result was sent; None if no send was recorded."""
    found: dict[Action, float] = {}
    for profile in ranked:
        for action, spans in profile.spans.items():
            if isinstance(action, Action) and action.kind in (Kind.SEND_F, Kind.SEND_B) and step < len(spans):
                for kind in (Kind.F,) if action.kind == Kind.SEND_F else (Kind.B, Kind.I):
                    found[Action(action.stage, kind, action.microbatch)] = spans[step].start_s
    return found or None


def _peaks(ranked: Sequence[_Profile], step: int) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    peaks = [profile.peak_bytes(step) for profile in ranked]
    known = [each for each in peaks if each is not None]
    return np.array(known, np.int64) if len(known) == len(peaks) else None
