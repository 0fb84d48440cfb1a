"""Watch: how much of this machine others use while something is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_LEAST_S = 0.03  # the kernel counts in hundredths of a second, and not all at one time
_SHARE = 0.05  # of the window; of one core


@dataclass(frozen=True, kw_only=True)
class CpuTimes:
    """CPU seconds so far: of all cores of the machine, idle ones aside, and of the processes that measure."""

    busy_s: float
    own_s: float
    now_s: float


@dataclass(kw_only=True)
class Window:
    """What happened while it was open: its length, and the CPU seconds that others used in it."""

    length_s: float = 0.0
    outside_s: float = 0.0

    @property
    def is_disturbed(self) -> bool:
        """Whether others used more than a twentieth of a core, and more than the kernel's counting is off by."""
        return self.outside_s > max(_LEAST_S, _SHARE * self.length_s)


@dataclass(frozen=True, kw_only=True)
class OutsideLoad:
    """Tells which measurements were disturbed from outside this run.

    read: takes the ids of this run's worker processes; other reads than those of /proc are for tests.
    """

    read: Callable[[Sequence[int]], CpuTimes] = field(default_factory=lambda: read_proc)

    @contextmanager
    def window(self, process_ids: Sequence[int]) -> Iterator[Window]:
        """Watch while the body runs; the window is complete when it has."""
        window, before = Window(), self.read(process_ids)
        yield window
        after = self.read(process_ids)
        window.length_s = after.now_s - before.now_s
        window.outside_s = max((after.busy_s - before.busy_s) - (after.own_s - before.own_s), 0.0)


def read_proc(process_ids: Sequence[int], root: Path = Path("/proc")) -> CpuTimes:
    """From /proc: busy is user, nice, system, irq, softirq and steal; own is this process's and the given ones'."""
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    own = 0
    for process in (os.getpid(), *process_ids):
        fields = (root / str(process) / "stat").read_text().rpartition(")")[2].split()
        own += int(fields[11]) + int(fields[12])
    user, nice, system, _idle, _wait, irq, softirq, steal = map(
        int, (root / "stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    busy = user + nice + system + irq + softirq + steal
    return CpuTimes(busy_s=busy * tick_s, own_s=own * tick_s, now_s=time.monotonic())
