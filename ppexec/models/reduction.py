"""Reduction: how the losses of microbatches make the loss of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from ppexec.models.batch import Batch
from ppexec.models.model_error import reraise
from ppexec.models.shapes import BoundarySpec
from ppsim.errors import InputError

Reduction = Literal["mean", "sum"] | Callable[[Any], float]
"""See `ppexec.models.model.Model`."""


class Share(NamedTuple):
    """What a microbatch's loss counts in the loss of its step: part / whole."""

    part: float
    whole: float

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """The gradient with which the backward of a loss starts."""
        return torch.full_like(loss, self.part) / self.whole


def numbers_of(reduction: Reduction, batch: Batch) -> list[float]:
    """How many samples or terms each microbatch of a batch has; empty where only its loss knows.

    Parameters
    ----------
    reduction : "mean", "sum" or callable
        The model's.
    batch : Batch
        With boundaries for "mean", with targets for a callable.

    Raises
    ------
    InputError
        If a callable gives no number of 0 or more.
    """
    if reduction == "mean":
        return [float(_samples(boundaries[0])) for boundaries in batch.boundaries]
    if reduction == "sum":
        return []
    found = []
    for microbatch, target in enumerate(batch.targets):
        try:
            number = float(reduction(target))
        except Exception as error:
            reraise(error, f"reduction(targets of microbatch {microbatch})")
        if not 0 <= number < math.inf:
            raise InputError(f"reduction gives {number} terms for microbatch {microbatch}: give a number of 0 or more")
        found.append(number)
    return found


def _samples(boundary: BoundarySpec) -> int:
    """The first dimension of the first tensor; 1 if it has none."""
    first = next(leaf for leaf in boundary.leaves if leaf is not None)
    return first.shape[0] if first.shape else 1


def shares_of(reduction: Reduction, numbers: Sequence[float], whole: float, microbatches: int) -> list[Share]:
    """What each microbatch of a replica counts.

    Parameters
    ----------
    reduction : "mean", "sum" or callable
        The model's.
    numbers : sequence of float
        From `numbers_of`.
    whole : float
        Their sum over all replicas.
    microbatches : int
        Of the replica.

    Raises
    ------
    InputError
        If there is nothing to take a mean of.
    """
    if reduction == "sum":
        return [Share(1.0, 1.0)] * microbatches
    if not whole > 0:
        raise InputError("the step has no sample or no term of a loss: give data with one or more")
    return [Share(number if reduction == "mean" else 1.0, whole) for number in numbers]
