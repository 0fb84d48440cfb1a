"""Rounds: profiling, measured steps and known runs in turn, so that a machine that drifts drifts under all alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppexec.calibrate.known_run import KnownRun
from ppexec.config.config import RunConfig
from ppexec.machine.outside_load import OutsideLoad, Window
from ppexec.measure.assemble import RankMemory
from ppexec.measure.profile import Profile
from ppexec.session import Session
from ppexec.verification.verify import VerifyReport
from ppexec.workers.pool import WorkerPool
from ppsim import Collectives, Reduction, StageCost, Trace
from ppsim.costs.by_microbatch import StageCosts
from ppsim.errors import InputError

_MOST_DISTURBED = 2  # steps, for each one that was asked for
_ROUNDS_BY_LAYER = 3  # of profiling; only stages are timed in later ones
_LAUNCHES = 5  # steps in which launching is timed
_LONGEST_S = 30e-3  # of a known run's forward
_LONGER = 2  # a known run's forward takes, than launching one for every rank: what is fitted is no wait for the host
_SHARE = 0.25  # how long known runs take beside real steps; beside others, of which they explain more, as long as those


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one session measured.

    profile: None if compute was timed. stages: what each takes, stated or profiled; of the longest replica. shorter:
    those of replicas with fewer microbatches, by their number. traces: of undisturbed steps, and
    disturbed: of the others. known_steps: see `step_fit.calibrated`. memory: by rank, from an untimed step.
    launch_s: what the host spends on each action, see `Session.time_launches`.
    speeds: of a rank whose device n ranks use at once, over its speed alone, at n - 1; None where nobody shares a GPU.
    """

    profile: Profile | None
    stages: StageCosts
    shorter: dict[int, StageCosts]
    traces: list[Trace]
    known_steps: list[tuple[Trace, KnownRun]]
    disturbed: list[Trace]
    memory: list[RankMemory]
    receive_window: int | None
    verified: VerifyReport | None
    reduction: Reduction | None
    collectives: Collectives | None
    environment: dict[str, Any]
    speeds: tuple[float, ...] | None = None
    launch_s: list[float] | None = None


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
    """Profile, run and calibrate in turn.

    Disturbed steps are repeated, up to as many as were asked for.

    Parameters
    ----------
    calibrates : bool
        Whether to make known runs.
    config, pool, costs, verify, watch, advance
        As in `experiment.predict_and_measure`.

    Raises
    ------
    InputError
        If all steps are disturbed.
    """
    with Session(config, pool=pool, costs=costs) as session:
        is_timed = session.costs is not None
        for _ in range(config.warmup):
            if not is_timed:
                session.profile_rounds(1)
            session.measure(1)
            advance("warm-up")
        # Microbatches come in another order in each step. Where they differ, every step reads what the first one reads,
        # so that the step that is predicted is the step that is measured.
        is_uneven = not is_timed and _is_uneven(session)
        launch_s = None if is_timed else session.time_launches(_LAUNCHES)
        known = _KnownRuns(session, is_timed, launch_s or [0.0]) if calibrates else None
        advance("calibration")
        rounds: list[list[Any]] = []
        beside = _Beside(session) if config.device != "cpu" and config.is_local and not is_timed else None
        traces: list[Trace] = []
        disturbed: list[Trace] = []
        while len(traces) < config.steps and len(disturbed) <= _MOST_DISTURBED * config.steps:
            step = 0 if is_uneven else len(traces)
            by_layer = len(traces) < _ROUNDS_BY_LAYER
            with _window(watch, pool) as window:
                new_rounds = [] if is_timed else session.profile_rounds(1, first_step=step, by_layer=by_layer)
                if beside:
                    beside.profile(len(traces), first_step=step)
                trace = session.measure(1, first_step=step)
                known_steps = known.beside(trace[0].makespan_s) if known else []
            if window.is_disturbed:
                disturbed += trace
                continue
            rounds = [of_rank + new for of_rank, new in zip(rounds, new_rounds, strict=True)] if rounds else new_rounds
            traces += trace
            if known:
                known.kept += known_steps
            advance("profile and step")
        if not traces:
            raise InputError(
                f"all of {len(disturbed)} steps were disturbed by other load on this machine: run it when there is none"
            )
        reduction, collectives = session.probe_reduction(), session.probe_collectives()
        memory = session.memory()
        window_size = session.receive_window
        advance("memory")
        verified = session.verify() if verify and not is_timed else None
        advance("verify")
        profile = None if is_timed else session.summarise(rounds)

        def stages_of(microbatches: int) -> StageCosts:
            replica = config.microbatches_by_replica.index(microbatches)
            return list(session.costs or []) if profile is None else session.stage_costs(profile, 0, replica=replica)

        return Measured(
            profile=profile,
            stages=stages_of(config.microbatches),
            shorter={each: stages_of(each) for each in set(config.microbatches_by_replica) - {config.microbatches}},
            traces=traces,
            known_steps=known.kept if known else [],
            disturbed=disturbed,
            memory=memory,
            receive_window=window_size,
            verified=verified,
            reduction=reduction,
            collectives=collectives,
            environment=session.environment(),
            speeds=None if beside is None else beside.speeds(rounds),
            launch_s=launch_s,
        )


def _is_uneven(session: Session) -> bool:
    """Whether some microbatch of the measured steps has another shape than the others."""
    steps = range(session.config.steps)
    return len({shape for step in steps for shape in session.microbatch_shapes(step)}) > 1


def _window(watch: OutsideLoad | None, pool: WorkerPool | None) -> contextlib.AbstractContextManager[Window]:
    if watch is None:
        return contextlib.nullcontext(Window())
    return watch.window([] if pool is None else pool.process_ids)


class _Beside:
    """How fast ranks that share a GPU compute when only some do: 1, 2, ... of them profiled side by side."""

    def __init__(self, session: Session) -> None:
        self._session, self._ranks = session, session.config.ranks
        self._seconds: dict[int, dict[tuple[str, int], list[float]]] = {n: {} for n in range(1, self._ranks)}

    def profile(self, turn: int, *, first_step: int) -> None:
        """One more round for each number of ranks, of other ranks in each turn."""
        for n, seconds in self._seconds.items():
            chosen = [(turn + i) % self._ranks for i in range(n)]
            _note(seconds, self._session.profile_rounds(1, first_step=first_step, by_layer=False, ranks=chosen))

    def speeds(self, rounds: list[list[Any]]) -> tuple[float, ...]:
        """From these and the rounds of all ranks: the geometric mean over stages and kinds of action."""
        together: dict[tuple[str, int], list[float]] = {}
        _note(together, rounds)
        every = [*self._seconds.values(), together]
        alone = {key: np.log(np.median(found)) for key, found in every[0].items()}
        found = [
            np.mean([alone[key] - np.log(np.median(seconds)) for key, seconds in each.items() if key in alone])
            for each in every
        ]
        return tuple(float(min(np.exp(speed), 1.0)) for speed in found)


def _note(seconds: dict[tuple[str, int], list[float]], rounds: list[list[Any]]) -> None:
    """The mean of each round's actions, by kind and stage."""
    for samples in (samples for of_rank in rounds for samples in of_rank):
        for name, by_stage in samples.stage_seconds.items():
            for stage, found in by_stage.items():
                seconds.setdefault((name, stage), []).append(float(np.mean(found)))


class _KnownRuns:
    """Known runs in turn, beside what they are to say something about.

    kept: those that count.
    """

    def __init__(self, session: Session, is_timed: bool, launch_s: Sequence[float]) -> None:
        stages = session.costs if is_timed else session.profile(1).stages
        self.kept: list[tuple[Trace, KnownRun]] = []
        self._session, self._is_timed, self._time_left_s = session, is_timed, 0.0
        action_s = min(max(typical_s(stages or []), _LONGER * max(launch_s) * session.config.ranks), _LONGEST_S)
        self._turns = session.known_runs(session.message_bytes, action_s)
        self._share = 1.0 if is_timed or any(each.is_busy for each in self._turns) else _SHARE
        for each in self._turns:
            session.run_known(each)  # not counted: memory is touched for the first time

    def beside(self, step_s: float) -> list[tuple[Trace, KnownRun]]:
        """The next ones, as long as suits a step of this length; all of them until all are kept.

        Beside timed compute one at least: of a step that hardly computes, all else is what known runs show.
        """
        found: list[tuple[Trace, KnownRun]] = []
        self._time_left_s = max(self._time_left_s, 0.0 if self._is_timed else -np.inf) + self._share * step_s
        while self._time_left_s > 0 or len(self.kept) + len(found) < len(self._turns):
            each = self._turns[(len(self.kept) + len(found)) % len(self._turns)]
            trace = self._session.run_known(each)
            found.append((trace, each))
            self._time_left_s -= trace.makespan_s
        return found


def typical_s(stages: Sequence[StageCost]) -> float:
    """What a forward of these stages takes, within what a calibration can be run with in a second or two."""
    return float(np.clip(np.mean([stage.forward_s for stage in stages]), 0.5e-3, _LONGEST_S))
