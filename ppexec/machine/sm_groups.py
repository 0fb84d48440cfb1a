"""SM groups: half of a GPU's multiprocessors shared out, so that each rank of one process has its own (green contexts).

The groups are disjoint; memory bandwidth, L2 cache and power stay common. Half of the multiprocessors stay idle, so
that none of these is at its limit, and ranks do not slow one another down. Measured on an H100 in bfloat16: with four
groups of 32 at work the GPU was at its power limit, clocks fell from 1980 to some 1400 MHz and followed the load with
a delay of some 50 ms, and a forward took 1.34 times what it took alone; with four groups of 16 an action took 1.05
times. Copies between ranks have plain streams: 128 MiB took 0.13 ms beside half of the GPU at work, 0.6 ms beside all.

Source: CUDA driver API, "Green Contexts" (cuDevSmResourceSplitByCount).
"""

from __future__ import annotations

from typing import Any

import torch

_FAILURES = (ImportError, AttributeError, RuntimeError, TypeError, ValueError)
"""What an absent or an older driver or binding answers with. Plain streams do then, so no run fails for it."""
_STEP = 8  # multiprocessors: Hopper hands out multiples


class SMGroups:
    """`parts` streams to compute on, each with its own group of multiprocessors.

    Parameters
    ----------
    device : torch.device
        The GPU.
    parts : int
        How many groups.

    Attributes
    ----------
    streams : list of torch.cuda.Stream
        One for each part; plain streams where the driver has no groups.
    description : dict
        "multiprocessors" (of the GPU), "parts", "each" (the size of each group, or None without groups) and, where
        there are none, "why_not".
    """

    def __init__(self, device: torch.device, parts: int) -> None:
        self._device = device
        self._contexts: list[Any] = []
        self.streams: list[torch.cuda.Stream] = []
        total = torch.cuda.get_device_properties(device).multi_processor_count
        self.description: dict[str, Any] = {"multiprocessors": total, "parts": parts, "each": None}
        try:
            self._split(parts, total)
        except _FAILURES as error:
            self.close()
            self.streams = [torch.cuda.Stream(device) for _ in range(parts)]
            self.description["why_not"] = f"{type(error).__name__}: {error}"

    def _split(self, parts: int, total: int) -> None:
        """Make the streams."""
        from cuda.bindings import driver

        torch.zeros(1, device=self._device)  # the primary context must be there
        kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        number = _checked(driver.cuDeviceGet(self._device.index or 0))
        every = _checked(driver.cuDeviceGetDevResource(number, kind))
        each = max(total // 2 // parts // _STEP * _STEP, _STEP)
        groups, found, _ = _checked(driver.cuDevSmResourceSplitByCount(parts, every, 0, each))
        if int(found) < parts:
            raise RuntimeError(f"{total} multiprocessors give {int(found)} groups of {each}, not {parts}")
        for group in groups[:parts]:
            self.streams.append(self._stream_of(group, number))
        self.description["each"] = [int(group.sm.smCount) for group in groups[:parts]]

    def _stream_of(self, group: Any, number: Any) -> torch.cuda.Stream:
        """A stream of a green context with a group of multiprocessors."""
        from cuda.bindings import driver

        description = _checked(driver.cuDevResourceGenerateDesc([group], 1))
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        context = _checked(driver.cuGreenCtxCreate(description, number, flags))
        self._contexts.append(context)
        stream = _checked(driver.cuGreenCtxStreamCreate(context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0))
        return torch.cuda.ExternalStream(int(stream), device=self._device)

    def close(self) -> None:
        """Destroy the contexts; their streams must have nothing to do."""
        if self._contexts:
            from cuda.bindings import driver

            for context in self._contexts:
                driver.cuGreenCtxDestroy(context)
        self._contexts.clear()
        self.streams.clear()


def _checked(result: tuple[Any, ...]) -> Any:
    """What a driver call gives, without its error code. Raises RuntimeError for an error."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"the CUDA driver answered {error.name}")
    return values[0] if len(values) == 1 else values
