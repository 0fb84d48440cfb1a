"""NCCL machine: GPUs and communicators as a model, on which the real runtime and transport run a program.

The hosts run first. Each rank's real `Runtime` and `StreamTransport` submit a step to a stand-in for the device, which
writes down what a GPU would be given: kernels on streams, events between them, and the points where the host waits.
The host's path depends on nothing that a device computes, so what is written down is all that it does. Then the machine
runs what is written, one move at a time; somebody else chooses each move among those that are possible, so every
interleaving can be tried. It shares no code with the check of schedules.

What the machine assumes of a GPU:

- Kernels of one stream run one after the other, in the order of submission. A stream may wait for events of others.
- A communicator has a stream of its own at each end, as in PyTorch's `ProcessGroupNCCL`. Its work starts after what
  was submitted to the stream that posts it, and that stream goes on when the work is done.
- A send, receive or all-reduce that has started holds a place on its device and spins until its counterparts run too.
  The first send of a communicator from one rank to another meets the first receive there, whatever their tags. A real
  NCCL may let go of a small message before its receive runs; the machine never does.
- A device has a number of places (multiprocessors and what else a resident kernel needs). Every kernel takes one. A
  kernel that has started keeps its place until it ends: a GPU does not take turns.
- With `queues`, streams are dealt to so many hardware queues (CUDA_DEVICE_MAX_CONNECTIONS). A kernel starts only when
  those before it in its queue have started.
- The host waits only in `Event.synchronize` and `Device.synchronize`. No call that allocates or loads waits for the
  device, since the worker has done everything once before (`Worker._warm_up`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tests.support.nccl_hosts import SEND, FakeDevice, HostWait, Kernel


class Move(NamedTuple):
    """A host submits its next kernel, a kernel starts, or kernels end."""

    what: str
    kernels: tuple[Kernel, ...]


Choose = Callable[[Sequence[Move]], Move]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How it ended.

    circle: who waits for whom, if the machine hangs; empty if all hosts came to their end. mistaken: sends that met the
    receive of another message. most_running: of each device, the most kernels that ran at once.
    """

    circle: tuple[str, ...]
    mistaken: tuple[str, ...]
    most_running: tuple[int, ...]


class Machine:
    """Devices, and a run of what their hosts have written.

    places: of each device. queues: hardware queues of each device; None for one of each stream.
    """

    def __init__(self, devices: Sequence[FakeDevice], *, places: Sequence[int], queues: int | None = None) -> None:
        self._devices, self._places = devices, places
        self._at = [0] * len(devices)  # of each host
        self._submitted: set[Kernel] = set()
        self._started: set[Kernel] = set()
        self._ended: set[Kernel] = set()
        self._running: list[list[Kernel]] = [[] for _ in devices]
        self._ready: list[list[Kernel]] = [[] for _ in devices]
        self._can_end: list[tuple[Kernel, ...]] = []
        self._missing: dict[Kernel, int] = {}
        self._needed_by: dict[Kernel, list[Kernel]] = {}
        for kernel in self._kernels():
            self._missing[kernel] = len(kernel.needs)
            for need in kernel.needs:
                self._needed_by.setdefault(need, []).append(kernel)
        self._before_in_queue = {} if queues is None else self._queue_order(queues)

    def _kernels(self) -> Iterator[Kernel]:
        return (kernel for device in self._devices for kernel in device.host if isinstance(kernel, Kernel))

    def _queue_order(self, queues: int) -> dict[Kernel, Kernel]:
        """Of each kernel the one before it in its hardware queue; streams are dealt out as they were made."""
        last: dict[tuple[int, int], Kernel] = {}
        before: dict[Kernel, Kernel] = {}
        queue_of = {
            stream: at % queues for device in self._devices for at, stream in enumerate(device.streams.values())
        }
        for kernel in self._kernels():
            queue = kernel.rank, queue_of[kernel.stream]
            if queue in last:
                before[kernel] = last[queue]
            last[queue] = kernel
        return before

    def run(self, choose: Choose) -> Outcome:
        """Make moves until none is possible."""
        most_running = [0] * len(self._devices)
        while moves := self._moves():
            move = choose(moves)
            getattr(self, f"_{move.what}")(move.kernels)
            rank = move.kernels[0].rank
            most_running[rank] = max(most_running[rank], len(self._running[rank]))
        stuck = [rank for rank, device in enumerate(self._devices) if self._at[rank] < len(device.host)]
        return Outcome(
            circle=self._circle(stuck[0]) if stuck else (),
            mistaken=tuple(self._mistaken()),
            most_running=tuple(most_running),
        )

    def _moves(self) -> list[Move]:
        moves = [Move("end", kernels) for kernels in self._can_end]
        for rank, device in enumerate(self._devices):
            if (kernel := self._next_of_host(rank, device)) is not None:
                moves.append(Move("submit", (kernel,)))
            if len(self._running[rank]) < self._places[rank]:
                moves += [Move("start", (kernel,)) for kernel in self._ready[rank] if self._is_first_in_queue(kernel)]
        return moves

    def _next_of_host(self, rank: int, device: FakeDevice) -> Kernel | None:
        """The kernel that a host can submit next, past all waits that are over."""
        while self._at[rank] < len(device.host):
            item = device.host[self._at[rank]]
            if isinstance(item, Kernel):
                return item
            if not self._ended.issuperset(item.kernels):
                return None
            self._at[rank] += 1
        return None

    def _is_first_in_queue(self, kernel: Kernel) -> bool:
        before = self._before_in_queue.get(kernel)
        return before is None or before in self._started

    def _submit(self, kernels: tuple[Kernel, ...]) -> None:
        (kernel,) = kernels
        self._at[kernel.rank] += 1
        self._submitted.add(kernel)
        if not self._missing[kernel]:
            self._ready[kernel.rank].append(kernel)

    def _start(self, kernels: tuple[Kernel, ...]) -> None:
        (kernel,) = kernels
        self._ready[kernel.rank].remove(kernel)
        self._running[kernel.rank].append(kernel)
        self._started.add(kernel)
        meeting = kernel.meeting
        together = (kernel,) if meeting is None else tuple(meeting.members)
        if (meeting is None or len(meeting.ranks) == len(together)) and self._started.issuperset(together):
            self._can_end.append(together)

    def _end(self, kernels: tuple[Kernel, ...]) -> None:
        self._can_end.remove(kernels)
        for kernel in kernels:
            self._running[kernel.rank].remove(kernel)
            self._ended.add(kernel)
            for waiting in self._needed_by.get(kernel, []):
                self._missing[waiting] -= 1
                if not self._missing[waiting] and waiting in self._submitted:
                    self._ready[waiting.rank].append(waiting)

    def _mistaken(self) -> Iterator[str]:
        for kernel in self._kernels():
            if kernel.kind == SEND and kernel.meeting is not None and kernel in self._ended:
                for other in kernel.meeting.members:
                    if other.message != kernel.message:
                        yield f"{kernel} met {other}"

    def _circle(self, rank: int) -> tuple[str, ...]:
        """The circle met by following who waits for whom from a host until one repeats, or all up to a dead end."""
        steps: dict[int | Kernel, str] = {}
        at: int | Kernel = rank
        while at not in steps:
            steps[at], following = self._wait_of(at)
            if following is None:
                return tuple(steps.values())
            at = following
        waiting = list(steps)
        return tuple(steps[each] for each in waiting[waiting.index(at) :])

    def _wait_of(self, at: int | Kernel) -> tuple[str, int | Kernel | None]:
        """What a host (by its rank) or a kernel waits for, as a sentence and as the next to look at."""
        if isinstance(at, int):
            item = self._devices[at].host[self._at[at]]
            assert isinstance(item, HostWait)
            need = next(kernel for kernel in item.kernels if kernel not in self._ended)
            return f"the host of rank {at} waits for: {need}", need
        if at not in self._submitted:
            return f"{at} is not submitted by its host", at.rank
        for need in at.needs:
            if need not in self._ended:
                how = "stands behind" if need.stream is at.stream else "waits for"
                return f"{at} {how}: {need}", need
        if not self._is_first_in_queue(at):
            before = self._before_in_queue[at]
            return f"{at} stands in one hardware queue behind: {before}", before
        if at not in self._started:
            holder = self._running[at.rank][0]
            return f"{at} finds no place, one is held by: {holder}", holder
        assert at.meeting is not None
        other = next((kernel for kernel in at.meeting.members if kernel not in self._started), None)
        if other is not None:
            return f"{at} spins until it meets: {other}", other
        posted = {kernel.rank for kernel in at.meeting.members}
        missing = next(rank for rank in at.meeting.ranks if rank not in posted)
        has_ended = self._at[missing] == len(self._devices[missing].host)
        return f"{at} spins for what the host of rank {missing} never posts", None if has_ended else missing
