"""Host link: what moving activations between a device and its host's memory takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from ppsim.checks import checked
from ppsim.network.latency_bandwidth import LatencyBandwidth, fit_latency_and_bandwidth


@dataclass(frozen=True, kw_only=True)
class HostLink(LatencyBandwidth):
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
    starts, which is not before its O has ended, and what needs them waits until it ends. With `Conditions.blocking` a
    rank does nothing else while it copies.

    Examples
    --------
    >>> HostLink(bytes_per_s=4.0, latency_s=0.5).copy_s(8)
    2.5
    """

    def copy_s(self, size_bytes: Any) -> Any:
        """Seconds of one copy of so many bytes, or of each of an array of copies."""
        return self.latency_s + size_bytes / self.bytes_per_s

    @classmethod
    @checked
    def fitted(cls, size_bytes: npt.ArrayLike, seconds: npt.ArrayLike) -> HostLink:
        """Fit latency and bandwidth to measured copies, see `fit_latency_and_bandwidth`.

        Parameters
        ----------
        size_bytes, seconds : sequence of floats
            Size and time of each copy, in either direction.

        Returns
        -------
        HostLink

        Raises
        ------
        InputError
            For lists that are empty or differ in length, or numbers that are not finite or negative, or a time of 0.

        Examples
        --------
        >>> round(HostLink.fitted([4, 8], [1.5, 2.5]).copy_s(16), 9)
        4.5
        """
        latency_s, bytes_per_s = fit_latency_and_bandwidth(size_bytes, seconds)
        return cls(latency_s=latency_s, bytes_per_s=bytes_per_s)
