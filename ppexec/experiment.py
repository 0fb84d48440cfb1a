"""Experiment: one configuration predicted and run for real, step by step in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import ppsim
from ppexec.api import profiled_for_timed
from ppexec.config import RunConfig
from ppexec.measure import median_step, with_memory
from ppexec.pool import WorkerPool
from ppexec.profile import Profile
from ppexec.session import Session
from ppexec.verify import VerifyReport
from ppsim import Network, Reduction, StageCost, Trace
from ppsim.memory_columns import first_difference, with_columns


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was predicted, what was measured, and what from.

    predicted: one step. measured: every measured step, all with the activation bytes counted in an untimed step.
    stages: the costs the prediction was made from. profile: where they come from; None if compute was timed. verified:
    None if it was not asked for. reduction: the ring that adds up gradients over replicas, as probed; None without.
    """

    config: RunConfig
    profile: Profile | None
    environment: dict[str, Any]
    stages: list[StageCost]
    network: Network
    predicted: Trace
    measured: list[Trace]
    verified: VerifyReport | None
    reduction: Reduction | None = None

    @property
    def step_times_s(self) -> np.ndarray:
        """Makespan of every measured step."""
        return np.array([trace.makespan_s for trace in self.measured])

    @property
    def median(self) -> Trace:
        """The median measured step."""
        return median_step(self.measured)

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
            "step_time_s": _compared(self.predicted.makespan_s, times_s),
            "step_with_reductions_s": None
            if self.predicted.reduce_end_s is None
            else _compared(self.predicted.step_s, whole_s),
            "reduction": None if self.reduction is None else self.reduction.to_dict(),
            "bubble_fraction": {"predicted": self.predicted.bubble_fraction, "measured": float(np.median(fractions))},
            "activation_bytes": {
                "predicted": self.predicted.peak_activation_bytes.tolist(),
                "measured": self.median.peak_activation_bytes.tolist(),
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
    advance: Callable[[str], None] = lambda done: None,
) -> Outcome:
    """Profile, predict, run and verify a configuration.

    Rounds of profiling and measured steps take turns, so that a machine whose speed drifts drifts under both alike.
    costs: of each stage, if known; then nothing is profiled, ranks wait instead of computing (timed compute), and there
    are no gradients to verify. Timed compute without a cost file is profiled once, before. advance: called as each of
    `experiment_length(config)` parts is done, with its name.
    """
    costs = profiled_for_timed(config, pool) if costs is None else costs
    with Session(config, pool=pool, costs=costs) as session:
        is_timed = session.costs is not None
        for _ in range(config.warmup):
            if not is_timed:
                session.profile_rounds(1)
            session.measure(1)
            advance("warm-up")
        rounds: list[list[Any]] = [[] for _ in range(config.world_size)]
        traces: list[Trace] = []
        for step in range(config.steps):
            if not is_timed:
                for gathered, new in zip(rounds, session.profile_rounds(1, first_step=step), strict=True):
                    gathered += new
            traces += session.measure(1, first_step=step)
            advance("profile and step")
        network = session.probe_network()
        reduction = session.probe_reduction()
        memory = session.memory()
        window = session.receive_window
        advance("memory")
        verified = session.verify() if verify and not is_timed else None
        advance("verify")
        profile = None if is_timed else session.summarise(rounds)
        environment = session.environment()
        stages = list(session.costs or []) if profile is None else profile.stages
    predicted = with_columns(
        ppsim.simulate(config.pipeline, stages, network=network, reduction=reduction), receive_window=window
    )
    measured = [with_memory(trace, memory) for trace in traces]
    details = {"config": config.to_dict(), "environment": environment}
    return Outcome(
        config=config,
        profile=profile,
        environment=environment,
        stages=stages,
        network=network,
        predicted=replace(predicted, details=predicted.details | details),
        measured=[replace(trace, details=details) for trace in measured],
        verified=verified,
        reduction=reduction,
    )


def experiment_length(config: RunConfig) -> int:
    """How often `predict_and_measure` calls `advance`."""
    return config.warmup + config.steps + 2
