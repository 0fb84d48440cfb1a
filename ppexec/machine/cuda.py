"""CUDA device: streams and events of one GPU; nothing here waits for the GPU but `begin` and `synchronize`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ppexec.machine.clock import now_ns
from ppexec.machine.device import Event, Mark, Recorder, Stream
from ppexec.machine.sm_groups import SMGroups

_ALIGNMENTS = 5  # readings of both clocks, of which the closest counts
_LAUNCH_S = 2.8e-6  # of a waiting kernel, between two events, beside its cycles (H200)


class _CudaStream:
    """A stream of the GPU; submitted work launches its kernels at once, and they run when their turn comes."""

    def __init__(self, stream: torch.cuda.Stream, device: CudaDevice) -> None:
        self.stream, self._device = stream, device

    def submit(self, work: Callable[[], None], label: str = "") -> None:
        try:
            self._device.switch_to(self.stream)
            work()
        except Exception as error:
            if label:
                error.add_note(f"in {label}")
            raise

    def record(self) -> Event:
        return _CudaEvent(self.stream.record_event(), self._device.timeout_s)

    def wait(self, event: Event) -> None:
        self.stream.wait_event(event.event)  # type: ignore[attr-defined]

    def uses(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(self.stream)


class _CudaEvent:
    __slots__ = ("event", "is_done", "synchronize")

    def __init__(self, event: torch.cuda.Event, timeout_s: float | None) -> None:
        self.event = event
        self.is_done: Callable[[], bool] = event.query
        self.synchronize: Callable[[], None] = (
            event.synchronize if timeout_s is None else partial(_wait_for, event, timeout_s)
        )


def _wait_for(event: torch.cuda.Event, timeout_s: float) -> None:
    """Wait at work, as CUDA does. Raises TimeoutError."""
    until = now_ns() + timeout_s * 1e9
    while not event.query():
        if now_ns() > until:
            raise TimeoutError(f"the GPU was not done after {timeout_s:g} s")


class _GraphRecorder:
    """Records the work of the current stream as CUDA graphs."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would wait for the GPU, which may wait for messages of other ranks.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the capture has failed, and ending it says so
                graph.capture_end()
            raise
        graph.capture_end()
        return graph.replay


class CudaDevice:
    """One GPU.

    index: its number among those that this process sees. timeout_s: how long the host waits for it; for ever if None.
    """

    is_asynchronous = True

    def __init__(self, index: int = 0, *, timeout_s: float | None = None) -> None:
        torch.cuda.set_device(index)
        self.torch_device = torch.device("cuda", index)
        self.clock_error_s = 0.0
        self.timeout_s = timeout_s
        self._streams: dict[str, _CudaStream] = {}
        self._groups: dict[int, SMGroups] = {}
        self._zero: tuple[torch.cuda.Event, int] | None = None
        self._cycles_per_s: float | None = None
        self._current: torch.cuda.Stream | None = None
        self._default = torch.cuda.default_stream(self.torch_device)

    def switch_to(self, stream: torch.cuda.Stream) -> None:
        """Make a stream the current one, until other work is submitted: switching takes as long as a launch."""
        if self._current is not stream:
            torch.cuda.set_stream(stream)
            self._current = stream

    def stream(self, name: str) -> Stream:
        """The stream of this name."""
        if name not in self._streams:
            self._streams[name] = _CudaStream(torch.cuda.Stream(self.torch_device), self)
        return self._streams[name]

    def compute_stream(self, part: int = 0, parts: int = 1) -> Stream:
        """With several parts, a stream that has the part's own multiprocessors."""
        name = f"compute {part} of {parts}"
        if name not in self._streams:
            if parts == 1:
                return self.stream(name)
            if parts not in self._groups:
                self._groups[parts] = SMGroups(self.torch_device, parts)
            self._streams[name] = _CudaStream(self._groups[parts].streams[part], self)
        return self._streams[name]

    @property
    def shares(self) -> list[dict[str, Any]]:
        """How the multiprocessors are shared out (see `SMGroups.description`); empty if they are not."""
        return [groups.description for groups in self._groups.values()]

    def recorder(self, stream: Stream) -> Recorder:
        """One whose CUDA graphs share their memory."""
        return _GraphRecorder()

    def host_buffer(self, size_bytes: int) -> torch.Tensor:
        """Pinned memory, without which a copy would wait for the GPU."""
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def begin(self) -> None:
        """Wait for the GPU, and read both clocks: an event that an idle GPU passes lies between two looks at ours.

        The closest of some readings counts; the error is half the time between its looks.
        """
        self.synchronize()
        readings: list[tuple[int, int, torch.cuda.Event]] = []
        for _ in range(_ALIGNMENTS):
            event = torch.cuda.Event(enable_timing=True)
            before = now_ns()
            event.record()
            event.synchronize()
            after = now_ns()
            readings.append((after - before, (before + after) // 2, event))
        taken_ns, zero_ns, event = min(readings, key=lambda reading: reading[0])
        self.clock_error_s = taken_ns / 2e9
        self._zero = event, zero_ns

    def mark(self) -> Mark:
        """An event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait_s(self, seconds: float) -> None:
        """Let a kernel spin on one multiprocessor; its cycles are counted at the clock measured when first asked."""
        if self._cycles_per_s is None:
            self._cycles_per_s = _measured_cycles_per_s()
        torch.cuda._sleep(max(round((seconds - _LAUNCH_S) * self._cycles_per_s), 0))

    def times_ns(self, marks: Sequence[Mark]) -> list[int]:
        """From the reading of both clocks in `begin`."""
        if self._zero is None:
            raise RuntimeError("the device's clock was not read: begin a step first")
        zero, zero_ns = self._zero
        return [zero_ns + round(zero.elapsed_time(mark) * 1e6) for mark in marks]

    def synchronize(self) -> None:
        """Wait for the GPU; what comes next, outside of submitted work, is on the default stream."""
        if self.timeout_s is not None:
            for stream in self._streams.values():
                stream.record().synchronize()
        torch.cuda.synchronize(self.torch_device)
        self.switch_to(self._default)

    def close(self) -> None:
        """Give the streams and the groups of multiprocessors back."""
        self.synchronize()
        self._streams.clear()
        for groups in self._groups.values():
            groups.close()
        self._groups.clear()
        self._zero = None
        if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
            # cuBLAS keeps a workspace for every stream it ran on: without this each session leaks some 65 MiB.
            torch._C._cuda_clearCublasWorkspaces()


def _measured_cycles_per_s() -> float:
    """The clock at which a waiting kernel counts, warm: from two waits, so that launching drops out."""
    times_ms = []
    for cycles in (40_000_000, 2_000_000, 12_000_000):  # the first wakes the clock
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        times_ms.append(begin.elapsed_time(end))
    return 10_000_000 / ((times_ms[2] - times_ms[1]) / 1e3)
