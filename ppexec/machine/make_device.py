"""Make device: this process's device, as the configuration says."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch.distributed as dist

from ppexec.machine.device import Device, HostDevice

if TYPE_CHECKING:
    from ppexec.config.config import RunConfig


def make_device(config: RunConfig) -> Device:
    """The CPU, the asynchronous device made of threads, or this process's GPU (which others may share)."""
    if config.device == "threads":
        from ppexec.machine.threaded import ThreadedDevice

        return ThreadedDevice(threads=config.threads)
    if config.device == "cuda":
        from ppexec.machine.cuda import CudaDevice

        # Only of ranks that wait for other processes: kernels alone may take their time.
        return CudaDevice(_gpu_of_this_process(), timeout_s=None if config.is_local else config.timeout_s)
    return HostDevice()


def _gpu_of_this_process() -> int:
    """The GPU with the process's number on its machine, counted round where there are more processes than GPUs."""
    import torch

    rank = dist.get_rank() if dist.is_initialized() else 0
    return int(os.environ.get("LOCAL_RANK", rank)) % max(torch.cuda.device_count(), 1)
