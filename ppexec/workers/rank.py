"""Rank: a rank of a pipeline as one process holds it, and one step of those that share the process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

import ppsim
from ppexec.machine.device import Device, Stream
from ppexec.models.batch import Batch
from ppexec.stage.ledger import Ledger
from ppexec.stage.stage import Stage
from ppexec.stage.timed import TimedStage
from ppexec.transport.streams import StreamTransport
from ppexec.transport.transport import Transport
from ppexec.workers.runtime import Runtime
from ppexec.workers.step_record import StepRecord
from ppsim import Program


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One rank of the pipeline: its stages, its compute stream, its end of the links, and its runtime."""

    number: int
    stages: Mapping[int, Stage | TimedStage]
    compute: Stream
    transport: Transport
    runtime: Runtime

    def with_transport(self, transport: Transport) -> Rank:
        """The same rank with another end of the links."""
        self.runtime.transport = transport
        return replace(self, transport=transport)


def run_step(
    device: Device,
    ranks: Sequence[Rank],
    sequence: Sequence[tuple[int, int]],
    batch: Batch,
    *,
    ledgers: Mapping[int, Ledger] | None = None,
    keep_outputs: bool = False,
    is_timed: bool = True,
    act: Callable[[Rank, int], None] | None = None,
) -> list[StepRecord]:
    """Run one step of some ranks that share a process.

    Parameters
    ----------
    device : Device
        Where they compute.
    ranks : sequence of Rank
        The ranks.
    sequence : sequence of (int, int)
        Position in `ranks` and action of each submission, from `sequence_of`.
    batch : Batch
        The microbatches of the step.
    ledgers, keep_outputs, is_timed
        As of `Runtime.begin`.
    act : callable, optional
        Submits an action of a rank, instead of the rank's runtime.

    Returns
    -------
    list of StepRecord
        One for each rank, on this process's clock.
    """
    if is_timed:
        device.begin()
    for rank in ranks:
        rank.runtime.begin(batch, ledgers=ledgers, keep_outputs=keep_outputs, is_timed=is_timed)
    acts = [rank.runtime.act if act is None else partial(act, rank) for rank in ranks]
    *others, last = ranks
    try:
        for position, action in sequence:
            acts[position](action)
        # The last rank ends after the others: sums at the end of the step may take gradients of all of them.
        for rank in others:
            rank.runtime.end()
            last.compute.wait(rank.compute.record())
        last.runtime.end()
        device.synchronize()
    except TimeoutError as error:
        found = [rank.transport.missing() for rank in ranks if isinstance(rank.transport, StreamTransport)]
        raise RuntimeError("; ".join([*filter(None, found), f"timed out: {error}"])) from error
    return [rank.runtime.record() for rank in ranks]


def sequence_of(program: Program, held: Sequence[int]) -> list[tuple[int, int]]:
    """A sequence in which one process can submit the actions of the ranks it holds.

    Actions are sorted by their starts in a simulated step in which F, I and W take equally long. So every message is
    sent before it is received.

    Parameters
    ----------
    program : Program
        What runs.
    held : sequence of int
        The ranks of this process.

    Returns
    -------
    list of (int, int)
        Position of the rank in `held`, and number of the action on that rank.
    """
    if len(held) == 1:
        rank = held[0]
        return [(0, action) for action in range(int(program.rank_actions[rank + 1] - program.rank_actions[rank]))]
    unit = ppsim.StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    trace = ppsim.simulate(program.schedule, [unit] * program.schedule.stages)
    first_row = program.action_start[:-1]
    order = np.argsort(trace.start_s[first_row], kind="stable")
    rank_of = program.rank[first_row][order]
    position = {rank: at for at, rank in enumerate(held)}
    own = (order - program.rank_actions[rank_of]).tolist()
    return [(position[rank], action) for rank, action in zip(rank_of.tolist(), own, strict=True) if rank in position]
