"""Device: how fast one accelerator computes and moves memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ppsim.checks import check_fields, checked
from ppsim.costs.stage_cost import total_s
from ppsim.errors import InputError
from ppsim.estimate.work import Work


@dataclass(frozen=True, kw_only=True)
class Device:
    """Rates of one device.

    Parameters
    ----------
    flops_per_s : float
        FLOPs per second of matrix products.
    bytes_per_s : float
        Bytes per second of the device's memory, reads and writes together.
    efficiency, bandwidth_efficiency : float
        The share of each rate that is reached, above 0 and up to 1.
    launch_s : float
        Seconds that each operation takes besides.
    dtype_bytes : int, optional
        Bytes of an element for which `flops_per_s` holds. By default it holds for any.
    name, source : str
        What device it is, and where its rates are from.

    Raises
    ------
    InputError
        If a rate or a share has no meaning.

    Notes
    -----
    An operation takes max(FLOPs / FLOPs per second, bytes / bytes per second) + launch_s: the roofline of each
    operation by itself (Williams, Waterman and Patterson, Roofline, 2009). With both shares 1 and launch_s 0 no kernel
    is faster.

    Examples
    --------
    >>> from ppsim.estimate.work import Work
    >>> device = Device(flops_per_s=100.0, bytes_per_s=10.0, launch_s=0.5)
    >>> device.operation_s(Work(flops=400, traffic_bytes=20))
    4.5
    """

    flops_per_s: float
    bytes_per_s: float
    efficiency: float = 1.0
    bandwidth_efficiency: float = 1.0
    launch_s: float = 0.0
    dtype_bytes: int | None = None
    name: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        for rate in ("flops_per_s", "bytes_per_s"):
            value = getattr(self, rate)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{rate} must be finite and > 0, got {value!r}")
        for share in ("efficiency", "bandwidth_efficiency"):
            value = getattr(self, share)
            if not 0 < value <= 1:
                raise InputError(f"{share} must be a share above 0 and up to 1, got {value!r}")
        if not (math.isfinite(self.launch_s) and self.launch_s >= 0):
            raise InputError(f"launch_s must be seconds, finite and >= 0, got {self.launch_s!r}")

    def operation_s(self, work: Work) -> float:
        """Seconds of one operation."""
        computing = work.flops / (self.flops_per_s * self.efficiency)
        moving = work.traffic_bytes / (self.bytes_per_s * self.bandwidth_efficiency)
        return max(computing, moving) + self.launch_s

    @checked
    def time_s(self, works: Iterable[Work]) -> float:
        """Seconds of operations one after another."""
        return total_s(map(self.operation_s, works))


def _device(name: str, teraflops: float, gigabytes_per_s: float, source: str) -> Device:
    return Device(
        name=name, flops_per_s=teraflops * 1e12, bytes_per_s=gigabytes_per_s * 1e9, dtype_bytes=2, source=source
    )


# Vendors' peaks for 16-bit matrix products without sparsity.
_KNOWN = {
    "v100": _device("v100", 125, 900, "NVIDIA V100 datasheet: V100 SXM2, FP16 tensor cores"),
    "a100-40gb": _device("a100-40gb", 312, 1555, "NVIDIA A100 datasheet: A100 40GB SXM, BF16 dense"),
    "a100": _device("a100", 312, 2039, "NVIDIA A100 datasheet: A100 80GB SXM, BF16 dense"),
    "h100": _device("h100", 989, 3350, "NVIDIA H100 datasheet: H100 SXM, BF16 dense, half of the sparse 1,979"),
    "h200": _device("h200", 989, 4800, "NVIDIA H200 datasheet: H200 SXM, BF16 dense, half of the sparse 1,979"),
    "b200": _device("b200", 2250, 8000, "NVIDIA HGX B200 datasheet: an eighth of 8 GPUs, BF16 dense"),
    "mi300x": _device("mi300x", 1307.4, 5325, "AMD Instinct MI300X datasheet: BF16 dense"),
}


def device_names() -> list[str]:
    """The devices whose published rates are known here."""
    return list(_KNOWN)


@checked
def named_device(
    name: str, *, efficiency: float = 1.0, bandwidth_efficiency: float = 1.0, launch_s: float = 0.0
) -> Device:
    """A device with its vendor's peak rates for 16-bit elements.

    Parameters
    ----------
    name : str
        One of `device_names()`.
    efficiency, bandwidth_efficiency, launch_s : float
        As in `Device`.

    Raises
    ------
    InputError
        If no device has this name.

    Examples
    --------
    >>> named_device("h100", efficiency=0.5).flops_per_s
    989000000000000.0
    """
    if name not in _KNOWN:
        raise InputError(
            f"unknown device {name!r}: take {', '.join(_KNOWN)}, or state flops_per_s and bytes_per_s of your own"
        )
    return replace(_KNOWN[name], efficiency=efficiency, bandwidth_efficiency=bandwidth_efficiency, launch_s=launch_s)
