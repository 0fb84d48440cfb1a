"""Reference: the same step in one process without a pipeline, and what differs from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from ppexec.data import load_batch
from ppexec.models import Model, initialize_layer, load_model
from ppexec.stage import Stage
from ppsim import Kind, Program

if TYPE_CHECKING:
    from ppexec.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One tensor of the pipeline against the reference's: "output" by microbatch, or "gradient" by layer and name."""

    what: str
    layer: int
    name: str
    bit_equal: bool
    max_abs_diff: float
    largest: float


def accumulation_orders(program: Program) -> list[tuple[int, ...]]:
    """Per stage the microbatches in the sequence in which its weights' gradients are added up (its B, or its W)."""
    orders: list[list[int]] = [[] for _ in range(program.schedule.stages)]
    for row in range(len(program.stage)):
        if program.kind[row] in (Kind.B, Kind.W):
            orders[int(program.stage[row])].append(int(program.microbatch[row]))
    return [tuple(order) for order in orders]


def run_reference(
    layers: Sequence[nn.Module],
    model: Model,
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    order: Sequence[int],
    *,
    trains: bool,
) -> dict[int, torch.Tensor]:
    """Forward and backward of each microbatch in turn; gradients add up in the layers; gives the outputs.

    The loss of the step is the mean over microbatches, so each counts 1 / m.
    """
    outputs = {}
    with torch.set_grad_enabled(trains):
        for microbatch in order:
            value = inputs[microbatch]
            for layer in layers:
                value = layer(value)
            outputs[microbatch] = value.detach().clone()
            loss = model.loss(value, targets[microbatch]) / len(inputs)
            if trains and loss.requires_grad:
                loss.backward()
    return outputs


def compare_with_reference(worker: Worker, outputs: dict[int, torch.Tensor]) -> list[Comparison]:
    """What this rank's outputs and gradients differ from the reference's, tensor by tensor.

    The pipeline's first rank computes the reference with its own thread count and sends each tensor to the rank that
    has its counterpart. Where stages add their microbatches up in different sequences, the reference runs once for each
    sequence, and a stage is held to its own.
    """
    config, program = worker.config, worker.program
    schedule = config.pipeline
    every = tuple(range(config.microbatches))
    orders = [every] * schedule.stages if config.forward_only else accumulation_orders(program)
    last_rank = schedule.placement[-1]
    result: list[Comparison] = []
    reference = _Reference(worker) if worker.rank == 0 else None
    for number, order in enumerate(dict.fromkeys(orders)):
        if reference is not None:
            reference.run(order)
        if number == 0:
            for microbatch in every:
                theirs = None if reference is None else reference.outputs[microbatch]
                result += _compare(worker, last_rank, theirs, outputs.get(microbatch), "output", -1, str(microbatch))
        if config.forward_only:
            continue
        for stage, stage_order in enumerate(orders):
            if stage_order == order:
                result += _compare_gradients(worker, stage, reference)
    return result


class _Reference:
    """The whole model in this process, from the same seeds."""

    def __init__(self, worker: Worker) -> None:
        config = worker.config
        self.model = load_model(config)
        self.layers = [
            initialize_layer(layer, index=index, seed=config.seed, device=worker.device)
            for index, layer in enumerate(self.model.layers)
        ]
        self.batch = load_batch(
            self.model.sample,
            seed=config.seed,
            step=0,
            microbatches=config.microbatches,
            has_first=True,
            has_last=True,
            device=worker.device,
        )
        self.trains = not config.forward_only
        self.outputs: dict[int, torch.Tensor] = {}

    def run(self, order: Sequence[int]) -> None:
        for layer in self.layers:
            layer.zero_grad(set_to_none=True)
        self.outputs = run_reference(
            self.layers, self.model, self.batch.inputs, self.batch.targets, order, trains=self.trains
        )


def _compare_gradients(worker: Worker, stage: int, reference: _Reference | None) -> list[Comparison]:
    result: list[Comparison] = []
    holder = worker.config.pipeline.placement[stage]
    mine = worker.stages.get(stage)
    for position, layer in enumerate(range(*worker.layer_bounds[stage])):
        names = [name for name, parameter in worker.model.layers[layer].named_parameters() if parameter.requires_grad]
        own = dict(mine.layers[position].named_parameters()) if isinstance(mine, Stage) else {}
        theirs = dict(reference.layers[layer].named_parameters()) if reference else {}
        for name in names:
            result += _compare(
                worker, holder, _gradient(theirs.get(name)), _gradient(own.get(name)), "gradient", layer, name
            )
    return result


def _gradient(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A parameter's gradient; zeros where nothing reached it, which is what an optimizer would see."""
    if parameter is None:
        return None
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _compare(
    worker: Worker,
    holder: int,
    reference: torch.Tensor | None,
    mine: torch.Tensor | None,
    what: str,
    layer: int,
    name: str,
) -> list[Comparison]:
    """Bring the reference's tensor from the first rank to the holder of its counterpart and compare it there."""
    if holder != 0 and worker.rank == 0 and reference is not None:
        dist.send(reference.contiguous(), group_dst=holder, group=worker.group)
    if worker.rank != holder or mine is None:
        return []
    if holder != 0:
        reference = torch.empty_like(mine, memory_format=torch.contiguous_format)
        dist.recv(reference, group_src=0, group=worker.group)
    if reference is None:
        raise RuntimeError(f"the reference has no {what} {name} of layer {layer}")
    difference = (mine.double() - reference.double()).abs()
    return [
        Comparison(
            what=what,
            layer=layer,
            name=name,
            bit_equal=_same_bits(mine, reference),
            max_abs_diff=float(difference.max()) if difference.numel() else 0.0,
            largest=float(reference.double().abs().max()) if reference.numel() else 0.0,
        )
    ]


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal as bits, so that -0.0 is not 0.0 and a NaN equals itself."""
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
