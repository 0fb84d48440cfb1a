"""Cases: many configurations, each predicted, measured and stored, so that a study that was stopped can go on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

import ppsim
from ppexec.config.config import RunConfig
from ppexec.experiment.experiment import Outcome, predict_and_measure
from ppexec.machine.outside_load import OutsideLoad
from ppexec.workers.pool import WorkerPool
from ppsim import StageCost
from ppsim.errors import InputError, RunError
from ppsim.parameter_sweep.key import canonical_json, digest
from ppsim.parameter_sweep.store import PointOutcome, Store

Group = Literal["timed", "real", "shared-cores"]
GROUPS: tuple[Group, ...] = ("timed", "real", "shared-cores")
"""Timed compute; real compute with a core for each rank; real compute with twice as many ranks as cores."""

# Part of each key in the store. Raise the number when a measurement means something else: older results do not count.
_STORED_AS = "studies.fidelity.5"
_TIMED = {"small": (0.010, 64 << 10), "large": (0.025, 512 << 10)}  # a rank's forward, bytes of a message
_REAL = {"small": (256, 64), "large": (512, 128)}  # hidden, sequence
_STEPS = {"timed": 7, "real": 15, "shared-cores": 9}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration, and the key under which its result is stored. repeat: number of the repetition, from 0."""

    group: Group
    schedule: str
    ranks: int
    microbatches: int
    size: str
    steps: int
    repeat: int = 0

    def config(self) -> RunConfig:
        """What to run. Raises InputError where the schedule does not allow it."""
        hidden, seq = _REAL[self.size]
        schedule = ppsim.build_schedule(self.schedule, ranks=self.ranks, microbatches=self.microbatches)
        return RunConfig(
            schedule=self.schedule,
            ranks=self.ranks,
            microbatches=self.microbatches,
            layers=max(schedule.stages, 4),
            hidden=hidden,
            seq=seq,
            micro_batch_size=2,
            threads=1,
            steps=self.steps,
            warmup=1,
        )

    def costs(self) -> list[StageCost] | None:
        """What each stage of timed compute takes: a rank's stages share its time equally. None for real compute."""
        if self.group != "timed":
            return None
        rank_forward_s, size_bytes = _TIMED[self.size]
        pipeline = self.config().pipeline
        part_s = rank_forward_s * self.ranks / pipeline.model_stages
        cost = StageCost(
            forward_s=part_s,
            backward_input_s=part_s,
            backward_weight_s=part_s,
            activation_bytes=10 * size_bytes,
            weight_activation_bytes=6 * size_bytes,
            output_bytes=size_bytes,
        )
        return [cost] * pipeline.model_stages

    @property
    def text(self) -> str:
        """The configuration as canonical JSON. Repetition 0 is not written: its key is that of a case without any."""
        values = asdict(self)
        if not self.repeat:
            del values["repeat"]
        return canonical_json(values)

    @property
    def key(self) -> bytes:
        """The key of the case in the store."""
        return digest(_STORED_AS, self.text)


def cases(groups: Sequence[Group], steps: int, cores: int, repeats: int = 1) -> list[Case]:
    """List all cases of these groups that the schedules allow.

    Parameters
    ----------
    steps : int
        Measured steps of each; 0 takes what suits the group.
    cores : int
        Cores of this machine. "real" takes as many ranks or fewer, "shared-cores" twice as many.
    repeats : int
        Repetitions of each.
    """
    ranks = {
        "timed": (2, 4, 8),
        "real": tuple(p for p in (2, 4, 8) if p <= cores),
        "shared-cores": tuple(p for p in (4, 8) if p == 2 * cores),
    }
    microbatches: dict[str, Callable[[int], tuple[int, ...]]] = {
        "timed": lambda p: (p, 2 * p),
        "real": lambda p: (2 * p, 4 * p),
        "shared-cores": lambda p: (2 * p,),
    }
    found = [
        Case(
            group=group,
            schedule=schedule,
            ranks=p,
            microbatches=m,
            size=size,
            steps=steps or _STEPS[group],
            repeat=repeat,
        )
        for repeat in range(repeats)
        for group in groups
        for p in ranks[group]
        for m in microbatches[group](p)
        for size in _TIMED
        for schedule in ppsim.schedule_names()
    ]
    return [case for case in found if _is_possible(case)]


def _is_possible(case: Case) -> bool:
    try:
        case.config()
    except InputError:
        return False
    return True


def measure_missing(
    wanted: Sequence[Case],
    store: Store,
    *,
    limit_s: float,
    watch: OutsideLoad | None = None,
    progress: Callable[[Sequence[Case]], Iterable[Case]] = iter,
) -> None:
    """Measure and keep what the store lacks, one case after another.

    Parameters
    ----------
    limit_s : float
        Begin no further case after so many seconds, but measure one at least; 0 goes on to the end.
    watch : OutsideLoad or None
        Tells which steps other programs disturbed. A case of which all steps were disturbed is tried again next time.
    progress : callable
        Goes through the missing cases; a progress bar.
    """
    missing = [case for case in wanted if not store.has_result(case.key)]
    if not missing:
        return
    began_s = time.monotonic()
    with WorkerPool() as pool:
        for number, case in enumerate(progress(missing)):
            if number and limit_s and time.monotonic() - began_s > limit_s:
                return
            case_began_s = time.monotonic()
            result, error = None, None
            try:
                result = json.dumps(case_row(case, run_case(case, pool, watch or OutsideLoad())))
            except (InputError, RunError) as failure:  # this case's; others may still be measured
                error = str(failure)
            took_s = time.monotonic() - case_began_s
            store.write(case.key, _STORED_AS, case.text, PointOutcome(result=result, error=error, took_s=took_s))


def run_case(case: Case, pool: WorkerPool, watch: OutsideLoad) -> Outcome:
    """Predict and measure one case.

    Parameters
    ----------
    case : Case
        What to run.
    pool : WorkerPool
        Workers to use.
    watch : OutsideLoad
        Tells which steps other programs disturb.
    """
    return predict_and_measure(case.config(), pool=pool, costs=case.costs(), verify=False, watch=watch)


def case_row(case: Case, outcome: Outcome) -> dict[str, Any]:
    """One case's figures as JSON values, as `ppexec.experiment.accuracy` takes them."""
    times_s, predicted_s = outcome.step_times_s, outcome.predicted.makespan_s
    middle_s = float(np.median(times_s))
    return {
        **asdict(case),
        "predicted_s": predicted_s,
        "measured_s": middle_s,
        "relative_error": outcome.step_time_error,
        "spread": float(np.subtract(*np.quantile(times_s, [0.75, 0.25]))) / middle_s,
        "steps_s": times_s.tolist(),
        "disturbed_steps": len(outcome.disturbed),
        "bytes_equal_at_every_action": outcome.summary()["memory"]["equal_at_every_action"],
        "calibration": outcome.calibration.to_dict(),
        "predicted_spread": float(np.subtract(*np.quantile(outcome.likely.makespan_s, [0.75, 0.25]))) / predicted_s,
        "comparison": str(ppsim.compare(outcome.predicted, outcome.median)),
    }


def stored_rows(wanted: Sequence[Case], store: Store) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows that the store has, in order; and why others failed."""
    rows, failed = [], []
    for case in wanted:
        found = store.read(case.key)
        if found is None:
            continue
        if found.result is None:
            failed.append(f"{case.schedule}, {case.ranks} ranks: {found.error}")
        else:
            rows.append(json.loads(found.result))
    return rows, failed
