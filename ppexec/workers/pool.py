"""Pool: worker processes on this machine that are started once and serve many runs."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar, cast

import torch.distributed as dist

from ppexec.config.config import RunConfig
from ppexec.workers.failure import Cause, Failure
from ppexec.workers.process import no_main_module, serve, set_up, start, start_server, worker_environment
from ppexec.workers.watched_run import Death, WatchedRun
from ppsim import StageCost
from ppsim.errors import InputError, RunError

_Answer = TypeVar("_Answer")
_SET_UP = "set_up"
_BLAME_S = 2.0  # how long to wait for the worker to blame, once another has lost its connection
_Request = tuple[Callable[..., Any], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Process:
    """A worker process. `lifeline` is a pipe that closes when the pool's process ends."""

    process: Any
    connection: Connection
    lifeline: Connection


class WorkerPool:
    """Worker processes, one for each rank of a run. More are started when a run needs more.

    Use it as a context manager, or call `close`. The first start takes seconds, since the server that workers are
    forked from imports torch. Every further run starts in a tenth of a second. If a worker dies or fails, the call
    raises, and all workers are ended. The next run starts new ones.
    """

    def __init__(self) -> None:
        self._workers: list[_Process] = []
        self._store: dist.TCPStore | None = None
        self._worlds = 0
        self._devices: str | None = None  # `RunConfig.devices` of the workers' runs on GPUs, once there was one
        self._run = WatchedRun()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.connection.send(None)
        for worker in self._workers:
            worker.process.join(timeout=2)
        self._kill()

    def _kill(self) -> None:
        for worker in self._workers:
            if worker.process.is_alive():
                worker.process.kill()
            worker.process.join()
            worker.process.close()
            worker.connection.close()
            worker.lifeline.close()
        self._workers.clear()
        self._run.close()
        self._run = WatchedRun()

    @property
    def process_ids(self) -> list[int]:
        """The process id of every worker, by rank."""
        return [worker.process.pid for worker in self._workers]

    def set_up(self, config: RunConfig, costs: Sequence[StageCost] | None = None) -> None:
        """Give the ranks of a run to the first `config.world_size` workers.

        Parameters
        ----------
        config : RunConfig
            The run.
        costs : sequence of StageCost, optional
            If given, stages do not compute but wait for as long as these costs say.

        Raises
        ------
        InputError
            If a worker finds that the configuration cannot be run.
        WorkerError
            If a worker dies or fails.
        """
        if config.device == "cuda":
            # NCCL reads its settings once in a process, and those of shared GPUs are others.
            if self._devices not in (None, config.devices):
                self._kill()
            self._devices = config.devices
        self._grow(config.world_size)
        if self._store is None:
            self._store = _store_on_loopback()
        self._worlds += 1
        self._run.close()
        self._run = WatchedRun(config)
        common = {
            "port": self._store.port,
            "prefix": f"world{self._worlds}",
            "world_size": config.world_size,
            "config": config,
            "costs": costs,
            "board": self._run.board_address,
            "path": list(sys.path),
            "directory": os.getcwd(),
        }
        requests: list[_Request] = [(set_up, {**common, "rank": rank}) for rank in range(config.world_size)]
        self._call(config.world_size, _SET_UP, requests)
        self._forget_worlds()

    def _forget_worlds(self) -> None:
        """Delete what processes wrote to the store to find each other in earlier worlds."""
        if self._store is None:
            raise RuntimeError("worlds are forgotten before the store is open")
        for key in self._store.list_keys():
            if not key.startswith(f"world{self._worlds}/"):
                self._store.delete_key(key)

    def call(self, world_size: int, task: Callable[..., _Answer], **arguments: Any) -> list[_Answer]:
        """Call `task(worker, **arguments)` in the first `world_size` processes at once.

        Parameters
        ----------
        world_size : int
            Number of processes of the run that was set up.
        task : callable
            A function of a module. It is sent by name, so it cannot be a lambda or a nested function.
        **arguments
            Further arguments, which must be picklable.

        Returns
        -------
        list
            The answer of each process.

        Raises
        ------
        InputError
            If the task raises one.
        RunError
            If the workers of the run have ended, because an earlier call failed.
        WorkerError
            If a worker dies, if the task raises anything else, or if no worker makes progress for as long as the run's
            time-out.
        """
        if len(self._workers) < world_size:
            raise RunError(
                f"{task.__name__} needs {world_size} workers, and {len(self._workers)} are left: an earlier call "
                "failed and ended the others; set up the run anew, with a new Session"
            )
        return self._call(world_size, task.__name__, [(task, arguments)] * world_size)

    def _call(self, world_size: int, what: str, requests: list[_Request]) -> list[Any]:
        workers = self._workers[:world_size]
        try:
            for worker, request in zip(workers, requests, strict=True):
                with contextlib.suppress(BrokenPipeError):  # `_gather` finds and names a dead worker
                    worker.connection.send(request)
            return self._gather(workers, what)
        except BaseException:
            self._kill()
            raise

    def _gather(self, workers: list[_Process], what: str) -> list[Any]:
        """The answer of each worker; raises if one failed or died, or if none makes progress any more."""
        answers: dict[int, Any] = {}
        watch = self._run.watch([worker.process.pid for worker in workers])
        while len(answers) < len(workers):
            came = _receive(workers, answers, timeout_s=watch.interval_s)
            if any(isinstance(answer, Failure | Death) for answer in came.values()):
                self._raise(workers, {**answers, **came}, what)
            answers.update(came)
            if came:
                watch.moved()
            elif watch.has_stalled():
                pending = [worker for worker in range(len(workers)) if worker not in answers]
                raise self._run.stalled([worker.process for worker in workers], pending, watch, what)
        return [answers[rank] for rank in range(len(workers))]

    def _raise(self, workers: list[_Process], answers: dict[int, Any], what: str) -> NoReturn:
        """Raise for the worker that is to blame; those that only lost their connection to it are not."""

        def blamed() -> list[tuple[int, int]]:
            """By blame: workers that died, then those that failed by the kind of failure."""
            return sorted(
                (-1 if isinstance(answer, Death) else answer.cause, worker)
                for worker, answer in answers.items()
                if isinstance(answer, Failure | Death)
            )

        until_s = time.monotonic() + _BLAME_S
        while (
            blamed()[0][0] >= Cause.TIMED_OUT
            and (left_s := until_s - time.monotonic()) > 0
            and len(answers) < len(workers)
        ):
            answers.update(_receive(workers, answers, timeout_s=left_s))
        worker = blamed()[0][1]
        answer = answers[worker]
        # What is too large from the start is too large a configuration.
        refused = (Cause.INPUT, Cause.MEMORY) if what == _SET_UP else (Cause.INPUT,)
        if isinstance(answer, Failure) and answer.cause in refused:
            raise InputError(answer.message, answer.details)
        raise self._run.failed(worker, workers[worker].process, answer, what)

    def _grow(self, count: int) -> None:
        if len(self._workers) >= count:
            return
        context = multiprocessing.get_context("forkserver")
        # torch imports torch._dynamo when a layer first runs on the meta device, which takes seconds.
        context.set_forkserver_preload(["ppexec.workers.worker", "torch._dynamo", "torch.distributed.tensor.parallel"])
        with worker_environment(), no_main_module():
            start_server()
            while len(self._workers) < count:
                connection, theirs = context.Pipe()
                lifeline, watched = context.Pipe()
                process = context.Process(
                    target=serve, args=(theirs, watched), daemon=True, name=f"ppexec worker {len(self._workers)}"
                )
                start(process)
                theirs.close()
                watched.close()
                self._workers.append(_Process(process=process, connection=connection, lifeline=lifeline))


def _receive(workers: Sequence[_Process], answers: Mapping[int, Any], *, timeout_s: float) -> dict[int, Any]:
    """What the workers that have not answered yet answer within this time."""
    pending = {worker.connection: rank for rank, worker in enumerate(workers) if rank not in answers}
    came: dict[int, Any] = {}
    for ready in cast(list[Connection], wait(list(pending), timeout=timeout_s)):
        try:
            came[pending[ready]] = ready.recv()
        except (EOFError, ConnectionError):
            came[pending[ready]] = Death()
    return came


def _store_on_loopback() -> dist.TCPStore:
    """Where workers find each other. Given a port alone, PyTorch would listen to the whole network."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        return dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
