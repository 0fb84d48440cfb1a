"""Host: a step cannot be faster than the host launches it.

host      | launch 0F0 | launch 1F0 | launch 0F1 | ...
rank 0    |   0F0  |                |   0F1  |
rank 1                 |   1F0  |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

import ppsim
from ppexec.config.config import RunConfig
from ppexec.workers.rank import sequence_of
from ppexec.workers.runtime import RUN_AHEAD
from ppsim import Program, Trace
from ppsim.costs.by_microbatch import StageCosts

Seconds = npt.NDArray[np.float64]
HOST_BOUND = 0.01
"""By which share a host-bound step is longer at least. Less is within what a step's time varies by."""

_SHARING = ("cores", "sharing", "speeds", "sharing_efficiency")
_EXACT_S = 1e-7
_CHECKED = RUN_AHEAD // 2  # the host looks how far it is ahead after so many actions of a rank


def with_host(
    config: RunConfig, stages: StageCosts, launch_s: Sequence[float], options: Mapping[str, Any]
) -> tuple[dict[str, Any], float]:
    """The options of a run's simulation, with the host as what launches it if the step waits for that.

    Parameters
    ----------
    config : RunConfig
        Its ranks have a process each, or one for all.
    stages : sequence of StageCost, or of sequences of StageCost
        What the device takes.
    launch_s : sequence of float
        What the host spends on launching each action.
    options : mapping
        Of `ppsim.simulate`, "conditions" among them.

    Returns
    -------
    dict
        The options. Of a host-bound step ranks wait for the host before their actions, and do not slow one another
        down: while the host launches for one rank, the others have little to do.
    float
        By which share of its length the host makes the step longer; negative if it is faster than the device.
    """
    program, plain = config.pipeline.program, options["conditions"]
    alone = {name: value for name, value in options.items() if name not in (*_SHARING, "conditions")}

    def simulate(dispatch_s: Seconds) -> Trace:
        return ppsim.simulate(config.pipeline, stages, conditions=replace(plain, dispatch_s=dispatch_s), **alone)

    dispatch_s = np.broadcast_to(np.asarray(plain.dispatch_s, np.float64), program.actions)
    hosts = [range(config.ranks)] if config.is_local else [[rank] for rank in range(config.ranks)]
    found = dispatch_with_host(program, np.asarray(launch_s), dispatch_s, hosts, simulate)
    device_s = ppsim.simulate(config.pipeline, stages, **options).makespan_s
    delay = simulate(found).makespan_s / device_s - 1.0
    if delay <= HOST_BOUND:
        return dict(options), delay
    return {**alone, "conditions": replace(plain, dispatch_s=found)}, delay


def dispatch_with_host(
    program: Program,
    launch_s: Seconds,
    dispatch_s: Seconds,
    hosts: Sequence[Sequence[int]],
    simulate: Callable[[Seconds], Trace],
) -> Seconds:
    """What a rank spends before each action, waiting for the host included.

    Parameters
    ----------
    program : Program
        What runs.
    launch_s : array of shape (actions,)
        What the host spends on launching each action.
    dispatch_s : array of shape (actions,)
        What a rank spends before each action where the host is fast enough.
    hosts : sequence of sequences of int
        The ranks that each host process launches for.
    simulate : callable
        Gives the step for what ranks spend before their actions.

    Returns
    -------
    array of shape (actions,)
        At least `dispatch_s`.

    Notes
    -----
    A host launches the actions of its ranks one after another. An action starts no earlier than its launch and ends no
    earlier than its launch does, and the host gets only so far ahead of a rank (`runtime.RUN_AHEAD`). What an action
    waits for this depends on the actions before it alone, so waits found from one simulated step after another are
    final after as many steps as the longest chain of actions has, and mostly after a few.
    """
    sequences = [_numbered(program, ranks) for ranks in hosts]
    found = np.array(dispatch_s, np.float64)
    for _ in range(program.actions + 1):
        start_s, end_s = _spans(simulate(found))
        ready_s = start_s - found
        waits = np.zeros(program.actions)
        for sequence in sequences:
            launched_s = 0.0
            for action, waits_for in sequence:
                begun_s = launched_s if waits_for < 0 else max(launched_s, end_s[waits_for])
                launched_s = begun_s + launch_s[action]
                duration_s = end_s[action] - start_s[action]
                waits[action] = max(begun_s, launched_s - duration_s) - ready_s[action]
        better = np.maximum(dispatch_s, waits)
        if np.abs(better - found).max(initial=0.0) < _EXACT_S:
            break
        found = better
    return found


def _numbered(program: Program, ranks: Sequence[int]) -> list[tuple[int, int]]:
    """The actions that a host launches, in sequence, each with the action that must be done before; -1 for none."""
    numbered = []
    for held, own in sequence_of(program, ranks):
        first = int(program.rank_actions[ranks[held]])
        done = own // _CHECKED * _CHECKED - 2 * _CHECKED - 1
        numbered.append((first + own, first + done if done >= 0 else -1))
    return numbered


def _spans(trace: Trace) -> tuple[Seconds, Seconds]:
    """Start and end of each action."""
    first = trace.program.action_start[:-1]
    return np.minimum.reduceat(trace.start_s, first), np.maximum.reduceat(trace.end_s, first)
