"""Pool: worker processes on this machine, started once and fed many runs."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
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

_Answer = TypeVar("_Answer")
_Request = tuple[Callable[..., Any], dict[str, Any]]


class WorkerError(RuntimeError):
    """A worker died or failed; the message says which rank, at what, and how."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    kind: str
    message: str
    is_value_error: bool
    details: str


@dataclass(frozen=True, kw_only=True)
class _Process:
    process: Any
    connection: Connection
    lifeline: Connection


class WorkerPool:
    """Processes that take a run's ranks, one each; more are started when a run needs more.

    Use it as a context manager, or call `close`. Starting the first takes seconds (torch is imported once, in the
    server that the workers are forked from), every further run milliseconds. If a worker dies or fails, the call
    raises, all workers are replaced, and the pool can be used on.
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
        """The workers' process ids, by rank."""
        return [worker.process.pid for worker in self._workers]

    def set_up(self, config: RunConfig, costs: Sequence[StageCost] | None = None) -> None:
        """Make the first `config.world_size` workers the ranks of a run; with stage `costs`, of timed stages."""
        self._grow(config.world_size)
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
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
        """Call `task(worker, **arguments)` in every process at once; the answers by process.

        task: a function of a module, which is sent by its name. Raises ValueError or WorkerError.
        """
        return self._call(world_size, task.__name__, [(task, arguments)] * world_size)

    def _call(self, world_size: int, what: str, requests: list[_Request]) -> list[Any]:
        workers = self._workers[:world_size]
        try:
            for worker, request in zip(workers, requests, strict=True):
                with contextlib.suppress(BrokenPipeError):  # a dead worker is named below
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
                    raise WorkerError(_obituary(rank, workers[rank].process, what)) from None
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
        """Raise a failure; when a peer merely lost its connection, the one that caused it is named instead."""
        others = [c for c, other in by_connection.items() if other not in results and other != rank]
        for ready in cast(list[Connection], wait(others, timeout=0.5) if others else []):
            other = by_connection[ready]
            try:
                answer = ready.recv()
            except (EOFError, ConnectionError):
                raise WorkerError(_obituary(other, workers[other].process, what)) from None
            if isinstance(answer, _Failure) and not failure.is_value_error and "onnection" in failure.message:
                rank, failure = other, answer
        if failure.is_value_error:
            raise ValueError(failure.message.split("\n")[0])
        raise WorkerError(f"rank {rank} failed to {what}: {failure.kind}: {failure.message}\n{failure.details}")

    def _grow(self, count: int) -> None:
        if len(self._workers) >= count:
            return
        context = multiprocessing.get_context("forkserver")
        # The second is what torch imports, for seconds, when a layer first runs on the meta device.
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


def _obituary(rank: int, process: Any, what: str) -> str:
    process.join(timeout=5)
    code = process.exitcode
    cause = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with {code}"
    return f"rank {rank} (process {process.pid}) {cause} during {what!r}"


@contextlib.contextmanager
def _worker_environment() -> Iterator[None]:
    """The allocator reads its settings when a process starts, so they must be there before the fork server is."""
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
    """Workers need nothing of the caller's script; without it they do not run it again (no __main__ guard needed)."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(connection: Connection, lifeline: Connection) -> None:
    """A worker's life: requests in, answers out, until the pool closes or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(lifeline,), daemon=True).start()
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
                is_value_error=isinstance(error, ValueError) or _is_out_of_memory(error),
                details=traceback.format_exc(),
            )
        connection.send(answer)


def _is_out_of_memory(error: Exception) -> bool:
    """torch reports it as a RuntimeError; to the user it is a size that does not fit."""
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
    from ppexec.machine.mesh import join_world
    from ppexec.machine.nccl import prepare_process
    from ppexec.workers.worker import Worker

    # The caller's, as they are now: they may have changed since this process started.
    sys.path[:] = path
    os.chdir(directory)
    if config.device == "cuda":
        prepare_process(rank, shares_gpu=config.devices == "shared")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    join_world(
        rank=rank,
        world_size=world_size,
        store=dist.PrefixStore(prefix, store),
        backend=config.backend,
        timeout_s=config.timeout_s,
    )
    return Worker(config, costs)


def _die_with(lifeline: Connection) -> None:
    """End this process when the pool's process is gone, even while it waits for a message that will never come."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)
