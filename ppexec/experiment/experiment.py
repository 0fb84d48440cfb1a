"""Experiment: one configuration predicted and run for real, step by step in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

import ppsim
from ppexec.api import profiled_for_timed
from ppexec.calibrate.calibration import Calibration
from ppexec.calibrate.step_fit import calibrated
from ppexec.config.config import RunConfig
from ppexec.experiment.host import HOST_BOUND, with_host
from ppexec.experiment.turns import measure_in_turn
from ppexec.machine.environment import is_crowded, usable_cores
from ppexec.machine.outside_load import OutsideLoad
from ppexec.measure.assemble import with_memory
from ppexec.measure.profile import Profile
from ppexec.verification.verify import VerifyReport
from ppexec.workers.pool import WorkerPool
from ppexec.workers.session_workers import under_torchrun
from ppsim import Collectives, HostLink, Network, Reduction, StageCost, Trace
from ppsim.costs.by_microbatch import CostTable, StageCosts
from ppsim.explain.memory_difference import first_difference
from ppsim.simulation.gradient_reductions import ready_times
from ppsim.simulation.memory_columns import with_columns
from ppsim.simulation.timed_program import message_bytes
from ppsim.trace.trace import known, median_step

_SAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was predicted, what was measured, and what from.

    Parameters
    ----------
    config : RunConfig
        What ran.
    profile : Profile or None
        Where `stages` come from. None if compute was timed.
    environment : dict
        The machine and the versions.
    stages : sequence of StageCost, or of sequences of StageCost
        The costs that the prediction was made from; by microbatch where microbatches differ.
    network : Network
        The network that the prediction was made from.
    predicted : Trace
        The predicted step: the median one of `likely`.
    measured : list of Trace
        Every measured step. All have the activation bytes counted in an untimed step.
    verified : VerifyReport or None
        None if it was not asked for.
    calibration : Calibration
        Where dispatch, sending and network come from.
    likely : Ensemble
        Samples of the step, as times vary in the calibration.
    disturbed : list of Trace
        Steps during which other programs used the machine. They count nowhere else.
    reduction : Reduction or None
        The probed ring that sums gradients over replicas. None without replicas, or with sharded parameters.
    collectives : Collectives or None
        The probed gathering of sharded parameters and reduction of their gradients. None unless they are sharded.
    speeds, launch_s
        See `ppexec.experiment.turns.Measured`.
    host_delay : float
        See `ppexec.experiment.host.with_host`.
    """

    config: RunConfig
    profile: Profile | None
    environment: dict[str, Any]
    stages: StageCosts
    network: Network
    predicted: Trace
    measured: list[Trace]
    verified: VerifyReport | None
    calibration: Calibration
    likely: ppsim.Ensemble
    disturbed: list[Trace] = field(default_factory=list)
    reduction: Reduction | None = None
    collectives: Collectives | None = None
    speeds: tuple[float, ...] | None = None
    launch_s: list[float] | None = None
    host_delay: float = 0.0

    @property
    def step_times_s(self) -> np.ndarray:
        """Makespan of every measured step; without the disturbed ones, if there are others."""
        return np.array([trace.makespan_s for trace in self.measured])

    @property
    def median(self) -> Trace:
        """The median measured step."""
        return median_step(self.measured)

    @property
    def largest_stages(self) -> list[StageCost]:
        """One cost of each stage: that of its microbatch with the most bytes where they differ."""
        costs = CostTable.of(self.stages, self.config.microbatches)
        return [
            max(each, key=lambda cost: (cost.activation_bytes, cost.output_bytes)) for each in costs.of_microbatches
        ]

    @property
    def host_link(self) -> HostLink | None:
        """What copies of activations to host memory take, from the profile; None where the schedule has none."""
        return None if self.profile is None else self.profile.host_link

    @property
    def is_host_bound(self) -> bool:
        """Whether the host launches more slowly than the device computes, so that the predicted step waits for it."""
        return self.host_delay > HOST_BOUND

    @property
    def step_time_error(self) -> float:
        """(predicted - median measured) / median measured."""
        middle = float(np.median(self.step_times_s))
        return (self.predicted.makespan_s - middle) / middle

    def summary(self) -> dict[str, Any]:
        """The comparison as JSON values; seconds and bytes."""
        times_s, whole_s = self.step_times_s, np.array([trace.step_s for trace in self.measured])
        fractions = [trace.bubble_fraction for trace in self.measured]
        verified = self.verified
        return {
            "step_time_s": {
                **_compared(self.predicted.makespan_s, times_s),
                "predicted_p25": float(np.quantile(self.likely.makespan_s, 0.25)),
                "predicted_p75": float(np.quantile(self.likely.makespan_s, 0.75)),
            },
            "step_with_reductions_s": None
            if self.predicted.reduce_end_s is None
            else _compared(self.predicted.step_s, whole_s),
            "reduction": None if self.reduction is None else self.reduction.to_dict(),
            "collectives": None if self.collectives is None else self.collectives.to_dict(),
            "host_link": None if self.host_link is None else self.host_link.to_dict(),
            "bubble_fraction": {"predicted": self.predicted.bubble_fraction, "measured": float(np.median(fractions))},
            "activation_bytes": {
                "predicted": known(self.predicted.peak_activation_bytes).tolist(),
                "measured": known(self.median.peak_activation_bytes).tolist(),
            },
            "memory": self._memory(),
            "gradients": None
            if verified is None or self.config.forward_only
            else {"bit_equal": verified.gradients_bit_equal, "max_abs_diff": verified.max_gradient_diff},
            "outputs": None
            if verified is None
            else {"bit_equal": verified.outputs_bit_equal, "max_abs_diff": verified.max_output_diff},
            "first_difference": None if verified is None else verified.first_difference,
            "config": self.config.to_dict(),
            "environment": self.environment,
        }

    def _memory(self) -> dict[str, Any]:
        """Both clocks' columns, peaks by rank; whether what is counted is equal after every action, and where not."""
        predicted, measured = self.predicted, self.median
        difference = first_difference(predicted, measured)
        return {
            "predicted": predicted.memory.to_dict(),
            "measured": measured.memory.to_dict(),
            "equal_at_every_action": difference is None,
            "first_difference": difference,
        }


def _compared(predicted_s: float, measured_s: np.ndarray) -> dict[str, Any]:
    """One time of the step on both clocks."""
    middle_s = float(np.median(measured_s))
    return {
        "predicted": predicted_s,
        "measured_median": middle_s,
        "measured_p25": float(np.quantile(measured_s, 0.25)),
        "measured_p75": float(np.quantile(measured_s, 0.75)),
        "relative_error": (predicted_s - middle_s) / middle_s,
        "measured": measured_s.tolist(),
    }


def predict_and_measure(
    config: RunConfig,
    *,
    pool: WorkerPool | None = None,
    costs: Sequence[StageCost] | None = None,
    verify: bool = True,
    calibration: Calibration | None = None,
    watch: OutsideLoad | None = None,
    advance: Callable[[str], None] | None = None,
) -> Outcome:
    """Profile, predict, run and verify one configuration.

    Parameters
    ----------
    config : RunConfig
        What to run.
    pool : WorkerPool, optional
        Workers to use. By default some are started, and stopped afterwards.
    costs : sequence of StageCost, optional
        Costs of the stages, if known. Then nothing is profiled, ranks wait instead of computing, and there are no
        gradients to verify. Timed compute without a cost file is profiled once, before.
    verify : bool
        Whether to compare outputs and gradients with one process.
    calibration : Calibration, optional
        What the machine adds to a step. By default it is measured here, with known runs.
    watch : OutsideLoad, optional
        Tells which steps other programs disturb. These do not count, nor do the rounds of profiling beside them.
    advance : callable, optional
        Called with the name of each of the `experiment_length(config)` parts when it is done.

    Returns
    -------
    Outcome
        Prediction and measurements, with what they are made of.

    Notes
    -----
    Profiling, measured steps and known runs take turns, so that a machine whose speed drifts affects all alike. The
    prediction is the median of many samples: where ranks wait for one another, variation costs more than its mean.
    Where microbatches differ in size, every measured step reads those of step 0, whose order is predicted.

    What copies of activations take (O, L) is measured while profiling, and what sharded parameters take (UNSHARD,
    REDUCE_GRAD) beside the steps. Bytes are predicted as they are counted, with copies that end where they stand.

    Of replicas with different numbers of microbatches, the longest is predicted and measured. The others count as what
    its reductions may have to wait for, at their mean times.
    """
    with contextlib.ExitStack() as owned:
        if pool is None and not under_torchrun():
            pool = owned.enter_context(WorkerPool())
        costs = profiled_for_timed(config, pool) if costs is None else costs
        found = measure_in_turn(
            config,
            pool,
            costs,
            verify=verify,
            calibrates=calibration is None,
            watch=watch,
            advance=advance or (lambda done: None),
        )
    if calibration is None:
        calibration = calibrated(found.known_steps)
    speeds = found.speeds
    stages = found.stages if speeds is None else _scaled(found.stages, speeds[-1])  # profiled with all ranks at work
    is_shared = found.profile is not None and config.device == "cpu" and is_crowded(config)
    common = {
        "streams": config.streams,
        "cores": usable_cores() if is_shared else None,
        "sharing": "fair" if is_shared or speeds else "turns",
        "speeds": speeds,
        "sharing_efficiency": calibration.sharing_efficiency if is_shared else 1.0,
        "reduction": found.reduction,
        "collectives": found.collectives,
        "host_link": None if found.profile is None else found.profile.host_link,
        "blocking": config.is_blocking,
    }

    def options_of(pipeline: ppsim.Schedule, stages: StageCosts) -> dict[str, Any]:
        return calibration.options(pipeline.program, message_bytes(pipeline.program, stages)) | common

    if found.reduction is not None and found.shorter:
        pipelines = {each.microbatches: each for each in config.pipelines}
        shorter = [(pipelines[count], own) for count, own in found.shorter.items()]
        steps = [ppsim.simulate(pipeline, own, **options_of(pipeline, own)) for pipeline, own in shorter]
        common["gradients_ready_s"] = np.max([ready_times(step) for step in steps], axis=0)
    options = options_of(config.pipeline, stages)
    jitter, host_delay = calibration.jitter(timed=found.profile is None), 0.0
    if found.launch_s is not None:
        options, host_delay = with_host(config, stages, found.launch_s, options)
        if host_delay > HOST_BOUND:  # waits for the host do not vary as what ranks spend on dispatching does
            jitter = replace(jitter, factors={n: each for n, each in jitter.factors.items() if n != "dispatch"})
    likely = ppsim.monte_carlo(config.pipeline, stages, jitter=jitter, samples=_SAMPLES, **options)
    predicted = with_columns(likely.trace(likely.nearest(50)), receive_window=found.receive_window)
    if config.pipeline.offload is not None and not config.is_blocking:
        counted = ppsim.simulate(config.pipeline, stages, engine="compiled")
        predicted = replace(predicted, activation_bytes=counted.activation_bytes, host_bytes=counted.host_bytes)
    measured, disturbed = ([with_memory(trace, found.memory) for trace in of] for of in (found.traces, found.disturbed))
    details = {"config": config.to_dict(), "environment": found.environment}
    return Outcome(
        config=config,
        profile=found.profile,
        environment=found.environment,
        stages=stages,
        network=options["network"],
        predicted=replace(predicted, details=predicted.details | details),
        measured=[replace(trace, details=details) for trace in measured],
        verified=found.verified,
        calibration=calibration,
        likely=likely,
        disturbed=[replace(trace, details=details) for trace in disturbed],
        reduction=found.reduction,
        collectives=found.collectives,
        speeds=found.speeds,
        launch_s=found.launch_s,
        host_delay=host_delay,
    )


def _scaled(stages: StageCosts, factor: float) -> StageCosts:
    """Stages whose actions all take this much longer, for each microbatch where these differ."""
    return [
        scaled(each, factor) if isinstance(each, StageCost) else [scaled(cost, factor) for cost in each]
        for each in stages
    ]


def scaled(stage: StageCost, factor: float) -> StageCost:
    """A stage whose actions all take this much longer."""
    seconds = {
        each.name: value * factor
        for each in fields(stage)
        if each.name.endswith("_s") and (value := getattr(stage, each.name)) is not None
    }
    return replace(stage, **seconds)


def experiment_length(config: RunConfig) -> int:
    """How often `predict_and_measure` calls `advance`."""
    return config.warmup + config.steps + 3
