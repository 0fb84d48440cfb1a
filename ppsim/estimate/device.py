"""Device: how fast one accelerator computes and moves memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ppsim.estimate.work import Work


@dataclass(frozen=True, kw_only=True)
class Device:
    """Rates of one device; an operation takes max(FLOPs / FLOPs per second, bytes / bytes per second) + launch_s.

    That is the roofline (Williams, Waterman and Patterson, 2009) for each operation by itself.

    flops_per_s: of matrix products at `dtype_bytes` per element (None: at any). bytes_per_s: of the device's memory,
    reads and writes together. efficiency, bandwidth_efficiency: the share of each that is reached, 0 < share <= 1; at 1
    and with launch_s = 0 times are bounds that no kernel beats. launch_s: fixed seconds of each operation.
    name, source: for reading.
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
        for rate in ("flops_per_s", "bytes_per_s"):
            value = getattr(self, rate)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{rate} must be finite and > 0, got {value!r}")
        for share in ("efficiency", "bandwidth_efficiency"):
            value = getattr(self, share)
            if not 0 < value <= 1:
                raise ValueError(f"{share} must be a share above 0 and up to 1, got {value!r}")
        if not (math.isfinite(self.launch_s) and self.launch_s >= 0):
            raise ValueError(f"launch_s must be seconds, finite and >= 0, got {self.launch_s!r}")

    def operation_s(self, work: Work) -> float:
        """Seconds of one operation."""
        computing = work.flops / (self.flops_per_s * self.efficiency)
        moving = work.traffic_bytes / (self.bytes_per_s * self.bandwidth_efficiency)
        return max(computing, moving) + self.launch_s

    def time_s(self, works: Iterable[Work]) -> float:
        """Seconds of operations one after another."""
        return math.fsum(map(self.operation_s, works))


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
}


def device_names() -> list[str]:
    """The devices whose published rates are known here."""
    return list(_KNOWN)


def named_device(
    name: str, *, efficiency: float = 1.0, bandwidth_efficiency: float = 1.0, launch_s: float = 0.0
) -> Device:
    """A device at its vendor's 16-bit peak rates, of which the stated shares are reached. Raises ValueError."""
    if name not in _KNOWN:
        raise ValueError(
            f"unknown device {name!r}: take {', '.join(_KNOWN)}, or state flops_per_s and bytes_per_s of your own"
        )
    return replace(_KNOWN[name], efficiency=efficiency, bandwidth_efficiency=bandwidth_efficiency, launch_s=launch_s)
