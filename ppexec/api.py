"""The things one does with a configuration: run it, verify it, profile it, train with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ppexec.config.config import RunConfig
from ppexec.measure.assemble import median_step, with_memory
from ppexec.measure.profile import Profile
from ppexec.session import Session
from ppexec.train.train import TrainReport
from ppexec.verify.verify import VerifyReport
from ppexec.workers.pool import WorkerPool
from ppsim import LayerCost, StageCost, Trace


def run(config: RunConfig, *, pool: WorkerPool | None = None) -> Trace:
    """Run the configuration's schedule for real; the trace of the median step, with activation bytes.

    `details` holds step_times_s (makespan of every measured step), config and environment. Raises ValueError for what
    cannot run, WorkerError if a worker dies.
    """
    with Session(config, pool=pool, costs=profiled_for_timed(config, pool)) as session:
        if config.warmup:
            session.measure(config.warmup)
        traces = session.measure(config.steps, first_step=config.warmup)
        trace = with_memory(median_step(traces), session.memory())
        details = {
            "step_times_s": [t.makespan_s for t in traces],
            "config": config.to_dict(),
            "environment": session.environment(),
        }
        return replace(trace, details=details)


def profiled_for_timed(config: RunConfig, pool: WorkerPool | None) -> list[StageCost] | None:
    """Timed compute takes its durations from the cost file, else from a profile made first: that one's stage costs.

    None if no such profile is needed.
    """
    if config.compute == "real" or config.costs is not None:
        return None
    return _profile(replace(config, compute="real"), pool).stages


def verify(config: RunConfig, *, pool: WorkerPool | None = None) -> VerifyReport:
    """Run one step and compare outputs and gradients with one process without a pipeline, bit by bit."""
    with Session(config, pool=pool) as session:
        return session.verify()


def train(
    config: RunConfig,
    *,
    steps: int | None = None,
    save: Path | None = None,
    resume: Path | None = None,
    pool: WorkerPool | None = None,
) -> TrainReport:
    """Train by `steps` optimizer steps (AdamW; `config.steps` unless given) and say each one's loss.

    resume: a checkpoint to go on from, of any mesh; its data goes on too. save: a directory for one, after the last
    step. Raises ValueError for what cannot run and for a checkpoint of another model, WorkerError if a worker dies.
    """
    with Session(config, pool=pool) as session:
        first = session.load_checkpoint(resume) if resume else 0
        count = config.steps if steps is None else steps
        losses = session.train(count)
        folder = session.save_checkpoint(save) if save else None
    return TrainReport(
        steps=list(range(first, first + count)),
        losses=losses,
        checkpoint=None if folder is None else str(folder),
        config=config.plain().to_dict(),
    )


def profile(config: RunConfig, *, pool: WorkerPool | None = None) -> list[LayerCost]:
    """Measure every layer's cost for one microbatch, with as many processes as the run has."""
    return _profile(config, pool).layers


def _profile(config: RunConfig, pool: WorkerPool | None) -> Profile:
    with Session(config, pool=pool) as session:
        session.profile_rounds(max(config.warmup, 1))
        return session.profile(config.steps)
