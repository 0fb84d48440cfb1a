"""Network: which link every two ranks have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ppsim.network.link import Link, LinkPiece

if TYPE_CHECKING:
    from ppsim.schedule.program import Program


@dataclass(frozen=True, kw_only=True)
class Network:
    """The links between all ranks: one for all pairs, and others where `links` has the pair.

    `Network(latency_s=1e-5, bytes_per_s=25e9, links={(0, 1): Link(latency_s=1e-6)})`; a pair is (source, destination).
    The fields beside `links` are those of the Link for all pairs. Without arguments messages cost nothing.
    """

    latency_s: float = 0.0
    gap_s: float = 0.0
    bytes_per_s: float = math.inf
    larger: tuple[LinkPiece, ...] = ()
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "larger", self.default.larger)

    @classmethod
    def of(cls, default: Link, links: Mapping[tuple[int, int], Link] | None = None) -> Network:
        """The network in which every pair has the link `default`, but those in `links`."""
        return cls(
            latency_s=default.latency_s,
            gap_s=default.gap_s,
            bytes_per_s=default.bytes_per_s,
            larger=default.larger,
            links=dict(links or {}),
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Network:
        """The network in a JSON file, such as `studies/link.py` measures. Raises CostError; see `network_file`."""
        from ppsim.network.network_file import load_network

        return load_network(path)

    def to_file(
        self,
        path: str | Path,
        *,
        environment: Mapping[str, Any] | None = None,
        samples: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Write a JSON file that `from_file` reads; with where it was measured, and what it was fitted from."""
        from ppsim.network.network_file import save_network

        save_network(self, path, environment=environment, samples=samples)

    @property
    def default(self) -> Link:
        """The link of every pair that `links` does not have."""
        return Link(latency_s=self.latency_s, gap_s=self.gap_s, bytes_per_s=self.bytes_per_s, larger=self.larger)

    def link(self, source: int, destination: int) -> Link:
        """The directed link from rank `source` to rank `destination`."""
        link = self.links.get((source, destination))
        return self.default if link is None else link

    def slowed(self, factors: Mapping[tuple[int, int], float]) -> Network:
        """The network in which the links of these pairs take that many times as long: stragglers.

        `network.slowed({(0, 1): 3.0})`. Raises ValueError for a factor that is not finite or not > 0.
        """
        slow = {pair: self.link(*pair).slowed(factor) for pair, factor in factors.items()}
        return replace(self, links={**self.links, **slow})

    def transfer_times(
        self, program: Program, message_bytes: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """How long each message keeps its link, and how much later it arrives; two arrays (messages,) of seconds."""
        if not self.links:
            return self.default.transfer_times(message_bytes)
        messages = program.messages
        occupied_s, latency_s = np.empty(len(messages)), np.empty(len(messages))
        bounds = [*np.flatnonzero(messages.position == 0).tolist(), len(messages)]
        for (source, destination), (begin, end) in zip(program.links(), pairwise(bounds), strict=True):
            link = self.link(source, destination)
            occupied_s[begin:end], latency_s[begin:end] = link.transfer_times(message_bytes[begin:end])
        return occupied_s, latency_s
