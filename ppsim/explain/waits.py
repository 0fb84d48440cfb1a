"""Waits: what a rank without work waits for, moment by moment, followed to where it comes from."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppsim.explain.step_graph import StepGraph

Seconds = npt.NDArray[np.float64]


class Cause(enum.IntEnum):
    """What keeps a rank waiting at a moment. The middle three are a message's."""

    COMPUTE = 0  # a rank computes what is needed, or what comes before it
    QUEUE = 1  # the link is taken by the messages ahead
    TRANSFER = 2
    LATENCY = 3
    DEVICE = 4  # everything is there and the rank is free, yet the action does not start


@dataclass(frozen=True, kw_only=True)
class Waits:
    """before_s: shape (actions, causes), the wait before each action. after_s: (p, causes), after each rank's last."""

    before_s: Seconds
    after_s: Seconds


def follow_waits(graph: StepGraph) -> Waits:
    """Split every wait by cause.

    A rank that waits for an action of another rank waits, at each moment, for what that rank is doing then: computing,
    or itself waiting for something. So a wait is followed from rank to rank to its root at that moment. After its last
    action a rank waits for the action that ends the step.
    """
    from ppsim.explain import kernels  # numba takes a second to import, so only who explains pays

    wiring, times, ranks = graph.wiring, graph.times, graph.program.ranks
    found = Waits(before_s=np.zeros((graph.program.actions, len(Cause))), after_s=np.zeros((ranks, len(Cause))))
    kernels.waits(
        wiring.order,
        wiring.rank,
        wiring.inputs,
        wiring.producer,
        times.start_s,
        times.end_s,
        times.message_start_s,
        graph.shown_left_s,
        times.arrival_s,
        graph.end_s,
        np.zeros(ranks),
        found.before_s,
        found.after_s,
    )
    return found
