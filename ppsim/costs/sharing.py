"""Sharing: the cost of a rank's part of a model, shared evenly by the stages that the rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from ppsim.costs.stage_cost import StageCost

_PER_MESSAGE = ("output_bytes", "output_gradient_bytes", "recompute_bytes")  # as large wherever the model is cut


def share_cost(cost: StageCost, placement: Sequence[int], copies: int = 1) -> list[StageCost]:
    """The cost of each stage if every rank's part of the model costs the same.

    Parameters
    ----------
    cost : StageCost
        Of what a rank holds; its messages are those of a stage.
    placement : sequence of ints
        The rank of each stage.
    copies : int
        Copies of the model that the stages are of. A microbatch passes through one of them, so each copy's stages share
        the cost among themselves.

    Returns
    -------
    list of StageCost
        So that schedules with one and with several stages on each rank are of one model. Bytes are rounded down.

    Examples
    --------
    >>> whole = StageCost(forward_s=2, backward_input_s=2, backward_weight_s=2, activation_bytes=9, output_bytes=4)
    >>> [(part.forward_s, part.activation_bytes, part.output_bytes) for part in share_cost(whole, [0, 0, 1])]
    [(1.0, 4, 4), (1.0, 4, 4), (2.0, 9, 4)]
    """
    return [_part(cost, count) for count in stages_beside(placement, copies)]


def stages_beside(placement: Sequence[int], copies: int = 1) -> list[int]:
    """How many stages of its copy the rank of each stage holds, itself among them.

    >>> stages_beside([0, 0, 1]), stages_beside([0, 1, 1, 0], copies=2)
    ([2, 2, 1], [1, 1, 1, 1])
    """
    size = len(placement) // copies
    each = [placement[first : first + size] for first in range(0, len(placement), size)]
    return [copy.count(rank) for copy in each for rank in copy]


def _part(cost: StageCost, count: int) -> StageCost:
    shared = {each.name: getattr(cost, each.name) for each in fields(cost) if each.name not in _PER_MESSAGE}
    return replace(
        cost,
        **{
            name: value / count if name.endswith("_s") else value // count
            for name, value in shared.items()
            if value is not None
        },
    )
