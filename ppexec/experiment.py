"""Experiment: one configuration predicted and run for real, step by step in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import ppsim
from ppexec.api import profiled_for_timed
from ppexec.calibrate import Calibration, fit
from ppexec.config import RunConfig
from ppexec.environment import is_crowded, usable_cores
from ppexec.exercise import exercises
from ppexec.measure import RankMemory, median_step, with_memory
from ppexec.pool import WorkerPool
from ppexec.profile import Profile
from ppexec.session import Session, under_torchrun
from ppexec.verify import VerifyReport
from ppexec.watch import OutsideLoad, Window
from ppsim import Network, Reduction, StageCost, Trace
from ppsim.memory_columns import first_difference, with_columns
from ppsim.simulate import message_bytes

_MOST_DISTURBED = 2  # steps, for each one that was asked for
_SAMPLES = 200
_ROUNDS_BY_LAYER = 3  # of profiling; only stages are timed in later ones
_EXERCISE = {True: 1.0, False: 0.25}  # how long exercises take beside steps of timed or real compute


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was predicted, what was measured, and what from.

    predicted: one step. measured: every measured step, all with the activation bytes counted in an untimed step.
    stages: the costs the prediction was made from. profile: where they come from; None if compute was timed. verified:
    None if it was not asked for. calibration: what dispatch, sending and network were taken from. likely: samples of
    the step, as costs vary in the calibration; the predicted one is their median. disturbed: steps during which others
    used the machine, which count nowhere else. reduction: the ring that adds up gradients over replicas, as probed;
    None without.
    """

    config: RunConfig
    profile: Profile | None
    environment: dict[str, Any]
    stages: list[StageCost]
    network: Network
    predicted: Trace
    measured: list[Trace]
    verified: VerifyReport | None
    calibration: Calibration
    likely: ppsim.Ensemble
    disturbed: list[Trace] = field(default_factory=list)
    reduction: Reduction | None = None

    @property
    def step_times_s(self) -> np.ndarray:
        """Makespan of every measured step; without the disturbed ones, if there are others."""
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
            "step_time_s": {
                **_compared(self.predicted.makespan_s, times_s),
                "predicted_p25": float(np.quantile(self.likely.makespan_s, 0.25)),
                "predicted_p75": float(np.quantile(self.likely.makespan_s, 0.75)),
            },
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
    calibration: Calibration | None = None,
    watch: OutsideLoad | None = None,
    advance: Callable[[str], None] = lambda done: None,
) -> Outcome:
    """Profile, predict, run and verify a configuration.

    Rounds of profiling, measured steps and exercises for the calibration take turns, so that a machine whose speed
    drifts drifts under all alike. The prediction is the median of many samples: where ranks wait for one another, what
    varies costs more than its mean.
    costs: of each stage, if known; then nothing is profiled, ranks wait instead of computing (timed compute), and there
    are no gradients to verify. Timed compute without a cost file is profiled once, before. calibration: made here
    unless given. watch: tells which steps are disturbed from outside; these, and the rounds of profiling beside them,
    do not count. advance: called as each of `experiment_length(config)` parts is done, with its name.
    """
    with contextlib.ExitStack() as owned:
        if pool is None and not under_torchrun():
            pool = owned.enter_context(WorkerPool())
        costs = profiled_for_timed(config, pool) if costs is None else costs
        found = _alternate(
            config, pool, costs, verify=verify, calibrates=calibration is None, watch=watch, advance=advance
        )
    calibration = fit(found.exercised) if calibration is None else calibration
    stages, program = found.stages, config.pipeline.program
    is_shared = found.profile is not None and is_crowded(config)
    options = calibration.options(program, message_bytes(program, stages))
    likely = ppsim.monte_carlo(
        config.pipeline,
        stages,
        jitter=calibration.jitter(timed=found.profile is None),
        samples=_SAMPLES,
        cores=usable_cores() if is_shared else None,
        sharing="fair" if is_shared else "turns",
        reduction=found.reduction,
        **options,
    )
    predicted = with_columns(likely.trace(likely.nearest(50)), receive_window=found.receive_window)
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
    )


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What one session measured."""

    profile: Profile | None
    stages: list[StageCost]
    traces: list[Trace]
    exercised: list[tuple[Trace, list[StageCost]]]
    disturbed: list[Trace]
    memory: list[RankMemory]
    receive_window: int
    verified: VerifyReport | None
    reduction: Reduction | None
    environment: dict[str, Any]


def _alternate(
    config: RunConfig,
    pool: WorkerPool | None,
    costs: Sequence[StageCost] | None,
    *,
    verify: bool,
    calibrates: bool,
    watch: OutsideLoad | None,
    advance: Callable[[str], None],
) -> _Found:
    """Profile, run and exercise in turn. Disturbed steps are made up for, twice as many as were asked for at most."""
    with Session(config, pool=pool, costs=costs) as session:
        is_timed = session.costs is not None
        for _ in range(config.warmup):
            if not is_timed:
                session.profile_rounds(1)
            session.measure(1)
            advance("warm-up")
        rehearsals = _Rehearsals(session, is_timed) if calibrates else None
        advance("calibration")
        rounds: list[list[Any]] = [[] for _ in range(config.world_size)]
        traces: list[Trace] = []
        disturbed: list[Trace] = []
        steps_exercised: list[tuple[Trace, list[StageCost]]] = []
        while len(traces) < config.steps and len(disturbed) <= _MOST_DISTURBED * config.steps:
            step = len(traces)
            with _window(watch, pool) as window:
                new_rounds = (
                    [] if is_timed else session.profile_rounds(1, first_step=step, by_layer=step < _ROUNDS_BY_LAYER)
                )
                trace = session.measure(1, first_step=step)
                exercised = rehearsals.beside(trace[0].makespan_s) if rehearsals else []
            if window.is_disturbed:
                disturbed += trace
                continue
            for gathered, new in zip(rounds, new_rounds, strict=False):
                gathered += new
            traces += trace
            steps_exercised += exercised
            advance("profile and step")
        if not traces:
            raise ValueError(
                f"all of {len(disturbed)} steps were disturbed by other load on this machine: run it when there is none"
            )
        reduction = session.probe_reduction()
        memory = session.memory()
        window_size = session.receive_window
        advance("memory")
        verified = session.verify() if verify and not is_timed else None
        advance("verify")
        profile = None if is_timed else session.summarise(rounds)
        return _Found(
            profile=profile,
            stages=list(session.costs or []) if profile is None else profile.stages,
            traces=traces,
            exercised=steps_exercised,
            disturbed=disturbed,
            memory=memory,
            receive_window=window_size,
            verified=verified,
            reduction=reduction,
            environment=session.environment(),
        )


def _window(watch: OutsideLoad | None, pool: WorkerPool | None) -> contextlib.AbstractContextManager[Window]:
    if watch is None:
        return contextlib.nullcontext(Window())
    return watch.window([] if pool is None else pool.process_ids)


class _Rehearsals:
    """Exercises in turn, beside what they are to say something about."""

    def __init__(self, session: Session, is_timed: bool) -> None:
        config, stages = session.config, session.costs if is_timed else session.profile(1).stages
        self._session = session
        self._turns = [
            each
            for of_round in exercises(
                config.ranks,
                session.message_bytes,
                typical_s(stages or []),
                stages_per_rank=-(-config.pipeline.stages // config.ranks),
            )
            for each in of_round
        ]
        self._share, self._owed_s, self._done = _EXERCISE[is_timed], 0.0, 0
        for each in self._turns:
            session.exercise(each)  # not counted: memory is touched for the first time

    def beside(self, step_s: float) -> list[tuple[Trace, list[StageCost]]]:
        """The next ones, as long as suits a step of this length; all of them at first."""
        found: list[tuple[Trace, list[StageCost]]] = []
        self._owed_s += self._share * step_s
        while self._owed_s > 0 or self._done < len(self._turns):
            each = self._turns[self._done % len(self._turns)]
            trace = self._session.exercise(each)
            found.append((trace, each.stages))
            self._owed_s -= trace.makespan_s
            self._done += 1
        return found


def typical_s(stages: Sequence[StageCost]) -> float:
    """What a forward of these stages takes, within what a calibration can be run with in a second or two."""
    return float(np.clip(np.mean([stage.forward_s for stage in stages]), 0.5e-3, 30e-3))


def experiment_length(config: RunConfig) -> int:
    """How often `predict_and_measure` calls `advance`."""
    return config.warmup + config.steps + 3
