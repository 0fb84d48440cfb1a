"""Gradients: their norm over all parameters of the model, and what is not finite in a step, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import isfinite, nan, sqrt
from typing import Any

import torch
import torch.distributed as dist

from ppexec.models.batch import Batch
from ppexec.models.model import Model, Place
from ppexec.stage.stage import Stage
from ppexec.stage.tensor_parallel import is_sharded as is_tp_slice
from ppexec.stage.tensor_parallel import local_gradient
from ppexec.workers.worker import Worker


@dataclass(kw_only=True)
class StepLosses:
    """The losses of a step. Those of microbatches whose loss this process does not have are 0.

    Parameters
    ----------
    values : list of float
        The loss of each microbatch of the step over all replicas, by global index from the step's first on.
    parts : list of float
        What each of them counts.
    whole : float
        The step's loss is sum(values * parts) / whole.
    """

    values: list[float]
    parts: list[float]
    whole: float = 0.0

    @classmethod
    def none(cls, worker: Worker, rounds: int) -> StepLosses:
        """The losses of a step of so many rounds, before any is known."""
        count = rounds * worker.config.step_microbatches
        return cls(values=[0.0] * count, parts=[0.0] * count)

    def note(self, worker: Worker, batch: Batch, stages: Iterable[Stage]) -> None:
        """Note the losses of a round just run."""
        for stage in stages:
            if stage.losses:
                parts, self.whole = worker.loss_weights.of(batch)
                for microbatch, loss in stage.losses.items():
                    at = batch.positions[microbatch]
                    self.values[at], self.parts[at] = float(loss), parts[microbatch]

    def row(self, worker: Worker) -> torch.Tensor:
        """A vector in float64 that is added up over all processes. Ranks that would repeat a number give 0."""
        is_first_of_dp, is_first_of_tp = (
            worker.mesh is None or worker.mesh.get_local_rank(name) == 0 for name in ("dp", "tp")
        )
        numbers = torch.tensor([*self.values, *self.parts, self.whole if is_first_of_dp else 0.0], dtype=torch.float64)
        return numbers if is_first_of_tp else torch.zeros_like(numbers)

    @classmethod
    def of_row(cls, row: torch.Tensor) -> StepLosses:
        """The losses from the sum of all processes' `row`."""
        *numbers, whole = row.tolist()
        half = len(numbers) // 2
        return cls(values=numbers[:half], parts=numbers[half:], whole=whole)

    @property
    def mean(self) -> float:
        """The loss of the step, summed up by global index, so that it does not depend on the mesh."""
        total = sum(loss * part for loss, part in zip(self.values, self.parts, strict=True))
        return total / self.whole if self.whole else nan


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What all ranks know of a step once its gradients are complete.

    Parameters
    ----------
    losses : StepLosses
        Of every microbatch of the step over all replicas.
    norms : mapping from place to float
        The 2-norm of each trained parameter's gradient, in the order of the chain, a tied one once.
    norm : Tensor of shape ()
        The 2-norm of them all, on the host.
    """

    losses: StepLosses
    norms: Mapping[Place, float]
    norm: torch.Tensor

    @property
    def loss(self) -> float:
        """The step's loss."""
        return self.losses.mean

    def fault(self, *, first_index: int, stage_of: list[int]) -> str | None:
        """What is not finite, and where; None if all is.

        Parameters
        ----------
        first_index : int
            Global index of the first loss.
        stage_of : list of int, shape (layers,)
            The stage of each layer.
        """
        odd = [at for at, loss in enumerate(self.losses.values) if not isfinite(loss)]
        if odd:
            index = first_index + odd[0]
            what = f"the loss of microbatch {index} (what sample({index}) gives) is {self.losses.values[odd[0]]}"
            return what + (f" ({len(odd) - 1} more losses are not finite)" if len(odd) > 1 else "")
        places = [place for place, norm in self.norms.items() if not isfinite(norm)]
        if not places:
            return None
        # Backwards run from the last layer to the first, so the last layer of these is the nearest to the cause.
        layer, name = places[-1]
        what = f"the gradient of layer {layer} {name} (stage {stage_of[layer]}) is not finite"
        return what + (f", and those of {len(places) - 1} parameters earlier in the chain" if len(places) > 1 else "")


def gather(
    worker: Worker,
    parameters: Mapping[Place, torch.Tensor],
    losses: StepLosses,
) -> Gathered:
    """Tell all ranks the losses and the norms of all gradients. Collective over the world.

    Parameters
    ----------
    worker : Worker
        This process.
    parameters : mapping
        By place, the trained parameters whose gradients this process reports, or their float32 master copies. One
        replica reports each parameter, or all replicas if each has a share of it.
    losses : StepLosses
        The losses that this process has.

    Notes
    -----
    A parameter's norm is computed where it is, in its own type, as `torch.nn.utils.clip_grad_norm_` does. The total
    norm is the norm of these norms in the order of the layers. Without tp it has the bits of one process's. With tp
    each rank adds the sum of squares of its slice. Gradients that are sharded over replicas are gathered one after
    another before their norm is taken; such parameters have no tp. A norm that overflows is computed again in float64.
    Every number but the squares is nonzero on one rank only, so adding up changes no bit of it: a training holds one
    copy of the model.
    """
    places = trained_places(worker.model)
    is_first_of_tp = worker.mesh is None or worker.mesh.get_local_rank("tp") == 0
    sizes, squares = torch.zeros(2, len(places), dtype=torch.float64)
    held = [(at, parameters[place]) for at, place in enumerate(places) if place in parameters]
    held = [(at, p) for at, p in held if is_first_of_tp or is_tp_slice(p)]
    if worker.config.is_sharded:
        for at, parameter in held:
            size = _norms([_whole_gradient(parameter)])[0]
            sizes[at] = size if worker.dp_rank == 0 else 0.0
    elif held:
        for (at, parameter), size in zip(held, _norms([_gradient(parameter) for _, parameter in held]), strict=True):
            if is_tp_slice(parameter):
                squares[at] = size * size  # infinite where it overflows
            else:
                sizes[at] = size
    own = losses.row(worker)
    sizes, squares, every = total(worker, torch.cat([sizes, squares, own])).split([len(places)] * 2 + [len(own)])
    by_place = [one + sqrt(square) for one, square in zip(sizes.tolist(), squares.tolist(), strict=True)]
    return Gathered(
        losses=StepLosses.of_row(every), norms=dict(zip(places, by_place, strict=True)), norm=_of_all(worker, by_place)
    )


def total(worker: Worker, numbers: torch.Tensor) -> torch.Tensor:
    """Numbers of float64 on the host added up over all processes, in place. Collective."""
    if worker.mesh is not None:
        dist.all_reduce(numbers)
    return numbers


def _norms(gradients: Sequence[torch.Tensor]) -> list[float]:
    """The 2-norm of each gradient, in its own type unless that overflows."""
    norms = torch.stack([torch.linalg.vector_norm(gradient).double() for gradient in gradients]).tolist()
    return [
        norm if isfinite(norm) else float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        for norm, gradient in zip(norms, gradients, strict=True)
    ]


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    gradient = local_gradient(parameter)
    if gradient is None:
        raise RuntimeError("a parameter has no gradient, where the trainer gives zeros to those that none reaches")
    return gradient


def _whole_gradient(parameter: Any) -> torch.Tensor:
    """A gradient of which each replica has a share. Collective over the replicas."""
    whole: torch.Tensor = parameter.grad.full_tensor()
    return whole


def _of_all(worker: Worker, norms: list[float]) -> torch.Tensor:
    """The norm of all parameters from that of each, in their type unless it overflows."""
    types = {p.dtype for layer in worker.model.layers for p in layer.parameters() if p.requires_grad}
    # With master weights gradients are float32. Promoting with bfloat16, the narrowest type of a run, changes nothing.
    least = torch.float32 if worker.config.master_weights else torch.bfloat16
    exact = torch.tensor(norms, dtype=torch.float64)
    norm: torch.Tensor = torch.linalg.vector_norm(exact.to(reduce(torch.promote_types, types, least)))
    if not norm.isfinite():
        norm = torch.linalg.vector_norm(exact)
    return norm


def trained_places(model: Model) -> list[Place]:
    """The trained parameters of the whole chain in its order, a tied one once, at its first place."""
    again = {place for places in model.tied for place in places[1:]}
    return [
        (index, name)
        for index, layer in enumerate(model.layers)
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and (index, name) not in again
    ]


def clip(parameters: Iterable[torch.Tensor], norm: torch.Tensor, clip_norm: float) -> None:
    """Scale all gradients by clip_norm / norm if that is below 1, as `torch.nn.utils.clip_grad_norm_` does."""
    factor = torch.clamp(clip_norm / (norm + 1e-6), max=1.0)
    for parameter in parameters:
        gradient = _gradient(parameter)
        gradient.mul_(factor.to(gradient.device))
