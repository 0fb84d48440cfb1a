"""Runtime: interprets a program on one rank. It has no schedule of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from ppexec.machine.device import Device, Event, HostDevice, Mark, Pending, Stream
from ppexec.models.batch import Batch, fitted
from ppexec.stage.gradient_sum import Reduction
from ppexec.stage.ledger import Ledger, gradient_bytes
from ppexec.stage.stage import Stage, act
from ppexec.stage.tied import TiedGradients
from ppexec.stage.timed import TimedStage
from ppexec.transport.transport import Transport
from ppsim import Kind, Program

RUN_AHEAD = 8
"""How many actions the host may be ahead of an asynchronous device at least, and at most half as many more: so the
device has work, and what is allocated stays bounded."""


class _Row(NamedTuple):
    """What a rank must know of one row of the program."""

    row: int
    kind: Kind
    stage: Stage | TimedStage
    microbatch: int
    local_input: int
    message_in: int
    message_out: int
    local_output: bool
    is_split: bool
    reduces: bool


@dataclass(kw_only=True)
class StepRecord:
    """What one rank saw of one step; times in nanoseconds of its clock, in the order of its rows.

    sent_ns: message -> when it was handed over. received_ns: message -> when its wait ended. levels: activation bytes
    after each row, if a ledger counted; posted and gradients: after each row's action, the buffers of receives posted
    and not yet used, and the parameters' gradients. outputs: the last stage's, by microbatch, if asked for. reduced_ns:
    stage -> begin and end of its REDUCE_GRAD; reduced_bytes: stage -> bytes that this rank added up in it; both empty
    without replicas.
    """

    start_ns: list[int] = field(default_factory=list)
    end_ns: list[int] = field(default_factory=list)
    sent_ns: dict[int, int] = field(default_factory=dict)
    received_ns: dict[int, int] = field(default_factory=dict)
    levels: list[int] = field(default_factory=list)
    posted: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    reduced_ns: dict[int, tuple[int, int]] = field(default_factory=dict)
    reduced_bytes: dict[int, int] = field(default_factory=dict)

    def shift(self, offset_ns: int) -> None:
        """Put its times on a clock that is ahead by so much."""
        self.start_ns = [time + offset_ns for time in self.start_ns]
        self.end_ns = [time + offset_ns for time in self.end_ns]
        self.sent_ns = {message: time + offset_ns for message, time in self.sent_ns.items()}
        self.received_ns = {message: time + offset_ns for message, time in self.received_ns.items()}
        self.reduced_ns = {
            stage: (start + offset_ns, end + offset_ns) for stage, (start, end) in self.reduced_ns.items()
        }


@dataclass(kw_only=True)
class _Step:
    """A step under way: what was asked for, what is still needed, and the moments of what was done."""

    batch: Batch
    ledgers: Mapping[int, Ledger] | None
    keeps_outputs: bool
    is_timed: bool = True
    submitted: int = 0
    record: StepRecord = field(default_factory=StepRecord)
    start: list[Mark] = field(default_factory=list)
    end: list[Mark] = field(default_factory=list)
    results: dict[int, Pending] = field(default_factory=dict)
    reductions: dict[int, Reduction] = field(default_factory=dict)
    ahead: deque[Event] = field(default_factory=deque)


class Runtime:
    """One rank's part of a program, with its stages and its end of the links.

    replicas: the ranks that hold the same stages in other data-parallel replicas; a stage's gradients are added up over
    them as soon as its last backward has ended (REDUCE_GRAD). None without replicas. tied: weights in two places, whose
    gradients are added up when the step is over. device, compute: where stages compute, the CPU unless given.
    """

    def __init__(
        self,
        program: Program,
        rank: int,
        stages: Mapping[int, Stage | TimedStage],
        transport: Transport,
        *,
        replicas: dist.ProcessGroup | None = None,
        tied: TiedGradients | None = None,
        device: Device | None = None,
        compute: Stream | None = None,
    ) -> None:
        self._device: Device = HostDevice() if device is None else device
        self._compute = self._device.compute_stream() if compute is None else compute
        self._replicas = replicas
        self._tied = tied
        self.stages = stages
        self._transport = transport
        self._last_stage = program.schedule.stages - 1
        self.actions = _actions(program, rank, stages)
        self._labels = [f"rank {rank}, action {_spelled(rows)}" for rows in self.actions]
        self._under_way = _Step(batch=Batch(), ledgers=None, keeps_outputs=False)

    def step(
        self, batch: Batch, *, ledgers: Mapping[int, Ledger] | None = None, keep_outputs: bool = False
    ) -> StepRecord:
        """Run one step and say when everything happened.

        batch: this rank's microbatches. ledgers: by stage, to count activation bytes (a step slower for it).
        keep_outputs: keep the last stage's outputs in the record.
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
        """Make ready for a step; its actions follow one by one, then `end`, and `record` when the device is done.

        is_timed: False for a step whose record has no times, which saves the device the events.
        """
        own = None if ledgers is None else {index: ledgers[index] for index in self.stages}
        self._under_way = _Step(batch=batch, ledgers=own, keeps_outputs=keep_outputs, is_timed=is_timed)
        for stage in self.stages.values():
            stage.ledger = own[stage.index] if own else None
            stage.begin(batch)
        self._transport.start()

    def act(self, action: int) -> None:
        """Submit one action, and the messages that it sends."""
        step, rows, compute = self._under_way, self.actions[action], self._compute
        inputs = [self._input(row, step) for row in rows]
        outputs = [Pending() for _ in rows]
        compute.submit(partial(self._run, rows, inputs, outputs, step), self._labels[action])
        for row, output in zip(rows, outputs, strict=True):
            if row.message_out >= 0:
                self._transport.send(row.message_out, output)
            elif row.local_output:
                step.results[row.row] = output
            if row.reduces and self._replicas is not None:
                self._reduce(row.stage, self._replicas, step)
        if step.ledgers is not None:
            step.record.posted.extend([self._transport.posted_bytes] * len(rows))
        step.submitted += 1
        if self._device.is_asynchronous and step.submitted % (RUN_AHEAD // 2) == 0:
            step.ahead.append(compute.record())
            if len(step.ahead) > 2:
                step.ahead.popleft().synchronize()

    def _run(self, rows: Sequence[_Row], inputs: list[Pending], outputs: list[Pending], step: _Step) -> None:
        """Compute an action; what its stream does."""
        mark = self._device.mark if step.is_timed else _no_mark
        for row, given, output in zip(rows, inputs, outputs, strict=True):
            value = given.take()
            step.start.append(mark())
            output.value = act(row.stage, row.kind, row.microbatch, value, step.batch, split=row.is_split)
            step.end.append(mark())
            del value
            if step.ledgers is not None:
                # Row by row: after its F an overlapped pair holds both its microbatches, after its B one of them.
                step.record.levels.append(sum(ledger.level_bytes for ledger in step.ledgers.values()))
        for row, output in zip(rows, outputs, strict=True):
            if row.local_output and row.message_out < 0 and output.value is not None:
                # As large as a message would have been: a view would hold on to all that it is a view of.
                output.value = fitted(output.value)
            is_last_output = row.kind == Kind.F and row.stage.index == self._last_stage
            if step.keeps_outputs and is_last_output and output.value is not None:
                step.record.outputs[row.microbatch] = output.value.clone()
        if step.ledgers is not None:
            gradients = sum(gradient_bytes(stage.layers) for stage in self.stages.values() if isinstance(stage, Stage))
            step.record.gradients.extend([gradients] * len(rows))

    def _reduce(self, stage: Stage | TimedStage, replicas: dist.ProcessGroup, step: _Step) -> None:
        """Start adding up a stage's gradients over the replicas, beside what is computed next."""
        if not self._device.is_asynchronous:
            step.reductions[stage.index] = stage.reduce_gradients(replicas)
            return
        stream = self._device.stream("gradients")

        def add_up() -> None:
            begin = self._device.mark()
            reduction = stage.reduce_gradients(replicas)
            reduction.wait()
            step.record.reduced_bytes[stage.index] = reduction.size_bytes
            step.record.reduced_ns[stage.index] = begin, self._device.mark()

        stream.wait(self._compute.record())
        stream.submit(add_up, f"adding up the gradients of stage {stage.index}")

    def end(self) -> None:
        """Submit what ends the step."""
        step = self._under_way
        self._transport.finish()
        for stage_index, reduction in step.reductions.items():
            step.record.reduced_ns[stage_index] = reduction.finish()
            step.record.reduced_bytes[stage_index] = reduction.size_bytes
        if self._device.is_asynchronous and self._replicas is not None:
            self._compute.wait(self._device.stream("gradients").record())
        if self._tied is not None:
            self._compute.submit(self._tied.add, "adding up tied gradients")

    def record(self) -> StepRecord:
        """What was seen of the step, once the device has done all."""
        step, times_ns = self._under_way, self._device.times_ns
        self._under_way = _Step(batch=Batch(), ledgers=None, keeps_outputs=False)
        record = step.record
        if not step.is_timed:
            return record
        record.start_ns, record.end_ns = times_ns(step.start), times_ns(step.end)
        for found, marks in ((record.sent_ns, self._transport.sent), (record.received_ns, self._transport.received)):
            found.update(zip(marks, times_ns(list(marks.values())), strict=True))
        if not step.reductions:
            record.reduced_ns = {
                stage: (begin, end)
                for stage, (begin, end) in ((s, times_ns(both)) for s, both in record.reduced_ns.items())
            }
        return record

    def _input(self, row: _Row, step: _Step) -> Pending:
        """What a row needs: a message, another stage's result on this rank, data, or nothing."""
        if row.message_in >= 0:
            return self._transport.receive(row.message_in)
        if row.local_input >= 0:
            return step.results.pop(row.local_input)
        return Pending(step.batch.inputs[row.microbatch] if row.kind == Kind.F and step.batch.inputs else None)


def _no_mark() -> None:
    """In a step that nobody times."""


def _spelled(rows: Sequence[_Row]) -> str:
    return " and ".join(f"{row.stage.index}{row.kind.name}{row.microbatch}" for row in rows)


def _actions(program: Program, rank: int, stages: Mapping[int, Stage | TimedStage]) -> list[list[_Row]]:
    """A rank's actions in sequence, each with its rows."""
    needed_here = {
        int(program.needs[row]) for row in program.rows_of(rank) if program.needs[row] >= 0 > program.message_in[row]
    }
    weight_rows = [row for row in program.rows_of(rank) if program.kind[row] == Kind.W]
    last_gradient = {
        int(program.stage[row]): row for row in program.rows_of(rank) if program.kind[row] in (Kind.B, Kind.W)
    }
    split = {(int(program.stage[row]), int(program.microbatch[row])) for row in weight_rows}
    return [
        [
            _Row(
                row=row,
                kind=Kind(int(program.kind[row])),
                stage=stages[int(program.stage[row])],
                microbatch=int(program.microbatch[row]),
                local_input=int(program.needs[row]) if program.message_in[row] < 0 else -1,
                message_in=int(program.message_in[row]),
                message_out=int(program.message_out[row]),
                local_output=row in needed_here,
                reduces=last_gradient.get(int(program.stage[row])) == row,
                is_split=(int(program.stage[row]), int(program.microbatch[row])) in split,
            )
            for row in range(int(program.action_start[action]), int(program.action_start[action + 1]))
        ]
        for action in range(int(program.rank_actions[rank]), int(program.rank_actions[rank + 1]))
    ]
