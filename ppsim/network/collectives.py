"""Collectives: what gathering sharded parameters and reducing their gradients over replicas takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from ppsim.checks import check_fields, check_names, checked
from ppsim.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """All-gathers of parameters and reduce-scatters of gradients over the replicas, on a stream of each rank.

    Parameters
    ----------
    replicas : int
        Data-parallel replicas over which parameters are sharded, d.
    latency_s : float
        Seconds of each round, whatever its bytes.
    bytes_per_s : float
        Bandwidth between neighbours of the ring. The default is no limit.
    unshard_s, reduce_s : sequence of floats, one per stage, or None
        Measured seconds of a stage's UNSHARD and REDUCE_GRAD, in place of the ring's.

    Raises
    ------
    InputError
        For numbers that cannot be.

    Notes
    -----
    A ring gathers or reduces in d - 1 rounds, each with one d-th of the bytes: (d - 1) (latency_s + bytes /
    (d bytes_per_s)) (Thakur, Rabenseifner and Gropp, 2005). Both together are the all-reduce of `Reduction`.

    UNSHARD and REDUCE_GRAD of a rank run one after another in the sequence in which they stand in its order, each once
    the action before it has ended. Computation goes on meanwhile. An action waits until its stage is whole.

    Examples
    --------
    >>> Collectives(replicas=4, latency_s=0.5, bytes_per_s=1.0).ring_s(8)
    7.5
    """

    replicas: int
    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    unshard_s: Sequence[float] | None = None
    reduce_s: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.replicas, bool) or not isinstance(self.replicas, int) or self.replicas < 1:
            raise InputError(f"replicas must be a whole number of 1 or more, got {self.replicas!r}")
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise InputError(f"latency_s must be seconds, finite and >= 0, got {self.latency_s!r}")
        if not self.bytes_per_s > 0:
            raise InputError(f"bytes_per_s must be > 0 (leave it out for no limit), got {self.bytes_per_s!r}")
        for name in ("unshard_s", "reduce_s"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, tuple(given))
                if not all(math.isfinite(each) and each >= 0 for each in given):
                    raise InputError(f"{name} must be seconds, finite and >= 0, got {list(given)}")

    @checked
    def ring_s(self, size_bytes: int) -> float:
        """Seconds of one all-gather or reduce-scatter of so many bytes in all."""
        return (self.replicas - 1) * (self.latency_s + size_bytes / self.replicas / self.bytes_per_s)

    def share_bytes(self, size_bytes: int) -> int:
        """Bytes that a replica keeps of so many, rounded up."""
        return -(-size_bytes // self.replicas)

    def to_dict(self) -> dict[str, object]:
        """The collectives as JSON values. No limit is None."""
        given = {**asdict(self), "bytes_per_s": self.bytes_per_s if math.isfinite(self.bytes_per_s) else None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    @classmethod
    @checked
    def from_dict(cls, given: Mapping[str, object]) -> Collectives:
        """The collectives that `to_dict` wrote. Raises InputError for other content."""
        check_names("collectives", given, [each.name for each in fields(cls)])
        if given.get("replicas") is None:
            raise InputError("collectives: replicas is missing: give a whole number of 1 or more")
        return cls(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
