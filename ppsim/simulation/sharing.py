"""Devices: cores or GPUs that ranks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Sharing = Literal["turns", "fair"]


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Which device each rank computes on, and how those on one device share it.

    of_rank: device of each rank, numbered from 0, shape (p,). cores: how many ranks a device runs at full speed at
    once. sharing: with "turns" an action keeps a core from its start to its end and others queue, first come first
    served; with "fair" all that are ready run at once, each at cores / ready of its speed, as under a time-sharing
    operating system. efficiency: with "fair", what the cores get done together where more want them, as a share of what
    they could: then each runs at efficiency * cores / ready of its speed. A scheduler that leaves a core idle while
    others queue for another, and switching between them, keep it below 1.
    """

    of_rank: tuple[int, ...]
    cores: int = 1
    sharing: Sharing = "turns"
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.cores, bool) or not isinstance(self.cores, int) or self.cores < 1:
            raise ValueError(f"cores must be a whole number of 1 or more, got {self.cores!r}")
        if any(isinstance(device, bool) or not isinstance(device, int) or device < 0 for device in self.of_rank):
            raise ValueError(f"devices are numbered from 0, got {list(self.of_rank)}")
        if self.sharing not in get_args(Sharing):
            raise ValueError(f"sharing must be one of {', '.join(get_args(Sharing))}, got {self.sharing!r}")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"sharing_efficiency must be above 0 and at most 1, got {self.efficiency!r}")
        if self.efficiency != 1 and self.sharing != "fair":
            raise ValueError(
                f"sharing_efficiency {self.efficiency!r} is of ranks that compute at once: give it with sharing 'fair'"
            )

    @property
    def are_shared(self) -> bool:
        """Whether some rank may ever have to wait for another."""
        return any(self.of_rank.count(device) > self.efficiency * self.cores for device in set(self.of_rank))


def devices_of(
    ranks: int, *, cores: int | None, devices: Sequence[int] | None, sharing: Sharing, sharing_efficiency: float
) -> Devices | None:
    """The devices that `simulate`'s options mean; None if every rank computes by itself. Raises ValueError."""
    if cores is None and devices is None:
        if sharing_efficiency != 1:
            raise ValueError(
                f"sharing_efficiency {sharing_efficiency!r} is of ranks that share: give it with cores or devices"
            )
        return None
    of_rank = tuple(devices) if devices is not None else (0,) * ranks
    if len(of_rank) != ranks:
        raise ValueError(f"devices names {len(of_rank)} devices for {ranks} ranks: give each rank's")
    return Devices(of_rank=of_rank, cores=1 if cores is None else cores, sharing=sharing, efficiency=sharing_efficiency)
