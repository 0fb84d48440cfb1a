"""API: run a configuration, verify it, profile it, or train with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ppexec.config.config import RunConfig
from ppexec.measure.assemble import with_memory
from ppexec.measure.profile import Profile
from ppexec.session import Session
from ppexec.training.checkpoint import newest
from ppexec.training.train import TrainReport
from ppexec.verification.verify import VerifyReport
from ppexec.workers.pool import WorkerPool
from ppsim import LayerCost, StageCost, Trace
from ppsim.files import check_directory
from ppsim.trace.trace import median_step


def run(config: RunConfig, *, pool: WorkerPool | None = None) -> Trace:
    """Run a schedule for real, and time it.

    Parameters
    ----------
    config : RunConfig
        What to run. `config.steps` steps are measured after `config.warmup` others.
    pool : WorkerPool, optional
        Processes to use again. Without one the run starts its own, and ends them.

    Returns
    -------
    Trace
        The step of the median makespan, with the bytes counted in an untimed step. Its `details` have `step_times_s`
        (the makespan of every measured step), `config` and `environment`.

    Raises
    ------
    InputError
        For a run that cannot be.
    WorkerError
        If a worker fails or dies.

    Examples
    --------
    It starts a process for each rank. A script needs no `if __name__ == "__main__"` for that:

    >>> config = RunConfig(schedule="1f1b", ranks=2, microbatches=4, hidden=64, seq=8)
    >>> trace = run(config)  # doctest: +SKIP
    >>> trace.bubble_fraction, trace.peak_activation_bytes  # doctest: +SKIP
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
    """The stage costs that timed compute takes its durations from, where there is no cost file.

    Parameters
    ----------
    config : RunConfig
        It is profiled with real compute.
    pool : WorkerPool or None
        As for `run`.

    Returns
    -------
    list of StageCost or None
        None for real compute, or with a cost file.
    """
    if config.compute == "real" or config.costs is not None:
        return None
    return profile_with_stages(replace(config, compute="real"), pool=pool).stages


def verify(config: RunConfig, *, pool: WorkerPool | None = None) -> VerifyReport:
    """Run one step, and compare outputs and gradients with one process without a pipeline.

    Parameters
    ----------
    config, pool
        As for `run`.

    Returns
    -------
    VerifyReport
        `passed` says whether all are equal.

    Raises
    ------
    InputError, WorkerError
        As for `run`.

    Examples
    --------
    >>> report = verify(RunConfig(schedule="zb-h1", ranks=2, hidden=64, seq=8))  # doctest: +SKIP
    >>> report.outputs_bit_equal, report.gradients_bit_equal  # doctest: +SKIP
    (True, True)
    """
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
    """Train with AdamW.

    Parameters
    ----------
    config : RunConfig
        Says how: rounds accumulated, learning rate with its warm-up and decay, weight decay, clipping.
    steps : int, optional
        Number of optimizer steps; `config.steps` unless given.
    save : Path, optional
        Directory for a checkpoint after the last step.
    resume : Path, optional
        Checkpoint to go on from, saved on any mesh. The data goes on where it stopped.
    pool : WorkerPool, optional
        As for `run`.

    Returns
    -------
    TrainReport
        With the loss of each step.

    Raises
    ------
    InputError
        For a run that cannot be, a checkpoint that is damaged or of another model, or a directory that cannot be
        written.
    RunError
        If a loss or a gradient is not finite (see `RunConfig.skip_nonfinite`), or the checkpoint cannot be written.
    WorkerError
        If a worker fails or dies.

    Examples
    --------
    >>> config = RunConfig(model="gpt", layers=2, ranks=2, hidden=64, seq=32)
    >>> first = train(config, steps=10, save=Path("checkpoints"))  # doctest: +SKIP
    >>> second = train(config, steps=10, resume=Path("checkpoints"))  # doctest: +SKIP
    >>> second.steps[0]  # doctest: +SKIP
    10
    """
    if resume is not None:  # before workers are started
        newest(resume)
    if save is not None:  # before a training that nobody would get
        check_directory(save)
    with Session(config, pool=pool) as session:
        if resume is not None:
            session.load_checkpoint(resume)
        report = session.train(config.steps if steps is None else steps)
        return replace(report, checkpoint=str(session.save_checkpoint(save))) if save is not None else report


def profile(config: RunConfig, *, pool: WorkerPool | None = None) -> list[LayerCost]:
    """Measure what every layer costs for one microbatch, on as many processes as the run has.

    Parameters
    ----------
    config, pool
        As for `run`. `config.steps` rounds are measured.

    Returns
    -------
    list of LayerCost
        As `ppsim.partition` and `ppsim.save_costs` take them.

    Raises
    ------
    InputError, WorkerError
        As for `run`.
    """
    return profile_with_stages(config, pool=pool).layers


def profile_with_stages(config: RunConfig, *, pool: WorkerPool | None = None) -> Profile:
    """Measure as `profile` does; the costs of layers and stages, and the environment."""
    with Session(config, pool=pool) as session:
        session.profile_rounds(max(config.warmup, 1))
        return session.profile(config.steps)
