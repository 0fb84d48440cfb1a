"""Transport: what the runtime asks of whatever carries its messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ppexec.machine.device import Mark, Pending
from ppexec.models.shapes import TensorSpec
from ppsim import Program


class Transport(Protocol):
    """One rank's end of all its links; messages are numbered as in the program's table.

    sent, received: of each message since `start`,
    when it was handed over by this rank, and when it was there for this rank.
    """

    @property
    def window(self) -> int | None:
        """How many receives of a link are posted ahead of their use; None where none are posted."""

    @property
    def sent(self) -> Mapping[int, Mark]:
        """Message -> moment."""

    @property
    def received(self) -> Mapping[int, Mark]:
        """Message -> moment."""

    @property
    def posted_bytes(self) -> int:
        """The size of the receives that are posted and not yet used."""

    def start(self) -> None:
        """Before a step."""

    def finish(self) -> None:
        """After it: everything sent has left."""

    def send(self, message: int, pending: Pending) -> None:
        """Hand over a tensor once the computations submitted so far are done; nobody waits for it."""

    def receive(self, message: int) -> Pending:
        """Let the computations wait for a message; the tensor is the caller's own."""


MakeTransport = Callable[[Program, Sequence[TensorSpec], int], Transport]
"""From a program, its messages' specs and how many receives are posted ahead."""
