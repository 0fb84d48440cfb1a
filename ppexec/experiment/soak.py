"""Soak: random runs, one after another, each checked against one process and against the predicted bytes."""

from __future__ import annotations

import gc
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ppsim
from ppexec.config.config import RunConfig
from ppexec.experiment.faults import FAULTS, arm
from ppexec.experiment.soak_models import KINDS
from ppexec.measure.assemble import with_memory
from ppexec.session import Session
from ppexec.workers.pool import WorkerPool
from ppexec.workers.watched_run import WorkerError
from ppsim.errors import InputError
from ppsim.explain.memory_difference import first_difference
from ppsim.simulation.memory_columns import with_columns

MOST_PROCESSES = 4
FAULT_S = 10.0
"""A run with a fault must have ended after so many seconds."""
_STOP_S = 2.0  # time-out of runs in which a rank is stopped
_FAULTS_OF_ALL = 0.2  # share of rounds


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round: a run, and what happens to it.

    number: which round of its seed. config: what runs. fault: (rank, action, name of the fault), or None.
    """

    number: int
    config: RunConfig
    fault: tuple[int, int, str] | None

    def __str__(self) -> str:
        config = self.config
        model = config.model.rpartition(":")[2]
        mesh = f"dp {config.dp} x pp {config.ranks} x tp {config.tp}"
        what = "" if self.fault is None else f", rank {self.fault[0]} {self.fault[2]} at action {self.fault[1]}"
        counts = config.replica_microbatches or config.microbatches
        return f"round {self.number}: {model}, {config.schedule}, {mesh}, {counts} microbatches{what}"


def draw(seed: int, number: int) -> Round:
    """The round of a seed and a number, always the same."""
    dice = random.Random(f"{seed} {number}")
    while True:
        try:
            config = _config(dice)
        except InputError:  # numbers that do not go together
            continue
        fault = None
        if dice.random() < _FAULTS_OF_ALL and config.backend == "gloo" and not config.forward_only:
            program = min(config.pipelines, key=lambda each: each.microbatches).program  # others have these actions too
            rank = dice.randrange(config.ranks)
            actions = int(program.rank_actions[rank + 1] - program.rank_actions[rank])
            fault = (rank, dice.randrange(actions), dice.choice(sorted(FAULTS)))
        return Round(number=number, config=config, fault=fault)


def _config(dice: random.Random) -> RunConfig:
    """A random configuration; raises InputError for one that cannot be."""
    kinds = [f"{kind.__module__}:{kind.__name__}" for kind in KINDS]
    model = dice.choice(["mlp", "gpt", *kinds])
    backend: Literal["gloo", "local"] = "local" if dice.random() < 0.25 else "gloo"
    ranks = dice.randint(1, MOST_PROCESSES)
    widest = 1 if backend == "local" else MOST_PROCESSES // ranks
    dp = dice.randint(1, widest)
    tp = dice.choice([1, 2]) if widest // dp >= 2 and model in ("mlp", "gpt") else 1
    schedule = dice.choice(ppsim.schedule_names())
    microbatches = dice.randint(1, 8)
    pipeline = ppsim.build_schedule(schedule, ranks=ranks, microbatches=microbatches)
    layers = pipeline.model_stages * dice.randint(1, 2)
    shares = [microbatches, *(dice.randint(1, microbatches) for _ in range(dp - 1))]
    dice.shuffle(shares)
    return RunConfig(
        model=model,
        schedule=schedule,
        ranks=ranks,
        dp=dp,
        tp=tp,
        microbatches=microbatches,
        replica_microbatches=",".join(map(str, shares)) if dp > 1 and dice.random() < 0.5 else "",
        layers=max(layers, 2),
        hidden=8 * dice.randint(1, 4),
        seq=dice.randint(2, 6),
        micro_batch_size=dice.randint(1, 3),
        dropout=dice.choice([0.0, 0.2]) if model == "gpt" else 0.0,
        tied=model == "gpt" and dice.random() < 0.5,
        recompute=dice.random() < 0.25,
        forward_only=dice.random() < 0.1,
        dtype=dice.choice(["float32", "float32", "float64", "bfloat16"]),
        receive_window=dice.choice([0, 0, 0, 8 * microbatches]),
        device=dice.choice(["cpu", "cpu", "threads"]),
        backend=backend,
        seed=dice.randrange(1000),
        threads=1,
        warmup=0,
        steps=1,
    )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a round.

    complaint: what is wrong; empty if all is right. bit_equal: whether outputs and gradients were equal to the last bit
    (other rounds are equal within the tolerance of their mesh); None where nothing was compared. seconds: how long it
    took.
    """

    round: Round
    complaint: str
    bit_equal: bool | None
    seconds: float


def run_round(each: Round, pool: WorkerPool, breakable: WorkerPool) -> Verdict:
    """Run one round.

    Parameters
    ----------
    each : Round
        Which.
    pool : WorkerPool
        For runs that are to succeed. Its workers live as long as it does.
    breakable : WorkerPool
        For runs with a fault, which end the workers.
    """
    began_s = time.monotonic()
    bit_equal = None
    try:
        if each.fault is None:
            bit_equal, complaint = _check(each.config, pool)
        else:
            complaint = _check_fault(each.config, breakable, *each.fault)
    except Exception as error:
        complaint = f"{type(error).__name__}: {error}"
    return Verdict(round=each, complaint=complaint, bit_equal=bit_equal, seconds=time.monotonic() - began_s)


def _check(config: RunConfig, pool: WorkerPool) -> tuple[bool, str]:
    """Whether a run was bit-equal, and what is wrong with its gradients or bytes."""
    with Session(config, pool=pool) as session:
        report = session.verify()
        if not report.passed:
            return False, f"differs from one process: {report.first_difference}"
        stages = session.stage_costs(session.profile(1), 0)
        predicted = with_columns(
            ppsim.simulate(config.pipeline, stages, engine="compiled"), receive_window=session.receive_window
        )
        measured = with_memory(session.measure(1)[0], session.memory())
        difference = first_difference(predicted, measured)
    is_bit_equal = report.outputs_bit_equal and (config.forward_only or report.gradients_bit_equal)
    return is_bit_equal, "" if difference is None else f"bytes differ: {difference}"


def _check_fault(config: RunConfig, pool: WorkerPool, rank: int, action: int, fault: str) -> str:
    """What is wrong with how a run with a fault ended."""
    changed = replace(config, timeout_s=_STOP_S) if fault == "stopped" else config
    with Session(changed, pool=pool) as session:
        pool.call(changed.world_size, arm, rank=rank, action=action, fault=fault)
        processes, began_s = pool.process_ids, time.monotonic()
        try:
            session.measure(1)
        except WorkerError as error:
            took_s = time.monotonic() - began_s
            if not re.search(rf"\brank {rank}\b", str(error)):
                return f"rank {rank} is not named: {error}"
            if took_s > FAULT_S:
                return f"took {took_s:.1f} s to end: {error}"
            left = [process for process in processes if Path(f"/proc/{process}").exists()]
            return f"processes {left} are left" if left else ""
    return "the run did not end with an error"


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What the soak holds of the machine at a moment: of this process, and of its workers together."""

    seconds: float
    rounds: int
    own_bytes: int
    workers_bytes: int
    own_files: int
    workers_files: int
    shared_files: int

    @classmethod
    def now(cls, seconds: float, rounds: int, workers: Sequence[int]) -> Footprint:
        """Read it from /proc."""
        gc.collect()
        return cls(
            seconds=seconds,
            rounds=rounds,
            own_bytes=_resident_bytes(os.getpid()),
            workers_bytes=sum(_resident_bytes(worker) for worker in workers),
            own_files=_open_files(os.getpid()),
            workers_files=sum(_open_files(worker) for worker in workers),
            shared_files=len(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else 0,
        )


def _resident_bytes(process: int) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _open_files(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def growth(footprints: Sequence[Footprint]) -> dict[str, dict[str, float]]:
    """How much each part of the footprint grew.

    Returns
    -------
    dict
        Field -> `begin` and `end`, the medians of the second and of the last quarter, and `grown`, end / begin - 1. The
        first quarter does not count: libraries are loaded and caches are filled in it.
    """
    count = len(footprints)
    quarters = footprints[count // 4 : count // 2] or footprints, footprints[-(count // 4) :] or footprints
    found = {}
    for name in ("own_bytes", "workers_bytes", "own_files", "workers_files", "shared_files"):
        begin, end = (_median([float(getattr(each, name)) for each in quarter]) for quarter in quarters)
        found[name] = {"begin": begin, "end": end, "grown": end / begin - 1 if begin else end}
    return found


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def counts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """How many rounds there were of each kind, and how they ended."""
    plain = [each for each in verdicts if each.round.fault is None]
    return {
        "rounds": len(verdicts),
        "compared": len(plain),
        "bit_equal": sum(bool(each.bit_equal) for each in plain),
        "faults": len(verdicts) - len(plain),
        "failures": sum(bool(each.complaint) for each in verdicts),
        "by_schedule": _tally(verdicts, lambda each: each.round.config.schedule),
        "by_model": _tally(verdicts, lambda each: each.round.config.model.rpartition(":")[2]),
        "by_fault": _tally(verdicts, lambda each: each.round.fault[2] if each.round.fault else "none"),
    }


def _tally(verdicts: Sequence[Verdict], key: Callable[[Verdict], str]) -> dict[str, int]:
    return dict(sorted(Counter(key(each) for each in verdicts).items()))
