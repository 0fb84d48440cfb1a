"""Tasks: what a worker is asked to measure. Each is called in all workers of a run at once.

Those that answer by rank give a list with an answer for each rank that the worker holds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import torch

from ppexec.machine.clock import now_ns
from ppexec.machine.environment import ALLOCATOR, is_crowded
from ppexec.machine.mesh import meet
from ppexec.measure.allocator import AllocatorPeak, allocator_peak
from ppexec.measure.assemble import RankMemory
from ppexec.measure.link_probe import LinkSample, probe_links, probe_sizes
from ppexec.measure.ping import PingSample
from ppexec.measure.profile import LayerProfiler, LayerSamples, run_in_turn
from ppexec.measure.torch_schedules import time_compute, time_peer
from ppexec.models.shapes import tensors_in
from ppexec.stage.gradient_sum import ReductionSample, probe_reduction
from ppexec.stage.ledger import Ledger, optimizer_bytes, parameter_bytes, tensors_of
from ppexec.stage.stage import Stage
from ppexec.transport.shared_memory import SharedTransport
from ppexec.workers.runtime import StepRecord
from ppexec.workers.worker import OPTIMIZER, Rank, Worker


def measure(worker: Worker, *, steps: int, first_step: int = 0) -> list[list[StepRecord]]:
    """Run and time `steps` steps; by rank, then by step."""
    by_step = [worker.step(batch) for batch in worker.undisturbed_batches(first_step, steps)]
    return [list(of_rank) for of_rank in zip(*by_step, strict=True)] or [[] for _ in worker.ranks]


def count_memory(worker: Worker) -> list[RankMemory]:
    """What each rank holds after each row's action, from one untimed step."""
    batch = worker.load(0)
    is_timed = worker.costs is not None
    ledgers: dict[int, Ledger] = {}
    for rank in worker.ranks:
        footprints = {} if is_timed else _profiler(worker, rank).footprints(batch)
        for index, stage in rank.stages.items():
            older: list[torch.Tensor | torch.UntypedStorage] = [*tensors_in(batch.targets)]
            if isinstance(stage, Stage):
                older += [*tensors_of(stage.layers), *footprints[index].older]
            ledgers[index] = Ledger(older)
    worker.clear()
    records = worker.step(batch, ledgers=ledgers)
    optimizer = worker.kept(OPTIMIZER)
    return [
        RankMemory(
            activation_bytes=record.levels,
            buffer_bytes=record.posted,
            gradient_bytes=None if is_timed else record.gradients,
            parameter_bytes=None if is_timed else parameter_bytes(layer for s in _real(rank) for layer in s.layers),
            optimizer_bytes=None if optimizer is None else optimizer_bytes(optimizer),
        )
        for rank, record in zip(worker.ranks, records, strict=True)
    ]


def _real(rank: Rank) -> list[Stage]:
    return [stage for stage in rank.stages.values() if isinstance(stage, Stage)]


def transport_name(worker: Worker) -> list[str]:
    """What carries each rank's messages."""
    return [type(rank.transport).__name__ for rank in worker.ranks]


def receive_window(worker: Worker) -> list[int | None]:
    """How many receives each rank posts ahead on each link; None where none are posted."""
    return [rank.transport.window for rank in worker.ranks]


def profile(
    worker: Worker, *, rounds: int, first_step: int = 0, by_layer: bool = True, ranks: Sequence[int] | None = None
) -> list[list[LayerSamples]]:
    """Time the ranks' stages and layers, in their order, at the same time as other workers time theirs.

    ranks: of those that this worker holds, the ones to time, side by side; all unless given.
    """
    held = [rank for rank in worker.ranks if ranks is None or rank.number in ranks]
    found: dict[int, list[LayerSamples]] = {rank.number: [] for rank in worker.ranks}
    for batch in worker.undisturbed_batches(first_step, rounds):
        profilers = [_profiler(worker, rank) for rank in held]
        samples = run_in_turn(worker.device, profilers, batch, by_layer=by_layer)
        for rank, of_rank in zip(held, samples, strict=True):
            found[rank.number].append(of_rank)
    return list(found.values())


def _profiler(worker: Worker, rank: Rank) -> LayerProfiler:
    def make() -> LayerProfiler:
        # A rank that waits for a core computes nothing; threads of its own would hide from its clock.
        is_hidden = is_crowded(worker.config) and worker.config.threads == 1 and not worker.device.is_asynchronous
        return LayerProfiler(
            worker.program,
            rank.number,
            {stage.index: stage for stage in _real(rank)},
            worker.boundaries,
            worker.overwriting,
            device=worker.device,
            compute=rank.compute,
            mark=time.thread_time_ns if is_hidden else None,
        )

    return worker.keep((LayerProfiler, rank.number), make)


def probe(worker: Worker) -> list[list[LinkSample]]:
    """What a message costs on every link of the program, measured by its sender."""
    is_shared = isinstance(worker.ranks[0].transport, SharedTransport)
    return [
        probe_links(
            worker.program,
            worker.message_specs,
            worker.pipeline_group,
            offset_ns=worker.offset_ns,
            make_transport=worker.transports.maker() if is_shared else None,
        )
    ]


def probe_by_size(worker: Worker, *, size_bytes: Sequence[int], rounds: int) -> list[list[PingSample]]:
    """What messages of these sizes cost between any two ranks, measured by their senders."""
    return [
        probe_sizes(
            size_bytes,
            worker.pipeline_group,
            rounds=rounds,
            offset_ns=worker.offset_ns,
            make_transport=worker.transports.maker(),
        )
    ]


def probe_reductions(worker: Worker) -> list[ReductionSample]:
    """What adding up this rank's gradients over the replicas takes, stage by stage; nothing without replicas.

    The ranks of a pipeline take turns, as they mostly do at the end of a step; those of tp go together.
    """
    samples: list[ReductionSample] = []
    for rank in range(worker.config.ranks if worker.replicas is not None else 0):
        meet(worker.mesh)
        if rank == worker.rank and worker.replicas is not None:
            for stage in worker.stages.values():
                samples += probe_reduction(stage.blank_gradients(), worker.replicas, worker.device)
    return samples


def message_bytes(worker: Worker) -> list[int]:
    """The size of every message of the program."""
    return [spec.size_bytes for spec in worker.message_specs]


def allocator(worker: Worker) -> dict[str, str | None]:
    """This process's allocator settings."""
    return {name: os.environ.get(name) for name in ALLOCATOR}


def device_peak(worker: Worker) -> AllocatorPeak:
    """What a step takes of the GPU's memory, and what its actions need while they run."""
    return allocator_peak(worker)


def clock_error_s(worker: Worker) -> float:
    """How far the device's clock may be off the host's."""
    return worker.device.clock_error_s


def time_plain(worker: Worker, *, rounds: int) -> list[list[dict[str, float]]]:
    """Seconds of F and B of this rank's stage in a plain loop without messages."""
    return [time_compute(worker, rounds)]


def time_steps(worker: Worker, *, executor: str | None, steps: int) -> list[list[tuple[int, int]]]:
    """Begin and end of whole steps, of this project's runtime (None) or of PyTorch's, on the first rank's clock."""
    if executor is not None:
        return [time_peer(worker, executor, steps)]
    times = []
    for batch in worker.undisturbed_batches(0, steps):
        began = now_ns()
        worker.step(batch, is_timed=False)
        times.append((began + worker.offset_ns, now_ns() + worker.offset_ns))
    return [times]
