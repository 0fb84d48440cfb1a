"""Tasks: what workers are asked to measure. A task is called in all workers of a run at once.

Most tasks return a list with an answer for each rank that the worker holds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ppexec.machine.clock import now_ns
from ppexec.machine.environment import ALLOCATOR, is_crowded
from ppexec.machine.mesh import meet
from ppexec.measure.allocator import AllocatorPeak, allocator_peak
from ppexec.measure.assemble import RankMemory
from ppexec.measure.launches import launch_times
from ppexec.measure.layer_profiler import LayerProfiler, run_in_turn
from ppexec.measure.layer_samples import LayerSamples
from ppexec.measure.link_probe import LinkSample, probe_links, probe_sizes
from ppexec.measure.ping import PingSample
from ppexec.measure.torch_schedules import time_compute, time_peer
from ppexec.models.shapes import tensors_in
from ppexec.stage.gradient_sum import ReductionSample, probe_reduction
from ppexec.stage.ledger import Ledger, optimizer_bytes, parameter_bytes, tensors_of
from ppexec.stage.sharded import ShardingSample, probe_sharding
from ppexec.stage.stage import Stage
from ppexec.transport.shared_memory import SharedTransport
from ppexec.workers.rank import Rank
from ppexec.workers.step_record import StepRecord
from ppexec.workers.worker import OPTIMIZER, Worker


def measure(worker: Worker, *, steps: int, first_step: int = 0) -> list[list[StepRecord]]:
    """Run and time steps.

    Parameters
    ----------
    worker : Worker
        This process.
    steps : int
        How many.
    first_step : int
        Number of the first, which decides what data it reads.

    Returns
    -------
    list of lists of StepRecord
        By rank, then by step.
    """
    by_step = []
    for batch in worker.undisturbed_batches(first_step, steps):
        by_step.append(worker.step(batch))
        worker.note_losses(batch)
    return [list(of_rank) for of_rank in zip(*by_step, strict=True)] or [[] for _ in worker.ranks]


def odd_losses(worker: Worker) -> dict[tuple[int, int, int], float]:
    """The losses of the steps just measured or verified that are no finite numbers, see `Worker.take_odd_losses`."""
    return worker.take_odd_losses()


def count_memory(worker: Worker) -> list[RankMemory]:
    """Count in one untimed step the bytes that each rank holds after each of its rows."""
    batch = worker.load(0)
    is_timed = worker.costs is not None
    ledgers: dict[int, Ledger] = {}
    for rank in worker.ranks:
        with whole_parameters(worker):
            footprints = {} if is_timed else _profiler(worker, rank).footprints(batch)
        for index, stage in rank.stages.items():
            older: list[torch.Tensor | torch.UntypedStorage] = [*tensors_in(batch.targets)]
            if isinstance(stage, Stage):
                older += [*tensors_of(stage.layers), *footprints[index].older]
                older += [] if stage.sharded is None else stage.sharded.whole
            ledgers[index] = Ledger(older)
    worker.clear()
    records = worker.step(batch, ledgers=ledgers)
    optimizer = worker.kept(OPTIMIZER)
    trained = [parameter for stage in worker.real_stages for parameter in stage.parameters]
    return [
        RankMemory(
            activation_bytes=record.levels,
            buffer_bytes=record.posted,
            gradient_bytes=None if is_timed else record.gradients,
            parameter_bytes=None if is_timed else parameter_bytes(layer for s in _real(rank) for layer in s.layers),
            optimizer_bytes=None if optimizer is None else optimizer_bytes(optimizer, trained),
            unsharded_bytes=record.unsharded or None,
            host_bytes=None if worker.program.schedule.offload is None else record.host,
        )
        for rank, record in zip(worker.ranks, records, strict=True)
    ]


@contextmanager
def whole_parameters(worker: Worker) -> Iterator[None]:
    """A context in which all stages of a worker are whole, outside of a step. Collective over the replicas."""
    sharded = [stage.sharded for stage in worker.real_stages if stage.sharded is not None]
    for parameters in sharded:
        parameters.unshard()
    try:
        yield
    finally:
        for parameters in sharded:
            parameters.reshard()
            parameters.gathered_ns.clear()


def _real(rank: Rank) -> list[Stage]:
    return [stage for stage in rank.stages.values() if isinstance(stage, Stage)]


def transport_name(worker: Worker) -> list[str]:
    """The class name of each rank's transport."""
    return [type(rank.transport).__name__ for rank in worker.ranks]


def receive_window(worker: Worker) -> list[int | None]:
    """How many receives each rank posts ahead on each link; None where no receives are posted."""
    return [rank.transport.window for rank in worker.ranks]


def profile(
    worker: Worker, *, rounds: int, first_step: int = 0, by_layer: bool = True, ranks: Sequence[int] | None = None
) -> list[list[LayerSamples]]:
    """Time stages and layers in the order of the run, in all workers at the same time.

    Parameters
    ----------
    worker : Worker
        This process.
    rounds : int
        How many rounds.
    first_step : int
        Number of the step whose data the first round reads.
    by_layer : bool
        Whether to time layers too, and not only whole stages.
    ranks : sequence of int, optional
        Which of this worker's ranks to time at the same time; all if not given.

    Returns
    -------
    list of lists of LayerSamples
        By rank of this worker, then by round; empty lists for ranks that are not timed.
    """
    held = [rank for rank in worker.ranks if ranks is None or rank.number in ranks]
    found: dict[int, list[LayerSamples]] = {rank.number: [] for rank in worker.ranks}
    for batch in worker.undisturbed_batches(first_step, rounds):
        profilers = [_profiler(worker, rank) for rank in held]
        with whole_parameters(worker):
            samples = run_in_turn(worker.device, profilers, batch, by_layer=by_layer)
        for rank, of_rank in zip(held, samples, strict=True):
            found[rank.number].append(of_rank)
    return list(found.values())


def _profiler(worker: Worker, rank: Rank) -> LayerProfiler:
    def make() -> LayerProfiler:
        # CPU time leaves out waiting for a core. It counts one thread only, so it serves ranks of one thread.
        takes_cpu_time = is_crowded(worker.config) and worker.config.threads == 1 and not worker.device.is_asynchronous
        return LayerProfiler(
            worker.program,
            rank.number,
            {stage.index: stage for stage in _real(rank)},
            worker.overwriting,
            device=worker.device,
            compute=rank.compute,
            mark=time.thread_time_ns if takes_cpu_time else None,
        )

    return worker.keep((LayerProfiler, rank.number), make)


def time_launches(worker: Worker, *, steps: int) -> list[list[float]]:
    """What the host spends on each action of each rank; see `launch_times`."""
    return launch_times(worker, steps=steps)


def probe(worker: Worker) -> list[list[LinkSample]]:
    """Measure a message on every link of the program; the links of which this rank is the sender."""
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
    """Measure messages of given sizes between every two ranks.

    Parameters
    ----------
    worker : Worker
        This process.
    size_bytes : sequence of int
        The sizes.
    rounds : int
        How often each measurement is taken.

    Returns
    -------
    list of lists of PingSample
        For this rank, the links of which it is the sender.
    """
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
    """Measure how long it takes to add up each stage's gradients over those who hold it; empty if none other does.

    The stages take turns, as at the end of a step. The ranks of tp measure at the same time.
    """
    samples: list[ReductionSample] = []
    pipeline, is_needed = worker.pipeline, worker.config.dp * worker.pipeline.copies > 1
    for turn in range(pipeline.model_stages if is_needed else 0):
        meet(worker.mesh)
        for stage in range(turn, pipeline.stages, pipeline.model_stages):
            if stage in worker.holders:
                blank = worker.stages[stage].blank_gradients()
                samples += probe_reduction(blank, worker.holders[stage], worker.device)
    return samples


def probe_collectives(worker: Worker) -> dict[int, tuple[ShardingSample, int]]:
    """Measure UNSHARD and REDUCE_GRAD of each stage of this process, and the bytes of its share of the parameters.

    The stages take turns.
    """
    samples: dict[int, tuple[ShardingSample, int]] = {}
    for turn in range(worker.config.pipeline.stages if worker.mesh is not None else 0):
        meet(worker.mesh)
        for stage in worker.real_stages:
            if stage.index == turn and stage.sharded is not None and worker.mesh is not None:
                sample = probe_sharding(stage.sharded, worker.mesh.get_group("dp"))
                samples[turn] = sample, parameter_bytes(stage.layers)
    return samples


def message_bytes(worker: Worker) -> list[int]:
    """The size of each message of the program."""
    return [spec.size_bytes for spec in worker.message_specs]


def shapes(worker: Worker, *, step: int) -> list[str]:
    """The kind of each microbatch of a step, see `Batch.shapes`."""
    return worker.load(step).shapes


def allocator(worker: Worker) -> dict[str, str | None]:
    """This process's allocator settings (see `ppexec.machine.environment.ALLOCATOR`)."""
    return {name: os.environ.get(name) for name in ALLOCATOR}


def device_shares(worker: Worker) -> list[dict[str, Any]]:
    """How this process's ranks share the multiprocessors of its GPU; empty if they do not."""
    return getattr(worker.device, "shares", [])


def device_peak(worker: Worker) -> AllocatorPeak:
    """Measure the GPU memory of a step, and what actions need besides while they run."""
    return allocator_peak(worker)


def clock_error_s(worker: Worker) -> float:
    """How far the device's clock may have drifted from the host's."""
    return worker.device.clock_error_s


def time_plain(worker: Worker, *, rounds: int) -> list[list[dict[str, float]]]:
    """Time F and B of this rank's stage in a plain loop without messages; see `time_compute`."""
    return [time_compute(worker, rounds)]


def time_steps(worker: Worker, *, executor: str | None, steps: int) -> list[list[tuple[int, int]]]:
    """Time whole steps, and nothing inside them.

    Parameters
    ----------
    worker : Worker
        This process.
    executor : str or None
        Which runtime runs them: one of PyTorch's (see `torch_schedules.PEERS`), or None for this project's.
    steps : int
        How many.

    Returns
    -------
    list of lists of (int, int)
        For this process, begin and end of each step, in nanoseconds on the first rank's clock.
    """
    if executor is not None:
        return [time_peer(worker, executor, steps)]
    times = []
    for batch in worker.undisturbed_batches(0, steps):
        began = now_ns()
        worker.step(batch, is_timed=False)
        times.append((began + worker.offset_ns, now_ns() + worker.offset_ns))
    return [times]
