"""Ring: replicas that pass bytes on to their neighbours, which is how all-gathers and reductions are timed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Self

from ppsim.checks import check_fields, check_names, check_whole, checked
from ppsim.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Data-parallel replicas in a ring.

    Parameters
    ----------
    replicas : int
        Data-parallel replicas, d.
    latency_s : float
        Seconds of each round, whatever its bytes.
    bytes_per_s : float
        Bandwidth between neighbours of the ring. The default is no limit.

    Raises
    ------
    InputError
        For numbers that cannot be.
    """

    replicas: int
    latency_s: float = 0.0
    bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        check_fields(self)
        check_whole("replicas", self.replicas)
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise InputError(f"latency_s must be seconds, finite and >= 0, got {self.latency_s!r}")
        if not self.bytes_per_s > 0:
            raise InputError(f"bytes_per_s must be > 0 (leave it out for no limit), got {self.bytes_per_s!r}")

    @checked
    def ring_s(self, size_bytes: int) -> float:
        """Seconds of one all-gather or reduce-scatter of so many bytes in all."""
        return (self.replicas - 1) * (self.latency_s + size_bytes / self.replicas / self.bytes_per_s)

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON values. No limit is None."""
        given = {**asdict(self), "bytes_per_s": self.bytes_per_s if math.isfinite(self.bytes_per_s) else None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    @classmethod
    @checked
    def from_dict(cls, given: Mapping[str, object]) -> Self:
        """What `to_dict` wrote. Raises InputError for other content."""
        what = cls.__name__.lower()
        check_names(what, given, [each.name for each in fields(cls)])
        if given.get("replicas") is None:
            raise InputError(f"{what}: replicas is missing: give a whole number of 1 or more")
        return cls(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
