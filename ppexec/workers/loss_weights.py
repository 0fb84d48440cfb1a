"""LossWeights: what the losses of microbatches count in the loss of their step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ppexec.config.config import RunConfig
from ppexec.models.batch import Batch
from ppexec.models.reduction import Reduction, numbers_of, shares_of
from ppexec.stage.stage import Stage
from ppexec.stage.tensor_parallel import local_gradient
from ppsim.errors import RunError


class LossWeights:
    """What the loss of each microbatch counts in the loss of its step, agreed on by all replicas.

    A mean's weights are known from the data before the step. With reduction="sum" only the losses know their numbers of
    terms: gradients are divided by the sum of these after the step.

    Parameters
    ----------
    config : RunConfig
        The run.
    reduction : "mean", "sum" or callable
        The model's.
    microbatches : int
        Of this replica.
    mesh : DeviceMesh or None
        All processes; None in a run of one process.
    device : torch.device
        Where numbers are added up over processes.
    """

    def __init__(
        self, config: RunConfig, reduction: Reduction, microbatches: int, mesh: DeviceMesh | None, device: torch.device
    ) -> None:
        self._config, self._reduction, self._microbatches = config, reduction, microbatches
        self._mesh, self._device = mesh, device
        self._terms = 0.0

    def clear(self) -> None:
        """Forget the terms of the last step."""
        self._terms = 0.0

    def share(self, batches: Sequence[Batch]) -> None:
        """Let the batches of a step know what their losses count, on the ranks of the last stage."""
        numbers = [numbers_of(self._reduction, batch) for batch in batches]
        if self._reduction == "mean" and self._config.dp == 1 and len({n for each in numbers for n in each}) == 1:
            return  # all count the same
        whole = self.over_replicas(sum(map(sum, numbers)))
        for batch, each in zip(batches, numbers, strict=True):
            batch.shares.extend(shares_of(self._reduction, each, whole, self._microbatches))

    def over_replicas(self, number: float) -> float:
        """The sum of a number over the replicas. Collective over them."""
        return number if self._config.dp == 1 else self._over("dp", number)

    def _over(self, dimension: str, number: float) -> float:
        if self._mesh is None:
            return number
        total = torch.tensor([number], dtype=torch.float64, device=self._device)
        dist.all_reduce(total, group=self._mesh.get_group(dimension))
        return float(total)

    def count_terms(self, stages: Sequence[Stage], *, completes_step: bool) -> None:
        """Add the terms of the losses just computed; at the end of the step divide the gradients by all. Collective."""
        if self._reduction != "sum" or self._config.forward_only:
            return
        self._terms += sum(float(number) for stage in stages for number in stage.terms.values())
        if completes_step:
            self._divide_gradients(stages)

    def _divide_gradients(self, stages: Iterable[Stage]) -> None:
        self._terms = terms = self.over_replicas(self._over("pp", self._terms))
        if not 0 < terms < math.inf:
            raise RunError(f"the losses of the step counted {terms:g} terms: their numbers must be > 0 together")
        for parameter in {parameter: None for stage in stages for parameter in stage.parameters}:
            gradient = local_gradient(parameter)
            if gradient is not None:
                gradient.div_(terms)

    def of(self, batch: Batch) -> tuple[list[float], float]:
        """What the loss of each microbatch counts in that of the step, and by what their sum is divided.

        Known on the ranks of the last stage, after the step.
        """
        alike = [1.0] * self._microbatches
        if self._reduction == "sum":
            return alike, self._terms
        if not batch.shares:
            return alike, float(self._config.step_microbatches * batch.rounds)
        return [part for part, _ in batch.shares], batch.shares[0][1]
