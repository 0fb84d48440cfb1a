"""SM groups: a GPU's multiprocessors shared out, so that each rank of one process has its own (CUDA green contexts).

The multiprocessors are split once, into disjoint groups; memory bandwidth, L2 cache and power stay shared. Source: CUDA
driver API, "Green Contexts" (cuDevSmResourceSplitByCount).
"""

from __future__ import annotations

from typing import Any

import torch


class SMGroups:
    """`parts` streams, each with its own group of multiprocessors; with plain streams where the driver has no groups.

    description: how many multiprocessors there are, how many each group has, and how many are in none.
    """

    def __init__(self, device: torch.device, parts: int) -> None:
        self._contexts: list[Any] = []
        self.streams: list[torch.cuda.Stream] = []
        self.description: dict[str, Any]
        total = torch.cuda.get_device_properties(device).multi_processor_count
        try:
            self._split(device, parts, total)
        except (ImportError, AttributeError, RuntimeError) as error:
            self.close()
            self.streams = [torch.cuda.Stream(device) for _ in range(parts)]
            self.description = {"multiprocessors": total, "parts": parts, "each": None, "why_not": str(error)}

    def _split(self, device: torch.device, parts: int, total: int) -> None:
        from cuda.bindings import driver

        torch.zeros(1, device=device)  # the primary context must be there
        kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        number = _checked(driver.cuDeviceGet(device.index or 0))
        every = _checked(driver.cuDeviceGetDevResource(number, kind))
        each = max(total // parts // 8 * 8, 8)  # Hopper hands out multiples of 8
        groups, found, _ = _checked(driver.cuDevSmResourceSplitByCount(parts, every, 0, each))
        if int(found) < parts:
            raise RuntimeError(f"{total} multiprocessors give {int(found)} groups of {each}, not {parts}")
        for group in groups[:parts]:
            description = _checked(driver.cuDevResourceGenerateDesc([group], 1))
            flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
            context = _checked(driver.cuGreenCtxCreate(description, number, flags))
            self._contexts.append(context)
            stream = _checked(driver.cuGreenCtxStreamCreate(context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0))
            self.streams.append(torch.cuda.ExternalStream(int(stream), device=device))
        sizes = [int(group.sm.smCount) for group in groups[:parts]]
        self.description = {"multiprocessors": total, "parts": parts, "each": sizes, "unused": total - sum(sizes)}

    def close(self) -> None:
        """Destroy the contexts; their streams must have nothing to do."""
        if self._contexts:
            from cuda.bindings import driver

            for context in self._contexts:
                driver.cuGreenCtxDestroy(context)
        self._contexts.clear()
        self.streams.clear()


def _checked(result: tuple[Any, ...]) -> Any:
    """What a driver call gives, without its error code. Raises RuntimeError for one."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"the CUDA driver answered {error.name}")
    return values[0] if len(values) == 1 else values
