"""Monte Carlo: many samples of one step whose costs vary."""

from __future__ import annotations

from typing import Any

import numpy as np

from ppsim.checks import check_memory, check_whole, checked
from ppsim.conditions import Conditions
from ppsim.costs.by_microbatch import StageCosts, costs_of_copies
from ppsim.network.network import Network
from ppsim.schedule.schedule import Schedule
from ppsim.simulation.engines.times import check_finite
from ppsim.simulation.gradient_reductions import gradient_rows, reduction_times
from ppsim.simulation.simulate import network_details
from ppsim.simulation.timed_program import TimedProgram
from ppsim.variation.ensemble import Ensemble
from ppsim.variation.jitter import Jitter
from ppsim.variation.sample_times import SampleTimes
from ppsim.variation.sampler import Sampler


@checked
def monte_carlo(
    schedule: Schedule,
    stages: StageCosts,
    *,
    jitter: Jitter,
    samples: int = 1000,
    seed: int = 0,
    network: Network | None = None,
    engine: str | None = None,
    threads: int | None = None,
    conditions: Conditions | None = None,
    **options: Any,
) -> Ensemble:
    """Predict one step many times, with costs that vary.

    Parameters
    ----------
    schedule : Schedule
        What each rank does, in order.
    stages : sequence of StageCost
        The mean cost of each stage for one microbatch: for the stages of one copy of the model (`Schedule.copies`), or
        of all copies.
    jitter : Jitter
        How costs vary.
    samples : int
        How many steps are drawn.
    seed : int
        Seed of the random numbers. Sample i depends on schedule, costs, network, conditions, jitter, seed and i, and
        not on the number of samples or threads.
    network : Network, optional
        The links between ranks. Without it messages take no time.
    engine : "compiled", "simpy" or None
        What runs the samples. Both give the same answer. None takes "compiled" unless conditions let ranks share
        devices (`cores`, `devices`, `speeds`).
    threads : int or None
        None: every core that this process may use.
    conditions : Conditions, optional
        How each step is run. Times given there are means, around which the jitter varies.
    **options
        Single fields of `Conditions`, as of `simulate`.

    Returns
    -------
    Ensemble
        The samples' step times and their statistics.

    Raises
    ------
    InputError
        For what `simulate` refuses, fewer than one sample, a negative seed, or fewer than one thread.

    Notes
    -----
    A sample takes 4 + 4 p numbers of memory. Each thread takes one block of samples: half a megabyte of durations, or
    one sample if that is larger.

    Examples
    --------
    >>> from ppsim import StageCost, build_schedule
    >>> cost = StageCost(forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0)
    >>> schedule = build_schedule("1f1b", ranks=2, microbatches=4)
    >>> steps = monte_carlo(schedule, [cost] * 2, jitter=Jitter(action=0.1), samples=100, engine="simpy")
    >>> len(steps), bool(steps.mean_s > 15)
    (100, True)
    """
    for name, value, least in (("samples", samples, 1), ("seed", seed, 0), ("threads", threads, 1)):
        if value is not None:
            check_whole(name, value, least=least)
    # Four numbers of each step and of each rank, and copies while they are put together.
    check_memory(f"{samples} samples", 8 * samples * (4 + 4 * schedule.ranks), "take fewer samples")
    network = Network() if network is None else network
    conditions = (conditions or Conditions()).having(options)
    program = schedule.program
    stages = costs_of_copies(stages, schedule.copies, schedule.stages)
    timed = TimedProgram.of(program, stages, network, conditions)
    if engine is None:
        engine = "compiled" if timed.devices is None else "simpy"
    sampler = Sampler(times=SampleTimes(timed=timed, jitter=jitter, seed=seed), engine=engine, threads=threads)
    ready_rows = gradient_rows(program, conditions.reduction)  # whose ends let the reductions of stages start
    found = sampler.run(samples, watched=ready_rows)
    check_finite(found.last_end_s)
    # A step is longer than its makespan if gradients are still reduced after the last action. Conditions have either a
    # reduction or collectives.
    step_s = makespan_s = found.makespan_s
    if conditions.reduction is not None and len(ready_rows):
        _, end_s = reduction_times(
            program,
            stages,
            conditions.reduction,
            found.watched_end_s,
            gradients_ready_s=conditions.gradients_ready_s,
        )
        step_s = np.maximum(makespan_s, end_s.max(axis=1) - found.step_start_s)
    if conditions.collectives is not None:
        step_s = np.maximum(makespan_s, found.reduced_s - found.step_start_s)
    return Ensemble(
        sampler=sampler,
        stages=tuple(stages),
        conditions=conditions,
        details={"engine": engine, **network_details(network), "jitter": jitter.to_dict(), "seed": seed},
        makespan_s=makespan_s,
        step_s=step_s,
        rank_time_s=found.last_end_s - found.first_start_s,
        compute_s=found.compute_s,
    )
