"""All-reduce: what adding up gradients over data-parallel replicas takes (REDUCE_GRAD)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppsim.checks import checked
from ppsim.errors import InputError
from ppsim.network.latency_bandwidth import fit_latency_and_bandwidth
from ppsim.network.ring import Ring


@dataclass(frozen=True, kw_only=True)
class Reduction(Ring):
    """An all-reduce of the gradients of every stage over the replicas, by a ring.

    Where a schedule has copies of the model, each replica has as many members in the ring.

    Parameters
    ----------
    replicas : int
        Data-parallel replicas, d. With 1 there is something to add up only where there are copies of the model.
    latency_s : float
        Seconds of each round, whatever its bytes.
    bytes_per_s : float
        Bandwidth between neighbours of the ring. The default is no limit.

    Raises
    ------
    InputError
        For numbers that cannot be.

    Notes
    -----
    A ring takes 2 (d - 1) rounds, each with one d-th of the gradients: 2 (d - 1) (latency_s + bytes / (d bytes_per_s))
    (Patarasuk and Yuan, 2009). The reduction of a stage starts once its last backward (B, or W) has ended and the
    reduction before it on its rank has ended. Computation goes on meanwhile and is not slowed. The gradients are those
    of the trained weights (`StageCost.trained_bytes`). Adding up two copies of one weight on two stages is not counted.

    Examples
    --------
    >>> Reduction(replicas=4, latency_s=0.5, bytes_per_s=1.0).seconds(8)
    15.0
    """

    @classmethod
    @checked
    def fitted(cls, replicas: int, size_bytes: npt.ArrayLike, seconds: npt.ArrayLike) -> Reduction:
        """Fit latency and bandwidth to measured all-reduces.

        Parameters
        ----------
        replicas : int
            Data-parallel replicas, 2 or more.
        size_bytes, seconds : sequence of floats
            Size and time of each all-reduce.

        Returns
        -------
        Reduction
            The ring with the least squares of relative errors, so that small all-reduces count as large ones do. A
            latency or a bandwidth that would come out negative is left out (0, and no limit).

        Raises
        ------
        InputError
            For fewer than 2 replicas, lists that are empty or differ in length, or numbers that are not finite or
            negative, or a time of 0.
        """
        if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 2:
            raise InputError(f"replicas must be 2 or more to have something to fit, got {replicas!r}")
        sizes, times = np.asarray(size_bytes, float), np.asarray(seconds, float)
        latency_s, speed = fit_latency_and_bandwidth(sizes / replicas, times / (2 * (replicas - 1)))
        return cls(replicas=replicas, latency_s=latency_s, bytes_per_s=speed)

    def seconds(self, size_bytes: int) -> float:
        """Seconds of one all-reduce of that size: a reduce-scatter and an all-gather."""
        return 2 * self.ring_s(size_bytes)
