"""Waits: what a rank without work waits for, moment by moment, followed to where it comes from."""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.explain.step_graph import StepGraph

Seconds = npt.NDArray[np.float64]


class Cause(enum.IntEnum):
    """What keeps a rank waiting at a moment. QUEUE, TRANSFER and LATENCY are a message's."""

    COMPUTE = 0  # a rank computes what is needed, or what comes before it
    QUEUE = 1  # the link is taken by the messages ahead
    STREAM = 2  # the link is free, but a post is missing, or a communicator has to carry something else before
    TRANSFER = 3
    LATENCY = 4
    DEVICE = 5  # everything is there and the rank is free, yet the action does not start
    COLLECTIVE = 6  # the stage's parameters are still being gathered
    COPY = 7  # the activations are still coming back from host memory


class Waits(NamedTuple):
    """All waits of a step by cause, in seconds.

    Parameters
    ----------
    before_s : array of shape (actions, causes)
        The wait before each action.
    after_s : array of shape (p, causes)
        The wait after the last action of each rank.
    """

    before_s: Seconds
    after_s: Seconds


def follow_waits(graph: StepGraph) -> Waits:
    """Split every wait by cause.

    Parameters
    ----------
    graph : StepGraph
        The step.

    Returns
    -------
    Waits

    Notes
    -----
    A rank that waits for an action of another rank waits, at each moment, for what that rank is doing then: computing,
    or itself waiting for something. So a wait is followed from rank to rank to its root at that moment. After its last
    action a rank waits for the action that ends the step.
    """
    from ppsim.explain import kernels  # imported here because numba takes a second to import

    found = Waits(
        before_s=np.zeros((graph.program.actions, len(Cause))), after_s=np.zeros((graph.program.ranks, len(Cause)))
    )
    kernels.split_waits(
        graph.wiring,
        graph.times,
        graph.queued_until_s(),
        graph.shown_left_s,
        graph.gathered_s,
        graph.loaded_s,
        graph.end_s,
        found,
    )
    return found
