"""Progress: where each rank of a run stands, in memory that others can read even if the rank is dead or stopped."""

from __future__ import annotations

import json
import mmap
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ppexec.transport.waits import waits_for
from ppsim import Program

_STEPS, _ROW, _MESSAGE = range(3)
_HEAD = 8  # words before the times of rows
_WORD_BYTES = 8


class RankProgress:
    """What one rank writes while it runs.

    Parameters
    ----------
    words : memoryview
        Its block of the board, zeros at first: how many steps have begun, the row under way (its number + 1; negative
        when it has ended), the message waited for (its number + 1), then the start and the end of every row of the
        program in nanoseconds, 0 where it has none yet.
    rows : int
        Rows of the program.
    """

    def __init__(self, words: memoryview, rows: int) -> None:
        self._head = words[:_HEAD]
        self._start, self._end = words[_HEAD : _HEAD + rows], words[_HEAD + rows : _HEAD + 2 * rows]

    def begin_step(self, rows: range) -> None:
        """A step begins, in which the rank runs these rows."""
        zeros = memoryview(array("q", bytes(_WORD_BYTES * len(rows))))
        self._start[rows.start : rows.stop] = zeros
        self._end[rows.start : rows.stop] = zeros
        self._head[_ROW] = self._head[_MESSAGE] = 0
        self._head[_STEPS] += 1

    def begin_row(self, row: int, now: object) -> None:
        """A row begins. `now` is in nanoseconds; anything else is the mark of a device and is not written down."""
        self._head[_ROW] = row + 1
        if type(now) is int:
            self._start[row] = now

    def end_row(self, row: int, now: object) -> None:
        """A row has ended."""
        self._head[_ROW] = -row - 1
        if type(now) is int:
            self._end[row] = now

    def wait(self, message: int) -> None:
        """The rank begins to wait for a message."""
        self._head[_MESSAGE] = message + 1

    def go_on(self) -> None:
        """The message is there."""
        self._head[_MESSAGE] = 0


class Board:
    """A block of memory for each rank of a run.

    The memory has no name in the file system, so that nothing is left of it. It exists on Linux only.

    Parameters
    ----------
    programs : sequence of Program
        What the ranks of each replica run.
    blocks : int
        Number of ranks, over all replicas and ranks of tp; those of a replica stand together.
    """

    def __init__(self, programs: Sequence[Program], blocks: int, descriptor: int) -> None:
        self._programs, self._blocks_of_replica = programs, blocks // len(programs)
        self._block = _words_of_block(programs)
        self._blocks = blocks
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _WORD_BYTES * self._block * blocks)
        self._words = memoryview(self._memory).cast("q")

    @classmethod
    def create(cls, programs: Sequence[Program], blocks: int) -> Board | None:
        """A new board; None where the system has no such memory."""
        if not hasattr(os, "memfd_create"):
            return None
        try:
            descriptor = os.memfd_create("progress")
        except OSError:
            return None
        os.ftruncate(descriptor, _WORD_BYTES * _words_of_block(programs) * blocks)
        return cls(programs, blocks, descriptor)

    @property
    def address(self) -> str:
        """What another process of this machine opens it by, as long as this process keeps it open."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @classmethod
    def open(cls, programs: Sequence[Program], blocks: int, address: str) -> Board:
        """The board of another process."""
        descriptor = os.open(address, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(programs, blocks, descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Release what `create` made."""
        self._words.release()
        self._memory.close()
        os.close(self._descriptor)

    def of_rank(self, block: int) -> RankProgress:
        """The writing end of a block."""
        return RankProgress(self._of(block), len(self._program_of(block).stage))

    def _program_of(self, block: int) -> Program:
        return self._programs[block // self._blocks_of_replica]

    def _of(self, block: int) -> memoryview:
        return self._words[block * self._block : (block + 1) * self._block]

    def signs(self, block: int) -> bytes:
        """Changes whenever the rank has begun or ended anything."""
        return bytes(self._of(block)[:_HEAD])

    def waits(self, block: int) -> bool:
        """Whether the rank waits for a message."""
        return self._of(block)[_MESSAGE] > 0

    def standing(self, block: int) -> str:
        """Where the rank stands, such as "in action 1F0 of step 3"; empty before its first step. Steps count from 1."""
        steps, row, message = self._of(block)[:3]
        program = self._program_of(block)
        if not steps:
            return ""
        if message > 0:
            _, _, waiting = waits_for(program, message - 1).partition(", ")
            return f"{waiting}, in step {steps}"
        if row > 0:
            return f"in action {program.action_of(row - 1)} of step {steps}"
        if row < 0:
            return f"after action {program.action_of(-row - 1)} of step {steps}"
        return f"at the start of step {steps}"

    def partial_trace(self, first: int, stride: int) -> PartialTrace | None:
        """What the ranks of one pipeline have done of their steps; None if nothing has been timed.

        Parameters
        ----------
        first, stride : int
            The block of the pipeline's first rank, and the distance to the next rank's.
        """
        program = self._program_of(first)
        start, end = np.zeros((2, len(program.stage)), np.int64)
        for rank in range(program.ranks):
            rows = slice(program.rows_of(rank).start, program.rows_of(rank).stop)
            words = np.array(self._of(first + rank * stride), np.int64)[_HEAD:]
            start[rows] = words[rows]
            end[rows] = words[len(start) :][rows]
        return PartialTrace(program=program, start_ns=start, end_ns=end) if start.any() else None


def _words_of_block(programs: Sequence[Program]) -> int:
    return _HEAD + 2 * max(len(program.stage) for program in programs)


@dataclass(frozen=True, kw_only=True)
class PartialTrace:
    """The rows of a step that did not end.

    Parameters
    ----------
    program : Program
        What ran.
    start_ns, end_ns : array of int, shape (rows,)
        When each row began and ended, in nanoseconds; 0 where it did not.
    """

    program: Program
    start_ns: npt.NDArray[np.int64]
    end_ns: npt.NDArray[np.int64]

    def to_json(self) -> str:
        """The trace in Chrome's format, for ui.perfetto.dev. Rows that did not end reach to the last time known."""
        begun = np.flatnonzero(self.start_ns)
        zero, last = int(self.start_ns[begun].min()), int(max(self.start_ns.max(), self.end_ns.max()))
        events: list[dict[str, object]] = [
            {"ph": "M", "name": "process_name", "pid": rank + 1, "tid": 0, "args": {"name": f"rank {rank}"}}
            for rank in range(self.program.ranks)
        ]
        for row in begun.tolist():
            ended = bool(self.end_ns[row])
            end = int(self.end_ns[row]) if ended else last
            events.append(
                {
                    "ph": "X",
                    "name": str(self.program.action_of(row)) + ("" if ended else " (did not end)"),
                    "pid": int(self.program.rank[row]) + 1,
                    "tid": int(self.program.rank[row]) + 1,
                    "ts": (int(self.start_ns[row]) - zero) / 1000,
                    "dur": (end - int(self.start_ns[row])) / 1000,
                    "args": {"ended": ended},
                }
            )
        return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}) + "\n"

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")
