"""Replicas: one step of data-parallel replicas whose schedules differ, such as in their number of microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ppsim.checks import checked
from ppsim.conditions import Conditions
from ppsim.costs.by_microbatch import StageCosts, costs_of_copies
from ppsim.errors import InputError
from ppsim.network.all_reduce import Reduction
from ppsim.network.network import Network
from ppsim.schedule.schedule import Schedule
from ppsim.simulation.gradient_reductions import ready_times, with_reductions
from ppsim.simulation.simulate import simulate
from ppsim.trace.trace import Trace


@checked
def simulate_replicas(
    schedules: Sequence[Schedule],
    stages: StageCosts,
    *,
    network: Network | None = None,
    engine: str = "simpy",
    conditions: Conditions | None = None,
    **options: Any,
) -> list[Trace]:
    """Predict one step of data-parallel replicas that each have a schedule of their own.

    Parameters
    ----------
    schedules : sequence of Schedule, shape (d,)
        What each replica runs, with any number of microbatches. All hold the same stages on the same ranks.
    stages, network, engine
        As of `simulate`, for all replicas.
    conditions, **options
        As of `simulate`, for all replicas. `reduction` adds up their gradients; without one that takes no time.

    Returns
    -------
    list of Trace, shape (d,)
        The step of each replica, all on one clock. Their reductions run at the same times, so that `step_s` of each is
        the step of all; of an evaluation, which reduces nothing, each has its own.

    Raises
    ------
    InputError
        For what `simulate` refuses, stages on other ranks, another number of replicas in `reduction`, or `collectives`,
        with which replicas wait for one another inside a step.

    Notes
    -----
    Replicas wait for one another in reductions alone. That of a stage starts when the last replica has its gradients
    and the reduction before it on its rank has ended. Each trace's conditions hold when that was
    (`Conditions.gradients_ready_s`). Give it to `simulate` where the replicas differ in more than their schedules.

    Examples
    --------
    >>> from ppsim import Reduction, StageCost, build_schedule
    >>> cost = StageCost(forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0, parameter_bytes=8)
    >>> schedules = [build_schedule("1f1b", ranks=2, microbatches=count) for count in (5, 4)]
    >>> ring = Reduction(replicas=2, bytes_per_s=4.0)
    >>> [(trace.makespan_s, trace.step_s) for trace in simulate_replicas(schedules, [cost] * 2, reduction=ring)]
    [(18.0, 20.0), (15.0, 20.0)]
    """
    conditions = (conditions or Conditions()).having(options)
    _check(schedules, conditions)
    if conditions.reduction is None:
        conditions = replace(conditions, reduction=Reduction(replicas=len(schedules)))
    found: dict[int, Trace] = {}
    for schedule in schedules:
        if id(schedule) not in found:
            found[id(schedule)] = simulate(schedule, stages, network=network, engine=engine, conditions=conditions)
    ready_s = [ready_times(trace) for trace in found.values()]
    if len(ready_s[0]):
        if conditions.gradients_ready_s is not None:
            ready_s.append(np.asarray(conditions.gradients_ready_s))
        conditions = replace(conditions, gradients_ready_s=np.max(ready_s, axis=0))
    stages = costs_of_copies(stages, schedules[0].copies, schedules[0].stages)
    joint = {key: with_reductions(replace(trace, conditions=conditions), stages) for key, trace in found.items()}
    return [joint[id(schedule)] for schedule in schedules]


def _check(schedules: Sequence[Schedule], conditions: Conditions) -> None:
    """Refuse what does not make one step."""
    if not schedules:
        raise InputError("there are no replicas: give the schedule of each")
    first, reduction = schedules[0], conditions.reduction
    for replica, schedule in enumerate(schedules):
        for name in ("ranks", "placement", "copies", "is_forward_only"):
            own, others = getattr(schedule, name), getattr(first, name)
            if own != others:
                raise InputError(
                    f"replicas hold the same stages on the same ranks, and {name} is {own} of replica {replica} and "
                    f"{others} of replica 0: build their schedules alike but for the number of microbatches"
                )
    if reduction is not None and reduction.replicas != len(schedules):
        raise InputError(
            f"reduction has {reduction.replicas} replicas, and there are schedules of {len(schedules)}: give it "
            f"replicas={len(schedules)}"
        )
    if conditions.collectives is not None:
        raise InputError(
            "with collectives replicas wait for one another wherever they gather parameters: take simulate for "
            "replicas alike, or a reduction"
        )
