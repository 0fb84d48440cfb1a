"""Ring: replicas that pass bytes on to their neighbours, which is how all-gathers and reductions are timed."""

from __future__ import annotations

from dataclasses import dataclass

from ppsim.checks import check_whole, checked
from ppsim.network.latency_bandwidth import LatencyBandwidth


@dataclass(frozen=True, kw_only=True)
class Ring(LatencyBandwidth):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("replicas", self.replicas)

    @checked
    def ring_s(self, size_bytes: int) -> float:
        """Seconds of one all-gather or reduce-scatter of so many bytes in all."""
        return (self.replicas - 1) * (self.latency_s + size_bytes / self.replicas / self.bytes_per_s)
