"""Latency and bandwidth: what a transfer takes, as a fixed time and a time for each byte."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Self

import numpy as np
import numpy.typing as npt

from ppsim.checks import check_fields, check_names, checked
from ppsim.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LatencyBandwidth:
    """A transfer takes latency_s + bytes / bytes_per_s; its subclasses say what transfers there are.

    Parameters
    ----------
    latency_s : float
        Seconds of each transfer, whatever its bytes.
    bytes_per_s : float
        Bandwidth. The default is no limit.

    Raises
    ------
    InputError
        For numbers that cannot be.
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        check_fields(self)
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise InputError(f"latency_s must be seconds, finite and >= 0, got {self.latency_s!r}")
        if not self.bytes_per_s > 0:
            raise InputError(f"bytes_per_s must be > 0 (leave it out for no limit), got {self.bytes_per_s!r}")

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON values. No limit is None."""
        given = {**asdict(self), "bytes_per_s": self.bytes_per_s if math.isfinite(self.bytes_per_s) else None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    @classmethod
    @checked
    def from_dict(cls, given: Mapping[str, object]) -> Self:
        """What `to_dict` wrote. Raises InputError for other content."""
        what = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()  # as the options of a step are called
        check_names(what, given, [each.name for each in fields(cls)])
        for each in fields(cls):
            if each.default is MISSING and given.get(each.name) is None:
                raise InputError(f"{what}: {each.name} is missing: give a whole number of 1 or more")
        return cls(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def fit_latency_and_bandwidth(size_bytes: npt.ArrayLike, seconds: npt.ArrayLike) -> tuple[float, float]:
    """Fit latency and bandwidth to measured transfers.

    Parameters
    ----------
    size_bytes, seconds : sequence of floats
        Size and time of each transfer.

    Returns
    -------
    latency_s, bytes_per_s : float
        Those with the least squares of relative errors, so that small transfers count as large ones do. A latency or a
        bandwidth that would come out negative is left out (0, and no limit). Transfers of one size are all latency.

    Raises
    ------
    InputError
        For lists that are empty or differ in length, or numbers that are not finite or negative, or a time of 0.
    """
    sizes, times = np.asarray(size_bytes, float), np.asarray(seconds, float)
    if sizes.ndim != 1 or sizes.shape != times.shape or not len(sizes):
        raise InputError(f"size_bytes and seconds must be lists of one length, got {sizes.shape} and {times.shape}")
    if not (np.isfinite(sizes).all() and np.isfinite(times).all() and (sizes >= 0).all() and (times > 0).all()):
        raise InputError("size_bytes must be finite and >= 0, seconds finite and > 0")
    scale = float(sizes.max()) or 1.0
    matrix = np.column_stack([np.ones(len(sizes)), sizes / scale]) / times[:, None]
    fits = []
    for support in ([0, 1], [0], [1]):  # of fits that are as good the first
        part = matrix[:, support]
        values, _, rank, _ = np.linalg.lstsq(part, np.ones(len(times)), rcond=None)
        if rank == len(support) and (values >= 0).all():
            full = np.zeros(2)
            full[support] = values
            fits.append((float(((matrix @ full - 1) ** 2).sum()), full))
    _, (latency_s, part_s) = min(fits, key=lambda fit: fit[0])
    return float(latency_s), scale / float(part_s) if part_s > 0 else math.inf
