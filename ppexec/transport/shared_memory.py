"""Shared memory: small messages between processes of one machine, with a wake-up only for a sleeping receiver."""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import select
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ppexec.machine.clock import machine_id, now_ns
from ppexec.machine.device import Pending
from ppexec.machine.environment import usable_cores
from ppexec.models.shapes import TensorSpec
from ppexec.transport.slots import Layout, Slots
from ppexec.transport.transport import outgoing
from ppexec.transport.waits import LostMessage, waits_for, waits_to_send
from ppsim import Program

LARGEST_BYTES = 1 << 20
"""Largest message. Above it two copies by the ranks cost more than waking the thread of gloo that copies."""
_MOST_BYTES = 4 << 30  # of all messages of a step together
_AWAKE_NS = 300_000  # about what it takes to fall asleep and be woken
_LOOK_S = 50e-6  # sleep between two looks where there are enough cores: a core that idles this briefly wakes fast
_ASLEEP_S = 5e-3  # sleep between two looks otherwise: it bounds the delay should a wake-up be missed


@dataclass(frozen=True, kw_only=True)
class SharedMemory:
    """Memory shared by all ranks of a group, with what they need to wake and to watch one another.

    Parameters
    ----------
    memory : mmap
        All zeros at first.
    size_bytes : int
        Bytes for messages. Behind them lies one word per rank, which is 1 while the rank sleeps.
    processes : tuple of int, shape (ranks,)
        A descriptor of each rank's process, readable when the process has ended.
    bells : tuple of int, shape (ranks,)
        The writing end of each rank's pipe. A byte written to it wakes the rank.
    listening : int
        The reading end of this rank's own pipe.
    timeout : timedelta
        How long to wait for a message.
    spins : bool
        Whether there are enough cores for every rank to wait awake.
    """

    memory: mmap.mmap
    size_bytes: int
    processes: tuple[int, ...]
    bells: tuple[int, ...]
    listening: int
    timeout: timedelta
    spins: bool

    def __post_init__(self) -> None:
        weakref.finalize(self, _close, (*self.processes, *self.bells, self.listening))

    def sleepers(self) -> memoryview:
        """One word per rank, 1 while that rank sleeps."""
        return memoryview(self.memory)[self.size_bytes : self.size_bytes + 8 * len(self.bells)].cast("q")


class SharedTransport:
    """One rank's end of all its links, where messages under way lie in the slots of a shared memory.

    The sender copies a message into a slot and sets the message's word, and the receiver copies it out. No rank waits
    in a send, and messages may be received in any order.

    A receiver first polls the word for about as long as a wake-up would take, and yields its core to any process with
    work. Then it sleeps between looks. Where there are more ranks than cores it sleeps at once, until the sender wakes
    it.

    Parameters
    ----------
    program : Program
        What runs.
    specs : sequence of TensorSpec, shape (messages,)
        Shape and type of each message.
    memory : SharedMemory
        At least as large as `size_of` says.
    rank : int
        This rank of the program.

    Raises
    ------
    LostMessage
        From `receive`, when the sender's process has ended, or after the memory's timeout.
    """

    def __init__(self, program: Program, specs: Sequence[TensorSpec], *, memory: SharedMemory, rank: int) -> None:
        messages = program.messages
        self.takes_posts = False
        self.window = int(messages.position.max()) + 1  # every message has a slot of its own
        self._memory, self._rank, self._program = memory, rank, program
        self._sleepers = memory.sleepers()
        self._timeout_ns = round(memory.timeout.total_seconds() * 1e9)
        self._awake_ns = _AWAKE_NS if memory.spins else 0
        self._asleep_s, self._is_rung = (_LOOK_S, 0) if memory.spins else (_ASLEEP_S, 1)
        self._source, self._destination = messages.source.tolist(), messages.destination.tolist()
        self._layout = Layout.of(program, specs)
        self._slots = Slots(self._layout, specs, memoryview(memory.memory))
        self._words = self._slots.words
        self.use(specs)
        self.posted_bytes = 0
        self.sent: dict[int, int] = {}
        self.received: dict[int, int] = {}

    def use(self, specs: Sequence[TensorSpec]) -> bool:
        """Take the specs of the next steps; False if a message is larger than the slots of its link."""
        if not self._layout.holds(specs):
            return False
        self._specs = list(specs)
        self._slots.use(specs)
        self._sizes = [spec.size_bytes for spec in specs]
        self._incoming_bytes = sum(
            size for size, destination in zip(self._sizes, self._destination, strict=True) if destination == self._rank
        )
        return True

    def start(self) -> None:
        """Begin a step: every incoming message has its slot."""
        self.posted_bytes = self._incoming_bytes
        self.sent, self.received = {}, {}

    def finish(self) -> None:
        """End a step: everything sent is in shared memory already."""

    def send(self, message: int, pending: Pending) -> None:
        """Copy a message to a free slot; wait only if the receiver has not taken the same message of the last step."""
        self.sent[message] = now_ns()
        if self._words[message]:
            self._wait_until(False, message, self._destination[message])
        slot = self._slots.take(message)
        self._slots.tensor(message, slot).copy_(outgoing(pending, self._program, message, self._specs[message]))
        self._words[message] = slot + 1
        if self._sleepers[self._destination[message]]:
            with contextlib.suppress(BlockingIOError):  # a full pipe wakes the receiver too
                os.write(self._memory.bells[self._destination[message]], b"!")

    def post(self, message: int) -> None:
        """Nothing: no receives are posted."""

    def receive(self, message: int) -> Pending:
        """Wait for a message and copy it out of its slot."""
        if not self._words[message]:
            self._wait_until(True, message, self._source[message])
        tensor = self._slots.tensor(message, self._words[message] - 1).clone()
        self._words[message] = 0
        self.posted_bytes -= self._sizes[message]
        self.received[message] = now_ns()
        return Pending(tensor)

    def _wait_until(self, is_there: bool, message: int, peer: int) -> None:
        """Wait until a message's word is set (`is_there`) or free again."""
        words, began, waited_ns = self._words, now_ns(), 0
        while bool(words[message]) != is_there and waited_ns < self._awake_ns:
            os.sched_yield()
            waited_ns = now_ns() - began
        process, bell = self._memory.processes[peer], self._memory.listening
        while bool(words[message]) != is_there:
            self._sleepers[self._rank] = self._is_rung
            # The sender sets the word and then reads `sleepers`; here it is the other way round. So either this rank
            # sees the word, or the sender sees that this rank sleeps.
            ready = (
                [] if bool(words[message]) == is_there else select.select([bell, process], [], [], self._asleep_s)[0]
            )
            self._sleepers[self._rank] = 0
            if bell in ready:
                os.read(bell, 4096)
            if bool(words[message]) == is_there:
                return
            waited_ns = now_ns() - began
            if process in ready or waited_ns > self._timeout_ns:
                waiting = (waits_for if is_there else waits_to_send)(self._program, message)
                why = f"rank {peer}'s process ended" if process in ready else f"timed out after {waited_ns / 1e9:.0f} s"
                raise LostMessage(f"{waiting}: {why}")


def fits(program: Program, specs: Sequence[TensorSpec]) -> bool:
    """Whether these messages are few and small enough to go through shared memory."""
    return (
        bool(specs)
        and max(spec.size_bytes for spec in specs) <= LARGEST_BYTES
        and size_of(program, specs) <= _MOST_BYTES
    )


def size_of(program: Program, specs: Sequence[TensorSpec]) -> int:
    """Bytes to reserve for these messages, of which only those that are written to take memory."""
    return Layout.of(program, specs).size_bytes


def open_memory(size_bytes: int, *, group: dist.ProcessGroup, timeout: timedelta) -> SharedMemory | None:
    """Open memory shared by all ranks of a group. Collective.

    Parameters
    ----------
    size_bytes : int
        Bytes for messages (see `size_of`).
    group : ProcessGroup
        The ranks.
    timeout : timedelta
        How long a rank then waits for a message.

    Returns
    -------
    SharedMemory or None
        None unless all ranks are on one x86-64 machine whose system can share memory.

    Notes
    -----
    The memory has no name in the file system, so a killed process leaves none behind. The first rank creates it and
    the others open it through the first rank's process. Other processors than x86-64 may show a core's stores to other
    cores in another order, so that a word could be seen before its message.
    """
    machines = _gathered(_machine(), group)
    if machines[0] is None or len(set(machines)) > 1:
        return None
    ranks = dist.get_world_size(group)
    owned = _create(size_bytes + 8 * ranks) if dist.get_rank(group) == 0 else -1
    listening, bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    ends = _gathered((os.getpid(), owned, bell), group)
    memory, processes, bells = _find(ends, size_bytes + 8 * ranks)
    all_have_it = all(_gathered(memory is not None, group))  # from here on the first rank may close its descriptor
    _close([bell] if owned < 0 else [bell, owned])
    if memory is None or not all_have_it:
        _close([listening, *processes, *bells])
        return None
    spins = dist.get_world_size() * torch.get_num_threads() <= usable_cores()
    return SharedMemory(
        memory=memory,
        size_bytes=size_bytes,
        processes=tuple(processes),
        bells=tuple(bells),
        listening=listening,
        timeout=timeout,
        spins=spins,
    )


def _gathered(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _machine() -> tuple[str, str] | None:
    """This machine and its space of process ids; None where memory cannot be shared."""
    if platform.machine() not in ("x86_64", "AMD64") or not hasattr(os, "memfd_create"):
        return None
    try:
        return machine_id(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _create(size_bytes: int) -> int:
    """A descriptor of new memory, all zeros; -1 if the system gives none."""
    try:
        descriptor = os.memfd_create("messages")
        os.ftruncate(descriptor, size_bytes)
    except OSError:
        return -1
    return descriptor


def _find(ends: Sequence[tuple[int, int, int]], size_bytes: int) -> tuple[mmap.mmap | None, list[int], list[int]]:
    """The first rank's memory (None if it cannot be opened), and the `processes` and `bells` of SharedMemory."""
    processes: list[int] = []
    bells: list[int] = []
    try:
        owner, owned, _ = ends[0]
        descriptor = os.open(f"/proc/{owner}/fd/{owned}", os.O_RDWR | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(descriptor, size_bytes)
        finally:
            os.close(descriptor)
        for process, _, bell in ends:
            processes.append(os.pidfd_open(process))
            bells.append(os.open(f"/proc/{process}/fd/{bell}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return None, processes, bells
    return memory, processes, bells


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
