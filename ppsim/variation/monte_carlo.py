"""Monte Carlo: many samples of one step whose costs vary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from ppsim.costs.stage_cost import StageCost
from ppsim.network.all_reduce import Reduction
from ppsim.network.network import Network
from ppsim.schedule.action import Kind
from ppsim.schedule.schedule import Schedule
from ppsim.simulation.engines.samples import Samples
from ppsim.simulation.simulate import check_finite, load_of
from ppsim.variation.draws import Draws
from ppsim.variation.ensemble import Ensemble
from ppsim.variation.jitter import Jitter
from ppsim.variation.sampler import Runner

Seconds = npt.NDArray[np.float64]


def monte_carlo(
    schedule: Schedule,
    stages: Sequence[StageCost],
    *,
    jitter: Jitter,
    samples: int = 1000,
    seed: int = 0,
    network: Network | None = None,
    engine: str | None = None,
    reduction: Reduction | None = None,
    threads: int | None = None,
    **options: Any,
) -> Ensemble:
    """Predict one step `samples` times, with costs that vary as `jitter` says.

    Sample i depends on schedule, costs, jitter, seed and i alone: not on the number of samples or threads. options:
    the other options of `simulate` (overlap, scale, slow_ranks, dispatch_s, send_s, receive_window, cores, devices,
    sharing, sharing_efficiency); what they say of costs is the mean. engine: "compiled", or "simpy" for the same answer
    later; None takes the compiled one unless ranks share devices, which only SimPy's has. threads: None takes every
    core this process may use. Memory: a few blocks of some hundred kilobytes or one step each, and three numbers per
    rank and sample.

    Raises what `simulate` raises, and ValueError for less than one sample, a seed or threads that cannot be.
    """
    for name, value, least in (("samples", samples, 1), ("seed", seed, 0), ("threads", threads, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be a whole number of {least} or more, got {value!r}")
    network = Network() if network is None else network
    load = load_of(schedule.program, stages, network, **options)
    if load.devices is not None and not load.devices.are_shared:
        load = load_of(
            schedule.program, stages, network, **{**options, "cores": None, "devices": None, "sharing_efficiency": 1.0}
        )
    if engine is None:
        engine = "compiled" if load.devices is None else "simpy"
    runner = Runner(draws=Draws(load=load, jitter=jitter, seed=seed), engine=engine, threads=threads)
    reduced = _Reductions(reduction, runner, stages) if reduction is not None and reduction.replicas > 1 else None
    found = runner.run(samples, watched=reduced.rows if reduced else None)
    check_finite(found.last_end_s)
    details = {
        "latency_s": network.latency_s,
        "bytes_per_s": network.bytes_per_s if np.isfinite(network.bytes_per_s) else None,
        "links": len(network.links),
        **{name: _plain(value) for name, value in options.items() if value is not None},
        **({} if reduction is None else {"reduction": asdict(reduction)}),
        "jitter": jitter.to_dict(),
        "seed": seed,
    }
    makespan_s = found.makespan_s
    return Ensemble(
        runner=runner,
        stages=tuple(stages),
        reduction=reduction,
        details=details,
        makespan_s=makespan_s,
        step_s=np.maximum(makespan_s, reduced.ends(found)) if reduced and len(reduced.rows) else makespan_s,
        rank_time_s=found.last_end_s - found.first_start_s,
        compute_s=found.compute_s,
    )


class _Reductions:
    """When the gradients of each sample have been added up; see `ppsim.network.all_reduce`."""

    def __init__(self, reduction: Reduction, runner: Runner, stages: Sequence[StageCost]) -> None:
        self._program = runner.draws.load.program
        self._seconds = np.array([reduction.seconds(stage.parameter_bytes) for stage in stages])
        ends = np.flatnonzero((self._program.kind == Kind.B) | (self._program.kind == Kind.W))
        last = np.zeros(len(stages), np.int64)
        last[self._program.stage[ends]] = ends  # a stage is on one rank, whose rows ascend: the last one stays
        self.rows = last if len(ends) else last[:0]

    def ends(self, found: Samples) -> Seconds:
        """From the step's first start until the last reduction has ended, shape (samples,)."""
        ready_s = found.watched_end_s
        samples = np.arange(len(ready_s))
        free_s = np.full((len(ready_s), self._program.ranks), -np.inf)
        placement = np.array(self._program.schedule.placement)
        for stage in np.argsort(ready_s, axis=1, kind="stable").T:
            rank = placement[stage]
            free_s[samples, rank] = np.maximum(ready_s[samples, stage], free_s[samples, rank]) + self._seconds[stage]
        return free_s.max(axis=1) - found.step_start_s


def _plain(value: Any) -> Any:
    """An option of `simulate` as a JSON value."""
    if isinstance(value, dict):
        return {str(rank): factor for rank, factor in value.items()}
    return np.asarray(value).tolist()
