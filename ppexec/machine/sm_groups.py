"""SM groups: a GPU's multiprocessors shared out, so that each rank of one process has its own (CUDA green contexts).

The multiprocessors are split once, into disjoint groups; memory bandwidth, L2 cache and power stay shared. What is left
over, such as 4 of 132 beside four groups of 32, copies messages. Source: CUDA driver API, "Green Contexts"
(cuDevSmResourceSplitByCount).
"""

from __future__ import annotations

from typing import Any

import torch

_FAILURES = (ImportError, AttributeError, RuntimeError, TypeError, ValueError)
"""What an absent or an older driver or binding answers with. Plain streams do then, so no run fails for it."""


class SMGroups:
    """`parts` streams to compute on, each with its own group of multiprocessors, and a group of its own for copies.

    Parameters
    ----------
    device : torch.device
        The GPU.
    parts : int
        How many groups to compute with.

    Attributes
    ----------
    streams : list of torch.cuda.Stream
        One for each part; plain streams where the driver has no groups.
    description : dict
        "multiprocessors", "parts", "each" (the size of each group, or None without groups), "copies" (how many
        multiprocessors copies have to themselves, or None) and, where something fell back to plain streams, "why_not".
    """

    def __init__(self, device: torch.device, parts: int) -> None:
        self._device = device
        self._contexts: list[Any] = []
        self._copying: Any = None
        self.streams: list[torch.cuda.Stream] = []
        total = torch.cuda.get_device_properties(device).multi_processor_count
        self.description: dict[str, Any] = {"multiprocessors": total, "parts": parts, "each": None, "copies": None}
        try:
            rest, number = self._split(parts, total)
        except _FAILURES as error:
            self.close()
            self.streams = [torch.cuda.Stream(device) for _ in range(parts)]
            self.description["why_not"] = _reason(error)
            return
        try:
            self._copying = self._context_of(rest, number)
            self.description["copies"] = int(rest.sm.smCount)
        except _FAILURES as error:
            self.description["why_not"] = f"copies have plain streams: {_reason(error)}"

    def copy_stream(self) -> torch.cuda.Stream:
        """A new stream with the multiprocessors that are in no part; a plain one if there are none.

        A copy within one GPU is a kernel too: `cudaMemcpyAsync` from device to device runs on multiprocessors and not
        on a copy engine. On a plain stream it queues behind the computations of all parts.
        """
        if self._copying is not None:
            try:
                return self._stream_of(self._copying)
            except _FAILURES as error:
                self.description["why_not"] = f"a copy has a plain stream: {_reason(error)}"
        return torch.cuda.Stream(self._device)

    def _split(self, parts: int, total: int) -> tuple[Any, Any]:
        """Make the parts' streams. What is left of the multiprocessors, and the device's number for the driver."""
        from cuda.bindings import driver

        torch.zeros(1, device=self._device)  # the primary context must be there
        kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        number = _checked(driver.cuDeviceGet(self._device.index or 0))
        every = _checked(driver.cuDeviceGetDevResource(number, kind))
        each = max(total // parts // 8 * 8, 8)  # Hopper hands out multiples of 8
        groups, found, rest = _checked(driver.cuDevSmResourceSplitByCount(parts, every, 0, each))
        if int(found) < parts:
            raise RuntimeError(f"{total} multiprocessors give {int(found)} groups of {each}, not {parts}")
        for group in groups[:parts]:
            self.streams.append(self._stream_of(self._context_of(group, number)))
        self.description["each"] = [int(group.sm.smCount) for group in groups[:parts]]
        return rest, number

    def _context_of(self, group: Any, number: Any) -> Any:
        """A green context with a group of multiprocessors. Raises RuntimeError for an empty group."""
        from cuda.bindings import driver

        if group.type != driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM or not int(group.sm.smCount):
            raise RuntimeError("no multiprocessors are left over")
        description = _checked(driver.cuDevResourceGenerateDesc([group], 1))
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        context = _checked(driver.cuGreenCtxCreate(description, number, flags))
        self._contexts.append(context)
        return context

    def _stream_of(self, context: Any) -> torch.cuda.Stream:
        from cuda.bindings import driver

        stream = _checked(driver.cuGreenCtxStreamCreate(context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0))
        return torch.cuda.ExternalStream(int(stream), device=self._device)

    def close(self) -> None:
        """Destroy the contexts; their streams must have nothing to do."""
        if self._contexts:
            from cuda.bindings import driver

            for context in self._contexts:
                driver.cuGreenCtxDestroy(context)
        self._contexts.clear()
        self._copying = None
        self.streams.clear()


def _checked(result: tuple[Any, ...]) -> Any:
    """What a driver call gives, without its error code. Raises RuntimeError for an error."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"the CUDA driver answered {error.name}")
    return values[0] if len(values) == 1 else values


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
