"""Worker: what one process of a run holds: its ranks, with their stages and their ends of the links.

What a worker is asked to do is a task: a function of another room that takes the worker (see `ppexec.measure.tasks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import ppsim
from ppexec.config.config import RunConfig
from ppexec.machine.clock import offset_to_first_ns
from ppexec.machine.device import Device, Stream
from ppexec.machine.make_device import make_device
from ppexec.machine.mesh import build_mesh
from ppexec.machine.quiet import set_apart_what_stays, undisturbed
from ppexec.machine.waiting import sharpen_sleep
from ppexec.models.batch import Batch, load_batch, read_sample
from ppexec.models.load import load_model, refuse_what_does_not_fit
from ppexec.models.model import Model
from ppexec.models.shapes import Boundaries, BoundarySpec, TensorSpec, Tree, first_overwriting
from ppexec.stage.build import build_stage
from ppexec.stage.ledger import Ledger
from ppexec.stage.stage import Stage, act
from ppexec.stage.tensor_parallel import check_plan
from ppexec.stage.tied import TiedGradients
from ppexec.stage.timed import TimedStage, message_specs, timed_stages
from ppexec.transport.choice import TransportChoice
from ppexec.transport.transport import Transport
from ppexec.workers.runtime import Runtime, StepRecord
from ppsim import Kind, Program, StageCost
from ppsim.costs.partition import bounds

_Kept = TypeVar("_Kept")

OPTIMIZER = "optimizer"
"""Key under which a training keeps its optimizer in the worker."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One rank of the pipeline: its stages, the stream it computes on, its end of the links, and what runs them."""

    number: int
    stages: Mapping[int, Stage | TimedStage]
    compute: Stream
    transport: Transport
    runtime: Runtime


class Worker:
    """Built in every process of an initialised world, or in the only one of a pipeline whose ranks share a process.

    rank, dp_rank: this process's place in its pipeline and among the replicas. ranks: those of the pipeline that it
    holds: one, or all of them. group: the processes of its pipeline; None if it is the only one of the run.
    """

    def __init__(self, config: RunConfig, costs: Sequence[StageCost] | None = None) -> None:
        torch.set_num_threads(config.threads)
        set_apart_what_stays()
        self.config, self.costs = config, costs
        self.device: Device = make_device(config)
        self.mesh = None if config.backend == "local" else self._build_mesh()
        self.group: dist.ProcessGroup | None = None if self.mesh is None else self.mesh.get_group("pp")
        self.rank = 0 if self.mesh is None else self.mesh.get_local_rank("pp")
        self.dp_rank = 0 if self.mesh is None else self.mesh.get_local_rank("dp")
        self.program: Program = config.pipeline.program
        self.layer_bounds = bounds(config.layer_sizes)
        self._kept: dict[Any, Any] = {}
        held = range(config.ranks) if self.mesh is None else [self.rank]
        if costs is not None:
            sharpen_sleep()
            stages_of: dict[int, Mapping[int, Stage | TimedStage]] = {
                rank: timed_stages(
                    config.pipeline.stages_of(rank), costs, trains=not config.forward_only, device=self.device
                )
                for rank in held
            }
        else:
            self.model = load_model(config)
            check_plan(self.model, config.tp)
            refuse_what_does_not_fit(self.model, config)
            self._boundaries = Boundaries(
                self.model.layers,
                holder=config.pipeline.placement[0],
                group=self.group,
                device=self.device.torch_device,
            )
            (self.boundaries,) = self._boundaries.agree(lambda: [read_sample(self.model.sample, 0)[0]], 1)
            self.overwriting = first_overwriting(self.model.layers, self.boundaries[0])
            stages_of = {rank: self._real_stages(rank) for rank in held}
        self.transports = TransportChoice(
            group=self.group,
            mesh=self.mesh,
            device=self.device,
            window=config.receive_window,
            timeout_s=config.timeout_s,
        )
        self.stages: dict[int, Stage | TimedStage] = {
            index: stage for stages in stages_of.values() for index, stage in stages.items()
        }
        self.ranks = self.build_ranks(
            self.program, self.message_specs, stages_of, replicas=self.replicas, tied=self._tied()
        )
        self.sequence = sequence_of(self.program, held)
        self.offset_ns = 0 if self.group is None else offset_to_first_ns(self.group)
        if self.device.is_asynchronous and self.group is not None and costs is None:
            self._warm_up()

    def _warm_up(self) -> None:
        """Do every kind of action once before anything is received.

        On a GPU libraries, kernels and communicators start when first used, and wait then until the GPU is idle. In a
        step it may not be: receives that are posted ahead spin on it.
        """
        if self.replicas is not None:
            number = torch.ones(1, device=self.device.torch_device)
            self.replicas.allreduce([number]).wait()
            self.replicas.allreduce_coalesced([number]).wait()
        batch = self.load(0)
        for rank in self.ranks:
            for stage in (stage for stage in rank.stages.values() if isinstance(stage, Stage)):
                stage.begin(batch)
                actions = self.sample_actions(stage, batch)
                is_split = any(kind == Kind.W for kind, _ in actions)
                for kind, value in actions * 2:  # gradients are made, then added to
                    rank.compute.submit(partial(_act, stage, kind, value, batch, is_split), "warming up")
        self.device.synchronize()
        self.clear()

    def _build_mesh(self) -> DeviceMesh:
        config = self.config
        return build_mesh(dp=config.dp, pp=config.ranks, tp=config.tp, device_type=self.device.torch_device.type)

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """The processes of this pipeline. Raises ValueError if its ranks share one process."""
        if self.group is None:
            raise ValueError(
                "this takes a process for each rank, but backend 'local' has one for all: take gloo or nccl"
            )
        return self.group

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The processes that add up gradients with this one; None if there are none, or no gradients."""
        if self.mesh is None or self.config.dp == 1 or self.config.forward_only:
            return None
        return self.mesh.get_group("dp")

    def _real_stages(self, rank: int) -> dict[int, Stage]:
        """Of one rank. Ranks of one process have a model each, since its dropout knows one microbatch at a time."""
        model = self.model if rank == self.rank else load_model(self.config)
        return {stage: self._real_stage(stage, model) for stage in self.config.pipeline.stages_of(rank)}

    def _real_stage(self, stage: int, model: Model) -> Stage:
        config, (begin, end) = self.config, self.layer_bounds[stage]
        return build_stage(
            stage,
            model,
            range(begin, end),
            copies_input=self.overwriting[begin] < end,
            is_last=stage == config.pipeline.stages - 1,
            microbatches=config.microbatches * config.dp,
            trains=not config.forward_only,
            recompute=config.recompute,
            seed=config.seed,
            device=self.device.torch_device,
            mesh=None if self.mesh is None else self.mesh["tp"],
        )

    def _tied(self) -> TiedGradients | None:
        """Weights in two places of the model; None if there are none, or no gradients."""
        if self.costs is not None or self.config.forward_only or not self.model.tied:
            return None
        return TiedGradients(
            self.model.tied,
            stage_of=[stage for stage, size in enumerate(self.config.layer_sizes) for _ in range(size)],
            placement=self.config.pipeline.placement,
            modules={
                stage.first_layer + at: layer for stage in self.real_stages for at, layer in enumerate(stage.layers)
            },
            mesh=self.mesh,
        )

    def build_ranks(
        self,
        program: Program,
        specs: Sequence[TensorSpec],
        stages_of: Mapping[int, Mapping[int, Stage | TimedStage]],
        *,
        window: int | None = None,
        replicas: dist.ProcessGroup | None = None,
        tied: TiedGradients | None = None,
    ) -> list[Rank]:
        """The ranks of a program that this process holds, with the given stages. Collective.

        window: receives posted ahead on each link, instead of the run's.
        """
        ranks = []
        computes = {rank: self.device.compute_stream(rank, len(stages_of)) for rank in stages_of}
        found = self.transports.open(program, specs, computes, window=window)
        for rank, stages in stages_of.items():
            is_last = rank == max(stages_of)  # whose end is the end of all
            runtime = Runtime(
                program,
                rank,
                stages,
                found[rank],
                replicas=replicas,
                tied=tied if is_last else None,
                device=self.device,
                compute=computes[rank],
            )
            ranks.append(
                Rank(number=rank, stages=stages, compute=computes[rank], transport=found[rank], runtime=runtime)
            )
        return ranks

    @property
    def real_stages(self) -> list[Stage]:
        """The stages that compute."""
        return [stage for stage in self.stages.values() if isinstance(stage, Stage)]

    @property
    def message_specs(self) -> list[TensorSpec]:
        """Of each message, if all microbatches are like the model's first."""
        if self.costs is not None:
            return message_specs(self.program, self.costs)
        return self._specs_of([self.boundaries] * self.config.microbatches)

    def _specs_of(self, boundaries: Sequence[Sequence[BoundarySpec]]) -> list[TensorSpec]:
        """Of each message: between stages s and s + 1 what leaves the last layer of s, and its gradient."""
        program, messages = self.program, self.program.messages
        lower = np.minimum(program.stage[messages.producer], program.stage[messages.consumer]).tolist()
        crossed = [
            boundaries[microbatch][self.layer_bounds[stage][1]]
            for microbatch, stage in zip(program.microbatch[messages.producer].tolist(), lower, strict=True)
        ]
        is_ahead = (program.kind[messages.producer] == Kind.F).tolist()
        return [each.message if ahead else each.gradient for each, ahead in zip(crossed, is_ahead, strict=True)]

    def sample_actions(self, stage: Stage, batch: Batch) -> list[tuple[Kind, Tree | None]]:
        """Each kind of action that the program has for a stage, with a tensor such as it is given; in sequence."""
        rows = np.flatnonzero(self.program.stage == stage.index)
        first, last = stage.first_layer, stage.first_layer + len(stage.layers)
        device = self.device.torch_device

        def given(kind: Kind) -> Tree | None:
            if kind == Kind.W or (kind != Kind.F and stage.loss is not None):
                return None
            if kind == Kind.F and stage.is_first:
                return batch.inputs[0]
            spec = self.boundaries[first].message if kind == Kind.F else self.boundaries[last].gradient
            return torch.zeros(spec.shape, dtype=spec.dtype, device=device)

        kinds = [Kind(kind) for kind in dict.fromkeys(self.program.kind[rows].tolist())]
        return [(kind, given(kind)) for kind in kinds]

    def load(self, step: int) -> Batch:
        """This process's microbatches of a step; none where compute is timed."""
        if self.costs is not None:
            return Batch()
        batch = load_batch(
            self.model.sample,
            seed=self.config.seed,
            step=step,
            microbatches=self.config.microbatches,
            micro_batch_size=self.config.micro_batch_size,
            dp=self.config.dp,
            dp_rank=self.dp_rank,
            has_first=0 in self.stages,
            has_last=self.config.pipeline.stages - 1 in self.stages,
            device=self.device.torch_device,
        )
        batch.boundaries.extend(self._boundaries.agree(lambda: batch.inputs, self.config.microbatches))
        return batch

    def clear(self) -> None:
        """Forget gradients and losses of the step before."""
        for stage in self.stages.values():
            stage.clear()

    def undisturbed_batches(self, first: int, count: int) -> Iterator[Batch]:
        """The batches of `count` steps; all processes begin and end the body of the loop together."""
        for step in range(first, first + count):
            batch = self.load(step)
            self.clear()
            with undisturbed(self.mesh):
                yield batch

    def step(
        self,
        batch: Batch,
        *,
        ledgers: Mapping[int, Ledger] | None = None,
        keep_outputs: bool = False,
        is_timed: bool = True,
    ) -> list[StepRecord]:
        """One step; the record of each rank held here, on the first rank's clock."""
        records = run_step(
            self.device,
            self.ranks,
            self.sequence,
            batch,
            ledgers=ledgers,
            keep_outputs=keep_outputs,
            is_timed=is_timed,
        )
        for record in records:
            record.shift(self.offset_ns)
        return records

    def keep(self, key: Any, make: Callable[[], _Kept]) -> _Kept:
        """What a task needs again in its next call: made in the first, by the task's own key."""
        if key not in self._kept:
            self._kept[key] = make()
        return cast(_Kept, self._kept[key])

    def kept(self, key: Any) -> Any:
        """The same if it was made, else None."""
        return self._kept.get(key)

    def close(self) -> None:
        """Give the device back."""
        self._kept.clear()
        self.device.close()


def _act(stage: Stage, kind: Kind, value: Tree | None, batch: Batch, is_split: bool) -> None:
    act(stage, kind, 0, value, batch, split=is_split)


def run_step(
    device: Device,
    ranks: Sequence[Rank],
    sequence: Sequence[tuple[int, int]],
    batch: Batch,
    *,
    ledgers: Mapping[int, Ledger] | None = None,
    keep_outputs: bool = False,
    is_timed: bool = True,
) -> list[StepRecord]:
    """Submit the actions of all ranks held here, in sequence, and wait until the device has done them."""
    if is_timed:
        device.begin()
    for rank in ranks:
        rank.runtime.begin(batch, ledgers=ledgers, keep_outputs=keep_outputs, is_timed=is_timed)
    acts = [rank.runtime.act for rank in ranks]
    for held, action in sequence:
        acts[held](action)
    *others, last = ranks
    for rank in others:
        rank.runtime.end()
        last.compute.wait(rank.compute.record())
    last.runtime.end()
    device.synchronize()
    return [rank.runtime.record() for rank in ranks]


def sequence_of(program: Program, held: Sequence[int]) -> list[tuple[int, int]]:
    """(number among the held ranks, action of that rank), in a sequence in which no message is asked for too early.

    Of several ranks: as their actions would start if all took equally long.
    """
    if len(held) == 1:
        rank = held[0]
        return [(0, action) for action in range(int(program.rank_actions[rank + 1] - program.rank_actions[rank]))]
    unit = ppsim.StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    trace = ppsim.simulate(program.schedule, [unit] * program.schedule.stages)
    first_row = program.action_start[:-1]
    order = np.argsort(trace.start_s[first_row], kind="stable")
    rank_of = program.rank[first_row][order]
    place = {rank: at for at, rank in enumerate(held)}
    own = (order - program.rank_actions[rank_of]).tolist()
    return [(place[rank], action) for rank, action in zip(rank_of.tolist(), own, strict=True) if rank in place]
