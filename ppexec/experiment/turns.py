"""Rounds: profiling, measured steps and exercises in turn, so that a machine that drifts drifts under all alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppexec.calibrate.known_run import Exercise
from ppexec.config.config import RunConfig
from ppexec.machine.outside_load import OutsideLoad, Window
from ppexec.measure.assemble import RankMemory
from ppexec.measure.profile import Profile
from ppexec.session import Session
from ppexec.verify.verify import VerifyReport
from ppexec.workers.pool import WorkerPool
from ppsim import Reduction, StageCost, Trace

_MOST_DISTURBED = 2  # steps, for each one that was asked for
_ROUNDS_BY_LAYER = 3  # of profiling; only stages are timed in later ones
_SHARE = 0.25  # how long exercises take beside real steps; beside others, of which they explain more, as long as those


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one session measured.

    profile: None if compute was timed. stages: what each takes, stated or profiled. traces: of undisturbed steps, and
    disturbed: of the others. exercised: see `step_fit.calibrated`. memory: by rank, from an untimed step.
    """

    profile: Profile | None
    stages: list[StageCost]
    traces: list[Trace]
    exercised: list[tuple[Trace, Exercise]]
    disturbed: list[Trace]
    memory: list[RankMemory]
    receive_window: int
    verified: VerifyReport | None
    reduction: Reduction | None
    environment: dict[str, Any]


def measure_in_turn(
    config: RunConfig,
    pool: WorkerPool | None,
    costs: Sequence[StageCost] | None,
    *,
    verify: bool,
    calibrates: bool,
    watch: OutsideLoad | None,
    advance: Callable[[str], None],
) -> Measured:
    """Profile, run and exercise in turn. Disturbed steps are made up for, twice as many as were asked for at most.

    Raises ValueError if all are disturbed. For the arguments see `experiment.predict_and_measure`; calibrates: whether
    to exercise.
    """
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
            if rehearsals:
                rehearsals.kept += exercised
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
        return Measured(
            profile=profile,
            stages=list(session.costs or []) if profile is None else profile.stages,
            traces=traces,
            exercised=rehearsals.kept if rehearsals else [],
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
    """Exercises in turn, beside what they are to say something about.

    kept: those that count.
    """

    def __init__(self, session: Session, is_timed: bool) -> None:
        stages = session.costs if is_timed else session.profile(1).stages
        self.kept: list[tuple[Trace, Exercise]] = []
        self._session, self._is_timed, self._owed_s = session, is_timed, 0.0
        self._turns = session.exercises(session.message_bytes, typical_s(stages or []))
        self._share = 1.0 if is_timed or any(each.is_busy for each in self._turns) else _SHARE
        for each in self._turns:
            session.exercise(each)  # not counted: memory is touched for the first time

    def beside(self, step_s: float) -> list[tuple[Trace, Exercise]]:
        """The next ones, as long as suits a step of this length; all of them until all are kept.

        Beside timed compute one at least: of a step that hardly computes, all else is what exercises show.
        """
        found: list[tuple[Trace, Exercise]] = []
        self._owed_s = max(self._owed_s, 0.0 if self._is_timed else -np.inf) + self._share * step_s
        while self._owed_s > 0 or len(self.kept) + len(found) < len(self._turns):
            each = self._turns[(len(self.kept) + len(found)) % len(self._turns)]
            trace = self._session.exercise(each)
            found.append((trace, each))
            self._owed_s -= trace.makespan_s
        return found


def typical_s(stages: Sequence[StageCost]) -> float:
    """What a forward of these stages takes, within what a calibration can be run with in a second or two."""
    return float(np.clip(np.mean([stage.forward_s for stage in stages]), 0.5e-3, 30e-3))
