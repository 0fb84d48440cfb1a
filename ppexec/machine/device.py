"""Device: where a rank computes, with streams that run work in order, events between them, and a clock.

The runtime submits every action to a stream and lets streams wait for each other's events. It does not depend on the
kind of device. On the CPU, `submit` does the work before it returns. On an asynchronous device `submit` returns at
once, and the host runs ahead. There only `Event.synchronize` and `Device.synchronize` make the host wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ppexec.machine.clock import now_ns
from ppexec.machine.recorded_operations import OperationRecorder
from ppexec.machine.waiting import wait_s

Mark = Any
"""A moment on a device's clock; `Device.times_ns` turns it into nanoseconds once the device has reached it."""


class Pending:
    """A place for a value that may not exist yet: submitted work puts it here, and later work takes it.

    It is a tensor. Data for the first stage may be a pytree of tensors.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def take(self) -> Any:
        """Take the value out; it is not kept here. None if there is none."""
        value, self.value = self.value, None
        return value


class Event(Protocol):
    """A point in a stream's work."""

    def is_done(self) -> bool:
        """Whether the stream has passed it."""

    def synchronize(self) -> None:
        """Let the host wait until the stream has passed it."""


class Stream(Protocol):
    """Runs work in the order in which it is submitted."""

    def submit(self, work: Callable[[], None], label: str = "") -> None:
        """Do work after all work submitted before. An error in it names the `label`."""

    def record(self) -> Event:
        """An event at the end of the work submitted so far."""

    def wait(self, event: Event) -> None:
        """Let work submitted from now on start after an event."""

    def uses(self, tensor: torch.Tensor) -> None:
        """Keep the memory of another stream's tensor from reuse until the work submitted so far is done."""


class Recorder(Protocol):
    """Records work of one stream, to be replayed in the order in which it was recorded."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record work; returns what does it again on the same tensors. Both run in work submitted to the stream."""


class Device(Protocol):
    """A process's CPU or GPU.

    Attributes
    ----------
    torch_device : torch.device
        Where its tensors are.
    is_asynchronous : bool
        Whether the host runs ahead of it.
    clock_error_s : float
        How far its clock may have drifted from the host's since the last `begin`.
    """

    torch_device: torch.device
    is_asynchronous: bool
    clock_error_s: float

    def stream(self, name: str) -> Stream:
        """The stream of this name, made when first asked for."""

    def compute_stream(self, part: int = 0, parts: int = 1) -> Stream:
        """A stream to compute on. Where the device can be divided, it gets share `part` of `parts` equal shares."""

    def recorder(self, stream: Stream) -> Recorder:
        """A recorder of work on a stream. What is recorded may share memory: replay it in order."""

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """So many bytes in the host's memory, which its streams copy to and from beside their work."""

    def begin(self) -> None:
        """Begin a step: wait for earlier work, then read the clocks of host and device together."""

    def mark(self) -> Mark:
        """Record this moment in the work under way. Call it in submitted work."""

    def wait_s(self, seconds: float) -> None:
        """Make the work under way last so long without computing. Call it in submitted work."""

    def times_ns(self, marks: Sequence[Mark]) -> list[int]:
        """The times of marks that the device has reached, in nanoseconds on the host's clock."""

    def synchronize(self) -> None:
        """Let the host wait for all streams; raises the first exception of submitted work.

        A device with a time-out raises TimeoutError if it is not done by then; so do its events.
        """

    def close(self) -> None:
        """Release what the device holds."""


class _Done:
    """The event of a stream whose work is done when `submit` returns."""

    def is_done(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


_DONE = _Done()


class _HostStream:
    def submit(self, work: Callable[[], None], label: str = "") -> None:
        work()

    def record(self) -> Event:
        return _DONE

    def wait(self, event: Event) -> None:
        return

    def uses(self, tensor: torch.Tensor) -> None:
        return


class HostDevice:
    """The CPU: `submit` does the work at once, in the caller's thread. There is one stream under all names."""

    is_asynchronous = False
    clock_error_s = 0.0

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self._stream = _HostStream()

    def stream(self, name: str) -> Stream:
        """The only stream."""
        return self._stream

    def compute_stream(self, part: int = 0, parts: int = 1) -> Stream:
        """The only stream."""
        return self._stream

    def recorder(self, stream: Stream) -> Recorder:
        """One that notes operations."""
        return OperationRecorder()

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """Other memory: the CPU's own is the host's."""
        return torch.empty(size_bytes, dtype=torch.uint8)

    def begin(self) -> None:
        """Nothing to wait for."""

    mark = staticmethod(now_ns)
    wait_s = staticmethod(wait_s)

    def times_ns(self, marks: Sequence[Mark]) -> list[int]:
        """The marks, which are nanoseconds already."""
        return list(marks)

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to release."""
