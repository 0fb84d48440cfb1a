"""Device: where a rank computes. Streams that run work in order, events between them, and a clock.

The runtime submits every action to a stream and lets streams wait for one another's events; it never asks which device
it is on. On the host work is done at once, inside `submit`. On an asynchronous device `submit` returns at once and the
host runs ahead; only `Event.synchronize` and `Device.synchronize` make the host wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ppexec.machine.clock import now_ns
from ppexec.machine.waiting import wait_s

Mark = Any
"""A moment on a device's clock; `Device.times_ns` turns it into nanoseconds once the device has reached it."""


class Pending:
    """A tensor that may not exist yet: work on one stream puts it here, work that comes after takes it.

    Data for the first stage may be a pytree of tensors.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def take(self) -> Any:
        """The tensor, which is held here no longer; None if there is none."""
        value, self.value = self.value, None
        return value


def taken(pending: Pending, message: int) -> torch.Tensor:
    """The tensor of a message. Raises RuntimeError if it is not there, which is a fault of the runtime."""
    tensor: torch.Tensor | None = pending.take()
    if tensor is None:
        raise RuntimeError(f"message {message} was to be sent before it was computed")
    return tensor


class Event(Protocol):
    """A point in a stream's work."""

    def is_done(self) -> bool:
        """Whether the stream has passed it."""

    def synchronize(self) -> None:
        """Let the host wait until the stream has passed it."""


class Stream(Protocol):
    """Work that is done in the order in which it is submitted."""

    def submit(self, work: Callable[[], None], label: str = "") -> None:
        """Do this after all that was submitted before. label: what it is, for an error's message."""

    def record(self) -> Event:
        """The end of all that was submitted until now."""

    def wait(self, event: Event) -> None:
        """What is submitted from now on starts after the event."""

    def uses(self, tensor: torch.Tensor) -> None:
        """Memory that another stream allocated is not given to others before the work submitted so far is done."""


class Device(Protocol):
    """One rank's share of a CPU or GPU.

    torch_device: where its tensors are. is_asynchronous: whether the host runs ahead of it. clock_error_s: how far its
    clock may be off the host's since the last `begin`.
    """

    torch_device: torch.device
    is_asynchronous: bool
    clock_error_s: float

    def stream(self, name: str) -> Stream:
        """The stream of this name, made when first asked for."""

    def compute_stream(self, part: int = 0, parts: int = 1) -> Stream:
        """A stream to compute on, with one of `parts` equal shares of the device where it can be shared out."""

    def begin(self) -> None:
        """Before a step: wait for what was before, and read host and device clock at once."""

    def mark(self) -> Mark:
        """The moment at which the work under way gets here; to be called in submitted work."""

    def wait_s(self, seconds: float) -> None:
        """Let the work under way take so long without computing."""

    def times_ns(self, marks: Sequence[Mark]) -> list[int]:
        """Marks that have been reached, in nanoseconds of the host's clock."""

    def synchronize(self) -> None:
        """Let the host wait until all streams have done all. Raises what submitted work raised first."""

    def close(self) -> None:
        """Give back what the device holds."""


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
    """The CPU: the rank's own thread does the work at once."""

    is_asynchronous = False
    clock_error_s = 0.0

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self._stream = _HostStream()

    def stream(self, name: str) -> Stream:
        """All are one."""
        return self._stream

    def compute_stream(self, part: int = 0, parts: int = 1) -> Stream:
        """All are one."""
        return self._stream

    def begin(self) -> None:
        """Nothing is under way."""

    def mark(self) -> Mark:
        """Now."""
        return now_ns()

    def wait_s(self, seconds: float) -> None:
        """Sleep."""
        wait_s(seconds)

    def times_ns(self, marks: Sequence[Mark]) -> list[int]:
        """They are that already."""
        return list(marks)

    def synchronize(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is held."""
