"""Tasks: what a worker is asked to do for a calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ppexec.calibrate.known_run import KnownRun
from ppexec.machine.quiet import undisturbed
from ppexec.machine.waiting import sharpen_sleep
from ppexec.models.batch import Batch
from ppexec.stage.stage import Stage
from ppexec.stage.timed import TimedStage, message_specs, timed_stages
from ppexec.workers.rank import Rank, run_step, sequence_of
from ppexec.workers.step_record import StepRecord
from ppexec.workers.worker import Worker
from ppsim.schedule.deadlock import smallest_receive_window


class _Built(NamedTuple):
    ranks: list[Rank]
    sequence: Sequence[tuple[int, int]]


def run_known(worker: Worker, *, known: KnownRun) -> list[StepRecord]:
    """Run and time one step of a known run on the worker's ranks.

    Parameters
    ----------
    worker : Worker
        Keeps the ranks of the known run for the next call.
    known : KnownRun
        What is run.

    Returns
    -------
    list of StepRecord
        By rank, with times on the first rank's clock.
    """
    built = worker.keep(known, lambda: _build(worker, known))
    with undisturbed(worker.mesh):
        records = run_step(worker.device, built.ranks, built.sequence, Batch())
    for record in records:
        record.shift(worker.offset_ns)
    return records


def _build(worker: Worker, known: KnownRun) -> _Built:
    """Its ranks, which post as many receives ahead as in the worker's own run, or more if they need more."""
    sharpen_sleep()
    program = known.schedule.program
    window = worker.config.receive_window
    held = [rank.number for rank in worker.ranks]
    stages_of: dict[int, Mapping[int, Stage | TimedStage]] = {
        rank: timed_stages(
            known.schedule.stages_of(rank), known.stages, trains=True, device=worker.device, busy=known.is_busy
        )
        for rank in held
    }
    ranks = worker.build_ranks(
        program,
        message_specs(program, known.stages),
        stages_of,
        window=max(window, smallest_receive_window(program)) if window else 0,
    )
    return _Built(ranks, sequence_of(program, held))
