"""Worker: one rank of a run: its stages, its end of the links, and what it can be asked to do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ppexec.calibrate.known_run import Exercise, Gym, message_specs, timed_stages
from ppexec.config.config import RunConfig
from ppexec.machine.clock import now_ns, offset_to_first_ns
from ppexec.machine.environment import ALLOCATOR, is_crowded
from ppexec.machine.mesh import build_mesh, meet
from ppexec.machine.quiet import set_apart_what_stays, undisturbed
from ppexec.measure.assemble import RankMemory
from ppexec.measure.link_probe import LinkSample, probe_links, probe_sizes
from ppexec.measure.ping import PingSample
from ppexec.measure.profile import LayerProfiler, LayerSamples
from ppexec.models.batch import Batch, load_batch, read_sample
from ppexec.models.load import load_model, refuse_what_does_not_fit
from ppexec.models.shapes import TensorSpec, agree_on_boundaries, first_overwriting
from ppexec.stage.gradient_sum import ReductionSample, probe_reduction
from ppexec.stage.ledger import Ledger, parameter_bytes, tensors_of
from ppexec.stage.stage import Stage, build_stage
from ppexec.stage.tensor_parallel import check_plan
from ppexec.stage.tied import TiedGradients
from ppexec.stage.timed import TimedStage, sharpen_sleep
from ppexec.train.train import Trainer
from ppexec.transport.choice import Carriers
from ppexec.transport.shared_memory import SharedTransport
from ppexec.verify.reference import Comparison, compare_with_reference
from ppexec.workers.runtime import Runtime, StepRecord
from ppsim import StageCost
from ppsim.costs.partition import bounds


class Worker:
    """Built in every process of an initialised world; its methods are called in all of them at once."""

    def __init__(self, config: RunConfig, costs: Sequence[StageCost] | None = None) -> None:
        torch.set_num_threads(config.threads)
        set_apart_what_stays()
        self.config = config
        self.device = torch.device("cpu")
        self.mesh = build_mesh(dp=config.dp, pp=config.ranks, tp=config.tp)
        self.group: dist.ProcessGroup = self.mesh.get_group("pp")
        self.rank = self.mesh.get_local_rank("pp")
        self.dp_rank = self.mesh.get_local_rank("dp")
        self.program = config.pipeline.program
        self.layer_bounds = bounds(config.layer_sizes)
        self.costs = costs
        self.stages: dict[int, Stage | TimedStage]
        if costs is not None:
            sharpen_sleep()
            held = config.pipeline.stages_of(self.rank)
            self.stages = {**timed_stages(held, costs, trains=not config.forward_only)}
        else:
            self.model = load_model(config)
            check_plan(self.model, config.tp)
            refuse_what_does_not_fit(self.model, config)
            self.boundaries = agree_on_boundaries(
                self.model.layers,
                lambda: read_sample(self.model.sample, 0)[0],
                holder=config.pipeline.placement[0],
                group=self.group,
            )
            self.overwriting = first_overwriting(self.model.layers, self.boundaries[0])
            self.stages = {stage: self._real_stage(stage) for stage in config.pipeline.stages_of(self.rank)}
        self.carriers = Carriers(
            self.group, window=config.receive_window, timeout_s=config.timeout_s, device=self.device
        )
        self.transport = self.carriers.open(self.program, self._message_specs())
        self.runtime = Runtime(
            self.program, self.rank, self.stages, self.transport, replicas=self._replicas(), tied=self._tied_gradients()
        )
        self.peers: dict[str, Callable[[Batch], Any]] = {}
        self.offset_ns = offset_to_first_ns(self.group)

    def _replicas(self) -> dist.ProcessGroup | None:
        """The ranks that add up gradients with this one; None if there are none, or no gradients."""
        return self.mesh.get_group("dp") if self.config.dp > 1 and not self.config.forward_only else None

    def _real_stage(self, stage: int) -> Stage:
        begin, end = self.layer_bounds[stage]
        return build_stage(
            stage,
            self.model,
            range(begin, end),
            copies_input=self.overwriting[begin] < end,
            is_last=stage == self.config.pipeline.stages - 1,
            microbatches=self.config.microbatches * self.config.dp,
            trains=not self.config.forward_only,
            recompute=self.config.recompute,
            seed=self.config.seed,
            device=self.device,
            mesh=self.mesh["tp"],
        )

    def _tied_gradients(self) -> TiedGradients | None:
        """Weights in two places of the model; None if there are none, or no gradients."""
        if self.costs is not None or self.config.forward_only or not self.model.tied:
            return None
        held = [stage for stage in self.stages.values() if isinstance(stage, Stage)]
        return TiedGradients(
            self.model.tied,
            stage_of=[stage for stage, size in enumerate(self.config.layer_sizes) for _ in range(size)],
            placement=self.config.pipeline.placement,
            modules={stage.first_layer + at: layer for stage in held for at, layer in enumerate(stage.layers)},
            mesh=self.mesh,
        )

    @property
    def _has_first(self) -> bool:
        return 0 in self.stages

    @property
    def _has_last(self) -> bool:
        return self.config.pipeline.stages - 1 in self.stages

    def _message_specs(self) -> list[TensorSpec]:
        """Between stages s and s + 1 both ways: what leaves the last layer of s."""
        program = self.program
        if self.costs is not None:
            return message_specs(program, self.costs)
        lower = [
            min(int(program.stage[a]), int(program.stage[b]))
            for a, b in zip(program.messages.producer, program.messages.consumer, strict=True)
        ]
        return [self.boundaries[self.layer_bounds[stage][1]] for stage in lower]

    def load(self, step: int) -> Batch:
        """This rank's microbatches of a step; none where compute is timed."""
        if self.costs is not None:
            return Batch()
        return load_batch(
            self.model.sample,
            seed=self.config.seed,
            step=step,
            microbatches=self.config.microbatches,
            micro_batch_size=self.config.micro_batch_size,
            dp=self.config.dp,
            dp_rank=self.dp_rank,
            has_first=self._has_first,
            has_last=self._has_last,
            device=self.device,
        )

    def clear(self) -> None:
        """Forget gradients and losses of the step before."""
        for stage in self.stages.values():
            stage.clear()

    def together(self, first: int, count: int) -> Iterator[Batch]:
        """The batches of `count` steps, each to be used undisturbed."""
        for step in range(first, first + count):
            batch = self.load(step)
            self.clear()
            with undisturbed(self.mesh):
                yield batch

    def measure(self, steps: int, first_step: int = 0) -> list[StepRecord]:
        """Run and time `steps` steps; times are on the first rank's clock."""
        records = []
        for batch in self.together(first_step, steps):
            record = self.runtime.step(batch)
            record.shift(self.offset_ns)
            records.append(record)
        return records

    def exercise(self, exercise: Exercise) -> StepRecord:
        """Run and time one step of a known schedule, in this world; times are on the first rank's clock."""
        self.gym.prepare(exercise)
        with undisturbed(self.mesh):
            record = self.gym.step(exercise)
        record.shift(self.offset_ns)
        return record

    @cached_property
    def gym(self) -> Gym:
        """This rank's end of exercises."""
        config = self.config
        return Gym(self.group, window=config.receive_window, timeout_s=config.timeout_s, device=self.device)

    def count_memory(self) -> RankMemory:
        """What this rank holds after each row's action, from one untimed step."""
        batch = self.load(0)
        is_timed = self.costs is not None
        footprints = {} if is_timed else self._profiler.footprints(batch)
        self.clear()
        ledgers = {}
        for index, stage in self.stages.items():
            older: list[torch.Tensor | torch.UntypedStorage] = [*batch.targets]
            if isinstance(stage, Stage):
                older += [*tensors_of(stage.layers), *footprints[index].older]
            ledgers[index] = Ledger(older)
        record = self.runtime.step(batch, ledgers=ledgers)
        layers = [layer for stage in self.stages.values() if isinstance(stage, Stage) for layer in stage.layers]
        return RankMemory(
            activation_bytes=record.levels,
            buffer_bytes=record.posted,
            gradient_bytes=None if is_timed else record.gradients,
            parameter_bytes=None if is_timed else parameter_bytes(layers),
            optimizer_bytes=self.trainer.optimizer_bytes if "trainer" in vars(self) else None,
        )

    def transport_name(self) -> str:
        """What carries this rank's messages."""
        return type(self.transport).__name__

    def receive_window(self) -> int:
        """How many receives are posted ahead on each link."""
        return self.transport.window

    def profile(self, rounds: int, first_step: int = 0, by_layer: bool = True) -> list[LayerSamples]:
        """Time this rank's stages and layers, in its order, at the same time as the other ranks time theirs."""
        return [self._profiler.round(batch, by_layer=by_layer) for batch in self.together(first_step, rounds)]

    @cached_property
    def _profiler(self) -> LayerProfiler:
        stages = {index: stage for index, stage in self.stages.items() if isinstance(stage, Stage)}
        # A rank that waits for a core computes nothing; threads of its own would hide from its clock.
        clock = time.thread_time_ns if is_crowded(self.config) and self.config.threads == 1 else now_ns
        return LayerProfiler(self.program, self.rank, stages, self.boundaries, self.overwriting, clock=clock)

    def probe(self) -> list[LinkSample]:
        """What a message costs on every link of the program, measured by its sender."""
        make_transport = self.carriers.maker() if isinstance(self.transport, SharedTransport) else None
        return probe_links(
            self.program, self._message_specs(), self.group, offset_ns=self.offset_ns, make_transport=make_transport
        )

    def probe_sizes(self, size_bytes: Sequence[int], rounds: int) -> list[PingSample]:
        """What messages of these sizes cost between any two ranks, measured by their senders."""
        return probe_sizes(
            size_bytes, self.group, rounds=rounds, offset_ns=self.offset_ns, make_transport=self.carriers.maker()
        )

    def probe_reductions(self) -> list[ReductionSample]:
        """What adding up this rank's gradients over the replicas takes, stage by stage; nothing without replicas.

        The ranks of a pipeline take turns, as they mostly do at the end of a step; those of tp go together.
        """
        replicas = self._replicas()
        samples: list[ReductionSample] = []
        for rank in range(self.config.ranks if replicas is not None else 0):
            meet(self.mesh)
            if rank == self.rank and replicas is not None:
                for stage in self.stages.values():
                    samples += probe_reduction(stage.blank_gradients(), replicas)
        return samples

    def message_bytes(self) -> list[int]:
        """The size of every message of the program."""
        return [spec.size_bytes for spec in self._message_specs()]

    def allocator(self) -> dict[str, str | None]:
        """This process's allocator settings."""
        return {name: os.environ.get(name) for name in ALLOCATOR}

    def time_compute(self, rounds: int) -> list[dict[str, float]]:
        """F and B of this rank's stage in a plain loop (see `torch_schedules`)."""
        from ppexec.measure.torch_schedules import time_compute

        return time_compute(self, rounds)

    def time_steps(self, executor: str | None, steps: int) -> list[tuple[int, int]]:
        """Begin and end of whole steps, of this project's runtime (None) or a peer's (see `torch_schedules`)."""
        from ppexec.measure.torch_schedules import time_ours, time_peer

        return time_ours(self, steps) if executor is None else time_peer(self, executor, steps)

    @cached_property
    def trainer(self) -> Trainer:
        """The optimizer of this rank's parameters, made when first needed."""
        return Trainer(self)

    def train(self, steps: int) -> list[dict[int, float]]:
        """Optimizer steps; of each the losses that this rank saw, by global microbatch."""
        return self.trainer.steps(steps)

    def next_step(self) -> int:
        """The number of the next step of a training."""
        return self.trainer.next_step

    def save_checkpoint(self, directory: Path) -> Path:
        """Write parameters and optimizer state; the folder."""
        return self.trainer.save(directory)

    def load_checkpoint(self, directory: Path) -> int:
        """Read them back; the number of the next step."""
        return self.trainer.load(directory)

    def nudge(self) -> None:
        """Move every parameter by one rounding (see `Trainer.nudge`)."""
        self.trainer.nudge()

    def verify(self) -> list[Comparison]:
        """Run a step and compare this rank's outputs and gradients with one process that has no pipeline."""
        batch = self.load(0)
        self.clear()
        meet(self.mesh)
        record = self.runtime.step(batch, keep_outputs=True)
        return compare_with_reference(self, record.outputs)
