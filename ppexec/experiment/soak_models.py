"""Soak models: small models, each of a kind that breaks pipelines; with any number of layers, 2 or more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ppexec.config.config import RunConfig
from ppexec.models.model import Model, Place


def _model(config: RunConfig, layers: Sequence[nn.Module], tied: Sequence[Sequence[Place]] = ()) -> Model:
    rows = config.micro_batch_size

    def sample(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        stream = torch.Generator().manual_seed(1_000_003 * config.seed + index)
        both = torch.randn(2, rows, config.hidden, generator=stream, dtype=config.torch_dtype)
        return both[0], both[1]

    return Model(layers=layers, sample=sample, loss=nn.functional.mse_loss, tied=tied)


def _linear(config: RunConfig) -> nn.Linear:
    return nn.Linear(config.hidden, config.hidden, dtype=config.torch_dtype)


def shared_layer(config: RunConfig) -> Model:
    """One module stands at every third place of the chain."""
    same = nn.Sequential(_linear(config), nn.Tanh())
    return _model(config, [_linear(config) if at % 3 else same for at in range(config.layers)])


def tied_weights(config: RunConfig) -> Model:
    """The weights of the first, a middle and the last layer are one."""
    places = sorted({0, config.layers // 2, config.layers - 1})
    layers = [_linear(config) for _ in range(config.layers)]
    return _model(config, layers, [[(at, "weight") for at in places]])


class _Detaches(nn.Module):
    """Its output leads to no gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner(value)
        return output.detach()


def no_gradient(config: RunConfig) -> Model:
    """A layer in the middle gives an output without a gradient, and the weights of another one are frozen."""
    layers: list[nn.Module] = [_linear(config) for _ in range(config.layers)]
    layers[config.layers // 2] = _Detaches(_linear(config))
    layers[-1].requires_grad_(False)
    return _model(config, layers)


def draws(config: RunConfig) -> Model:
    """Every layer draws from torch's own generator."""
    return _model(config, [nn.Sequential(_linear(config), nn.Dropout(0.3)) for _ in range(config.layers)])


class _Boundary(NamedTuple):
    """What layers of `several_tensors` hand on."""

    hidden: torch.Tensor
    mask: torch.Tensor
    position: torch.Tensor


class _Opens(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, value: torch.Tensor) -> _Boundary:
        return _Boundary(self.inner(value), value > 0, torch.arange(value.shape[-1], device=value.device))


class _Passes(_Opens):
    def forward(self, value: _Boundary) -> _Boundary:  # type: ignore[override]
        return _Boundary(torch.where(value.mask, self.inner(value.hidden), value.hidden), ~value.mask, value.position)


class _Closes(_Opens):
    def forward(self, value: _Boundary) -> torch.Tensor:  # type: ignore[override]
        hidden: torch.Tensor = self.inner(value.hidden)
        return hidden * value.mask + value.position / value.position.shape[-1]


def several_tensors(config: RunConfig) -> Model:
    """Layers hand on a hidden state, a mask and positions."""
    inner = [_linear(config) for _ in range(config.layers)]
    middle = [_Passes(layer) for layer in inner[1:-1]]
    return _model(config, [_Opens(inner[0]), *middle, _Closes(inner[-1])])


class _Opaque(torch.autograd.Function):
    """A product whose backward is written by hand."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(value, weight)
        return value @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ value


class _OpaqueLinear(nn.Linear):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _Opaque.apply(value, self.weight)
        return output + self.bias


def opaque(config: RunConfig) -> Model:
    """Autograd sees no more of a layer than one function."""
    layers = [_OpaqueLinear(config.hidden, config.hidden, dtype=config.torch_dtype) for _ in range(config.layers)]
    return _model(config, layers)


def uneven_rows(config: RunConfig) -> Model:
    """Microbatches have 1, 2, 3 or 4 rows."""

    def sample(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        stream = torch.Generator().manual_seed(1_000_003 * config.seed + index)
        both = torch.randn(2, 1 + index % 4, config.hidden, generator=stream, dtype=config.torch_dtype)
        return both[0], both[1]

    return replace(_model(config, [_linear(config) for _ in range(config.layers)]), sample=sample)


def _sum_and_count(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    counts = target > 0
    return ((output - target).square() * counts).sum(), counts.sum()


def counted_terms(config: RunConfig) -> Model:
    """The loss is a sum over some elements, and counts them."""
    layers = [_linear(config) for _ in range(config.layers)]
    return replace(_model(config, layers), loss=_sum_and_count, reduction="sum")


KINDS = [shared_layer, tied_weights, no_gradient, draws, several_tensors, opaque, uneven_rows, counted_terms]
"""The factories."""
