"""Costs by microbatch: a stage costs the same for all microbatches, or each microbatch has a cost of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from ppsim.costs.stage_cost import StageCost
from ppsim.errors import CostError, InputError

StageCosts = Sequence[StageCost | Sequence[StageCost]]
"""The cost of each stage: one for all microbatches, or a sequence with one for each."""
_Cost = TypeVar("_Cost")


def costs_of_copies(stages: Sequence[_Cost], copies: int, wanted: int, *, noun: str = "stage costs") -> Sequence[_Cost]:
    """The costs of the stages of all copies of a model.

    Parameters
    ----------
    stages : sequence of StageCost, or of sequences of StageCost
        Those of one copy, or of all.
    copies : int
        How many copies there are.
    wanted : int
        How many stages all copies have together.
    noun : str
        What they are called in the message.

    Raises
    ------
    InputError
        If there are neither as many costs as stages of one copy nor as stages of all.
    """
    if len(stages) == wanted:
        return stages
    if len(stages) * copies == wanted:
        return list(stages) * copies
    several = f", or one for each of the {wanted // copies} of one copy of the model" if copies > 1 else ""
    raise InputError(f"{len(stages)} {noun} for a schedule of {wanted} stages: give one for each{several}")


class CostTable(Sequence[StageCost | Sequence[StageCost]]):
    """The costs of all stages, checked, with tables of their numbers. `CostTable.of` takes it as it takes costs.

    Parameters
    ----------
    stages : sequence of StageCost, or of sequences of StageCost, shape (stages,)
        The costs.
    microbatches : int
        How many there are.

    Raises
    ------
    CostError
        If a stage has another number of costs than there are microbatches, or weights whose size depends on the
        microbatch.
    """

    def __init__(self, stages: StageCosts, microbatches: int) -> None:
        self._given = stages
        every: list[list[StageCost]] = [[each] if isinstance(each, StageCost) else list(each) for each in stages]
        self._width = max((len(costs) for costs in every), default=1)
        for stage, costs in enumerate(every):
            if isinstance(stages[stage], StageCost):
                every[stage] = costs * self._width if self._width > 1 else costs
            elif len(costs) != microbatches:
                raise CostError(
                    f"stage {stage} has {len(costs)} costs for {microbatches} microbatches: give one StageCost for "
                    "all, or one for each"
                )
            elif len({(cost.parameter_bytes, cost.trained_bytes) for cost in costs}) > 1:
                raise CostError(
                    f"stage {stage} has costs with other parameter_bytes or gradient_bytes from microbatch to "
                    "microbatch: its weights are the same for all, so give the same"
                )
        self._every = every
        # Stages and microbatches mostly share their costs: each object is read once.
        distinct = {id(cost): cost for costs in every for cost in costs}
        numbers = {key: number for number, key in enumerate(distinct)}
        self._distinct = list(distinct.values())
        which = [[numbers[id(cost)] for cost in costs] for costs in every]
        self._which = np.array(which, np.intp).reshape(-1, self._width)

    @classmethod
    def of(cls, stages: StageCosts, microbatches: int) -> CostTable:
        """The table of these costs; of a table itself. Raises CostError as `CostTable` does."""
        return stages if isinstance(stages, CostTable) else cls(stages, microbatches)

    def __len__(self) -> int:
        return len(self._given)

    @overload
    def __getitem__(self, stage: int) -> StageCost | Sequence[StageCost]: ...

    @overload
    def __getitem__(self, stage: slice) -> StageCosts: ...

    def __getitem__(self, stage: int | slice) -> StageCost | Sequence[StageCost] | StageCosts:
        return self._given[stage]

    @property
    def of_stages(self) -> list[StageCost]:
        """A cost of each stage, for what does not depend on the microbatch."""
        return [costs[0] for costs in self._every]

    @property
    def of_microbatches(self) -> list[list[StageCost]]:
        """The costs of each stage: one for all microbatches, or one for each."""
        return self._every

    def table(self, read: Callable[[StageCost], Any], kind: npt.DTypeLike) -> npt.NDArray[Any]:
        """What `read` reads from every cost: a number, or a tuple of n numbers.

        Returns
        -------
        array of shape (stages, columns) or (stages, columns, n)
            A column for each microbatch, or one if no cost depends on the microbatch; see `column`.
        """
        return np.array([read(cost) for cost in self._distinct], kind)[self._which]

    def column(self, microbatch: npt.NDArray[Any]) -> npt.NDArray[Any] | int:
        """The column of such a table for each of some microbatches."""
        return 0 if self._width == 1 else microbatch
