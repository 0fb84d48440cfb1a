"""Perfetto: traces as Chrome's JSON, which ui.perfetto.dev opens.

Every rank of every trace is a process, numbered from 1 over all traces. Its tracks:

    compute              an X event per action; an overlapped pair is an event around its two parts
    send to rank 1       an X event per message, from the transfer's start until it has left the link
    receive from rank 1  an X event per message, from the transfer's start until it is there
    reduce gradients     an X event per stage whose gradients are added up over replicas
    activation bytes     a counter (C events)

and a flow (s, f) from the action that produced a message to the one that consumes it. What a trace does not know is
left out. Events on one track may nest but not cross; a link's messages do cross (the next transfer starts while the
last one is still in flight), so a link takes a second track when its first one is busy, and so on; so do reductions, of
which several may be under way.
"""

from __future__ import annotations

import gzip
import heapq
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ppsim.errors import InputError
from ppsim.files import write_bytes
from ppsim.schedule.action import Kind
from ppsim.trace.trace import Trace, known

Event = dict[str, Any]
Nanoseconds = npt.NDArray[np.int64]


def save_perfetto(traces: Mapping[str, Trace], path: str | Path) -> None:
    """Write `perfetto_json(traces)` to a file, compressed if its name ends in `.gz`; reproducible."""
    data = perfetto_json(traces).encode()
    write_bytes(path, gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)


def perfetto_json(traces: Mapping[str, Trace]) -> str:
    """Traces by name, such as `{"predicted": t, "measured": u}`, as one JSON object in Chrome's trace format.

    Each trace starts at 0. `ts` and `dur` are in microseconds, rounded to whole nanoseconds. Raises InputError if there
    are no traces.
    """
    if not traces:
        raise InputError('there is no trace to export: give at least one by name, as in {"predicted": trace}')
    world_size = max(trace.ranks for trace in traces.values())
    # Holistic Trace Analysis finds the rank by the first match of "rank":\s+(\d+): this head first, and its space kept.
    head = json.dumps(
        {"distributedInfo": {"backend": "", "rank": 0, "world_size": world_size}, "displayTimeUnit": "ms"}
    )
    events = ",\n".join(json.dumps(event, separators=(",", ":")) for event in _all_events(traces))
    return f'{head[:-1]}, "traceEvents": [\n{events}\n]}}\n'


def _all_events(traces: Mapping[str, Trace]) -> Iterator[Event]:
    numbers = _Numbers()
    for name, trace in traces.items():
        yield from _TraceEvents(name, trace, numbers).events()


_SIDE_TRACKS = {
    Kind.REDUCE_GRAD: ("reduce gradients", "reduction"),
    Kind.UNSHARD: ("gather parameters", "gathering"),
    Kind.O: ("offload activations", "copy"),
    Kind.L: ("load activations", "copy"),
}
"""Title and category of the tracks of what runs beside computations."""


class _Numbers:
    """Process, track and flow numbers; each is given once in a file. Viewers keep 0 for themselves."""

    def __init__(self) -> None:
        self.processes = self.tracks = self.flows = 0

    def process(self) -> int:
        self.processes += 1
        return self.processes

    def track(self) -> int:
        self.tracks += 1
        return self.tracks

    def flow(self) -> int:
        self.flows += 1
        return self.flows


class _TraceEvents:
    """The events of one trace. Slices come before flows, so that a flow finds the slice that it starts or ends in."""

    def __init__(self, name: str, trace: Trace, numbers: _Numbers) -> None:
        self.trace, self.program, self.numbers = trace, trace.program, numbers
        self.origin_s = float(trace.start_s.min())
        self.names = [f"{name} rank {rank}" for rank in range(trace.ranks)]
        self.process = [numbers.process() for _ in self.names]
        self.compute_track = [numbers.track() for _ in self.names]
        self.start, self.end = self.nanoseconds(trace.start_s), self.nanoseconds(trace.end_s)
        self.effect = self.nanoseconds(trace.effect_s)

    def nanoseconds(self, times_s: npt.NDArray[np.float64]) -> Nanoseconds:
        """Times from the trace's start; rounded once, so that what touches still touches and nothing crosses."""
        return np.rint((times_s - self.origin_s) * 1e9).astype(np.int64)

    def events(self) -> Iterator[Event]:
        for rank, name in enumerate(self.names):
            yield self.label("process_name", rank, 0, name=name)
            yield self.label("process_sort_index", rank, 0, sort_index=self.process[rank])
            yield self.label("thread_name", rank, self.compute_track[rank], name="compute")
            yield self.label("thread_sort_index", rank, self.compute_track[rank], sort_index=0)
            yield from self.compute(rank)
            yield from self.activations(rank)
        links = self.program.links() if self.trace.message_times_s is not None else []
        for position, link in enumerate(links, start=1):
            yield from self.link_tracks(link, position)
        for rank in range(self.trace.ranks):
            yield from self.beside(rank, len(links) + 1)
        yield from self.flows()

    def label(self, what: str, rank: int, track: int, **values: Any) -> Event:
        return {"ph": "M", "name": what, "pid": self.process[rank], "tid": track, "args": values}

    def slice(self, rank: int, track: int, name: str, category: str, begin: int, end: int, args: Event) -> Event:
        return {
            "ph": "X",
            "name": name,
            "cat": category,
            "pid": self.process[rank],
            "tid": track,
            "ts": begin / 1000,
            "dur": (end - begin) / 1000,
            "args": args,
        }

    def compute(self, rank: int) -> Iterator[Event]:
        program, track = self.program, self.compute_track[rank]
        for action in range(int(program.rank_actions[rank]), int(program.rank_actions[rank + 1])):
            rows = range(int(program.action_start[action]), int(program.action_start[action + 1]))
            if len(rows) == 2:
                name = f"({program.action_of(rows[0])};{program.action_of(rows[1])})OVERLAP_F_B"
                yield self.slice(rank, track, name, "pair", int(self.start[rows[0]]), int(self.end[rows[1]]), {})
            for row in rows:
                args: Event = {
                    "stage": int(program.stage[row]),
                    "kind": Kind(int(program.kind[row])).name,
                    "microbatch": int(program.microbatch[row]),
                }
                if self.trace.activation_bytes is not None:
                    args["activation_bytes"] = int(self.trace.activation_bytes[row])
                name = str(program.action_of(row))
                yield self.slice(rank, track, name, "compute", int(self.start[row]), int(self.end[row]), args)

    def activations(self, rank: int) -> Iterator[Event]:
        if self.trace.activation_bytes is None:
            return
        yield self.counter(rank, 0, 0)
        shown = 0
        for row in self.program.rows_of(rank):
            level = int(self.trace.activation_bytes[row])
            if level != shown:
                yield self.counter(rank, int(self.effect[row]), level)
            shown = level

    def counter(self, rank: int, moment: int, level: int) -> Event:
        return {
            "ph": "C",
            "name": "activation bytes",
            "pid": self.process[rank],
            "ts": moment / 1000,
            "args": {"bytes": level},
        }

    def link_tracks(self, link: tuple[int, int], position: int) -> Iterator[Event]:
        """The two ends of a directed link: sends on tracks of its source, receives on tracks of its destination."""
        trace, table = self.trace, self.program.messages
        source, destination = link
        messages = np.flatnonzero((table.source == source) & (table.destination == destination))
        start_s, left_s, arrival_s = (
            known(trace.message_start_s),
            known(trace.message_left_s),
            known(trace.message_arrival_s),
        )
        begin = self.nanoseconds(start_s[messages])
        for sending, rank, title, ends_s in (
            (True, source, f"send to rank {destination}", left_s),
            (False, destination, f"receive from rank {source}", arrival_s),
        ):
            # Two processes' clocks may disagree by a little: nothing arrives before it was sent.
            end = np.maximum(begin, self.nanoseconds(ends_s[messages]))
            lanes = _lanes(begin, end)
            tracks = [self.numbers.track() for _ in range(max(lanes) + 1)]
            for lane, track in enumerate(tracks):
                name = title if lane == 0 else f"{title} ({lane + 1})"
                yield self.label("thread_name", rank, track, name=name)
                yield self.label("thread_sort_index", rank, track, sort_index=position)
            for index, message in enumerate(messages.tolist()):
                args: Event = {"link": f"{source}->{destination}", "position": int(table.position[message])}
                if trace.message_bytes is not None:
                    args = {"bytes": int(trace.message_bytes[message]), **args}
                name = str(self.program.message_action(message, sending=sending))
                track = tracks[lanes[index]]
                yield self.slice(rank, track, name, "message", int(begin[index]), int(end[index]), args)

    def beside(self, rank: int, position: int) -> Iterator[Event]:
        """Tracks of what a rank does beside its computations; none of nothing."""
        of_rank = self.trace.side_work.where(self.trace.side_work.rank == rank)
        for number, (kind, (title, category)) in enumerate(_SIDE_TRACKS.items()):
            found = of_rank.where(of_rank.kind == kind)
            if not len(found.rank):
                continue
            begin = self.nanoseconds(found.start_s)
            end = np.maximum(begin, self.nanoseconds(found.end_s))
            lanes = _lanes(begin, end)
            tracks = [self.numbers.track() for _ in range(max(lanes) + 1)]
            for lane, track in enumerate(tracks):
                yield self.label("thread_name", rank, track, name=title if lane == 0 else f"{title} ({lane + 1})")
                yield self.label("thread_sort_index", rank, track, sort_index=position + number)
            for index, action in enumerate(found.actions()):
                args: Event = {"stage": action.stage, "kind": kind.name, "bytes": int(found.size_bytes[index])}
                if action.microbatch is not None:
                    args["microbatch"] = action.microbatch
                track = tracks[lanes[index]]
                yield self.slice(rank, track, str(action), category, int(begin[index]), int(end[index]), args)

    def flows(self) -> Iterator[Event]:
        """An arrow per message. It starts in its producer's last nanosecond: at the very end the slice has closed."""
        table = self.program.messages
        for producer, consumer in zip(table.producer.tolist(), table.consumer.tolist(), strict=True):
            number = self.numbers.flow()
            name = "activations" if self.program.kind[producer] == Kind.F else "gradients"
            common = {"name": name, "cat": "message", "id": number}
            yield {"ph": "s", **common, **self.anchor(producer, max(self.start[producer], self.end[producer] - 1))}
            yield {"ph": "f", "bp": "e", **common, **self.anchor(consumer, self.start[consumer])}

    def anchor(self, row: int, moment: np.int64) -> Event:
        rank = int(self.program.rank[row])
        return {"pid": self.process[rank], "tid": self.compute_track[rank], "ts": int(moment) / 1000}


def _lanes(begin: Nanoseconds, end: Nanoseconds) -> list[int]:
    """For each interval a lane in which it crosses no other, with as few lanes as possible."""
    lanes = [0] * len(begin)
    free = [0]
    busy: list[tuple[int, int]] = []  # (end, lane), a heap
    count = 1
    for index in np.lexsort((end, begin)).tolist():
        while busy and busy[0][0] <= begin[index]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            free.append(count)
            count += 1
        lane = heapq.heappop(free)
        lanes[index] = lane
        heapq.heappush(busy, (int(end[index]), lane))
    return lanes
