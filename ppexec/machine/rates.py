"""Rates: how fast this machine multiplies matrices and moves memory, as a device that ppsim can estimate with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

from ppexec.machine.clock import now_ns
from ppsim import Device


def measure_device(
    *,
    threads: int | None = None,
    dtype: torch.dtype = torch.float32,
    size: int = 1024,
    copied_bytes: int = 2**27,
    repeats: int = 15,
) -> Device:
    """This CPU's rates with `threads` threads (None: as many as torch has now): medians of `repeats` timings each.

    flops_per_s: of square products of `size` rows. bytes_per_s: of copying a buffer of `copied_bytes`, which should be
    larger than the caches; a copied byte is read and written, so it counts twice. launch_s: of adding two numbers.
    Torch's thread count is put back afterwards. Raises ValueError for numbers below 1.
    """
    numbers = {"threads": threads, "size": size, "copied_bytes": copied_bytes, "repeats": repeats}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    with _threads(threads), torch.inference_mode():
        left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
        product = torch.empty(size, size, dtype=dtype)
        source = torch.zeros(copied_bytes, dtype=torch.uint8)
        target = torch.zeros_like(source)
        one = torch.ones(1, dtype=dtype)
        matmul_s = _median_s(lambda: torch.mm(left, right, out=product), repeats)
        copy_s = _median_s(lambda: target.copy_(source), repeats)
        launch_s = _median_s(lambda: [one + one for _ in range(100)], repeats) / 100
        used = torch.get_num_threads()
    return Device(
        flops_per_s=2 * size**3 / matmul_s,
        bytes_per_s=2 * copied_bytes / copy_s,
        launch_s=launch_s,
        dtype_bytes=dtype.itemsize,
        name=f"this machine, {used} thread{'s' if used > 1 else ''}",
        source=f"measured: products of {size} rows, copies of {copied_bytes} bytes, torch {torch.__version__}",
    )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _median_s(work: Callable[[], object], repeats: int) -> float:
    """The median of `repeats` calls after two unmeasured ones, which touch the memory and start the threads."""
    times = []
    for turn in range(repeats + 2):
        began = now_ns()
        work()
        if turn >= 2:
            times.append(now_ns() - began)
    return max(median(times), 1) / 1e9
