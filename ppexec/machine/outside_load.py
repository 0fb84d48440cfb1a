"""Outside load: how much of this machine other programs use while something is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_LEAST_S = 0.03  # the kernel counts in hundredths of a second and does not update all counts at once
_SHARE = 0.05  # of one core


@dataclass(frozen=True, kw_only=True)
class CpuTimes:
    """CPU seconds so far, `busy_s` of all cores and `own_s` of the processes that measure, at the time `now_s`."""

    busy_s: float
    own_s: float
    now_s: float


@dataclass(kw_only=True)
class Window:
    """A stretch of time, and the CPU seconds that other programs used in it."""

    length_s: float = 0.0
    outside_s: float = 0.0

    @property
    def is_disturbed(self) -> bool:
        """Whether others used more than a twentieth of a core, and more than the error of the kernel's counts."""
        return self.outside_s > max(_LEAST_S, _SHARE * self.length_s)


@dataclass(frozen=True, kw_only=True)
class OutsideLoad:
    """Tells which measurements were disturbed by other programs.

    Parameters
    ----------
    read : callable
        Reads the CPU times, given the ids of this run's worker processes. Tests give another than `read_proc`.
    """

    read: Callable[[Sequence[int]], CpuTimes] = field(default_factory=lambda: read_proc)

    @contextmanager
    def window(self, process_ids: Sequence[int]) -> Iterator[Window]:
        """Watch while the body runs. The window is filled in when the body ends."""
        window, before = Window(), self.read(process_ids)
        yield window
        after = self.read(process_ids)
        window.length_s = after.now_s - before.now_s
        window.outside_s = max((after.busy_s - before.busy_s) - (after.own_s - before.own_s), 0.0)


def read_proc(process_ids: Sequence[int], root: Path = Path("/proc")) -> CpuTimes:
    """Read /proc: busy is user, nice, system, irq, softirq and steal; own counts this process and the given ones."""
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
