"""Launches: what the host spends on submitting each action to an asynchronous device.

Where this is more than the device takes for the action, the host is what a step waits for.
"""

from __future__ import annotations

from functools import partial
from statistics import median

from ppexec.machine.clock import now_ns
from ppexec.workers.rank import Rank, run_step
from ppexec.workers.worker import Worker


def launch_times(worker: Worker, *, steps: int) -> list[list[float]]:
    """Median seconds that the host spends on each action of a step: its kernels, its messages and its events.

    Parameters
    ----------
    worker : Worker
        Of an asynchronous device.
    steps : int
        How often each action is submitted.

    Returns
    -------
    list of list of float
        For each rank held here, by action.

    Notes
    -----
    Between two actions the host waits until the device is done, outside of what is timed. So no time counts in which
    the host only waits because it is far enough ahead.
    """
    taken: dict[tuple[int, int], list[float]] = {}
    for batch in worker.undisturbed_batches(0, steps):
        run_step(worker.device, worker.ranks, worker.sequence, batch, act=partial(_timed, taken))
    return [
        [median(taken[rank.number, action]) for action in range(len(rank.runtime.actions))] for rank in worker.ranks
    ]


def _timed(taken: dict[tuple[int, int], list[float]], rank: Rank, action: int) -> None:
    began = now_ns()
    rank.runtime.act(action)
    taken.setdefault((rank.number, action), []).append((now_ns() - began) / 1e9)
    rank.compute.record().synchronize()
