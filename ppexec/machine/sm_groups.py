"""SM groups: a GPU's multiprocessors divided among the ranks of one process (green contexts).

The groups are disjoint. Memory bandwidth, L2 cache and power are still shared. So groups take only half of the
multiprocessors, and the rest stays idle: then none of the shared resources is at its limit, and ranks do not slow one
another down. Measured on an H100 in bfloat16:

- Four groups of 32 at work bring the GPU to its power limit. Clocks fall from 1980 to some 1400 MHz, some 50 ms after
  the load, and a forward takes 1.34 times as long as alone.
- With four groups of 16 an action takes 1.05 times as long as alone.
- Copies between ranks run on plain streams. 128 MiB take 0.13 ms with half of the GPU at work, 0.6 ms with all of it.

Source: CUDA driver API, "Green Contexts" (cuDevSmResourceSplitByCount).
"""

from __future__ import annotations

from typing import Any

import torch

_FAILURES = (ImportError, AttributeError, RuntimeError, TypeError, ValueError)
"""What is raised where the driver or its Python binding is absent or too old. Plain streams are used then."""
_STEP = 8  # multiprocessors: Hopper's groups are multiples of it


class SMGroups:
    """`parts` streams to compute on, each with its own group of multiprocessors.

    Parameters
    ----------
    device : torch.device
        The GPU.
    parts : int
        How many groups. Each has at least 8 multiprocessors, so many parts take more than half of the GPU.

    Attributes
    ----------
    streams : list of torch.cuda.Stream
        One for each part; plain streams where the driver has no groups.
    description : dict
        "multiprocessors": of the GPU. "parts". "each": list of the groups' sizes, or None without groups. "why_not":
        why there are no groups, if so.
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
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        number = _checked(driver.cuDeviceGet(index))
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
        """Destroy the contexts. Their streams must have finished all work."""
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
