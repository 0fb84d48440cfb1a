"""Collectives: what gathering sharded parameters and reducing their gradients over replicas takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ppsim.errors import InputError
from ppsim.network.ring import Ring


@dataclass(frozen=True, kw_only=True)
class Collectives(Ring):
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
    whole_bytes : sequence of ints, one per stage, or None
        Counted bytes of a stage's gathered parameters, in place of its `parameter_bytes`: slices of a tensor that does
        not divide evenly are padded, and so is the whole.
    parameter_share_bytes, gradient_share_bytes : sequence of ints, one per stage, or None
        Counted bytes that a replica keeps of a stage's parameters and gradients, in place of even shares.

    Raises
    ------
    InputError
        For numbers that cannot be.

    Notes
    -----
    A ring gathers or reduces in d - 1 rounds, each with one d-th of the bytes: (d - 1) (latency_s + bytes /
    (d bytes_per_s)) (Thakur, Rabenseifner and Gropp, 2005). Both together are the all-reduce of `Reduction`.

    UNSHARD and REDUCE_GRAD of a rank run one after another in the sequence in which they stand in its order, each once
    the action before it has ended. Computation goes on meanwhile, during REDUCE_GRAD unless `Conditions.blocking`. An
    action waits until its stage is whole.

    Examples
    --------
    >>> Collectives(replicas=4, latency_s=0.5, bytes_per_s=1.0).ring_s(8)
    7.5
    """

    unshard_s: Sequence[float] | None = None
    reduce_s: Sequence[float] | None = None
    whole_bytes: Sequence[int] | None = None
    parameter_share_bytes: Sequence[int] | None = None
    gradient_share_bytes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in BY_STAGE:
            given, unit = getattr(self, name), "seconds" if name.endswith("_s") else "bytes"
            if given is not None:
                object.__setattr__(self, name, tuple(given))
                if not all(math.isfinite(each) and each >= 0 for each in given):
                    raise InputError(f"{name} must be {unit}, finite and >= 0, got {list(given)}")

    def share_bytes(self, size_bytes: int) -> int:
        """Bytes that a replica keeps of so many, rounded up."""
        return -(-size_bytes // self.replicas)

    def parameter_shares(self, size_bytes: Sequence[int]) -> list[int]:
        """Bytes that a replica keeps of each stage's parameters, of which there are so many."""
        return list(self.parameter_share_bytes or map(self.share_bytes, size_bytes))

    def gradient_shares(self, size_bytes: Sequence[int]) -> list[int]:
        """Bytes that a replica keeps of each stage's gradients, of which there are so many."""
        return list(self.gradient_share_bytes or map(self.share_bytes, size_bytes))


BY_STAGE = ("unshard_s", "reduce_s", "whole_bytes", "parameter_share_bytes", "gradient_share_bytes")
"""The fields of `Collectives` that have a number for each stage."""
