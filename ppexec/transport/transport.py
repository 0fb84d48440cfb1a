"""Transport: the interface between the runtime and what carries its messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ppexec.machine.device import Mark, Pending
from ppexec.models.shapes import TensorSpec
from ppsim import Program


class Transport(Protocol):
    """One rank's end of all its links. Messages are numbered as in the program's message table.

    Call `start` before every step and `finish` after it.
    """

    @property
    def window(self) -> int | None:
        """How many receives are posted ahead on each link; None where no receives are posted."""

    @property
    def sent(self) -> Mapping[int, Mark]:
        """Message -> when this rank handed it over, in this step."""

    @property
    def received(self) -> Mapping[int, Mark]:
        """Message -> when it had arrived at this rank, in this step."""

    @property
    def posted_bytes(self) -> int:
        """Size of the buffers of receives that are posted and not used yet."""

    def start(self) -> None:
        """Begin a step."""

    def finish(self) -> None:
        """End a step: wait until all sent messages have left."""

    def send(self, message: int, pending: Pending) -> None:
        """Send a tensor once the computations submitted so far are done. The call does not wait for it."""

    def receive(self, message: int) -> Pending:
        """Let the computations submitted from now on wait for a message. Its tensor belongs to the caller."""


MakeTransport = Callable[[Program, Sequence[TensorSpec], int], Transport]
"""Makes a transport from a program, the specs of its messages, and the number of receives to post ahead."""
