"""Environment: the machine and software on which something was measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ppexec.config.config import RunConfig

ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",
}
"""Environment variables for workers. They keep freed memory in the process, which saves page faults: about a tenth of a
step. All threads share it: each run has new threads, and with memory of their own (glibc has up to 8 parts for each
core) a worker would grow for hundreds of runs, until every part has once served the largest."""


def describe_environment(**more: Any) -> dict[str, Any]:
    """Machine, versions and settings as JSON values, with the entries of `more` added."""
    import ppsim

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ppsim": ppsim.__version__,
        "load_average": round(os.getloadavg()[0], 2),
        "allocator": {name: os.environ.get(name) for name in ALLOCATOR},
        **more,
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def is_crowded(config: RunConfig) -> bool:
    """Whether the processes of a run on this machine have more threads than there are cores."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", config.world_size))
    return here * config.threads > usable_cores()


def memory_bytes() -> int:
    """Size of this machine's main memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
