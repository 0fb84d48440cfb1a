"""Overhead: what running a schedule costs beside its computations, here and in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import ppsim
from ppexec.config.config import RunConfig
from ppexec.session import Session
from ppexec.workers.pool import WorkerPool
from ppsim.errors import InputError

PEER_OF = {"afab": "torch-gpipe", "1f1b": "torch-1f1b"}
"""Our schedule -> PyTorch's executor of the same schedule, one of `ppexec.measure.torch_schedules.PEERS`."""


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What executors took for the same step.

    step_s: executor -> median seconds of a step. Executors are "ours", PyTorch's class for the schedule, and
    "torch-runtime", PyTorch's interpreter of our schedule. quartiles_s: the same, (lower, upper). floor_s: the
    simulated makespan from F and B alone, bubbles included, with messages and runtime free. microbatches: m.
    """

    schedule: str
    microbatches: int
    step_s: dict[str, float]
    quartiles_s: dict[str, tuple[float, float]]
    floor_s: float

    @property
    def overhead_us(self) -> dict[str, float]:
        """Microseconds per microbatch beyond the floor."""
        return {name: (value - self.floor_s) / self.microbatches * 1e6 for name, value in self.step_s.items()}

    @property
    def ratio(self) -> float:
        """Our overhead divided by that of PyTorch's class for the schedule."""
        return self.overhead_us["ours"] / self.overhead_us[PEER_OF[self.schedule]]


def measure_overhead(config: RunConfig, *, pool: WorkerPool, advance: Callable[[], Any] = lambda: None) -> Overhead:
    """Run a step of every executor in turn.

    Parameters
    ----------
    config : RunConfig
        One stage on each rank, schedule "afab" or "1f1b", on a CPU. The first `config.warmup` turns are discarded, the
        next `config.steps` are kept.
    pool : WorkerPool
        Workers to use.
    advance : callable
        Called after each turn.

    Notes
    -----
    The floor that executors are held against is the prediction from F and B alone. F and B are timed in a plain loop
    without messages, in the same turns as the executors.
    """
    if config.schedule not in PEER_OF:
        raise InputError(f"PyTorch's overhead is known for {' and '.join(PEER_OF)}, not {config.schedule!r}")
    if config.device == "cuda":
        raise InputError("the floor is the host's time, and a GPU computes beside the host: take device 'cpu'")
    executors = ["ours", PEER_OF[config.schedule], "torch-runtime"]
    times: dict[str, list[float]] = {name: [] for name in executors}
    compute: list[list[dict[str, float]]] = [[] for _ in range(config.ranks)]
    with Session(config, pool=pool) as session:
        for turn in range(config.warmup + config.steps):
            by_rank = session.time_compute(1)
            for name in executors:
                taken_s = session.time_steps(None if name == "ours" else name, 1)
                if turn >= config.warmup:
                    times[name] += taken_s
            if turn >= config.warmup:
                for gathered, new in zip(compute, by_rank, strict=True):
                    gathered += new
            advance()
    stages = [
        ppsim.StageCost(
            forward_s=median(values["forward_s"] for values in rank),
            backward_input_s=0,  # neither schedule splits B
            backward_weight_s=0,
            backward_s=median(values["backward_s"] for values in rank),
        )
        for rank in compute
    ]
    return Overhead(
        schedule=config.schedule,
        microbatches=config.microbatches,
        step_s={name: median(values) for name, values in times.items()},
        quartiles_s={name: _quartiles(values) for name, values in times.items()},
        floor_s=ppsim.simulate(config.pipeline, stages).makespan_s,
    )


def _quartiles(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
