"""NCCL hosts: what the real runtime and transport give GPUs to do, written down for the machine of `nccl_machine`.

Each rank's `Runtime` and `StreamTransport` submit their steps to a stand-in for a device. It writes down kernels on
streams, what they come after, and where the host waits. The host's path depends on nothing that a device computes, so
this is all that it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch

from ppexec.machine.device import Event, Mark, Stream
from ppexec.models.batch import Batch
from ppexec.stage.timed import message_specs, timed_stages
from ppexec.transport.streams import GroupChannel, Pair, StreamTransport
from ppexec.workers.rank import Rank, run_step, sequence_of
from ppexec.workers.runtime import Runtime
from ppsim import Program, StageCost
from ppsim.schedule.streams import Streams

_COST = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, output_bytes=1, parameter_bytes=4)

COMPUTE, SEND, RECEIVE, ALL_REDUCE = "compute", "send", "receive", "all-reduce"


@dataclass(eq=False)
class Kernel:
    """What a stream runs.

    number: its place in what the host does. needs: the kernels that must end before it starts. meeting: those that must
    run with it; None for a computation. message: -1 where it carries none.
    """

    rank: int
    number: int
    kind: str
    label: str
    stream: FakeStream
    needs: tuple[Kernel, ...]
    meeting: Meeting | None
    message: int

    def __str__(self) -> str:
        return self.label if self.label.startswith("rank") else f"rank {self.rank} {self.label}"


@dataclass(eq=False)
class Meeting:
    """Kernels that end together, one on each of these ranks."""

    ranks: tuple[int, ...]
    members: list[Kernel] = field(default_factory=list)


class HostWait(NamedTuple):
    """The host waits until these kernels have ended."""

    kernels: tuple[Kernel, ...]


class NeverGoesOn(Exception):
    """Ends the writing of a host that waits for what only it could submit."""


def wait_for_ever(device: FakeDevice, what: str) -> NoReturn:
    """Let a device's host wait for what only it could submit."""
    kernel = Kernel(device.rank, len(device.host), COMPUTE, what, device.current, (), None, -1)
    device.host.append(HostWait((kernel,)))
    raise NeverGoesOn


class FakeEvent:
    """The end of some kernels."""

    def __init__(self, device: FakeDevice, kernels: tuple[Kernel, ...]) -> None:
        self._device, self.kernels = device, kernels

    def is_done(self) -> bool:
        raise NotImplementedError("a host that looks has a path that depends on the device")

    def synchronize(self) -> None:
        self._device.host.append(HostWait(self.kernels))


class FakeStream:
    """Writes down what is submitted."""

    def __init__(self, device: FakeDevice, name: str) -> None:
        self.device, self.name = device, name
        self._after: dict[FakeStream, Kernel] = {}  # what the next kernel comes after: of each stream the last suffices

    def submit(self, work: Callable[[], None], label: str = "") -> None:
        self.device.current, self.device.label = self, label
        work()

    def record(self) -> FakeEvent:
        return FakeEvent(self.device, tuple(self._after.values()))

    def wait(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        for kernel in event.kernels:
            known = self._after.get(kernel.stream)
            if known is None or known.number < kernel.number:
                self._after[kernel.stream] = kernel

    def uses(self, tensor: torch.Tensor) -> None:
        return

    def launch(self, kind: str, meeting: Meeting | None = None, message: int = -1) -> None:
        device = self.device
        needs = tuple(self._after.values())
        label = f"{device.label} ({device.results[message]})" if message >= 0 else device.label
        kernel = Kernel(device.rank, len(device.host), kind, label, self, needs, meeting, message)
        if meeting is not None:
            meeting.members.append(kernel)
        self._after = {self: kernel}
        device.host.append(kernel)


class FakeDevice:
    """A device that computes nothing; tensors have no memory.

    results: what each message carries, for names. host: what its host does, in sequence.
    """

    is_asynchronous = True
    clock_error_s = 0.0

    def __init__(self, rank: int, results: Sequence[str]) -> None:
        self.rank, self.results = rank, results
        self.torch_device = torch.device("meta")
        self.host: list[Kernel | HostWait] = []
        self.streams: dict[str, FakeStream] = {}
        self.current = self.own_stream("compute 0")
        self.label = ""

    def own_stream(self, name: str) -> FakeStream:
        return self.streams.setdefault(name, FakeStream(self, name))

    def stream(self, name: str) -> Stream:
        return self.own_stream(name)

    def compute_stream(self, part: int = 0, parts: int = 1) -> Stream:
        return self.own_stream(f"compute {part}")

    def begin(self) -> None:
        self.synchronize()

    def mark(self) -> Mark:
        return 0

    def wait_s(self, seconds: float) -> None:
        """What a timed stage computes: one kernel on the current stream."""
        self.current.launch(COMPUTE)

    def times_ns(self, marks: Sequence[Mark]) -> list[int]:
        return [0] * len(marks)

    def synchronize(self) -> None:
        ends = {end: None for stream in self.streams.values() for end in stream.record().kernels}
        self.host.append(HostWait(tuple(ends)))

    def close(self) -> None:
        return


class Communicator:
    """An NCCL communicator. members: its devices; `end` gives what a process holds of it."""

    def __init__(self, members: Sequence[FakeDevice], name: str) -> None:
        self.members, self.name = list(members), name
        self._meetings: dict[tuple[tuple[int, ...], int], Meeting] = {}
        self._posted: Counter[tuple[int, tuple[int, ...]]] = Counter()

    def end(self, device: FakeDevice) -> CommunicatorEnd:
        """The process group in the process of this device."""
        return CommunicatorEnd(self, device)

    def meeting(self, device: FakeDevice, ranks: tuple[int, ...]) -> Meeting:
        """The next one of these ranks in which a device takes part. A send is of its source and destination."""
        at = self._posted[device.rank, ranks]
        self._posted[device.rank, ranks] += 1
        return self._meetings.setdefault((ranks, at), Meeting(ranks))


class CommunicatorEnd:
    """Stands in for a `ProcessGroup`: its work runs on the communicator's own stream in the order of posting."""

    def __init__(self, communicator: Communicator, device: FakeDevice) -> None:
        self._communicator, self._device = communicator, device
        self._stream = device.own_stream(f"communicator {communicator.name}")

    def _post(self, kind: str, ranks: tuple[int, ...], message: int = -1) -> Work:
        self._stream.wait(self._device.current.record())
        self._stream.launch(kind, self._communicator.meeting(self._device, ranks), message)
        return Work(self._device, self._stream.record())

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        return self._post(SEND, (self._device.rank, self._communicator.members[peer].rank), tag)

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        return self._post(RECEIVE, (self._communicator.members[peer].rank, self._device.rank), tag)

    def allreduce_coalesced(self, tensors: list[torch.Tensor]) -> Work:
        return self._post(ALL_REDUCE, tuple(member.rank for member in self._communicator.members))


class Work:
    """What a process group gives for an operation: `wait` lets the current stream wait, not the host."""

    def __init__(self, device: FakeDevice, event: FakeEvent) -> None:
        self._device, self._event = device, event

    def wait(self) -> None:
        self._device.current.wait(self._event)


def write_steps(
    program: Program,
    *,
    window: int | None,
    streams: Streams = "link",
    replicas: int = 1,
    steps: int = 1,
    transport: type[StreamTransport] = StreamTransport,
    communicator_of: Callable[[Pair], Hashable] = lambda pair: pair,
) -> list[FakeDevice]:
    """The devices of all ranks, replica by replica, with what their hosts do in some steps in a row.

    transport: the real one unless given. communicator_of: which communicator carries a directed link; one of its own
    unless given. window: None where receives are posted where they stand. streams: on which streams a rank posts.
    """
    ranks = program.ranks
    results = [str(program.action_of(int(row))) for row in program.messages.producer]
    devices = [FakeDevice(rank, results) for rank in range(replicas * ranks)]
    over_replicas = [Communicator(devices[rank::ranks], "replicas") for rank in range(ranks)]
    for first in range(0, len(devices), ranks):
        pipeline = devices[first : first + ranks]
        communicators = _communicators(program, pipeline, communicator_of)
        for rank, device in enumerate(pipeline):
            channels: dict[Pair, Any] = {}
            for pair in (pair for pair in program.links() if rank in pair):
                communicator = communicators[communicator_of(pair)]
                peer = pipeline[pair[1] if pair[0] == rank else pair[0]]
                channels[pair] = GroupChannel(communicator.end(device), communicator.members.index(peer))  # type: ignore[arg-type]
            replicas_end: Any = over_replicas[rank].end(device) if replicas > 1 else None
            _write(
                program,
                rank,
                device,
                channels,
                replicas_end,
                window=window,
                streams=streams,
                steps=steps,
                transport=transport,
            )
    return devices


def _communicators(
    program: Program, pipeline: Sequence[FakeDevice], communicator_of: Callable[[Pair], Hashable]
) -> dict[Hashable, Communicator]:
    """Each with the ranks of all links that it carries."""
    ranks: dict[Hashable, set[int]] = {}
    for pair in program.links():
        ranks.setdefault(communicator_of(pair), set()).update(pair)
    return {key: Communicator([pipeline[rank] for rank in sorted(held)], str(key)) for key, held in ranks.items()}


def _write(
    program: Program,
    rank: int,
    device: FakeDevice,
    channels: dict[Pair, Any],
    replicas: Any,
    *,
    window: int | None,
    streams: Streams,
    steps: int,
    transport: type[StreamTransport],
) -> None:
    """Let one rank's host run, as the worker does."""
    costs, compute = [_COST] * program.schedule.stages, device.compute_stream()
    stages = timed_stages(
        program.schedule.stages_of(rank),
        costs,
        trains=not program.schedule.is_forward_only,
        device=device,
        copies=program.schedule.copies,
    )
    holders = None if replicas is None else dict.fromkeys(stages, replicas)
    end = transport(
        program,
        message_specs(program, costs),
        rank=rank,
        device=device,
        compute=compute,
        channels=channels,
        window=window,
        communicators=streams,
    )
    runtime = Runtime(program, rank, stages, end, holders=holders, device=device, compute=compute)
    ranks = [Rank(number=rank, stages=stages, compute=compute, transport=end, runtime=runtime)]
    with suppress(NeverGoesOn):
        for _ in range(steps):
            run_step(device, ranks, sequence_of(program, [rank]), Batch())
