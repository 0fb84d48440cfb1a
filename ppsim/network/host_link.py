"""Host link: what moving activations between a device and its host's memory takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from ppsim.checks import check_fields, check_names, checked
from ppsim.errors import InputError


@dataclass(frozen=True, kw_only=True)
class HostLink:
    """Copies of activations to host memory and back, on two streams of each rank, one for each direction.

    Parameters
    ----------
    bytes_per_s : float
        Bandwidth of each direction. The default is no limit.
    latency_s : float
        Seconds of each copy, whatever its bytes.

    Raises
    ------
    InputError
        For numbers that cannot be.

    Notes
    -----
    A copy takes latency_s + bytes / bytes_per_s. The copies of a rank in one direction run one after another in the
    sequence in which they stand in its order, each once the action before it has ended. Both directions run at once, as
    PCI Express does (full duplex). Computation goes on meanwhile. O frees its bytes when it ends. L takes them when it
    starts, which is not before its O has ended, and what needs them waits until it ends.

    Examples
    --------
    >>> HostLink(bytes_per_s=4.0, latency_s=0.5).copy_s(8)
    2.5
    """

    bytes_per_s: float = math.inf
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise InputError(f"latency_s must be seconds, finite and >= 0, got {self.latency_s!r}")
        if not self.bytes_per_s > 0:
            raise InputError(f"bytes_per_s must be > 0 (leave it out for no limit), got {self.bytes_per_s!r}")

    @checked
    def copy_s(self, size_bytes: int) -> float:
        """Seconds of one copy of so many bytes."""
        return self.latency_s + size_bytes / self.bytes_per_s

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON values. No limit is None."""
        return {**asdict(self), "bytes_per_s": self.bytes_per_s if math.isfinite(self.bytes_per_s) else None}

    @classmethod
    @checked
    def from_dict(cls, given: Mapping[str, object]) -> HostLink:
        """What `to_dict` wrote. Raises InputError for other content."""
        check_names("host_link", given, [each.name for each in fields(cls)])
        return cls(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
