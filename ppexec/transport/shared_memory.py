"""Messages through memory that ranks of one machine share: what is small is copied, and only who sleeps is woken."""

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
from ppexec.machine.device import Pending, taken
from ppexec.models.shapes import TensorSpec
from ppexec.transport.slots import Layout, Places
from ppexec.transport.waits import waits_for, waits_to_send
from ppsim import Program

LARGEST_BYTES = 1 << 20  # of a message: beyond, two copies by the ranks cost more than waking a thread that copies
_MOST_BYTES = 4 << 30  # of all messages of a step, should all be under way at once
_AWAKE_NS = 300_000  # as long as falling asleep and being woken takes
_LOOK_S = 50e-6  # between looks, where there are cores enough: a core that never idles long wakes soon
_ASLEEP_S = 5e-3  # to look again, should a bell ever be missed


@dataclass(frozen=True, kw_only=True)
class SharedMemory:
    """Memory that all ranks of a group have, all zeros at first, and what they need to wake and to watch one another.

    size_bytes: for messages; after it come as many words as there are ranks, each set while its rank sleeps.
    processes: a descriptor of each rank's process, which tells when it has ended. bells: the writing ends of every
    rank's pipe; listening: the reading end of this rank's. timeout: how long to wait for a message. spins: whether
    there are cores enough to wait awake.
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
        """The words of the ranks, each 1 while its rank sleeps."""
        return memoryview(self.memory)[self.size_bytes : self.size_bytes + 8 * len(self.bells)].cast("q")


class SharedTransport:
    """One rank's end of all its links, whose messages lie in shared memory while they are under way (see `slots`).

    A message is two copies and a word. So nobody waits in a send, and messages may be used in any order. A receiver
    looks for that word, giving way to whoever has work, for as long as it would take to be woken; then it sleeps
    between looks. Ranks that outnumber the cores sleep at once, until the sender rings. A receiver raises RuntimeError
    when the sender's process has ended, or after the timeout.

    program: what runs. specs: of each message, shape (messages,). memory: large enough for them (`size_of`).
    """

    def __init__(self, program: Program, specs: Sequence[TensorSpec], *, memory: SharedMemory, rank: int) -> None:
        messages = program.messages
        self.window = int(messages.position.max()) + 1  # all there are: each has its place
        self._memory, self._rank, self._program = memory, rank, program
        self._sleepers = memory.sleepers()
        self._timeout_ns = round(memory.timeout.total_seconds() * 1e9)
        self._awake_ns = _AWAKE_NS if memory.spins else 0
        self._asleep_s, self._is_rung = (_LOOK_S, 0) if memory.spins else (_ASLEEP_S, 1)
        self._source, self._destination = messages.source.tolist(), messages.destination.tolist()
        self._places = Places(Layout.of(program, specs), specs, memoryview(memory.memory))
        self._words = self._places.words
        self._sizes = [spec.size_bytes for spec in specs]
        self._incoming_bytes = sum(
            size for size, destination in zip(self._sizes, self._destination, strict=True) if destination == rank
        )
        self.posted_bytes = 0
        self.sent: dict[int, int] = {}
        self.received: dict[int, int] = {}

    def start(self) -> None:
        """Every message has a place to come to."""
        self.posted_bytes = self._incoming_bytes
        self.sent, self.received = {}, {}

    def finish(self) -> None:
        """Nothing is under way."""

    def send(self, message: int, pending: Pending) -> None:
        """Copy a message to a free place; only a receiver that is a whole step behind is waited for."""
        self.sent[message] = now_ns()
        if self._words[message]:
            self._wait_until(False, message, self._destination[message])
        place = self._places.take(message)
        self._places.tensor(message, place).copy_(taken(pending, message))
        self._words[message] = place + 1
        if self._sleepers[self._destination[message]]:
            with contextlib.suppress(BlockingIOError):  # rung so often already that it must wake
                os.write(self._memory.bells[self._destination[message]], b"!")

    def receive(self, message: int) -> Pending:
        """Wait for a message; the copy is the receiver's own."""
        if not self._words[message]:
            self._wait_until(True, message, self._source[message])
        tensor = self._places.tensor(message, self._words[message] - 1).clone()
        self._words[message] = 0
        self.posted_bytes -= self._sizes[message]
        self.received[message] = now_ns()
        return Pending(tensor)

    def _wait_until(self, is_there: bool, message: int, peer: int) -> None:
        words, began, waited_ns = self._words, now_ns(), 0
        while bool(words[message]) != is_there and waited_ns < self._awake_ns:
            os.sched_yield()
            waited_ns = now_ns() - began
        process, bell = self._memory.processes[peer], self._memory.listening
        while bool(words[message]) != is_there:
            self._sleepers[self._rank] = self._is_rung
            # A sender looks at who sleeps after it has set the word, so one of the two sees the other.
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
                raise RuntimeError(f"{waiting}: {why}")


def fits(program: Program, specs: Sequence[TensorSpec]) -> bool:
    """Whether these messages are few and small enough to go through shared memory."""
    return (
        bool(specs)
        and max(spec.size_bytes for spec in specs) <= LARGEST_BYTES
        and size_of(program, specs) <= _MOST_BYTES
    )


def size_of(program: Program, specs: Sequence[TensorSpec]) -> int:
    """The bytes that these messages need at most; what is never written to takes none."""
    return Layout.of(program, specs).size_bytes


def open_memory(size_bytes: int, *, group: dist.ProcessGroup, timeout: timedelta) -> SharedMemory | None:
    """Memory shared by all ranks of the group, if they are on one machine that has it, else None. Collective.

    It has no name, so that none is left behind by a killed process; the others find it through its owner. What one core
    stores must be seen by others in the order of the program, as on x86-64.
    """
    places = _gathered(_place(), group)
    if places[0] is None or len(set(places)) > 1:
        return None
    ranks = dist.get_world_size(group)
    owned = _create(size_bytes + 8 * ranks) if dist.get_rank(group) == 0 else -1
    listening, bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    ends = _gathered((os.getpid(), owned, bell), group)
    memory, processes, bells = _find(ends, size_bytes + 8 * ranks)
    everybody_has_it = all(_gathered(memory is not None, group))  # also the moment from which its owner may close it
    _close([bell] if owned < 0 else [bell, owned])
    if memory is None or not everybody_has_it:
        _close([listening, *processes, *bells])
        return None
    spins = dist.get_world_size() * torch.get_num_threads() <= len(os.sched_getaffinity(0))
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


def _place() -> tuple[str, str] | None:
    """Where process ids mean the same as here; None if what is needed is not there."""
    if platform.machine() not in ("x86_64", "AMD64") or not hasattr(os, "memfd_create"):
        return None
    try:
        return machine_id(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _create(size_bytes: int) -> int:
    """A descriptor of new memory, all zeros; -1 if there is none to be had."""
    try:
        descriptor = os.memfd_create("messages")
        os.ftruncate(descriptor, size_bytes)
    except OSError:
        return -1
    return descriptor


def _find(ends: Sequence[tuple[int, int, int]], size_bytes: int) -> tuple[mmap.mmap | None, list[int], list[int]]:
    """The first rank's memory, what tells that a process has ended, and all bells; None if they may not be had."""
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
