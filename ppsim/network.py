"""Network: what a message between two ranks costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ppsim.program import Program


@dataclass(frozen=True, kw_only=True)
class Link:
    """A directed link. A transfer occupies it for bytes / bytes_per_s and arrives latency_s after that."""

    latency_s: float = 0.0
    bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise ValueError(f"latency_s must be seconds, finite and >= 0, got {self.latency_s!r}")
        if not self.bytes_per_s > 0:
            raise ValueError(f"bytes_per_s must be > 0 (leave it out for no limit), got {self.bytes_per_s!r}")

    def occupied_s(self, size_bytes: float) -> float:
        """Seconds for which a transfer of that size keeps the link."""
        return size_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Network:
    """The links between all ranks: one for all pairs, and others where `links` has the pair.

    `Network(latency_s=1e-5, bytes_per_s=25e9, links={(0, 1): Link(latency_s=1e-6)})`; a pair is (source, destination).
    Without arguments messages cost nothing.
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Link(latency_s=self.latency_s, bytes_per_s=self.bytes_per_s)

    def link(self, source: int, destination: int) -> Link:
        """The directed link from rank `source` to rank `destination`."""
        default = Link(latency_s=self.latency_s, bytes_per_s=self.bytes_per_s)
        return self.links.get((source, destination), default)

    def transfer_times(
        self, program: Program, message_bytes: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """How long each message keeps its link, and how much later it arrives; two arrays (messages,) of seconds."""
        links = [self.link(*pair) for pair in program.links()]
        link = program.messages.link
        rate = np.array([model.bytes_per_s for model in links], np.float64)
        latency_s = np.array([model.latency_s for model in links], np.float64)
        return message_bytes / rate[link], latency_s[link]
