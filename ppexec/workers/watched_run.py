"""WatchedRun: what is known of a run from outside, and the error that says which rank ended it, where and why."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ppexec.config.config import RunConfig
from ppexec.workers.failure import Failure
from ppexec.workers.progress import Board, PartialTrace
from ppexec.workers.watch import Watch
from ppsim.errors import RunError


class WorkerError(RunError):
    """A worker died, failed or did not go on. The message names the rank, its action, and the cause.

    Attributes
    ----------
    details : str
        Where the other ranks stood, and the frames of the user's own code if that raised.
    partial_trace : PartialTrace or None
        What all ranks had done of the step; None if it was not in a timed step.
    """

    def __init__(self, message: str, details: str = "", partial_trace: PartialTrace | None = None) -> None:
        super().__init__(message, details)
        self.partial_trace = partial_trace


@dataclass(frozen=True)
class Death:
    """A worker is gone."""


class WatchedRun:
    """The run that was set up last: what is known of its ranks from outside."""

    def __init__(self, config: RunConfig | None = None) -> None:
        self._config = config
        programs = [] if config is None else [pipeline.program for pipeline in config.pipelines]
        self._board = Board.create(programs, self._ranks) if programs else None

    @property
    def _ranks(self) -> int:
        """Ranks over all replicas and ranks of tp."""
        config = self._config
        return 0 if config is None else config.dp * config.ranks * config.tp

    @property
    def board_address(self) -> str | None:
        """Where the workers find the board."""
        return None if self._board is None else self._board.address

    def close(self) -> None:
        """Release the board."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def watch(self, processes: Sequence[int]) -> Watch:
        """A watch over the workers."""
        timeout_s = math.inf if self._config is None else self._config.timeout_s
        return Watch(processes, self._board, [self._blocks(worker) for worker in range(len(processes))], timeout_s)

    def _blocks(self, worker: int) -> Sequence[int]:
        """The board's blocks of a worker: with backend "local" one worker has all ranks."""
        return range(self._ranks) if self._config is not None and self._config.is_local else [worker]

    def _name(self, block: int) -> str:
        """A rank's name: "rank 2", or with replicas or tp "rank 2 of replica 1, tp 0"."""
        config = self._config
        if config is None:
            return f"worker {block}"
        rest, tp_rank = divmod(block, config.tp)
        replica, rank = divmod(rest, config.ranks)
        of_replica = f" of replica {replica}" if config.dp > 1 else ""
        return f"rank {rank}{of_replica}" + (f", tp {tp_rank}" if config.tp > 1 else "")

    def _named(self, worker: int, process: Any) -> str:
        """A worker's rank and process: "rank 1 (process 4711)"."""
        names = [self._name(block) for block in self._blocks(worker)]
        return f"{names[0] if len(names) == 1 else f'the process of {len(names)} ranks'} (process {process.pid})"

    def _standing(self, worker: int, what: str) -> str:
        """Where a worker's rank stands in its program, or what it was asked for outside a step."""
        found = [] if self._board is None else [self._board.standing(block) for block in self._blocks(worker)]
        doing = f"during {what!r}"
        return f"{found[0]}, {doing}" if len(found) == 1 and found[0] else doing

    def _all_stand(self) -> str:
        """Where every rank stands, a line each; empty outside a step."""
        board = self._board
        if board is None:
            return ""
        found = {self._name(block): board.standing(block) for block in range(self._ranks)}
        lines = [f"  {name}: {standing or 'no step has begun'}" for name, standing in found.items()]
        return "\n".join(["where each rank stands:", *lines]) if any(found.values()) else ""

    def _partial_trace(self, worker: int) -> PartialTrace | None:
        """What the ranks of the worker's pipeline did of their steps."""
        config = self._config
        if self._board is None or config is None:
            return None
        block = self._blocks(worker)[0]
        first = block - block % (config.ranks * config.tp) + block % config.tp
        return self._board.partial_trace(first, config.tp)

    def failed(self, worker: int, process: Any, answer: Failure | Death, what: str) -> WorkerError:
        """The error for a worker that died or failed."""
        name, standing = self._named(worker, process), self._standing(worker, what)
        if isinstance(answer, Death):
            message, frames = f"{name} {_cause_of_death(process)} {standing}", ""
        elif answer.where:
            message, frames = f"process {process.pid} failed {answer.where}: {answer.message}", answer.details
        else:
            message, frames = f"{name} failed {standing}: {answer.message}", answer.details
        details = "\n".join(filter(None, [frames, self._all_stand()]))
        return WorkerError(message, details, self._partial_trace(worker))

    def stalled(self, processes: Sequence[Any], pending: Sequence[int], watch: Watch, what: str) -> WorkerError:
        """The error for a run in which nothing moves: it names the workers that wait for no other."""
        if self._config is None:
            raise RuntimeError("a run stalled before it was configured")
        stopped = [worker for worker in pending if watch.is_stopped(worker)]
        shown = stopped or [worker for worker in pending if not watch.waits(worker)] or pending
        who = "; ".join(
            f"{self._named(worker, processes[worker])} {'is stopped ' if worker in stopped else 'stands '}"
            f"{self._standing(worker, what)}"
            for worker in shown
        )
        remedy = "let it go on (SIGCONT)" if stopped else "if that can take so long, give a larger timeout_s"
        message = f"no rank has made progress for {self._config.timeout_s:g} s: {who}; {remedy}"
        return WorkerError(message, self._all_stand(), self._partial_trace(shown[0]))


def _cause_of_death(process: Any) -> str:
    """How a process ended."""
    process.join(timeout=5)
    code = process.exitcode
    if code is None or code >= 0:
        return f"left early (exit code {code})"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (by the system, if memory ran out)" if name == "SIGKILL" else "")
