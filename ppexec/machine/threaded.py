"""Threaded device: an asynchronous device made of threads, which tests on any machine what runs on GPUs.

Each stream is a thread with a queue. Work runs late, and streams overlap in any way that the events allow. Code that
reads or frees a result too early fails here as it would on a GPU.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ppexec.machine.clock import now_ns
from ppexec.machine.device import Event, Mark, Recorder, Stream
from ppexec.machine.recorded_operations import OperationRecorder
from ppexec.machine.waiting import sharpen_sleep, wait_s

_LOOK_S = 0.05  # between two checks whether a stream has failed


class _Item(NamedTuple):
    """Work in a stream's queue. `always` marks work that is done even after a failure."""

    work: Callable[[], object]
    label: str = ""
    always: bool = False


class _ThreadEvent:
    """A point in a thread's work that other threads can wait for."""

    def __init__(self) -> None:
        self.passed = threading.Event()

    def is_done(self) -> bool:
        return self.passed.is_set()

    def synchronize(self) -> None:
        self.passed.wait()


class _ThreadStream:
    """A thread that works off its queue. After a failure on any stream it skips work but still passes events."""

    def __init__(self, name: str, device: ThreadedDevice) -> None:
        self._device = device
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"stream {name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        torch.set_num_threads(self._device.threads)  # each thread has its own count
        sharpen_sleep()
        while (item := self._queue.get()) is not None:
            if item.always or self._device.failure is None:
                try:
                    item.work()
                except BaseException as error:  # the host raises it, in `synchronize`
                    self._device.fail(error, item.label)
            del item  # so that its tensors are freed before the next item comes

    def submit(self, work: Callable[[], None], label: str = "") -> None:
        if self._device.launch_s:
            wait_s(self._device.launch_s)
        self._queue.put(_Item(work, label))

    def record(self) -> _ThreadEvent:
        event = _ThreadEvent()
        self._queue.put(_Item(event.passed.set, always=True))
        return event

    def wait(self, event: Event) -> None:
        self._queue.put(_Item(event.synchronize))

    def uses(self, tensor: torch.Tensor) -> None:
        """Work holds its tensors until it is done."""

    def close(self) -> None:
        self._queue.put(None)


class ThreadedDevice:
    """A CPU whose streams are threads.

    Parameters
    ----------
    threads : int
        Threads of torch with which each stream computes.
    launch_s : float
        Seconds that the host spends on submitting work, as if it launched kernels.
    timeout_s : float or None
        Seconds that the host waits for the device in `synchronize`; None waits for ever.
    """

    is_asynchronous = True
    clock_error_s = 0.0

    def __init__(self, *, threads: int = 1, launch_s: float = 0.0, timeout_s: float | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self.threads, self.launch_s, self.timeout_s = threads, launch_s, timeout_s
        self.failure: BaseException | None = None
        self._lock = threading.Lock()
        self._streams: dict[str, _ThreadStream] = {}

    def stream(self, name: str) -> Stream:
        """The thread of this name."""
        if name not in self._streams:
            self._streams[name] = _ThreadStream(name, self)
        return self._streams[name]

    def compute_stream(self, part: int = 0, parts: int = 1) -> Stream:
        """A thread for each part."""
        return self.stream(f"compute {part}")

    def recorder(self, stream: Stream) -> Recorder:
        """One that notes operations."""
        return OperationRecorder()

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """Other memory: the CPU's own is the host's."""
        return torch.empty(size_bytes, dtype=torch.uint8)

    def begin(self) -> None:
        """Wait for earlier work."""
        self.synchronize()

    def mark(self) -> Mark:
        """The current time."""
        return now_ns()

    def wait_s(self, seconds: float) -> None:
        """Sleep."""
        wait_s(seconds)

    def times_ns(self, marks: Sequence[Mark]) -> list[int]:
        """The marks, which are nanoseconds already."""
        return list(marks)

    def fail(self, error: BaseException, label: str) -> None:
        """Keep the first failure, with the label of its work."""
        with self._lock:
            if self.failure is None:
                if label:
                    error.add_note(f"in {label}")
                self.failure = error

    def synchronize(self) -> None:
        """Wait for all streams; raises the first exception of submitted work. The device can then be used again."""
        began = now_ns()
        for event in [stream.record() for stream in self._streams.values()]:
            while not event.passed.wait(_LOOK_S) and self.failure is None:
                if self.timeout_s is not None and now_ns() - began > self.timeout_s * 1e9:
                    raise TimeoutError(f"the device was not done after {self.timeout_s:g} s")
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def close(self) -> None:
        """End the threads."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
