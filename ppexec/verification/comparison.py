"""Comparison: a pipeline's outputs and gradients held against those of one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from ppexec.models.shapes import BoundarySpec, unpack
from ppexec.models.ties import tied_over_stages
from ppexec.stage.stage import Stage
from ppexec.stage.tensor_parallel import local, slice_like
from ppexec.verification.reference import Reference, gradient_of, orders_of_replicas
from ppexec.workers.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One tensor of the pipeline compared with the reference's.

    Parameters
    ----------
    what : str
        "output" or "gradient".
    layer : int
        Of a gradient; -1 for an output.
    name : str
        Of the parameter, or the number of the microbatch.
    bit_equal : bool
        Whether all elements have the same bits.
    within : bool
        Whether no element differs by more than its own tolerance.
    max_abs_diff : float
        The largest difference.
    tolerance : float
        The largest tolerance of an element: the difference that rounding alone can make. 0 where the same operations
        run in the same order.
    largest : float
        Magnitude of the reference's largest element.
    """

    what: str
    layer: int
    name: str
    bit_equal: bool
    within: bool
    max_abs_diff: float
    tolerance: float
    largest: float


def compare_with_reference(
    worker: Worker, outputs: dict[int, torch.Tensor], specs: Sequence[BoundarySpec]
) -> list[Comparison]:
    """Compare the outputs and gradients of this worker's ranks with the reference's. Collective over a pipeline.

    Parameters
    ----------
    worker : Worker
        After a step, with its gradients.
    outputs : dict of int to Tensor
        The last stage's messages, by microbatch; empty elsewhere.
    specs : sequence of BoundarySpec
        By microbatch, what such a message holds.

    Returns
    -------
    list of Comparison
        Of the tensors that this worker holds.

    Notes
    -----
    The first rank of each pipeline computes the reference, with its own thread count, and sends each tensor to the rank
    that holds the pipeline's. Where stages add up their microbatches in different orders, the reference runs once for
    each order, and a stage is compared with the one of its order.
    """
    config, schedule = worker.config, worker.pipeline
    orders = orders_of_replicas(config)
    reference = Reference(config, worker.device.torch_device) if worker.rank == 0 else None
    result: list[Comparison] = []
    for number, of_replicas in enumerate(dict.fromkeys(orders)):
        if reference is not None:
            # On the first rank's stream, since kernels are chosen by the part of the device that a stream may use.
            worker.ranks[0].compute.submit(partial(reference.run, *of_replicas), "the reference")
            worker.device.synchronize()
        if number == 0:
            for microbatch, copy in enumerate(schedule.routes.tolist()):
                holder = schedule.placement[(copy + 1) * schedule.model_stages - 1]
                expected = None if reference is None else reference.outputs[worker.dp_rank][microbatch]
                theirs = _bring(worker, holder, expected, outputs.get(microbatch))
                bound = None
                if config.tp > 1:
                    blank = outputs[microbatch].new_empty(1, dtype=torch.float64) if microbatch in outputs else None
                    slack = None if reference is None else reference.output_rounding(worker.dp_rank, microbatch)
                    bound = _bring(worker, holder, slack, blank)
                if theirs is not None:
                    tensors = specs[microbatch].tensors
                    mine, other = unpack(outputs[microbatch], tensors), unpack(theirs, tensors)
                    result.append(_compare(mine, other, bound, what="output", layer=-1, name=str(microbatch)))
        for stage in range(0 if config.forward_only else schedule.stages):
            if orders[stage % schedule.model_stages] == of_replicas:
                result += _compare_gradients(worker, stage, reference)
    return result


def _compare_gradients(worker: Worker, stage: int, reference: Reference | None) -> list[Comparison]:
    result: list[Comparison] = []
    holder = worker.pipeline.placement[stage]
    tied = tied_over_stages(worker.model.tied, worker.config.stage_of_layers)
    held = worker.stages.get(stage)
    for position, layer in enumerate(range(*worker.layer_bounds[stage])):
        own = dict(held.layers[position].named_parameters()) if isinstance(held, Stage) else {}
        for name, parameter in worker.model.layers[layer].named_parameters():
            if not parameter.requires_grad:
                continue
            whole = local(own[name]).new_empty(parameter.shape) if own else None
            theirs = _bring(worker, holder, reference.gradient(layer, name) if reference else None, whole)
            rounding = None
            if worker.config.dp > 1 or worker.config.tp > 1 or (layer, name) in tied:
                blank = None if whole is None else whole.double()
                rounding = _bring(worker, holder, reference.rounding(layer, name) if reference else None, blank)
            if own and theirs is not None:
                theirs = slice_like(own[name], theirs)
                rounding = None if rounding is None else slice_like(own[name], rounding)
                result.append(
                    _compare([gradient_of(own[name])], [theirs], rounding, what="gradient", layer=layer, name=name)
                )
    return result


def _bring(
    worker: Worker, holder: int, reference: torch.Tensor | None, counterpart: torch.Tensor | None
) -> torch.Tensor | None:
    """Send the reference's tensor from the first rank to the holder; the tensor there, None on every other rank."""
    if holder == 0 or worker.mesh is None:
        return reference if holder in {rank.number for rank in worker.ranks} else None
    if worker.rank == 0 and reference is not None:
        dist.send(reference.contiguous(), group_dst=holder, group=worker.pipeline_group)
    if worker.rank != holder or counterpart is None:
        return None
    buffer = torch.empty_like(counterpart, memory_format=torch.contiguous_format)
    dist.recv(buffer, group_src=0, group=worker.pipeline_group)
    return buffer


def _compare(
    mine: Sequence[torch.Tensor],
    theirs: Sequence[torch.Tensor],
    rounding: torch.Tensor | None,
    *,
    what: str,
    layer: int,
    name: str,
) -> Comparison:
    """Compare tensors pairwise. rounding: the tolerance of each element, or one for all."""
    own, other = _elements(mine), _elements(theirs)
    difference = (own - other).abs()
    bit_equal = all(map(_same_bits, mine, theirs))
    allowed = torch.zeros_like(difference) if rounding is None else rounding.reshape(-1).expand(len(difference))
    return Comparison(
        what=what,
        layer=layer,
        name=name,
        bit_equal=bit_equal,
        within=bit_equal or bool((difference <= allowed).all()),
        max_abs_diff=float(difference.max()) if difference.numel() else 0.0,
        tolerance=float(allowed.max()) if allowed.numel() else 0.0,
        largest=float(other.abs().max()) if other.numel() else 0.0,
    )


def _elements(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All elements in a row, in float64."""
    return torch.cat([tensor.double().reshape(-1) for tensor in tensors])


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether all bits are equal: -0.0 is not 0.0, and a NaN equals itself."""
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
