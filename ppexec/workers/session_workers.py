"""The workers of a session: those of a pool, or the processes that torchrun has started."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from ppexec.config.config import RunConfig
from ppexec.machine.mesh import WORLD_BACKENDS
from ppexec.machine.nccl import prepare_process
from ppexec.workers.failure import Cause, Failure
from ppexec.workers.pool import WorkerPool
from ppexec.workers.watched_run import WorkerError
from ppexec.workers.worker import Worker
from ppsim import StageCost

_Answer = TypeVar("_Answer")


def under_torchrun() -> bool:
    """Whether this process was started by torchrun as one of a group."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


class Workers(Protocol):
    """The processes of a run."""

    def call(self, task: Callable[..., _Answer], **arguments: Any) -> list[_Answer]:
        """Call `task(worker, **arguments)` in every process at once, and give the answer of each."""


class PoolWorkers:
    """The first processes of a pool."""

    def __init__(self, pool: WorkerPool, world_size: int) -> None:
        self._pool, self._world_size = pool, world_size

    def call(self, task: Callable[..., _Answer], **arguments: Any) -> list[_Answer]:
        """Call a task in each; see `WorkerPool.call`."""
        return self._pool.call(self._world_size, task, **arguments)


def _leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class TorchrunWorkers:
    """The worker in this process; every process gathers all results."""

    def __init__(self, config: RunConfig, costs: Sequence[StageCost] | None) -> None:
        if not dist.is_initialized():
            if config.device == "cuda":
                prepare_process(int(os.environ["RANK"]), shares_gpu=config.devices == "shared")
            dist.init_process_group(WORLD_BACKENDS[config.backend])
            atexit.register(_leave_world)  # a process that ends with its groups' threads running may abort
        self._worker = Worker(config, costs)

    def call(self, task: Callable[..., _Answer], **arguments: Any) -> list[_Answer]:
        """Call a task here, as every process does, and gather their answers. Raises as `WorkerPool.call`."""
        results: list[Any] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(results, task(self._worker, **arguments))
        except Exception as error:
            failure = Failure.of(error)
            if failure.cause == Cause.INPUT:
                raise
            message = f"process {dist.get_rank()} failed during {task.__name__!r}: {failure.message}"
            raise WorkerError(message, failure.details) from error
        return results
