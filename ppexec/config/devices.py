"""Devices: where the ranks of a run compute, and how many processes a machine can have for them."""

from __future__ import annotations

import os

import torch

from ppsim.errors import InputError
from ppsim.schedule.streams import Streams

_MOST_PROCESSES = 1024  # that one machine starts


def choose_device(device: str, *, backend: str, streams: Streams) -> str:
    """Choose the device if it is "auto", and refuse one that does not fit the backend.

    Returns
    -------
    str
        "cuda", "cpu", or "threads": the CPU with a thread for each stream, asynchronous as a GPU.

    Raises
    ------
    InputError
        If the device does not fit. The message names the devices that do.
    """
    if device == "auto":
        # With communicators of a pair or a rank, and with backend local, messages run one after another on streams
        # beside the computations.
        needs_streams = backend == "local" or streams != "link"
        on_gpu = backend == "nccl" or (backend == "local" and torch.cuda.is_available())
        device = "cuda" if on_gpu else "threads" if needs_streams else "cpu"
    able = {"gloo": ("cpu", "threads"), "nccl": ("cuda",), "local": ("cuda", "threads")}[backend]
    if device not in able:
        raise InputError(f"backend {backend!r} works with device {' or '.join(able)}, not {device!r}")
    if streams != "link" and (backend, device) != ("gloo", "threads"):
        raise InputError(
            f"streams {streams!r} run over gloo on device 'threads', got backend {backend!r} and device {device!r}: "
            "take these, or streams 'link'"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"backend {backend!r} on device 'cuda' needs an NVIDIA GPU and a PyTorch built for CUDA, and PyTorch "
            f"{torch.__version__} sees none: take --backend gloo, or --backend local --device threads"
        )
    return device


def check_backend_limits(devices: str, *, backend: str, dp: int, tp: int) -> None:
    """Refuse shared GPUs without nccl, and dp or tp above 1 with local."""
    if devices == "shared" and backend != "nccl":
        raise InputError(
            f"devices='shared' needs backend 'nccl', got {backend!r}: leave it out (with local, ranks always share one "
            "device)"
        )
    if backend == "local" and (dp > 1 or tp > 1):
        raise InputError(
            f"backend 'local' has one process, so dp and tp must be 1, got dp={dp} and tp={tp}: take gloo or nccl"
        )


def check_processes(*, dp: int, ranks: int, tp: int) -> None:
    """Refuse more processes than one machine starts. Those of torchrun run already and are not counted."""
    count = dp * ranks * tp
    if count > _MOST_PROCESSES and "LOCAL_WORLD_SIZE" not in os.environ:
        raise InputError(
            f"dp {dp} x ranks {ranks} x tp {tp} are {count} processes, and one machine starts at most "
            f"{_MOST_PROCESSES}: take fewer, or more machines with torchrun"
        )


def check_gpus(processes: int) -> None:
    """Refuse more processes on this machine than it has GPUs. Without torchrun all of them are on this machine."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", processes)), torch.cuda.device_count()
    if here > gpus:
        raise InputError(
            f"{here} processes on this machine need a GPU each, and there are {gpus}: take --devices shared (to verify "
            "and to count memory), --backend local (all ranks on one GPU), or more machines with torchrun"
        )
