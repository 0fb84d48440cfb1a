"""Runtime: interprets a program on one rank. It has no schedule of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist

from ppexec.machine.clock import now_ns
from ppexec.models.batch import Batch, fitted
from ppexec.stage.gradient_sum import Reduction
from ppexec.stage.ledger import Ledger, gradient_bytes
from ppexec.stage.stage import Stage
from ppexec.stage.tied import TiedGradients
from ppexec.stage.timed import TimedStage
from ppexec.transport.transport import Transport
from ppsim import Kind, Program


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
    after each row's action, if a ledger counted; posted and gradients: likewise the buffers of receives posted and not
    yet used, and the parameters' gradients. outputs: the last stage's, by microbatch, if asked for. reduced_ns: stage
    -> begin and end of its REDUCE_GRAD; reduced_bytes: stage -> bytes that this rank added up in it; both empty without
    replicas.
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


class Runtime:
    """One rank's part of a program, with its stages and its end of the links.

    replicas: the ranks that hold the same stages in other data-parallel replicas; a stage's gradients are added up over
    them as soon as its last backward has ended (REDUCE_GRAD). None without replicas. tied: weights in two
    places, whose gradients are added up when the step is over.
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
    ) -> None:
        self._replicas = replicas
        self._tied = tied
        self.stages = stages
        self._transport = transport
        needed_here = {
            int(program.needs[row])
            for row in program.rows_of(rank)
            if program.needs[row] >= 0 > program.message_in[row]
        }
        weight_rows = [row for row in program.rows_of(rank) if program.kind[row] == Kind.W]
        last_gradient = {
            int(program.stage[row]): row for row in program.rows_of(rank) if program.kind[row] in (Kind.B, Kind.W)
        }
        split = {(int(program.stage[row]), int(program.microbatch[row])) for row in weight_rows}
        last_stage = program.schedule.stages - 1
        self._last_stage = last_stage
        actions = range(int(program.rank_actions[rank]), int(program.rank_actions[rank + 1]))
        self._actions: list[list[_Row]] = []
        for action in actions:
            rows = range(int(program.action_start[action]), int(program.action_start[action + 1]))
            self._actions.append(
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
                    for row in rows
                ]
            )

    def step(
        self, batch: Batch, *, ledgers: Mapping[int, Ledger] | None = None, keep_outputs: bool = False
    ) -> StepRecord:
        """Run one step and say when everything happened.

        batch: this rank's microbatches. ledgers: by stage, to count activation bytes (a step slower for it).
        keep_outputs: keep the last stage's outputs in the record.
        """
        record = StepRecord()
        results: dict[int, torch.Tensor | None] = {}
        reductions: dict[int, Reduction] = {}
        for stage in self.stages.values():
            stage.ledger = ledgers[stage.index] if ledgers else None
            stage.begin(batch)
        self._transport.start()
        for rows in self._actions:
            inputs = [self._input(row, batch, results, record) for row in rows]
            outputs: list[torch.Tensor | None] = []
            for row, value in zip(rows, inputs, strict=True):
                record.start_ns.append(now_ns())
                outputs.append(self._compute(row, value, batch))
                record.end_ns.append(now_ns())
            inputs.clear()
            for row, output in zip(rows, outputs, strict=True):
                if row.message_out >= 0 and output is not None:
                    record.sent_ns[row.message_out] = now_ns()
                    self._transport.send(row.message_out, output)
                elif row.local_output:
                    # As large as a message would have been: a view would hold on to all that it is a view of.
                    results[row.row] = None if output is None else fitted(output)
                if row.reduces and self._replicas is not None:
                    reductions[row.stage.index] = row.stage.reduce_gradients(self._replicas)
                if keep_outputs and row.kind == Kind.F and row.stage.index == self._last_stage and output is not None:
                    record.outputs[row.microbatch] = output.clone()
            del outputs
            if ledgers is not None:
                level_bytes = sum(ledger.level_bytes for ledger in ledgers.values())
                record.levels.extend([level_bytes] * len(rows))
                record.posted.extend([self._transport.posted_bytes] * len(rows))
                gradients = sum(
                    gradient_bytes(stage.layers) for stage in self.stages.values() if isinstance(stage, Stage)
                )
                record.gradients.extend([gradients] * len(rows))
        self._transport.finish()
        for stage_index, reduction in reductions.items():
            record.reduced_ns[stage_index] = reduction.finish()
            record.reduced_bytes[stage_index] = reduction.size_bytes
        if self._tied is not None:
            self._tied.add()
        return record

    def _input(
        self, row: _Row, batch: Batch, results: dict[int, torch.Tensor | None], record: StepRecord
    ) -> torch.Tensor | None:
        """What a row needs: a message, another stage's result on this rank, data, or nothing."""
        if row.message_in >= 0:
            value = self._transport.receive(row.message_in)
            record.received_ns[row.message_in] = now_ns()
            return value
        if row.local_input >= 0:
            return results.pop(row.local_input)
        if row.kind == Kind.F:
            return batch.inputs[row.microbatch] if batch.inputs else None
        return None

    def _compute(self, row: _Row, value: torch.Tensor | None, batch: Batch) -> torch.Tensor | None:
        if row.kind == Kind.F:
            target = batch.targets[row.microbatch] if row.stage.loss is not None else None
            return row.stage.forward(row.microbatch, value, target, split=row.is_split)
        if row.kind == Kind.B:
            return row.stage.backward(row.microbatch, value)
        if row.kind == Kind.I:
            return row.stage.backward_input(row.microbatch, value)
        row.stage.backward_weight(row.microbatch)
        return None
