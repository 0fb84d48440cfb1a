"""Profile: what each layer costs, measured under the conditions of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch

from ppexec.clock import now_ns
from ppexec.data import Batch
from ppexec.ledger import Ledger, tensors_of
from ppexec.shapes import TensorSpec
from ppexec.stage import Stage
from ppsim import Kind, LayerCost, Program


@dataclass(kw_only=True)
class LayerSamples:
    """One round on one rank: layer -> its seconds per microbatch, and its bytes.

    forward_s, backward_s: as in the run, all microbatches. backward_input_s: the gradient for the input alone, of the
    last microbatch. sizes: activation, output and parameter bytes.
    """

    forward_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    backward_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    backward_input_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    sizes: dict[int, dict[str, int]] = field(default_factory=dict)


def profile_layers(
    program: Program, rank: int, stages: Mapping[int, Stage], boundaries: Sequence[TensorSpec], batch: Batch
) -> LayerSamples:
    """Run a rank's order without messages, timing every layer by itself.

    Other stages' outputs and gradients are made up from normal noise. As many microbatches are held at once as in the
    run, so that caches and allocator are in the run's condition.
    """
    samples = LayerSamples()
    chains: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    made_up = {stage.index: _noise(boundaries[stage.first_layer]) for stage in stages.values()}
    gradients = {stage.index: _noise(boundaries[stage.first_layer + len(stage.layers)]) for stage in stages.values()}
    for row in program.rows_of(rank):
        stage, microbatch = stages[int(program.stage[row])], int(program.microbatch[row])
        kind = Kind(int(program.kind[row]))
        if kind == Kind.F:
            inputs = batch.inputs[microbatch] if stage.is_first else made_up[stage.index].clone()
            target = batch.targets[microbatch] if stage.loss is not None else None
            chains[stage.index, microbatch] = _forward(stage, inputs, target, samples)
        elif kind in (Kind.B, Kind.I):
            gradient = None if stage.loss is not None else gradients[stage.index]
            _backward(stage, chains.pop((stage.index, microbatch)), gradient, samples.backward_s)
    for stage in stages.values():
        if stage.trains:
            _measure_once(stage, batch, made_up[stage.index], gradients[stage.index], samples)
    return samples


def _noise(spec: TensorSpec) -> torch.Tensor:
    value = spec.empty()
    return value.normal_() if spec.dtype.is_floating_point else value.zero_()


def _forward(
    stage: Stage, value: torch.Tensor, target: torch.Tensor | None, samples: LayerSamples
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer as a graph of its own: its (input, output)."""
    chain = []
    last = len(stage.layers) - 1
    with torch.set_grad_enabled(stage.trains):
        for position, layer in enumerate(stage.layers):
            began = now_ns()
            inputs = _leaf(stage, position, value)
            output = layer(inputs)
            if position == last and stage.loss is not None and target is not None:
                output = stage.loss(output, target) / stage.microbatches
            samples.forward_s[stage.first_layer + position].append((now_ns() - began) / 1e9)
            chain.append((inputs, output))
            value = output
    return chain if stage.trains else []


def _leaf(stage: Stage, position: int, value: torch.Tensor) -> torch.Tensor:
    """The data needs no gradient; what comes from a layer does, if it can have one."""
    value = value.detach()
    if stage.trains and value.is_floating_point() and not (stage.is_first and position == 0):
        value.requires_grad_()
    return value


def _backward(
    stage: Stage,
    chain: list[tuple[torch.Tensor, torch.Tensor]],
    gradient: torch.Tensor | None,
    seconds: dict[int, list[float]],
) -> None:
    for position in reversed(range(len(chain))):
        inputs, output = chain.pop()
        began = now_ns()
        if output.requires_grad:
            torch.autograd.backward(output, gradient)
        seconds[stage.first_layer + position].append((now_ns() - began) / 1e9)
        gradient = inputs.grad


def _measure_once(
    stage: Stage, batch: Batch, made_up: torch.Tensor, gradient: torch.Tensor, samples: LayerSamples
) -> None:
    """Bytes and the input's share of the backward, layer by layer, each as a stage of its own."""
    value = batch.inputs[0] if stage.is_first else made_up
    last = len(stage.layers) - 1
    for position, layer in enumerate(stage.layers):
        index = stage.first_layer + position
        ledger = Ledger([*tensors_of([layer]), *batch.targets])
        inputs = _leaf(stage, position, value)
        with ledger.saving():
            output = root = layer(inputs)
            if position == last and stage.loss is not None:
                root = stage.loss(output, batch.targets[0]) / stage.microbatches
        ledger.hold(inputs)
        ledger.hold(output)
        samples.sizes[index] = {
            "activation_bytes": ledger.level_bytes,
            "output_bytes": TensorSpec.of(output).size_bytes,
            "parameter_bytes": sum(parameter.nbytes for parameter in layer.parameters()),
        }
        del root, ledger
        probe = inputs.detach().clone()
        if probe.is_floating_point():
            probe.requires_grad_()
            result = layer(probe)
            upstream = _noise(TensorSpec.of(result))
            began = now_ns()
            if result.requires_grad:
                torch.autograd.grad(result, probe, upstream, allow_unused=True)
            samples.backward_input_s[index].append((now_ns() - began) / 1e9)
        value = output.detach()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Layer costs with their spread and where they were measured.

    layers: in model order. spread: layer -> field -> (lower, upper) quartile of the rounds' means, in seconds.
    """

    layers: list[LayerCost]
    spread: list[dict[str, tuple[float, float]]]
    environment: dict[str, Any]


def summarise(
    rounds_by_rank: Sequence[Sequence[LayerSamples]], names: Sequence[str], environment: dict[str, Any]
) -> Profile:
    """Costs from all ranks' rounds: a round's mean over microbatches, then the median over rounds.

    The mean, since a step takes the sum of its microbatches; the median, since a round may be disturbed from outside.
    Of the backward, I is what the gradient for the input takes by itself and W the rest of the fused B.
    """
    by_layer: dict[str, dict[int, list[float]]] = {
        name: defaultdict(list) for name in ("forward_s", "backward_s", "backward_input_s")
    }
    sizes: dict[int, dict[str, int]] = {}
    for rounds in rounds_by_rank:
        for samples in rounds:
            sizes.update(samples.sizes)
            for name, layers in by_layer.items():
                for layer, seconds in getattr(samples, name).items():
                    layers[layer].append(fmean(seconds))
    costs, spread = [], []
    for layer in sorted(by_layer["forward_s"]):
        middle = {name: median(layers[layer]) if layers[layer] else 0.0 for name, layers in by_layer.items()}
        costs.append(_layer_cost(layer, names[layer], middle, sizes.get(layer, {})))
        spread.append({name: _quartiles(layers[layer]) for name, layers in by_layer.items() if layers[layer]})
    return Profile(layers=costs, spread=spread, environment=environment)


def _layer_cost(layer: int, name: str, middle: dict[str, float], sizes: dict[str, int]) -> LayerCost:
    backward_s = middle["backward_s"]
    backward_input_s = min(middle["backward_input_s"], backward_s)
    return LayerCost(
        name=name,
        forward_s=middle["forward_s"],
        backward_input_s=backward_input_s,
        backward_weight_s=backward_s - backward_input_s,
        backward_s=backward_s,
        **sizes,
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    tensor = torch.tensor(sorted(values), dtype=torch.float64)
    return float(tensor.quantile(0.25)), float(tensor.quantile(0.75))
