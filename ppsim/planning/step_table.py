"""Step table: many training steps as arrays, so that all are timed at once, on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.checks import checked
from ppsim.estimate.layer_times import LayerSeconds, LayerTable
from ppsim.estimate.machine import Machine
from ppsim.estimate.work import Execution, LayerWork
from ppsim.planning.pipeline_times import pipeline_ends, pipeline_program, splits_backward
from ppsim.planning.training_step import TrainingStep, measured_factors

Seconds = npt.NDArray[np.float64]
# Adam with float32 copies of 2-byte weights: master weight and two moments read and written (24), gradient cast (6),
# its norm taken (4) and scaled (4), weight written (2).
OPTIMIZER_TRAFFIC_BYTES = 40


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Seconds of each step, arrays of shape (n,).

    step: from the first forward to the last updated weight. pipeline: until the last gradient. busy: what the busiest
    rank computes in that time, communication included. tensor: of tensor- and context-parallel ranks, experts: of
    experts, both on the busiest rank.
    gradients: what replicas' sum takes besides. optimizer: the update. tied: the sum over a tied table's two copies.
    """

    step: Seconds
    pipeline: Seconds
    busy: Seconds
    tensor: Seconds
    experts: Seconds
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
        known: dict[object, int] = {}
        self._first = np.empty(len(steps), np.int64)  # the embedding; a block of each kind and the head come after it
        for row, step in enumerate(steps):
            if step.layer_key not in known:
                known[step.layer_key] = len(layers)
                layers += [(work, step.execution) for work in step.layer_works.layers]
            self._first[row] = known[step.layer_key]
        self._keys = list({step.layer_key: None for step in steps})
        self._layers = [layer for layer, _ in layers]
        self._table = LayerTable(layers)
        self._tp, self._replicas, self._pp = (
            np.array([getattr(step, name) for step in steps], np.float64) for name in ("tp", "replicas", "pp")
        )
        self._microbatches = np.array([step.microbatches for step in steps], np.float64)
        self._groups: dict[tuple[str, int, int, int], list[int]] = {}
        for row, step in enumerate(steps):
            key_of_group = (step.schedule, step.pp, step.microbatches, step.stages_per_rank)
            self._groups.setdefault(key_of_group, []).append(row)
        self._tables = np.array([step.table_parameters for step in steps], np.float64)

    def __len__(self) -> int:
        return len(self._steps)

    def seconds(self, machine: Machine, rows: Sequence[int] | None = None) -> StepSeconds:
        """The seconds on a machine of all steps, or of those named; arrays of shape (n,) either way."""
        layer = self._table.seconds(machine, measured_factors(self._keys, machine))
        count = len(self._steps)
        pipeline, busy, tensor, experts, gradients, optimizer, step = np.full((7, count), np.nan)
        for group in self._grouped(rows):
            stages = self._stages(layer, group)
            ends = self._ends(machine, group, stages)
            at, load = np.arange(len(group.rows)), stages.load
            busiest = load.argmax(axis=1)
            busy[group.rows], tensor[group.rows] = load[at, busiest], stages.tensor[at, busiest]
            experts[group.rows] = stages.experts[at, busiest]
            pipeline[group.rows] = ends.max(axis=1)
            summed, updated = self._update(machine, group.rows, stages.backward)
            last = (ends + summed + updated).argmax(axis=1)
            step[group.rows] = (ends + summed + updated)[at, last]
            gradients[group.rows] = np.maximum((ends + summed)[at, last] - pipeline[group.rows], 0.0)
            optimizer[group.rows] = updated[at, last]
        tied = self._tied(machine)
        return StepSeconds(
            step=step + tied,
            pipeline=pipeline,
            busy=busy,
            tensor=tensor,
            experts=experts,
            gradients=gradients,
            optimizer=optimizer,
            tied=tied,
        )

    def bounds_s(self, machine: Machine) -> Seconds:
        """Seconds that no order of any schedule beats, by step: cheap, and never above what `seconds` says.

        A rank starts once the stages before its first one have passed on the first microbatch, and then computes all
        its work; where backwards are not split, the stages before that one come after its last backward as well.
        """
        layer = self._table.seconds(machine, measured_factors(self._keys, machine))
        found = np.empty(len(self._steps))
        for group in self._grouped(None):
            stages = self._stages(layer, group)
            lowest = stages.holds.argmax(axis=1)
            forward, backward = stages.kinds[0], stages.kinds[1]
            before = np.concatenate([np.zeros((len(group.rows), 1)), np.cumsum(forward, axis=1)], axis=1)[:, lowest]
            after = np.concatenate([np.zeros((len(group.rows), 1)), np.cumsum(backward, axis=1)], axis=1)[:, lowest]
            summed, updated = self._update(machine, group.rows, stages.backward)
            own = before + stages.least_load
            ends = (own + summed + updated).max(axis=1)
            if not group.is_split:
                first = int(stages.holds[:, 0].argmax())
                ends = np.maximum(ends, (own + after).max(axis=1) + (summed + updated)[:, first])
            found[group.rows] = ends
        return found + self._tied(machine)

    def _grouped(self, rows: Sequence[int] | None) -> list[_Group]:
        """Steps of one program together: those named, or all."""
        chosen = None if rows is None else set(rows)
        groups = []
        for (schedule, ranks, microbatches, chunks), members in self._groups.items():
            kept = members if chosen is None else [row for row in members if row in chosen]
            if kept:
                groups.append(_Group(schedule, ranks, microbatches, chunks, kept))
        return groups

    def _stages(self, layer: LayerSeconds, group: _Group) -> _Stages:
        counts = [self._steps[row].stage_kinds for row in group.rows]
        number = np.array([each.shape[1] for each in counts])
        # Blocks of each kind, shape (rows, stages, kinds); 0 of kinds that a model lacks.
        blocks = np.zeros((len(counts), len(counts[0]), number.max()))
        for row, each in enumerate(counts):
            blocks[row, :, : each.shape[1]] = each
        first = self._first[group.rows]
        which = first[:, None] + 1 + np.minimum(np.arange(number.max()), number[:, None] - 1)
        kinds = np.stack([layer.forward, layer.backward, layer.backward_input, layer.backward_weight])
        stages = np.einsum("crk,rsk->crs", kinds[:, which], blocks)
        stages[:, :, 0] += kinds[:, first]
        stages[:, :, -1] += kinds[:, first + number + 1]
        placement = self._steps[group.rows[0]].placement
        holds = (placement[None, :] == np.arange(group.ranks)[:, None]).astype(np.float64)
        tensor, experts = (
            np.einsum("rk,rsk->rs", each[which], blocks) @ holds.T * group.microbatches
            for each in (layer.communication - layer.exchange, layer.exchange)
        )
        return _Stages(kinds=stages, holds=holds, tensor=tensor, experts=experts, group=group)

    def _ends(self, machine: Machine, group: _Group, stages: _Stages) -> Seconds:
        """When each rank ends, shape (rows, p)."""
        if group.ranks == 1:
            return stages.load
        program = pipeline_program(group.schedule, group.ranks, group.microbatches, group.chunks)
        return pipeline_ends(program, stages.kinds, *self._messages(machine, group.rows, group.ranks))

    def _update(self, machine: Machine, rows: list[int], backward_s: Seconds) -> tuple[Seconds, Seconds]:
        """Seconds of the sum over replicas and of the optimizer, on each rank: two arrays of shape (rows, p)."""
        steps = [self._steps[row] for row in rows]
        experts = np.stack([step.rank_expert_parameters for step in steps])
        others = np.stack([step.rank_parameters for step in steps]) - experts
        dp, tp = self._replicas[rows][:, None], self._tp[rows][:, None]
        copies = np.array([step.expert_replicas for step in steps], np.float64)[:, None]
        is_cut = np.array([step.sharding == "optimizer" for step in steps])[:, None]
        wide = np.array([step.gradient_bytes for step in steps])[:, None]
        overlap = np.array([step.overlap_gradients for step in steps])[:, None]
        summed, gathered = np.zeros((2, *experts.shape))
        # Experts have their copies on other ranks than the rest.
        for parameters, replicas, stride in ((others, dp, tp), (experts, copies, tp * dp / copies)):
            if not parameters.any():
                continue
            is_summed = (replicas > 1) & (parameters > 0)
            # Most often all steps are of one kind, and the other is not asked for: small calls count here.
            if not is_cut.all():
                whole = machine.all_reduce_s(wide * parameters, replicas, stride)
                summed += np.where(is_summed & ~is_cut, whole, 0.0)
            if is_cut.any():
                scattered = machine.reduce_scatter_s(wide * parameters, replicas, stride)
                again = machine.reduce_scatter_s(2 * parameters, replicas, stride)
                summed += np.where(is_summed & is_cut, scattered, 0.0)
                gathered += np.where(is_summed & is_cut, again, 0.0)
        exposed = np.maximum(summed - overlap * backward_s, 0.0) + gathered
        owned = np.where(is_cut, others / dp + experts / copies, others + experts)
        return exposed, machine.moving_s(OPTIMIZER_TRAFFIC_BYTES * owned)

    def _messages(self, machine: Machine, rows: list[int], ranks: int) -> tuple[Seconds, Seconds]:
        """What a message takes from rank to rank: occupied and latency, arrays of shape (rows, p, p).

        Each tensor-parallel rank sends its share, and the receivers gather them (Narayanan et al., SC 2021, section
        4.1); with sequence parallelism the share is all there is to send.
        """
        size = np.array([self._layers[self._first[row] + 1].output_bytes for row in rows], np.float64)
        is_cut = np.array([self._steps[row].execution.sequence_parallel for row in rows])
        tp, wide = self._tp[rows], self._tp[rows] * self._replicas[rows]
        node = np.arange(ranks)[None, :] * wide[:, None] // machine.devices_per_node
        last = (np.arange(1, ranks + 1)[None, :] * wide[:, None] - 1) // machine.devices_per_node
        # Replicas may differ: if any replica's message crosses nodes, all are timed as crossing.
        crosses = (node[:, :, None] != node[:, None, :]) | (last[:, :, None] != last[:, None, :])
        share = np.where(is_cut, size, size / tp)
        occupied, latency = machine.message_s(share[:, None, None], crosses)
        gather = np.where(is_cut | (tp == 1), 0.0, machine.reduce_scatter_s(size, tp))
        return occupied, latency + gather[:, None, None]

    def _tied(self, machine: Machine) -> Seconds:
        """The first and the last rank add up their gradients of a tied table."""
        wide = np.array([step.gradient_bytes for step in self._steps])
        is_tied = np.array([step.model.tied and step.pp > 1 for step in self._steps])
        apart = self._tp * self._replicas * (self._pp - 1)
        occupied, latency = machine.message_s(wide * self._tables, apart + 1 > machine.devices_per_node)
        return np.where(is_tied, occupied + latency, 0.0)


class _Group(NamedTuple):
    """Steps that run the same program."""

    schedule: str
    ranks: int
    microbatches: int
    chunks: int
    rows: list[int]

    @property
    def is_split(self) -> bool:
        """Whether some backward is split into I and W; one rank alone computes its layers one after another."""
        return self.ranks > 1 and splits_backward(self.schedule)


@dataclass(frozen=True, kw_only=True)
class _Stages:
    """kinds: seconds of F, B, I, W, shape (4, rows, stages). holds: 1 where a rank has a stage, shape (p, stages)."""

    kinds: Seconds
    holds: Seconds
    tensor: Seconds
    experts: Seconds
    group: _Group

    @property
    def backward(self) -> Seconds:
        """Of one microbatch on each rank, shape (rows, p)."""
        return np.asarray(self.kinds[1] @ self.holds.T)

    @property
    def load(self) -> Seconds:
        """What each rank computes in a step, shape (rows, p)."""
        second = self.kinds[2] + self.kinds[3] if self.group.is_split else self.kinds[1]
        return np.asarray((self.kinds[0] + second) @ self.holds.T * self.group.microbatches)

    @property
    def least_load(self) -> Seconds:
        """The same, with whichever backward is cheaper: schedules may split some backwards and not others."""
        second = np.minimum(self.kinds[2] + self.kinds[3], self.kinds[1]) if self.group.is_split else self.kinds[1]
        return np.asarray((self.kinds[0] + second) @ self.holds.T * self.group.microbatches)


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
    A layer takes what its kernels take on the device, or its operations' launches on the host if that is longer, and
    its collectives; where the machine has a factor for layers of its shape, so many times as long. The pipeline
    is simulated, message by message. Then each rank adds up its gradients over the replicas, as far as that does not
    hide under the last backward, and updates its weights; the slowest rank ends the step.

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
