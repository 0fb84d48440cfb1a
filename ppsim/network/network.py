"""Network: the link between every two ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ppsim.checks import check_fields, checked
from ppsim.network.link import Link, LinkPiece
from ppsim.network.network_file import read_links, write_links
from ppsim.schedule.program import Program


@dataclass(frozen=True, kw_only=True)
class Network:
    """One link for all pairs of ranks, and others where `links` has the pair. Without arguments messages are free.

    Parameters
    ----------
    latency_s, gap_s, bytes_per_s, larger
        The fields of the `Link` that all pairs have.
    links : mapping from (source, destination) to Link
        The pairs that have another link.

    Examples
    --------
    >>> network = Network(latency_s=1e-5, links={(0, 1): Link(latency_s=1e-6)})
    >>> network.link(0, 1).latency_s, network.link(1, 0).latency_s
    (1e-06, 1e-05)
    """

    latency_s: float = 0.0
    gap_s: float = 0.0
    bytes_per_s: float = math.inf
    larger: tuple[LinkPiece, ...] = ()
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "larger", self.default.larger)

    @classmethod
    @checked
    def of(cls, default: Link, links: Mapping[tuple[int, int], Link] | None = None) -> Network:
        """The network in which every pair has the link `default`, except the pairs in `links`."""
        return cls(
            latency_s=default.latency_s,
            gap_s=default.gap_s,
            bytes_per_s=default.bytes_per_s,
            larger=default.larger,
            links=dict(links or {}),
        )

    @classmethod
    @checked
    def from_file(cls, path: str | Path) -> Network:
        """Read a JSON file (format: see `network_file`).

        Raises
        ------
        CostError
            Names file, link, field and value, and what to give instead.
        OSError
            If the file cannot be read.
        """
        return cls.of(*read_links(path))

    @checked
    def to_file(
        self,
        path: str | Path,
        *,
        environment: Mapping[str, Any] | None = None,
        samples: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Write a JSON file that `from_file` reads.

        Parameters
        ----------
        path : str or Path
            Where to write.
        environment : mapping, or None
            Where the links were measured; JSON values.
        samples : sequence of mappings, or None
            What the links were fitted from; JSON values.
        """
        write_links(path, self.default, self.links, environment=environment, samples=samples)

    @cached_property
    def default(self) -> Link:
        """The link of every pair that `links` does not have."""
        return Link(latency_s=self.latency_s, gap_s=self.gap_s, bytes_per_s=self.bytes_per_s, larger=self.larger)

    @checked
    def link(self, source: int, destination: int) -> Link:
        """The directed link from rank `source` to rank `destination`."""
        link = self.links.get((source, destination))
        return self.default if link is None else link

    @checked
    def slowed(self, factors: Mapping[tuple[int, int], float]) -> Network:
        """The same network with stragglers among its links.

        Parameters
        ----------
        factors : mapping from (source, destination) to float
            How many times as long a message takes on the link; 3.0 is three times as long.

        Raises
        ------
        InputError
            For a factor that is not finite or not > 0.
        """
        slow = {pair: self.link(*pair).slowed(factor) for pair, factor in factors.items()}
        return replace(self, links={**self.links, **slow})

    def transfer_times(
        self, program: Program, message_bytes: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """What each message of a program takes.

        Parameters
        ----------
        program : Program
            Whose messages they are.
        message_bytes : array of shape (messages,)
            The size of each.

        Returns
        -------
        two arrays of shape (messages,), in seconds
            How long each message occupies its link, and how much later it arrives.
        """
        if not self.links:
            return self.default.transfer_times(message_bytes)
        messages = program.messages
        occupied_s, latency_s = np.empty(len(messages)), np.empty(len(messages))
        bounds = [*np.flatnonzero(messages.position == 0).tolist(), len(messages)]
        for (source, destination), (begin, end) in zip(program.links(), pairwise(bounds), strict=True):
            link = self.link(source, destination)
            occupied_s[begin:end], latency_s[begin:end] = link.transfer_times(message_bytes[begin:end])
        return occupied_s, latency_s
