"""Sharing: devices (cores, GPUs) that several ranks compute on."""

from __future__ import annotations

from dataclasses import dataclass

from ppsim.conditions import Conditions, Sharing
from ppsim.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Which device each rank computes on, and how the ranks of one device share it.

    Parameters
    ----------
    of_rank : tuple of p ints
        The device of each rank.
    sharing : "turns" or "fair"
        With "turns" an action keeps a core from its start to its end, and others queue, first come first served. With
        "fair" all that are ready run at once, as under a time-sharing operating system.
    cores : int
        With "turns", how many ranks a device runs at once.
    speeds : tuple of floats
        With "fair", the speed of each rank when n ranks of its device are at work, at index n - 1. The last value holds
        for more ranks.
    """

    of_rank: tuple[int, ...]
    sharing: Sharing
    cores: int
    speeds: tuple[float, ...]

    @classmethod
    def of(cls, conditions: Conditions, ranks: int) -> Devices | None:
        """The devices that these conditions mean.

        Returns
        -------
        Devices or None
            None if no rank ever waits for another or slows it.

        Raises
        ------
        InputError
            If `devices` does not name one device for each rank.

        Notes
        -----
        With c cores of efficiency e, each of n ranks runs at min(1, e c / n) of its speed. An operating system that
        leaves a core idle while ranks queue for another one, and switching between them, keep e below 1.
        """
        if conditions.cores is None and conditions.devices is None and conditions.speeds is None:
            return None
        of_rank = (0,) * ranks if conditions.devices is None else tuple(conditions.devices)
        if len(of_rank) != ranks:
            raise InputError(f"devices names {len(of_rank)} devices for {ranks} ranks: give each rank's")
        most = max(map(of_rank.count, of_rank))  # ranks on one device
        cores = 1 if conditions.cores is None else conditions.cores
        capacity = conditions.sharing_efficiency * cores
        speeds = tuple(min(1.0, capacity / count) for count in range(1, most + 1))
        if conditions.speeds is not None:
            speeds = tuple(conditions.speeds)
        is_shared = most > cores if conditions.sharing == "turns" else min(speeds[:most]) < 1
        return cls(of_rank=of_rank, sharing=conditions.sharing, cores=cores, speeds=speeds) if is_shared else None
