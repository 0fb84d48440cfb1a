"""Runtime: runs one rank's part of a program. It decides nothing about the order of actions."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch.distributed as dist

from ppexec.machine.device import Device, Event, HostDevice, Mark, Pending, Stream
from ppexec.models.batch import Batch, fitted
from ppexec.stage.actions import act
from ppexec.stage.gradient_sum import Reduction
from ppexec.stage.ledger import Ledger
from ppexec.stage.recording import RecordedAction, Recording, key_of
from ppexec.stage.stage import Stage
from ppexec.stage.timed import TimedStage
from ppexec.transport.transport import Transport
from ppexec.workers.progress import RankProgress
from ppexec.workers.rank_rows import RankRow, actions_of, offload_of, sharding_of, spelled
from ppexec.workers.step_record import StepRecord
from ppsim import Kind, Program
from ppsim.schedule.program_tables import Post

RUN_AHEAD = 8
"""How many actions the host may run ahead of an asynchronous device; up to half as many more.

This keeps the device busy and bounds the memory of actions that are submitted and not yet done."""


class GradientSums(Protocol):
    """Sums of gradients that are made at the end of a step."""

    def add(self) -> None:
        """Replace the gradients by their sums."""


_Cell = tuple[int, int]  # a stage and a microbatch


@dataclass(kw_only=True)
class _Step:
    """A step under way: what was asked for, results not used yet, and the moments recorded so far."""

    batch: Batch
    ledgers: Mapping[int, Ledger] | None
    keeps_outputs: bool
    is_timed: bool = True
    submitted: int = 0
    record: StepRecord = field(default_factory=StepRecord)
    start: list[Mark] = field(default_factory=list)
    end: list[Mark] = field(default_factory=list)
    results: dict[int, Pending] = field(default_factory=dict)
    unsent: dict[int, Pending] = field(default_factory=dict)
    reductions: dict[int, Reduction] = field(default_factory=dict)
    copied: dict[int, tuple[Mark, Mark, int]] = field(default_factory=dict)  # of this rank's copies, by number
    gone: dict[_Cell, Event] = field(default_factory=dict)
    loaded: dict[_Cell, Event] = field(default_factory=dict)
    host_bytes: int = 0
    ahead: deque[Event] = field(default_factory=deque)


class Runtime:
    """Runs one rank's part of a program on the rank's stages.

    Parameters
    ----------
    program : Program
        What runs.
    rank : int
        This rank of the program.
    stages : mapping
        Stage number -> stage, for the stages of this rank.
    transport : Transport
        This rank's end of the links.
    holders : mapping
        Stage number -> the processes that hold the same stage: in the data-parallel replicas, or as copies of the
        model. The stage's gradients are added up over them as soon as its last backward has ended (REDUCE_GRAD). Empty
        where no other process has any.
    at_end : sequence of GradientSums
        What is added up at the end of the step, one after the other: copies of a stage that are in one process, and
        weights that stand in two places of the model.
    device : Device, optional
        Where the stages compute; the CPU if not given.
    compute : Stream, optional
        The stream of the rank's computations; one of the device's if not given.
    progress : RankProgress, optional
        Where the rank writes what it does, for those who watch it.
    records : bool
        Whether to record the actions in the first step and replay them in later ones (`ppexec.stage.recording`). Steps
        with ledgers compute as without.
    """

    def __init__(
        self,
        program: Program,
        rank: int,
        stages: Mapping[int, Stage | TimedStage],
        transport: Transport,
        *,
        holders: Mapping[int, dist.ProcessGroup] | None = None,
        at_end: Sequence[GradientSums] = (),
        device: Device | None = None,
        compute: Stream | None = None,
        progress: RankProgress | None = None,
        records: bool = False,
    ) -> None:
        self._device: Device = HostDevice() if device is None else device
        self._compute = self._device.compute_stream() if compute is None else compute
        self._holders = holders or {}
        self._at_end = at_end
        self._progress = progress
        self._rows = program.rows_of(rank)
        self.stages = stages
        self.transport = transport
        self._model_stages = program.schedule.model_stages
        # Ranks that share two stages may end them in different orders, and a stream adds up one after the other.
        self._reduces_at_end = self._device.is_asynchronous and program.schedule.copies > 1
        self._reduces_between = bool(self._holders) and not self._reduces_at_end
        self.actions = actions_of(program, rank, stages)
        self._posts = [
            [post for post in posts if post.is_send or transport.takes_posts] for posts in program.posts_of(rank)
        ]
        self._sharded = {
            index: stage.sharded
            for index, stage in stages.items()
            if isinstance(stage, Stage) and stage.sharded is not None
        }
        self._sharding = sharding_of(program, rank) if self._sharded else {}
        self._rank = rank
        self._copies = offload_of(program, rank)
        self._labels = [f"rank {rank}, action {spelled(rows)}" for rows in self.actions]
        self._under_way = _Step(batch=Batch(), ledgers=None, keeps_outputs=False)
        self._records = records
        self._recording: Recording | None = None
        self._recorded_key: Hashable = None

    def step(
        self, batch: Batch, *, ledgers: Mapping[int, Ledger] | None = None, keep_outputs: bool = False
    ) -> StepRecord:
        """Run one step from begin to end, for a rank that has its process to itself.

        Parameters
        ----------
        batch : Batch
            The microbatches of the step.
        ledgers : mapping, optional
            Stage number -> ledger that counts the stage's activation bytes. A step with ledgers is slower.
        keep_outputs : bool
            Whether to keep the last stage's outputs in the record.

        Returns
        -------
        StepRecord
        """
        self._device.begin()
        self.begin(batch, ledgers=ledgers, keep_outputs=keep_outputs)
        for action in range(len(self.actions)):
            self.act(action)
        self.end()
        self._device.synchronize()
        return self.record()

    def begin(
        self,
        batch: Batch,
        *,
        ledgers: Mapping[int, Ledger] | None = None,
        keep_outputs: bool = False,
        is_timed: bool = True,
    ) -> None:
        """Begin a step. Then call `act` for each action in sequence, then `end`, and `record` when the device is done.

        Parameters
        ----------
        batch : Batch
            The microbatches of the step.
        ledgers : mapping, optional
            Stage number -> ledger that counts the stage's activation bytes.
        keep_outputs : bool
            Whether to keep the last stage's outputs in the record.
        is_timed : bool
            Whether to record times. Without them an asynchronous device has fewer events to record.
        """
        own = None if ledgers is None else {index: ledgers[index] for index in self.stages}
        self._under_way = _Step(batch=batch, ledgers=own, keeps_outputs=keep_outputs, is_timed=is_timed)
        for stage in self.stages.values():
            stage.ledger = own[stage.index] if own else None
            stage.begin(batch)
        if self._progress is not None:
            self._progress.begin_step(self._rows)
        if self._records and own is None and self._recorded_key != key_of(batch):
            self._recorded_key = key_of(batch)
            self._compute.submit(partial(self._record, batch), "recording the actions")
        self.transport.start()
        self._go_to(0)

    def _go_to(self, place: int) -> None:
        """Start what stands at a place between actions: 0 before the first, k after k of them."""
        if posts := self._posts[place]:
            self._post(posts)
        if self._sharding:
            self._shard(place)
        if self._copies:
            self._copy(place)

    def _post(self, posts: Sequence[Post]) -> None:
        """Post some sends and receives."""
        for message, is_send in posts:
            if is_send:
                self.transport.send(message, self._under_way.unsent.pop(message))
            else:
                self.transport.post(message)

    def _shard(self, place: int) -> None:
        """Gather, let go and reduce what stands at a place."""
        record = self._under_way.record
        for kind, index in self._sharding.get(place, ()):
            parameters = self._sharded[index]
            if kind == Kind.UNSHARD:
                parameters.start_unshard()
                record.unsharded_bytes.append(parameters.full_bytes)
            elif kind == Kind.RESHARD:
                parameters.reshard()
            elif self._under_way.batch.completes_step:
                begin_ns, end_ns, record.reduced_bytes[index] = parameters.reduce()
                record.reduced_ns[index] = begin_ns, end_ns
            if place > 0 and self._under_way.ledgers is not None:
                rows = len(self.actions[place - 1])
                record.unsharded[-rows:] = [max(record.unsharded[-1], self._gathered_bytes)] * rows

    def _copy(self, place: int) -> None:
        """Start the copies that stand at a place, each on the stream of its direction.

        Where bytes are counted they run on the stream of the computations, so that every level is that of its place.
        """
        step, compute, is_counted = self._under_way, self._compute, self._under_way.ledgers is not None
        for number, kind, index, microbatch in self._copies.get(place, ()):
            direction = "offload" if kind == Kind.O else "load"
            stream = compute if is_counted else self._device.stream(f"{direction} of rank {self._rank}")
            stream.wait(compute.record())
            if kind == Kind.L:
                stream.wait(step.gone.pop((index, microbatch)))
            work = partial(self._move, number, kind, self.stages[index], microbatch, stream, step)
            stream.submit(work, f"{direction} of {index}F{microbatch}")
            (step.gone if kind == Kind.O else step.loaded)[index, microbatch] = stream.record()

    def _move(
        self, number: int, kind: Kind, stage: Stage | TimedStage, microbatch: int, stream: Stream, step: _Step
    ) -> None:
        """Do one copy; runs on its stream."""
        mark = self._device.mark if step.is_timed else _no_mark
        begin = mark()
        if kind == Kind.O:
            size_bytes = stage.offload(microbatch, self._device.host_buffer, stream.uses)
            step.host_bytes += size_bytes
        else:
            size_bytes = stage.load(microbatch, self._compute.uses)
        step.copied[number] = begin, mark(), size_bytes
        if step.ledgers is not None:
            levels, host = step.record.levels, step.record.host
            levels[-1] = max(levels[-1], sum(ledger.level_bytes for ledger in step.ledgers.values()))
            host[-1] = max(host[-1], step.host_bytes)
        if kind == Kind.L:
            step.host_bytes -= size_bytes

    @property
    def _gathered_bytes(self) -> int:
        return sum(parameters.gathered_bytes for parameters in self._sharded.values())

    def _record(self, batch: Batch) -> None:
        actions = [
            RecordedAction(row.row, row.stage, row.kind, row.microbatch, row.is_split)
            for rows in self.actions
            for row in rows
            if isinstance(row.stage, Stage)
        ]
        self._recording = None  # its memory goes first
        self._recording = Recording(actions, batch, self._device.recorder(self._compute))
        for stage in self.stages.values():
            stage.begin(batch)

    def act(self, action: int) -> None:
        """Submit one action, and the sends and receives that stand after it."""
        step, rows, compute = self._under_way, self.actions[action], self._compute
        if self._sharded:
            for row in rows:
                if row.stage.index in self._sharded:
                    self._sharded[row.stage.index].wait()
        works = [(row, self._input(row, step), Pending()) for row in rows]
        if step.loaded:
            for row in rows:
                if row.kind != Kind.F and (row.stage.index, row.microbatch) in step.loaded:
                    compute.wait(step.loaded.pop((row.stage.index, row.microbatch)))
        compute.submit(partial(self._run, works, step), self._labels[action])
        for row, _, output in works:
            if row.message_out >= 0:
                step.unsent[row.message_out] = output
            elif row.local_output:
                step.results[row.row] = output
        self._go_to(action + 1)
        if self._reduces_between and step.batch.completes_step:
            for row in rows:
                if row.reduces:
                    self._reduce(row.stage, step)
        if step.ledgers is not None:
            step.record.posted.extend([self.transport.posted_bytes] * len(rows))
        if self._device.is_asynchronous:
            self._bound_lead(step)

    def _bound_lead(self, step: _Step) -> None:
        """Let the host wait where it is too far ahead of the device."""
        step.submitted += 1
        if step.submitted % (RUN_AHEAD // 2) == 0:
            step.ahead.append(self._compute.record())
            if len(step.ahead) > 2:
                step.ahead.popleft().synchronize()

    def _run(self, works: Sequence[tuple[RankRow, Pending, Pending]], step: _Step) -> None:
        """Compute an action, from the input of each of its rows to the output; runs on the compute stream."""
        mark, progress = self._device.mark if step.is_timed else _no_mark, self._progress
        recording = self._recording if step.ledgers is None else None
        for row, given, output in works:
            value = given.take()
            now = mark()
            if progress is not None:
                progress.begin_row(row.row, now)
            step.start.append(now)
            if recording is not None:
                output.value = recording.replay(row.row, value, step.batch)
            else:
                output.value = act(
                    row.stage,
                    row.kind,
                    row.microbatch,
                    value,
                    step.batch,
                    split=row.is_split,
                    again=row.is_recomputed,
                    moves=row.is_moved,
                )
            now = mark()
            step.end.append(now)
            if progress is not None:
                progress.end_row(row.row, now)
            del value
            if step.ledgers is not None:
                # Row by row: after its F an overlapped pair holds both its microbatches, after its B one of them.
                step.record.levels.append(sum(ledger.level_bytes for ledger in step.ledgers.values()))
                step.record.host.append(step.host_bytes)
            if row.local_output and row.message_out < 0 and output.value is not None:
                # A view would keep the whole tensor alive that it is a view of.
                output.value = fitted(output.value)
        if step.keeps_outputs:
            for row, _, output in works:
                is_last = row.kind == Kind.F and (row.stage.index + 1) % self._model_stages == 0
                if is_last and output.value is not None:
                    step.record.outputs[row.microbatch] = output.value.clone()
        if step.ledgers is not None:
            gradients = sum(stage.gradient_bytes for stage in self.stages.values() if isinstance(stage, Stage))
            step.record.gradients.extend([gradients] * len(works))
            if self._sharded:
                step.record.unsharded.extend([self._gathered_bytes] * len(works))

    def _reduce(self, stage: Stage | TimedStage, step: _Step) -> None:
        """Start to add up a stage's gradients over the processes that hold it, while the next actions compute."""
        group = self._holders.get(stage.index)
        if group is None or stage.index in self._sharded:
            return
        if not self._device.is_asynchronous:
            step.reductions[stage.index] = stage.reduce_gradients(group)
            return
        stream = self._device.stream("gradients")

        def add_up() -> None:
            begin = self._device.mark()
            reduction = stage.reduce_gradients(group)
            reduction.wait()
            step.record.reduced_bytes[stage.index] = reduction.size_bytes
            step.record.reduced_ns[stage.index] = begin, self._device.mark()

        stream.wait(self._compute.record())
        stream.submit(add_up, f"adding up the gradients of stage {stage.index}")

    def end(self) -> None:
        """Submit the end of the step: sends and gradient sums under way, then those that wait for the end."""
        step = self._under_way
        if self._reduces_at_end and step.batch.completes_step:
            for index in sorted(self._holders, key=lambda stage: stage % self._model_stages):
                self._reduce(self.stages[index], step)
        self.transport.finish()
        self._end_sharding(step.record)
        for stage_index, reduction in step.reductions.items():
            step.record.reduced_ns[stage_index] = reduction.finish()
            step.record.reduced_bytes[stage_index] = reduction.size_bytes
        if self._device.is_asynchronous and self._holders:
            self._compute.wait(self._device.stream("gradients").record())
        for sums in self._at_end if step.batch.completes_step else ():
            self._compute.submit(sums.add, "adding up gradients at the end of the step")

    def _end_sharding(self, record: StepRecord) -> None:
        """Let go what the schedule leaves whole, and note the gatherings in the sequence of the schedule."""
        gathered = {index: deque(parameters.gathered_ns) for index, parameters in self._sharded.items()}
        for parameters in self._sharded.values():
            parameters.reshard()
            parameters.gathered_ns.clear()
        for place in sorted(self._sharding):
            for kind, index in self._sharding[place]:
                if kind == Kind.UNSHARD and gathered[index]:
                    record.unsharded_ns.append(gathered[index].popleft())

    def record(self) -> StepRecord:
        """The record of the step; call it when the device is done."""
        step, times_ns = self._under_way, self._device.times_ns
        self._under_way = _Step(batch=Batch(), ledgers=None, keeps_outputs=False)
        record = step.record
        if not step.is_timed:
            return record
        record.start_ns, record.end_ns = times_ns(step.start), times_ns(step.end)
        for number in sorted(step.copied):
            begin, end, size_bytes = step.copied[number]
            begin_ns, end_ns = times_ns([begin, end])
            record.copied_ns.append((begin_ns, end_ns))
            record.copied_bytes.append(size_bytes)
        for found, marks in ((record.sent_ns, self.transport.sent), (record.received_ns, self.transport.received)):
            found.update(zip(marks, times_ns(list(marks.values())), strict=True))
        if not step.reductions:
            # A stream added the gradients up, so these are still marks of the device.
            for stage, both in record.reduced_ns.items():
                begin_ns, end_ns = times_ns(both)
                record.reduced_ns[stage] = begin_ns, end_ns
        return record

    def _input(self, row: RankRow, step: _Step) -> Pending:
        """A row's input: a message, the result of another row on this rank, data, or nothing."""
        if row.message_in >= 0:
            if self._progress is None:
                return self.transport.receive(row.message_in)
            self._progress.wait(row.message_in)
            received = self.transport.receive(row.message_in)
            self._progress.go_on()
            return received
        if row.local_input >= 0:
            return step.results.pop(row.local_input)
        return Pending(step.batch.inputs[row.microbatch] if row.kind == Kind.F and step.batch.inputs else None)


def _no_mark() -> None:
    """The mark of a step that is not timed."""
