"""Pool: worker processes on this machine that are started once and serve many runs."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

import torch.distributed as dist

from ppexec.config.config import RunConfig
from ppexec.machine.environment import ALLOCATOR
from ppsim import StageCost
from ppsim.errors import InputError, RunError

_Answer = TypeVar("_Answer")
_Request = tuple[Callable[..., Any], dict[str, Any]]


class WorkerError(RunError):
    """A worker died or failed. The message names the rank, what it was doing, and the cause."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """An exception in a worker, as sent to the pool."""

    kind: str
    message: str
    is_input: bool
    details: str


@dataclass(frozen=True, kw_only=True)
class _Process:
    """A worker process. `lifeline` is a pipe that closes when the pool's process ends."""

    process: Any
    connection: Connection
    lifeline: Connection


class WorkerPool:
    """Worker processes, one for each rank of a run. More are started when a run needs more.

    Use it as a context manager, or call `close`. The first start takes seconds, since the server that workers are
    forked from imports torch. Every further run starts in milliseconds. If a worker dies or fails, the call raises,
    and all workers are ended. The next run starts new ones.
    """

    def __init__(self) -> None:
        self._workers: list[_Process] = []
        self._store: dist.TCPStore | None = None
        self._worlds = 0

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
            worker.connection.close()
            worker.lifeline.close()
        self._workers.clear()

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
        self._grow(config.world_size)
        if self._store is None:
            self._store = _store_on_loopback()
        self._worlds += 1
        common = {
            "port": self._store.port,
            "prefix": f"world{self._worlds}",
            "world_size": config.world_size,
            "config": config,
            "costs": costs,
            "path": list(sys.path),
            "directory": os.getcwd(),
        }
        requests: list[_Request] = [(_set_up, {**common, "rank": rank}) for rank in range(config.world_size)]
        self._call(config.world_size, "set up", requests)

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
        WorkerError
            If a worker dies, or the task raises anything else.
        """
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
        results: dict[int, Any] = {}
        by_connection = {worker.connection: rank for rank, worker in enumerate(workers)}
        while len(results) < len(workers):
            pending = [c for c, rank in by_connection.items() if rank not in results]
            for ready in cast(list[Connection], wait(pending)):
                rank = by_connection[ready]
                try:
                    answer = ready.recv()
                except (EOFError, ConnectionError):
                    raise WorkerError(_cause_of_death(rank, workers[rank].process, what)) from None
                if isinstance(answer, _Failure):
                    self._raise(rank, what, answer, workers, by_connection, results)
                results[rank] = answer
        return [results[rank] for rank in range(len(workers))]

    def _raise(
        self,
        rank: int,
        what: str,
        failure: _Failure,
        workers: list[_Process],
        by_connection: dict[Connection, int],
        results: dict[int, Any],
    ) -> None:
        """Raise a failure; if the rank only lost its connection to another rank, raise what happened there instead."""
        others = [c for c, other in by_connection.items() if other not in results and other != rank]
        for ready in cast(list[Connection], wait(others, timeout=0.5) if others else []):
            other = by_connection[ready]
            try:
                answer = ready.recv()
            except (EOFError, ConnectionError):
                raise WorkerError(_cause_of_death(other, workers[other].process, what)) from None
            if isinstance(answer, _Failure) and not failure.is_input and "onnection" in failure.message:
                rank, failure = other, answer
        if failure.is_input:
            raise InputError(failure.message.split("\n")[0])
        raise WorkerError(f"rank {rank} failed to {what}: {failure.kind}: {failure.message}\n{failure.details}")

    def _grow(self, count: int) -> None:
        if len(self._workers) >= count:
            return
        context = multiprocessing.get_context("forkserver")
        # torch imports torch._dynamo when a layer first runs on the meta device, which takes seconds.
        context.set_forkserver_preload(["ppexec.workers.worker", "torch._dynamo", "torch.distributed.tensor.parallel"])
        with _worker_environment(), _no_main_module():
            while len(self._workers) < count:
                connection, theirs = context.Pipe()
                lifeline, watched = context.Pipe()
                process = context.Process(
                    target=_serve, args=(theirs, watched), daemon=True, name=f"ppexec worker {len(self._workers)}"
                )
                process.start()
                theirs.close()
                watched.close()
                self._workers.append(_Process(process=process, connection=connection, lifeline=lifeline))


def _cause_of_death(rank: int, process: Any, what: str) -> str:
    """Which rank died, how, and during what."""
    process.join(timeout=5)
    code = process.exitcode
    cause = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with {code}"
    return f"rank {rank} (process {process.pid}) {cause} during {what!r}"


@contextlib.contextmanager
def _worker_environment() -> Iterator[None]:
    """Set the allocator's variables while the fork server starts, since a process reads them only at its start."""
    before = {name: os.environ.get(name) for name in ALLOCATOR}
    os.environ.update({name: value for name, value in ALLOCATOR.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Hide the caller's script, so that workers do not run it again and it needs no `__main__` guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(connection: Connection, lifeline: Connection) -> None:
    """Answer requests in a worker process until the pool closes or its process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = sys.stderr  # what a model prints: the caller's standard output may be one JSON object
    threading.Thread(target=_exit_with, args=(lifeline,), daemon=True).start()
    worker: Any = None
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request is None:
            return
        task, arguments = request
        try:
            if task is _set_up:
                if worker is not None:
                    worker.close()
                worker = None
                worker = _set_up(**arguments)
                answer = None
            else:
                answer = task(worker, **arguments)
        except Exception as error:
            answer = _Failure(
                kind=type(error).__name__,
                message=str(error) + "".join(f" ({note})" for note in getattr(error, "__notes__", [])),
                is_input=isinstance(error, InputError) or _is_out_of_memory(error),
                details=traceback.format_exc(),
            )
        connection.send(answer)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. torch raises RuntimeError then; for the user it is a configuration that is too large."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _set_up(
    *,
    port: int,
    prefix: str,
    rank: int,
    world_size: int,
    config: RunConfig,
    costs: Sequence[StageCost] | None,
    path: list[str],
    directory: str,
) -> Any:
    """Join the world of a run and build this process's Worker."""
    from ppexec.machine.mesh import join_world
    from ppexec.machine.nccl import prepare_process
    from ppexec.workers.worker import Worker

    # The caller's import path and directory may have changed since this process started.
    sys.path[:] = path
    os.chdir(directory)
    if config.device == "cuda":
        prepare_process(rank, shares_gpu=config.devices == "shared")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")  # nobody else may connect
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    join_world(
        rank=rank,
        world_size=world_size,
        store=dist.PrefixStore(prefix, store),
        backend=config.backend,
        timeout_s=config.timeout_s,
    )
    return Worker(config, costs)


def _store_on_loopback() -> dist.TCPStore:
    """Where workers find each other. Given a port alone, PyTorch would listen to the whole network."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        return dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def _exit_with(lifeline: Connection) -> None:
    """End this process when the pool's process has ended, even in the middle of a task."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)
