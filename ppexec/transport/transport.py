"""Transport: what the runtime asks of whatever carries its messages."""

from __future__ import annotations

from typing import Protocol

import torch


class Transport(Protocol):
    """One rank's end of all its links; messages are numbered as in the program's table.

    window: how many receives of a link are posted ahead of their use.
    """

    window: int

    @property
    def posted_bytes(self) -> int:
        """The size of the receives that are posted and not yet used."""

    def start(self) -> None:
        """Before a step."""

    def finish(self) -> None:
        """After it: everything sent has left."""

    def send(self, message: int, tensor: torch.Tensor) -> None:
        """Hand a message over without waiting for its receiver."""

    def receive(self, message: int) -> torch.Tensor:
        """Wait for a message; the tensor is the caller's own."""
