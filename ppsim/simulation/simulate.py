"""Simulate: predict one step of a schedule from the costs of its stages."""

from __future__ import annotations

from typing import Any

import numpy as np

from ppsim.checks import checked
from ppsim.conditions import Conditions
from ppsim.costs.by_microbatch import CostTable, StageCosts, costs_of_copies
from ppsim.network.network import Network
from ppsim.schedule.schedule import Schedule
from ppsim.simulation.engines.by_name import run_engine
from ppsim.simulation.engines.times import check_finite
from ppsim.simulation.gradient_reductions import with_reductions
from ppsim.simulation.memory_levels import activation_levels, gradient_levels, parameters_per_rank
from ppsim.simulation.offloaded_activations import offloaded_memory
from ppsim.simulation.sharded_parameters import sharded_memory
from ppsim.simulation.timed_program import TimedProgram
from ppsim.trace.trace import Trace

_FREE, _PLAIN = Network(), Conditions()  # made once: making them takes almost as long as simulating a small step


@checked
def simulate(
    schedule: Schedule,
    stages: StageCosts,
    *,
    network: Network | None = None,
    engine: str = "simpy",
    conditions: Conditions | None = None,
    **options: Any,
) -> Trace:
    """Predict one step.

    Parameters
    ----------
    schedule : Schedule
        What each rank does, in order.
    stages : sequence of StageCost, or of sequences of StageCost
        The cost of each stage for one microbatch; or, if microbatches differ in size, for each microbatch. If the
        schedule holds several copies of the model, give the costs of one copy's stages, or of all stages.
    network : Network, optional
        The links between ranks. Without it messages take no time.
    engine : "simpy" or "compiled"
        What computes the times. "compiled" gives the same answer sooner, but has no shared devices.
    conditions : Conditions, optional
        How the step is run. By default as described in the notes.
    **options
        Single fields of `Conditions`, which replace those of `conditions`:

        - `overlap`: share of the sum of its parts that an overlapped pair takes
        - `scale`: factor on what each (stage, microbatch) takes
        - `durations_s`: measured seconds of each row, instead of the costs' seconds
        - `slow_ranks`: factor on all that a rank computes, by rank
        - `dispatch_s`: seconds before each action
        - `send_s`: seconds after each action that sends
        - `receive_window`: receives posted ahead on each link
        - `streams`: who has a communicator, "link", "pair" or "rank"
        - `cores`, `devices`, `sharing`, `sharing_efficiency`, `speeds`: what ranks share, and how
        - `reduction`: gradients added up over data-parallel replicas, and over copies of the model
        - `gradients_ready_s`: when the slowest replica has the gradients of each stage, on this step's clock
        - `collectives`: parameters gathered and gradients reduced where the schedule states its sharding
        - `host_link`: how long activations take to host memory and back where the schedule states that
        - `blocking`: whether a rank cannot compute while it copies activations or reduces gradients

    Returns
    -------
    Trace
        The step on the simulated clock. Its `conditions` say how it was run.

    Raises
    ------
    ScheduleError
        If the schedule is incomplete or could hang on its streams.
    InputError
        If costs and stages do not match, or an option has no meaning.

    Notes
    -----
    A rank runs its order in sequence, one action at a time. An action starts when its rank is free and its inputs have
    arrived. A send does not block its rank. A transfer starts when its producer has ended and the transfer before it
    has left the link, keeps the link for bytes / bytes_per_s and arrives latency_s later. Between stages on one rank a
    transfer takes no time. If the schedule states its sends and receives, or if `streams` is not "link", a transfer
    also waits for its receive, and for what stands before it on its communicators (see `Conditions`).

    For memory see `ppsim.simulation.memory_levels`.

    Examples
    --------
    >>> from ppsim import StageCost, build_schedule
    >>> cost = StageCost(forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0)
    >>> schedule = build_schedule("1f1b", ranks=2, microbatches=4)
    >>> simulate(schedule, [cost] * 2).makespan_s
    15.0
    >>> simulate(schedule, [cost] * 2, slow_ranks={1: 2.0}).makespan_s
    27.0
    """
    network = _FREE if network is None else network
    conditions = (conditions or _PLAIN).having(options)
    stages = CostTable(costs_of_copies(stages, schedule.copies, schedule.stages), schedule.microbatches)
    timed = TimedProgram.of(schedule.program, stages, network, conditions)
    details = {"engine": engine, **network_details(network)}
    return predicted(timed, stages, engine=engine, conditions=conditions, details=details)


def predicted(
    timed: TimedProgram, stages: StageCosts, *, engine: str, conditions: Conditions, details: dict[str, Any]
) -> Trace:
    """Run a timed program, and look up what it holds in memory.

    Parameters
    ----------
    timed : TimedProgram
        What is run.
    stages : sequence of StageCost, or of sequences of StageCost
        The cost of every stage for one microbatch; or, if microbatches differ in size, for each microbatch.
    engine : "simpy" or "compiled"
        What computes the times.
    conditions : Conditions
        What `timed` was made from. Gradient reductions and the memory of sharded parameters follow from them.
    details : dict
        The trace's `details`.

    Returns
    -------
    Trace

    Raises
    ------
    InputError
        If the step takes longer than a float holds.
    """
    program = timed.program
    with np.errstate(over="ignore"):  # refused below
        times = run_engine(engine, timed)
    check_finite(times.end_s, times.message_arrival_s, times.side_end_s)
    trace = Trace(
        program=program,
        clock="simulated",
        start_s=times.start_s,
        end_s=times.end_s,
        activation_bytes=activation_levels(program, stages),
        gradient_bytes=gradient_levels(program, stages),
        parameter_bytes=parameters_per_rank(program, stages),
        message_bytes=timed.message_bytes,
        message_start_s=times.message_start_s,
        message_left_s=times.message_left_s,
        message_arrival_s=times.message_arrival_s,
        conditions=conditions,
        details=details,
    )
    trace = offloaded_memory(trace, stages, times)
    trace = sharded_memory(trace, stages, conditions.collectives, times)
    return with_reductions(trace, stages)


def network_details(network: Network) -> dict[str, Any]:
    """The network in a few JSON values, for a trace's details."""
    return {
        "latency_s": network.latency_s,
        "bytes_per_s": network.bytes_per_s if np.isfinite(network.bytes_per_s) else None,
        "links": len(network.links),
    }
