"""Step table: many training steps as arrays, so that all are timed at once, on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ppsim.checks import checked
from ppsim.estimate.layer_times import LayerTable
from ppsim.estimate.layer_work import block_work, embedding_work, head_work
from ppsim.estimate.machine import Machine
from ppsim.estimate.work import Execution, LayerWork
from ppsim.planning.pipeline_times import pipeline_ends, pipeline_program
from ppsim.planning.training_step import TrainingStep
from ppsim.schedule.schedule import loop_placement

Seconds = npt.NDArray[np.float64]
# Adam with float32 copies of 2-byte weights: master weight and two moments read and written (24), gradient cast (6),
# its norm taken (4) and scaled (4), weight written (2).
OPTIMIZER_TRAFFIC_BYTES = 40


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Seconds of each step, arrays of shape (n,).

    step: from the first forward to the last updated weight. pipeline: until the last gradient. busy: what the busiest
    rank computes in that time, tensor-parallel communication included. tensor: that communication on the busiest rank.
    gradients: what replicas' sum takes besides. optimizer: the update. tied: the sum over a tied table's two copies.
    """

    step: Seconds
    pipeline: Seconds
    busy: Seconds
    tensor: Seconds
    gradients: Seconds
    optimizer: Seconds
    tied: Seconds


class StepTable:
    """Steps whose layers and messages are laid out once.

    Parameters
    ----------
    steps : sequence of TrainingStep
        n steps, of one model or of several.
    """

    def __init__(self, steps: Sequence[TrainingStep]) -> None:
        self._steps = list(steps)
        layers: list[tuple[LayerWork, Execution]] = []
        known: dict[object, tuple[int, int, int]] = {}
        self._layer = np.empty((len(steps), 3), np.int64)  # embedding, block, head
        for row, step in enumerate(steps):
            key = (replace(step.model, layers=1), step.execution)
            if key not in known:
                model, execution = step.padded_model, step.execution
                works = (embedding_work(model, execution), block_work(model, execution), head_work(model, execution))
                known[key] = (len(layers), len(layers) + 1, len(layers) + 2)
                layers += [(work, execution) for work in works]
            self._layer[row] = known[key]
        self._layers = [layer for layer, _ in layers]
        self._table = LayerTable(layers)
        self._tp, self._dp, self._pp = (
            np.array([getattr(step, name) for step in steps], np.float64) for name in ("tp", "dp", "pp")
        )
        self._microbatches = np.array([step.microbatches for step in steps], np.float64)
        self._groups: dict[tuple[str, int, int, int], list[int]] = {}
        for row, step in enumerate(steps):
            key_of_group = (step.schedule, step.pp, step.microbatches, step.stages_per_rank)
            self._groups.setdefault(key_of_group, []).append(row)
        self._parameters = self._rank_parameters()
        self._tables = np.array([step.padded_model.vocabulary * step.model.hidden / step.tp for step in steps])

    def __len__(self) -> int:
        return len(self._steps)

    def seconds(self, machine: Machine) -> StepSeconds:
        """All steps' seconds on a machine."""
        layer = self._table.seconds(machine)
        kinds = np.stack([layer.forward, layer.backward, layer.backward_input, layer.backward_weight])
        count = len(self._steps)
        pipeline, busy, tensor, gradients, optimizer, step = np.zeros((6, count))
        for (schedule, ranks, microbatches, chunks), rows in self._groups.items():
            blocks = np.array([self._steps[row].stage_blocks for row in rows], np.float64)
            which = self._layer[rows]
            stages = kinds[:, which[:, 1]][:, :, None] * blocks[None]
            stages[:, :, 0] += kinds[:, which[:, 0]]
            stages[:, :, -1] += kinds[:, which[:, 2]]
            shared = layer.communication[which[:, 1]][:, None] * blocks
            per_rank = stages[0] + stages[1]
            if ranks == 1:
                placement = np.zeros(chunks, np.int64)
                ends = (per_rank.sum(axis=1) * microbatches)[:, None]
            else:
                program = pipeline_program(schedule, ranks, microbatches, chunks)
                placement = np.array(program.schedule.placement, np.int64)
                ends = pipeline_ends(program, stages, *self._messages(machine, rows, ranks))
            holds = placement[None, :] == np.arange(ranks)[:, None]  # (ranks, stages)
            load = per_rank @ holds.T * microbatches
            busiest = load.argmax(axis=1)
            at = np.arange(len(rows))
            busy[rows], tensor[rows] = load[at, busiest], (shared @ holds.T * microbatches)[at, busiest]
            pipeline[rows] = ends.max(axis=1)
            summed, updated = self._update(machine, rows, stages[1] @ holds.T)
            last = (ends + summed + updated).argmax(axis=1)
            step[rows] = (ends + summed + updated)[at, last]
            gradients[rows] = (ends + summed)[at, last] - pipeline[rows]
            optimizer[rows] = updated[at, last]
        tied = self._tied(machine)
        return StepSeconds(
            step=step + tied,
            pipeline=pipeline,
            busy=busy,
            tensor=tensor,
            gradients=np.maximum(gradients, 0.0),
            optimizer=optimizer,
            tied=tied,
        )

    def rank_parameters(self, row: int) -> npt.NDArray[np.float64]:
        """Parameters on each rank of a step, shape (p,)."""
        return self._parameters[row]

    def _rank_parameters(self) -> list[npt.NDArray[np.float64]]:
        found = []
        for row, step in enumerate(self._steps):
            embedding, block, head = (self._layers[index].parameter_bytes / 2 for index in self._layer[row])
            stages = block * np.array(step.stage_blocks, np.float64)
            stages[0] += embedding
            # On one rank a tied table is there once.
            is_shared = step.model.tied and step.pp == 1
            stages[-1] += head - (step.padded_model.vocabulary * step.model.hidden / step.tp if is_shared else 0)
            placement = _placement(step)
            found.append(np.bincount(placement, weights=stages, minlength=step.pp).astype(np.float64))
        return found

    def _update(self, machine: Machine, rows: list[int], backward_s: Seconds) -> tuple[Seconds, Seconds]:
        """Seconds of the sum over replicas and of the optimizer, on each rank: two arrays of shape (rows, p)."""
        steps = [self._steps[row] for row in rows]
        parameters = np.stack([self._parameters[row] for row in rows])
        dp, tp = self._dp[rows][:, None], self._tp[rows][:, None]
        is_cut = np.array([step.sharding == "optimizer" for step in steps])[:, None]
        wide = np.array([step.gradient_bytes for step in steps])[:, None]
        overlap = np.array([step.overlap_gradients for step in steps])[:, None]
        scattered = machine.reduce_scatter_s(wide * parameters, dp, tp)
        gathered = machine.reduce_scatter_s(2 * parameters, dp, tp)
        summed = np.where(is_cut, scattered, machine.all_reduce_s(wide * parameters, dp, tp))
        exposed = np.maximum(summed - overlap * backward_s, 0.0) + np.where(is_cut, gathered, 0.0)
        exposed = np.where(dp > 1, exposed, 0.0)
        owned = parameters / np.where(is_cut, dp, 1)
        return exposed, machine.moving_s(OPTIMIZER_TRAFFIC_BYTES * owned)

    def _messages(self, machine: Machine, rows: list[int], ranks: int) -> tuple[Seconds, Seconds]:
        """What a message takes from rank to rank: occupied and latency, arrays of shape (rows, p, p).

        Each tensor-parallel rank sends its share, and the receivers gather them (Narayanan et al., SC 2021, section
        4.1); with sequence parallelism the share is all there is to send.
        """
        size = np.array([self._layers[self._layer[row, 1]].output_bytes for row in rows], np.float64)
        is_cut = np.array([self._steps[row].execution.sequence_parallel for row in rows])
        tp, wide = self._tp[rows], self._tp[rows] * self._dp[rows]
        node = np.arange(ranks)[None, :] * wide[:, None] // machine.devices_per_node
        last = (np.arange(1, ranks + 1)[None, :] * wide[:, None] - 1) // machine.devices_per_node
        # Replicas that share a node with the next rank's do not wait for the slowest that do not: the slowest counts.
        crosses = (node[:, :, None] != node[:, None, :]) | (last[:, :, None] != last[:, None, :])
        share = np.where(is_cut, size, size / tp)
        occupied, latency = machine.message_s(share[:, None, None], crosses)
        gather = np.where(is_cut | (tp == 1), 0.0, machine.reduce_scatter_s(size, tp))
        return occupied, latency + gather[:, None, None]

    def _tied(self, machine: Machine) -> Seconds:
        """The first and the last rank add up their gradients of a tied table."""
        wide = np.array([step.gradient_bytes for step in self._steps])
        is_tied = np.array([step.model.tied and step.pp > 1 for step in self._steps])
        apart = self._tp * self._dp * (self._pp - 1)
        occupied, latency = machine.message_s(wide * self._tables, apart + 1 > machine.devices_per_node)
        return np.where(is_tied, occupied + latency, 0.0)


def _placement(step: TrainingStep) -> npt.NDArray[np.int64]:
    if step.pp == 1:
        return np.zeros(step.stages, np.int64)
    if step.stages_per_rank == 1:
        return np.array(loop_placement(step.pp), np.int64)
    program = pipeline_program(step.schedule, step.pp, step.microbatches, step.stages_per_rank)
    return np.array(program.schedule.placement, np.int64)


@checked
def predict_steps(steps: Sequence[TrainingStep], machine: Machine) -> StepSeconds:
    """Predict the seconds of training steps on a machine.

    Parameters
    ----------
    steps : sequence of TrainingStep
        n steps, of one model or of several.
    machine : Machine
        What kernels, collectives and messages take.

    Returns
    -------
    StepSeconds
        Arrays of shape (n,).

    Notes
    -----
    A layer takes what its kernels and collectives take on the device, or its operations' launches on the host if that
    is longer. The pipeline is simulated, message by message. Then each rank adds up its gradients over the replicas,
    as far as that does not hide under the last backward, and updates its weights; the slowest rank ends the step.

    Examples
    --------
    >>> import ppsim
    >>> gpt = ppsim.Transformer.gpt(layers=24, hidden=2048, heads=16, vocabulary=51_200, positions=1024)
    >>> steps = [ppsim.TrainingStep(model=gpt, seq=1024, micro_batch_size=4, microbatches=8, pp=p) for p in (2, 4)]
    >>> predicted = predict_steps(steps, ppsim.named_machine("a100"))
    >>> bool(predicted.step[1] < predicted.step[0])
    True
    """
    return StepTable(steps).seconds(machine)
