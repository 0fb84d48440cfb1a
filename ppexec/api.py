"""The three things one does with a configuration: run it, verify it, profile it."""

from __future__ import annotations

from dataclasses import replace

from ppexec.config import RunConfig
from ppexec.measure import median_step, with_memory
from ppexec.pool import WorkerPool
from ppexec.profile import Profile
from ppexec.session import Session
from ppexec.verify import VerifyReport
from ppsim import LayerCost, StageCost, Trace


def run(config: RunConfig, *, pool: WorkerPool | None = None) -> Trace:
    """Run the configuration's schedule for real; the trace of the median step, with activation bytes.

    `details` holds step_times_s (makespan of every measured step), config and environment. Raises ValueError for what
    cannot run, WorkerError if a worker dies.
    """
    with Session(config, pool=pool, costs=_profiled(config, pool)) as session:
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


def _profiled(config: RunConfig, pool: WorkerPool | None) -> list[StageCost] | None:
    """Timed compute takes its durations from the cost file, else from a profile made first."""
    if config.compute == "real" or config.costs is not None:
        return None
    return _profile(replace(config, compute="real"), pool).stages


def verify(config: RunConfig, *, pool: WorkerPool | None = None) -> VerifyReport:
    """Run one step and compare outputs and gradients with one process without a pipeline, bit by bit."""
    with Session(config, pool=pool) as session:
        return session.verify()


def profile(config: RunConfig, *, pool: WorkerPool | None = None) -> list[LayerCost]:
    """Measure every layer's cost for one microbatch, with as many processes as the run has."""
    return _profile(config, pool).layers


def _profile(config: RunConfig, pool: WorkerPool | None) -> Profile:
    with Session(config, pool=pool) as session:
        session.profile_rounds(max(config.warmup, 1))
        return session.profile(config.steps)
