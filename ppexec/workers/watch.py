"""Watch: notices when no worker of a run makes progress any more."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from ppexec.workers.progress import Board

_BUSY = 0.05  # share of a core, from which a process counts as working
_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Watch:
    """Looks at processes now and then, from outside.

    A process makes progress while its block of the board changes, while it uses a core, or while it waits for a disk. A
    rank that waits for a message may use a core for that; it makes no progress.

    Parameters
    ----------
    processes : sequence of int, shape (workers,)
        The process id of each worker.
    board : Board or None
        Where the ranks write what they do.
    blocks : sequence of sequence of int, shape (workers,)
        Blocks of the ranks of each worker.
    timeout_s : float
        Seconds without progress of any, after which the run has stalled.
    """

    def __init__(
        self, processes: Sequence[int], board: Board | None, blocks: Sequence[Sequence[int]], timeout_s: float
    ) -> None:
        self._processes, self._board, self._blocks, self._timeout_s = processes, board, blocks, timeout_s
        self._looked_s = self._moved_s = time.monotonic()
        self._before = [self._signs(worker) for worker in range(len(processes))]

    @property
    def interval_s(self) -> float:
        """How long to wait between two looks."""
        return min(1.0, self._timeout_s / 4)

    def moved(self) -> None:
        """Something else shows progress, such as an answer."""
        self._moved_s = time.monotonic()

    def has_stalled(self) -> bool:
        """Look, and say whether nothing has moved for as long as the time-out. Never true without /proc."""
        now_s = time.monotonic()
        elapsed_s = max(now_s - self._looked_s, 1e-3)
        for worker, (signs_before, used_before_s) in enumerate(self._before):
            signs, used_s = self._before[worker] = self._signs(worker)
            works = used_s - used_before_s >= _BUSY * elapsed_s and not self.waits(worker)
            if signs != signs_before or works or self._state(worker) in ("D", ""):
                self._moved_s = now_s
        self._looked_s = now_s
        return now_s - self._moved_s >= self._timeout_s

    def waits(self, worker: int) -> bool:
        """Whether all ranks of a worker wait for messages."""
        board = self._board
        return board is not None and all(board.waits(block) for block in self._blocks[worker])

    def _signs(self, worker: int) -> tuple[list[bytes], float]:
        """What changes as a worker goes on, and the CPU time it has used in seconds."""
        board = self._board
        signs = [] if board is None else [board.signs(block) for block in self._blocks[worker]]
        fields = _stat(self._processes[worker])
        return signs, (int(fields[11]) + int(fields[12])) / _TICKS_PER_S if fields else 0.0

    def is_stopped(self, worker: int) -> bool:
        """Whether a signal has stopped a process."""
        return self._state(worker) in ("T", "t")

    def _state(self, worker: int) -> str:
        """Linux's letter for a process's state; empty if it is not known."""
        fields = _stat(self._processes[worker])
        return fields[0] if fields else ""


def _stat(process: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty if there are none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
