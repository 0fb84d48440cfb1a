"""Allocator: a step's peak is known from its order, on an allocator that counts live storages on the CPU."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppexec import Session, WorkerPool
from ppexec.machine.device import HostDevice
from ppexec.measure.allocator import AllocatorPeak, allocator_peak, predicted_peak_bytes
from ppexec.measure.assemble import RankMemory
from ppexec.measure.tasks import count_memory
from ppexec.stage.stage import Stage
from ppexec.workers.worker import Worker
from ppsim import Kind, build_schedule
from tests.support.remote import tiny


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, each until it dies, as a GPU's allocator does."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, int] = {}
        self._held = self._most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self._held += storage.nbytes()
        self._most = max(self._most, self._held)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._held -= self._known.pop(key)

    def held(self) -> int:
        return self._held

    def start_peak(self) -> None:
        self._most = self._held

    def peak(self) -> int:
        return self._most


def alone(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Worker:
    """One rank in this process, on this thread: what is counted is counted on one thread."""
    monkeypatch.setattr("ppexec.workers.worker.make_device", lambda config: HostDevice())
    return Worker(tiny(**{"backend": "local", "device": "threads", "ranks": 1, **changes}).plain())


@pytest.mark.parametrize("schedule", ["afab", "1f1b", "zb-h1"])
@pytest.mark.parametrize("size", [{"hidden": 64, "seq": 64}, {"hidden": 128, "seq": 8}], ids=["long", "wide"])
def test_the_peak_of_a_step_is_predicted(monkeypatch: pytest.MonkeyPatch, schedule: str, size: dict[str, int]) -> None:
    """With activations that weigh as much as the weights, and with much smaller ones."""
    with LiveBytes() as allocator:
        worker = alone(monkeypatch, schedule=schedule, **size)
        found = allocator_peak(worker, allocator)
    (memory,) = count_memory(worker)  # with the mode on, its own bookkeeping would count
    predicted = predicted_peak_bytes(worker.program, 0, memory, found)
    assert predicted == pytest.approx(found.peak_bytes, rel=0.01)


def peak_here(worker: Worker) -> AllocatorPeak:
    with LiveBytes() as allocator:
        allocator._held = sum(parameter.nbytes for stage in worker.real_stages for parameter in parameters(stage))
        return allocator_peak(worker, allocator)


def parameters(stage: Stage) -> list[torch.Tensor]:
    return [parameter for layer in stage.layers for parameter in layer.parameters()]


def test_the_peak_of_ranks_with_messages_is_predicted(pool: WorkerPool) -> None:
    """Receives are posted ahead, and a rank still holds a message when the next is posted.

    With AFAB, since gloo keeps what it has sent to the end of the step, and NCCL does not.
    """
    config = tiny(schedule="afab", hidden=64, seq=64, receive_window=2)
    with Session(config, pool=pool) as session:
        found, counted = session._workers.call(peak_here), session.memory()
    for rank in range(2):
        predicted = predicted_peak_bytes(config.pipeline.program, rank, counted[rank], found[rank])
        assert predicted == pytest.approx(found[rank].peak_bytes, rel=0.001)


def test_the_first_backward_of_each_stage_makes_the_gradients() -> None:
    program = build_schedule("1f1b", ranks=1, microbatches=2).program
    assert [Kind(kind).name for kind in program.kind.tolist()] == ["F", "B", "F", "B"]
    memory = RankMemory(
        activation_bytes=[10, 0, 10, 0], buffer_bytes=[0] * 4, gradient_bytes=[0, 7, 7, 7], parameter_bytes=None
    )
    found = {(int(Kind.F), 0): 10, (int(Kind.B), 0): 5}

    def peak(first: int) -> int:
        peaks = AllocatorPeak(
            base_bytes=100, peak_bytes=0, transient_bytes=found, first_transient_bytes={(int(Kind.B), 0): first}
        )
        return predicted_peak_bytes(program, 0, memory, peaks)

    assert peak(first=40) == 100 + 10 + 40  # the first B, when there are no gradients yet
    assert peak(first=8) == 100 + 7 + 10 + 5  # the second B, beside them


def test_a_device_without_a_caching_allocator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device 'threads' has no caching allocator: take a GPU"):
        allocator_peak(alone(monkeypatch))
