"""Pool: worker processes on this machine that are started once and serve many runs."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, TypeVar, cast

import torch.distributed as dist

from ppexec.config.config import RunConfig
from ppexec.machine.environment import ALLOCATOR
from ppexec.workers.failure import Cause, Failure
from ppexec.workers.progress import Board, PartialTrace
from ppexec.workers.watch import Watch
from ppsim import StageCost
from ppsim.errors import InputError, RunError

_Answer = TypeVar("_Answer")
_SET_UP = "set_up"
_BLAME_S = 2.0  # how long to wait for the worker to blame, once another has lost its connection
_Request = tuple[Callable[..., Any], dict[str, Any]]


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
        self._run = _Run()

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
        self._run = _Run()

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
        self._run.close()
        self._run = _Run(config)
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
        requests: list[_Request] = [(_set_up, {**common, "rank": rank}) for rank in range(config.world_size)]
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
            if any(isinstance(answer, Failure | _Death) for answer in came.values()):
                self._raise(workers, {**answers, **came}, what)
            answers.update(came)
            if came:
                watch.moved()
            elif watch.has_stalled():
                pending = [worker for worker in range(len(workers)) if worker not in answers]
                raise self._run.stalled(workers, pending, watch, what)
        return [answers[rank] for rank in range(len(workers))]

    def _raise(self, workers: list[_Process], answers: dict[int, Any], what: str) -> NoReturn:
        """Raise for the worker that is to blame; those that only lost their connection to it are not."""

        def blamed() -> list[tuple[int, int]]:
            """By blame: workers that died, then those that failed by the kind of failure."""
            return sorted(
                (-1 if isinstance(answer, _Death) else answer.cause, worker)
                for worker, answer in answers.items()
                if isinstance(answer, Failure | _Death)
            )

        until_s = time.monotonic() + _BLAME_S
        while (
            blamed()[0][0] == Cause.LOST and (left_s := until_s - time.monotonic()) > 0 and len(answers) < len(workers)
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
        with _worker_environment(), _no_main_module():
            _start_server()
            while len(self._workers) < count:
                connection, theirs = context.Pipe()
                lifeline, watched = context.Pipe()
                process = context.Process(
                    target=_serve, args=(theirs, watched), daemon=True, name=f"ppexec worker {len(self._workers)}"
                )
                _start(process)
                theirs.close()
                watched.close()
                self._workers.append(_Process(process=process, connection=connection, lifeline=lifeline))


@dataclass(frozen=True)
class _Death:
    """A worker is gone."""


def _receive(workers: Sequence[_Process], answers: Mapping[int, Any], *, timeout_s: float) -> dict[int, Any]:
    """What the workers that have not answered yet answer within this time."""
    pending = {worker.connection: rank for rank, worker in enumerate(workers) if rank not in answers}
    came: dict[int, Any] = {}
    for ready in cast(list[Connection], wait(list(pending), timeout=timeout_s)):
        try:
            came[pending[ready]] = ready.recv()
        except (EOFError, ConnectionError):
            came[pending[ready]] = _Death()
    return came


class _Run:
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

    def failed(self, worker: int, process: Any, answer: Failure | _Death, what: str) -> WorkerError:
        """The error for a worker that died or failed."""
        name, standing = self._named(worker, process), self._standing(worker, what)
        if isinstance(answer, _Death):
            message, frames = f"{name} {_cause_of_death(process)} {standing}", ""
        elif answer.where:
            message, frames = f"process {process.pid} failed {answer.where}: {answer.message}", answer.details
        else:
            message, frames = f"{name} failed {standing}: {answer.message}", answer.details
        details = "\n".join(filter(None, [frames, self._all_stand()]))
        return WorkerError(message, details, self._partial_trace(worker))

    def stalled(self, workers: Sequence[_Process], pending: Sequence[int], watch: Watch, what: str) -> WorkerError:
        """The error for a run in which nothing moves: it names the workers that wait for no other."""
        if self._config is None:
            raise RuntimeError("a run stalled before it was configured")
        stopped = [worker for worker in pending if watch.is_stopped(worker)]
        shown = stopped or [worker for worker in pending if not watch.waits(worker)] or pending
        who = "; ".join(
            f"{self._named(worker, workers[worker].process)} {'is stopped ' if worker in stopped else 'stands '}"
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


def _start_server() -> None:
    """Start the fork server with Ctrl-C blocked, for which it would print the frames of what it imports."""
    resource_tracker.ensure_running()  # the server starts it too, and that would end the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(process: Any) -> None:
    """Start a worker. If Ctrl-C comes meanwhile, end the server, which may still import for seconds."""
    try:
        process.start()
    except KeyboardInterrupt:
        server = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
        if server is not None:
            os.kill(server, signal.SIGKILL)
        raise


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
            answer = Failure.of(error)
        connection.send(answer)


def _set_up(
    *,
    port: int,
    prefix: str,
    rank: int,
    world_size: int,
    config: RunConfig,
    costs: Sequence[StageCost] | None,
    board: str | None,
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
        timeout_s=config.longest_wait_s,
    )
    return Worker(config, costs, board=board)


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
