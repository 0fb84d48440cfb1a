"""Worker: what one process of a run holds: its ranks, with their stages and their ends of the links.

A worker is asked to do tasks. A task is a function that takes the worker, such as those in `ppexec.measure.tasks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ppexec.config.config import RunConfig
from ppexec.machine.clock import offset_to_first_ns
from ppexec.machine.device import Device
from ppexec.machine.make_device import make_device
from ppexec.machine.mesh import build_mesh
from ppexec.machine.quiet import freeze_what_stays, undisturbed
from ppexec.machine.waiting import sharpen_sleep
from ppexec.models.batch import Batch, load_batch, read_sample
from ppexec.models.boundaries import Boundaries
from ppexec.models.load import load_model, refuse_what_does_not_fit
from ppexec.models.model import Model
from ppexec.models.seeds import HELD_OUT
from ppexec.models.shapes import BoundarySpec, TensorSpec, Tree
from ppexec.stage.actions import act
from ppexec.stage.build import build_stage
from ppexec.stage.copied import copy_groups
from ppexec.stage.ledger import Ledger
from ppexec.stage.stage import Stage
from ppexec.stage.tensor_parallel import check_plan
from ppexec.stage.timed import TimedStage, message_specs, timed_stages
from ppexec.transport.choice import TransportChoice
from ppexec.workers.loss_weights import LossWeights
from ppexec.workers.progress import Board, RankProgress
from ppexec.workers.rank import Rank, run_step, sequence_of
from ppexec.workers.runtime import GradientSums, Runtime
from ppexec.workers.step_record import StepRecord
from ppexec.workers.sums_at_end import sums_at_end
from ppsim import Kind, Program, StageCost
from ppsim.costs.partition import bounds
from ppsim.errors import InputError
from ppsim.schedule.streams import Streams

_Kept = TypeVar("_Kept")

OPTIMIZER = "optimizer"
"""Key under which training keeps its optimizer in the worker."""


class Worker:
    """The state of one process of a run. Each process builds one after it has joined the world.

    Parameters
    ----------
    config : RunConfig
        The run.
    costs : sequence of StageCost, optional
        If given, stages do not compute but wait for as long as these costs say.
    board : str, optional
        Address of the board where the ranks write what they do.

    Attributes
    ----------
    rank, dp_rank : int
        This process's number in its pipeline, and that of its replica. Both 0 in a run of one process.
    pipeline : Schedule
        That of its replica.
    ranks : list of Rank
        The ranks that this process holds: one of them, or all with backend "local".
    group : ProcessGroup or None
        The processes of this pipeline; None in a run of one process.
    offset_ns : int
        What to add to this process's clock to read the first rank's.

    Raises
    ------
    InputError
        If the model or the configuration cannot be run.
    """

    def __init__(
        self, config: RunConfig, costs: Sequence[StageCost] | None = None, *, board: str | None = None
    ) -> None:
        torch.set_num_threads(config.threads)
        freeze_what_stays()
        self.config, self.costs = config, costs
        self.device: Device = make_device(config)
        self.mesh = None if config.backend == "local" else self._build_mesh()
        self.group: dist.ProcessGroup | None = None if self.mesh is None else self.mesh.get_group("pp")
        self.rank = 0 if self.mesh is None else self.mesh.get_local_rank("pp")
        self.dp_rank = 0 if self.mesh is None else self.mesh.get_local_rank("dp")
        self.pipeline = config.pipelines[self.dp_rank]
        self.program: Program = self.pipeline.program
        self.layer_bounds = bounds(config.layer_sizes) * self.pipeline.copies
        self._kept: dict[Any, Any] = {}
        self._odd_losses: dict[tuple[int, int, int], float] = {}
        held = range(config.ranks) if self.mesh is None else [self.rank]
        if costs is not None:
            sharpen_sleep()
            stages_of: dict[int, Mapping[int, Stage | TimedStage]] = {
                rank: timed_stages(
                    self.pipeline.stages_of(rank),
                    costs,
                    trains=not config.forward_only,
                    device=self.device,
                    copies=self.pipeline.copies,
                )
                for rank in held
            }
        else:
            self.model = load_model(config)
            check_plan(self.model, config.tp)
            refuse_what_does_not_fit(self.model, config)
            self._boundaries = Boundaries(
                self.model.layers,
                holder=self.pipeline.placement[0],
                group=self.group,
                device=self.device.torch_device,
            )
            (self.boundaries,) = self._boundaries.agree(lambda: [read_sample(self.model.sample, 0)[0]], 1)
            self.overwriting = self._boundaries.overwriting
            stages_of = {rank: self._real_stages(rank) for rank in held}
        self.transports = TransportChoice(
            group=self.group,
            mesh=self.mesh,
            device=self.device,
            window=config.receive_window,
            timeout_s=config.longest_wait_s,
        )
        self.stages: dict[int, Stage | TimedStage] = {
            index: stage for stages in stages_of.values() for index, stage in stages.items()
        }
        self.loss_weights = LossWeights(
            config,
            "mean" if costs is not None else self.model.reduction,
            self.pipeline.microbatches,
            self.mesh,
            self.device.torch_device,
        )
        at_end: list[GradientSums] = []
        if costs is None and not config.forward_only:
            at_end = sums_at_end(self.model, self.pipeline, config.stage_of_layers, self.real_stages, self.mesh)
        # All are like the model's first.
        self._open_shapes = [] if costs is not None else [self.boundaries[0].name] * self.pipeline.microbatches
        self.ranks = self.build_ranks(
            self.program,
            self.message_specs,
            stages_of,
            holders=self.holders,
            at_end=at_end,
            progress=None if board is None else self._progress(board, held),
            records=config.graphs and costs is None,
            streams=config.streams,
        )
        self.sequence = sequence_of(self.program, held)
        self.offset_ns = 0 if self.group is None else offset_to_first_ns(self.group)
        if self.device.is_asynchronous and self.group is not None and costs is None:
            self._warm_up()
        if config.graphs and costs is None:  # so that no step that is measured waits for a rank that records
            self.step(self.load(0), is_timed=False)
            self.clear()

    def _warm_up(self) -> None:
        """Do every kind of action once before anything is received.

        On a GPU, libraries, kernels and communicators are set up at their first use, and setting up waits until the GPU
        is idle. In a step it would wait for ever, since receives that are posted ahead keep the GPU busy.
        """
        number = torch.ones(1, device=self.device.torch_device)
        for index in sorted(self.holders, key=lambda index: index % self.pipeline.model_stages):
            self.holders[index].allreduce([number]).wait()
            self.holders[index].allreduce_coalesced([number]).wait()
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
        """The processes of this pipeline; raises InputError if its ranks share one process."""
        if self.group is None:
            raise InputError(
                "this needs a process for each rank, but backend 'local' has one for all: take gloo or nccl"
            )
        return self.group

    @cached_property
    def holders(self) -> dict[int, dist.ProcessGroup]:
        """For each stage of this process those who add up its gradients; empty if none other does, or in an evaluation.

        Collective, when it is first asked for.
        """
        if self.mesh is None or self.config.forward_only:
            return {}
        pipeline = self.pipeline
        if pipeline.copies > 1:
            return copy_groups(pipeline.placement, pipeline.copies, self.mesh)
        if self.config.dp == 1:
            return {}
        return dict.fromkeys(pipeline.stages_of(self.rank), self.mesh.get_group("dp"))

    @property
    def has_first(self) -> bool:
        """Whether this process holds a first stage, whose input is data."""
        return any(stage % self.pipeline.model_stages == 0 for stage in self.stages)

    @property
    def has_last(self) -> bool:
        """Whether this process holds a last stage, which computes the loss."""
        return any((stage + 1) % self.pipeline.model_stages == 0 for stage in self.stages)

    def _real_stages(self, rank: int) -> dict[int, Stage]:
        """One rank's stages. Ranks of one process have a model each: its dropout works on one microbatch at a time."""
        model = self.model if rank == self.rank else load_model(self.config)
        return {stage: self._real_stage(stage, model) for stage in self.pipeline.stages_of(rank)}

    def _real_stage(self, stage: int, model: Model) -> Stage:
        config, (begin, end) = self.config, self.layer_bounds[stage]
        pipeline = self.pipeline
        return build_stage(
            stage,
            model,
            range(begin, end),
            copies_input=self.overwriting[begin] < end,
            is_first=stage % pipeline.model_stages == 0,
            is_last=(stage + 1) % pipeline.model_stages == 0,
            microbatches=config.step_microbatches,
            replicated=config.dp * pipeline.copies > 1,
            trains=not config.forward_only,
            recompute=config.recompute,
            seed=config.seed,
            device=self.device.torch_device,
            mesh=None if self.mesh is None else self.mesh["tp"],
            shard_mesh=self.mesh["dp"] if self.mesh is not None and config.is_sharded else None,
        )

    def _progress(self, address: str, held: Sequence[int]) -> dict[int, RankProgress]:
        """Where each rank of this process writes what it does."""
        config = self.config
        programs = [pipeline.program for pipeline in config.pipelines]
        board = Board.open(programs, config.dp * config.ranks * config.tp, address)
        tp_rank = 0 if self.mesh is None else self.mesh.get_local_rank("tp")
        return {rank: board.of_rank((self.dp_rank * config.ranks + rank) * config.tp + tp_rank) for rank in held}

    def build_ranks(
        self,
        program: Program,
        specs: Sequence[TensorSpec],
        stages_of: Mapping[int, Mapping[int, Stage | TimedStage]],
        *,
        window: int | None = None,
        holders: Mapping[int, dist.ProcessGroup] | None = None,
        at_end: Sequence[GradientSums] = (),
        progress: Mapping[int, RankProgress] | None = None,
        records: bool = False,
        streams: Streams = "link",
    ) -> list[Rank]:
        """Build the ranks of a program that this process holds. Collective.

        Parameters
        ----------
        program : Program
            What they run.
        specs : sequence of TensorSpec, shape (messages,)
            Shape and type of each message.
        stages_of : mapping
            Rank -> its stages by number, for the ranks of this process.
        window : int, optional
            Receives posted ahead on each link; the run's if not given.
        holders : mapping, optional
            Stage -> the processes to add up its gradients with.
        at_end : sequence of GradientSums
            Gradients that are added up at the end of a step, one after the other.
        progress : mapping, optional
            Rank -> where it writes what it does.
        records : bool
            Whether actions are recorded and replayed.
        streams : "link", "pair" or "rank"
            Who has a communicator.

        Returns
        -------
        list of Rank
        """
        ranks = []
        computes = {rank: self.device.compute_stream(rank, len(stages_of)) for rank in stages_of}
        found = self.transports.open(program, specs, computes, window=window, streams=streams)
        for rank, stages in stages_of.items():
            is_last = rank == max(stages_of)  # it ends its step after the others of this process
            runtime = Runtime(
                program,
                rank,
                stages,
                found[rank],
                holders=holders,
                at_end=at_end if is_last else (),
                device=self.device,
                compute=computes[rank],
                progress=None if progress is None else progress[rank],
                records=records,
            )
            ranks.append(
                Rank(number=rank, stages=stages, compute=computes[rank], transport=found[rank], runtime=runtime)
            )
        return ranks

    @property
    def real_stages(self) -> list[Stage]:
        """The stages of this process that compute; none where compute is timed."""
        return [stage for stage in self.stages.values() if isinstance(stage, Stage)]

    @property
    def message_specs(self) -> list[TensorSpec]:
        """The spec of each message if all microbatches are like the model's first."""
        if self.costs is not None:
            return message_specs(self.program, self.costs)
        return self.specs_of(self.program, [self.boundaries] * self.pipeline.microbatches)

    def specs_of(self, program: Program, boundaries: Sequence[Sequence[BoundarySpec]]) -> list[TensorSpec]:
        """The spec of each message: between stages s and s + 1 the output of the last layer of s, or its gradient.

        boundaries: of each microbatch.
        """
        messages = program.messages
        lower = np.minimum(program.stage[messages.producer], program.stage[messages.consumer]).tolist()
        crossed = [
            boundaries[microbatch][self.layer_bounds[stage][1]]
            for microbatch, stage in zip(program.microbatch[messages.producer].tolist(), lower, strict=True)
        ]
        is_ahead = (program.kind[messages.producer] == Kind.F).tolist()
        return [each.message if ahead else each.gradient for each, ahead in zip(crossed, is_ahead, strict=True)]

    def sample_actions(self, stage: Stage, batch: Batch) -> list[tuple[Kind, Tree | None]]:
        """Each kind of action that the program has for a stage, in its sequence, with an input to run it on.

        Where the stage has both B and I, as in DualPipeV, an F comes before each.
        """
        rows = np.flatnonzero(self.program.stage == stage.index)
        first, last = stage.first_layer, stage.first_layer + len(stage.layers)
        device = self.device.torch_device

        def given(kind: Kind) -> Tree | None:
            if kind == Kind.W or (kind != Kind.F and stage.loss is not None):
                return None
            if kind == Kind.F and stage.is_first:
                return batch.inputs[0]
            boundaries = batch.boundaries[0]
            spec = boundaries[first].message if kind == Kind.F else boundaries[last].gradient
            return torch.zeros(spec.shape, dtype=spec.dtype, device=device)

        present = set(self.program.kind[rows].tolist())
        ways = [way for way in ([Kind.F, Kind.B], [Kind.F, Kind.I, Kind.W]) if present.issuperset(way)]
        return [(kind, given(kind)) for way in ways or [[Kind.F]] for kind in way]

    def load(self, step: int) -> Batch:
        """This process's microbatches of a step; empty where compute is timed."""
        return self.load_rounds(step, 1)[0]

    def load_rounds(self, step: int, rounds: int, *, held_out: bool = False) -> list[Batch]:
        """This process's microbatches of each round of a step, which together make its loss. Collective.

        With `held_out` those of an evaluation, whose steps count from 0.
        """
        if self.costs is not None:
            return [Batch()] * rounds
        batches = [self._load(step, rounds, number, held_out=held_out) for number in range(rounds)]
        if batches[0].targets:
            self.loss_weights.share(batches)
        return batches

    def _load(self, step: int, rounds: int, round_number: int, *, held_out: bool) -> Batch:
        own = self.model.held_out if held_out else None
        batch = load_batch(
            own or self.model.sample,
            seed=self.config.seed,
            step=step,
            microbatches=self.config.microbatches_by_replica,
            samples_of=self.config.samples_of,
            dp_rank=self.dp_rank,
            rounds=rounds,
            round_number=round_number,
            first_index=HELD_OUT if held_out and own is None else 0,
            has_first=self.has_first,
            has_last=self.has_last,
            device=self.device.torch_device,
        )
        batch.boundaries.extend(self._boundaries.agree(lambda: batch.inputs, self.pipeline.microbatches))
        batch.shapes.extend(boundaries[0].name for boundaries in batch.boundaries)
        return batch

    def open_for(self, batch: Batch, program: Program, ranks: Sequence[Rank]) -> list[Rank]:
        """Ranks whose transports take the messages of a batch: the same, unless one has no room. Collective.

        Parameters
        ----------
        batch : Batch
            With the boundaries of its microbatches.
        program : Program
            What the ranks run.
        ranks : sequence of Rank
            Those of this process.
        """
        specs = self.specs_of(program, batch.boundaries)
        has_room = [rank.transport.use(specs) for rank in ranks]  # every one is asked
        if all(has_room):
            return list(ranks)
        computes = {rank.number: rank.compute for rank in ranks}
        opened = self.transports.open(program, specs, computes, streams=self.config.streams)
        return [rank.with_transport(opened[rank.number]) for rank in ranks]

    def clear(self) -> None:
        """Drop gradients and losses of the last step."""
        self.loss_weights.clear()
        for stage in self.stages.values():
            stage.clear()

    def note_losses(self, batch: Batch) -> None:
        """Note the losses of the step just run that are no finite numbers, for `take_odd_losses`."""
        for stage in self.real_stages:
            for microbatch, loss in stage.losses.items():
                if not bool(loss.isfinite().all()):
                    self._odd_losses[batch.step, microbatch, batch.samples[microbatch][0]] = float(loss)

    def take_odd_losses(self) -> dict[tuple[int, int, int], float]:
        """(step, microbatch, its first sample) -> loss, for those that `note_losses` found since the last call."""
        found, self._odd_losses = self._odd_losses, {}
        return found

    def undisturbed_batches(self, first: int, count: int) -> Iterator[Batch]:
        """Yield the batches of `count` steps, from step `first` on.

        All processes begin and end the body of the loop together, and collect no garbage in it.
        """
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
        """Run one step of the run's program.

        Parameters
        ----------
        batch : Batch
            The microbatches, from `load`.
        ledgers, keep_outputs, is_timed
            As of `Runtime.begin`.

        Returns
        -------
        list of StepRecord
            One for each rank of this process, on the first rank's clock.
        """
        if batch.shapes and batch.shapes != self._open_shapes:
            self.ranks = self.open_for(batch, self.program, self.ranks)
            self._open_shapes = batch.shapes
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
            if batch.boundaries and any(each is not batch.boundaries[0] for each in batch.boundaries):
                record.message_bytes = [spec.size_bytes for spec in self.specs_of(self.program, batch.boundaries)]
        self.loss_weights.count_terms(self.real_stages, completes_step=batch.completes_step)
        return records

    def keep(self, key: Any, make: Callable[[], _Kept]) -> _Kept:
        """The value under a key, which `make` makes at the first call. Tasks keep here what their next call needs."""
        if key not in self._kept:
            self._kept[key] = make()
        return cast(_Kept, self._kept[key])

    def kept(self, key: Any) -> Any:
        """The value under a key, or None if `keep` has not made it."""
        return self._kept.get(key)

    def close(self) -> None:
        """Drop what tasks kept, and close the device."""
        self._kept.clear()
        self.device.close()


def _act(stage: Stage, kind: Kind, value: Tree | None, batch: Batch, is_split: bool) -> None:
    act(stage, kind, 0, value, batch, split=is_split)
