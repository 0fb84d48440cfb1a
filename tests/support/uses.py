"""Uses: models that use a module, a parameter or an output in a way that plain chains do not.

Each is a factory for `--model tests.support.uses:NAME` with layers=8, made of small layers on the CPU unless it says
otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ppexec import Model, RunConfig
from ppexec.models.model import Place

ROWS = 3


def _model(config: RunConfig, layers: Sequence[nn.Module], tied: Sequence[Sequence[Place]] = ()) -> Model:
    def sample(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        stream = torch.Generator().manual_seed(1000 * config.seed + index)
        both = torch.randn(2, ROWS, config.hidden, generator=stream, dtype=config.torch_dtype)
        return both[0], both[1]

    return Model(layers=layers, sample=sample, loss=nn.functional.mse_loss, tied=tied)


def _linear(config: RunConfig) -> nn.Linear:
    return nn.Linear(config.hidden, config.hidden, dtype=config.torch_dtype)


def listed_twice(config: RunConfig) -> Model:
    """One module at layers 1 and 2 and 3, so that most cuts have it several times on a stage."""
    same = _linear(config)
    return _model(config, [_linear(config), same, same, same, nn.Tanh(), _linear(config), _linear(config), nn.Tanh()])


def on_several_stages(config: RunConfig) -> Model:
    """One module at layers 0, 3 and 7, so that most cuts have it on several stages; the same of a container."""
    same = nn.Sequential(_linear(config), nn.Tanh(), _linear(config))
    return _model(config, [same, _linear(config), nn.Tanh(), same, _linear(config), nn.Tanh(), _linear(config), same])


def shared_parameter(config: RunConfig, device: str = "cpu") -> Model:
    """Different modules with one Parameter, at layers 0, 1 and 7."""
    with torch.device(device):
        layers: list[nn.Module] = [_linear(config) for _ in range(8)]
    for at in (1, 7):
        layers[at].weight = layers[0].weight
    return _model(config, layers)


def shared_on_meta(config: RunConfig) -> Model:
    """The same on the meta device, where every rank makes only its own layers real."""
    return shared_parameter(config, "meta")


def shared_within_a_layer(config: RunConfig) -> Model:
    """Two modules of one layer have one Parameter, on the meta device."""

    def pair() -> nn.Module:
        layer = nn.Sequential(_linear(config), nn.Tanh(), _linear(config))
        layer[2].weight = layer[0].weight
        return layer

    with torch.device("meta"):
        return _model(config, [pair() for _ in range(8)])


def tied_in_three(config: RunConfig) -> Model:
    """A weight in three places, and a bias in four, stated as a chain of pairs."""
    layers = [_linear(config) for _ in range(8)]
    chain = [((1, "bias"), (2, "bias")), ((2, "bias"), (5, "bias")), ((7, "bias"), (5, "bias"))]
    return _model(config, layers, [((0, "weight"), (4, "weight"), (7, "weight")), *chain])


def tied_to_frozen(config: RunConfig) -> Model:
    """The first place of one tie is frozen, and another place of a second tie."""
    layers = [_linear(config) for _ in range(8)]
    layers[0].weight.requires_grad_(False)
    layers[6].bias.requires_grad_(False)
    return _model(config, layers, [((7, "weight"), (0, "weight"), (1, "weight")), ((1, "bias"), (6, "bias"))])


class Detaches(nn.Module):
    """Its output leads to no gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.inner(value).detach()


def detached(config: RunConfig) -> Model:
    """Nothing before layer 3 gets a gradient."""
    return _model(config, [Detaches(_linear(config)) if at == 3 else _linear(config) for at in range(8)])


class Router(nn.Module):
    """Uses only the arg max of one of its modules."""

    def __init__(self, router: nn.Module, width: int) -> None:
        super().__init__()
        self.router, self.experts = router, nn.Embedding(width, width, dtype=next(router.parameters()).dtype)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value + self.experts(self.router(value).argmax(-1))


def routed(config: RunConfig) -> Model:
    """Routers that get no gradient, beside experts that do."""
    return _model(config, [Router(_linear(config), config.hidden) if at % 2 else _linear(config) for at in range(8)])


class UnusedHead(nn.Module):
    """Computes what nobody uses."""

    def __init__(self, head: nn.Module, inner: nn.Module) -> None:
        super().__init__()
        self.head, self.inner = head, inner
        self.seen: torch.Tensor | None = None

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.seen = self.head(value).sum().detach()
        return self.inner(value)


def unused(config: RunConfig) -> Model:
    """Heads beside the chain that no loss uses."""
    return _model(config, [UnusedHead(_linear(config), _linear(config)) for _ in range(8)])


class AddsToMainGrad(torch.autograd.Function):
    """A linear layer whose backward adds to `weight.main_grad`, and gives what it has added since the last reset.

    If it runs twice for one microbatch, the gradient is wrong.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(value, weight)
        return value @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, weight = ctx.saved_tensors
        before = getattr(weight, "main_grad", None)
        own = gradient.T @ value
        weight.main_grad = own if before is None else before + own
        ctx.calls = getattr(ctx, "calls", 0) + 1
        return gradient @ weight, ctx.calls * own


class FusedLinear(nn.Linear):
    """Its backward has a side effect."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return AddsToMainGrad.apply(value, self.weight) + self.bias


def fused(config: RunConfig) -> Model:
    """Layers whose backward must run once."""
    return _model(
        config,
        [
            FusedLinear(config.hidden, config.hidden, dtype=config.torch_dtype) if at % 3 else _linear(config)
            for at in range(8)
        ],
    )


class Checkpointed(nn.Module):
    """A block that owns a parameter and recomputes itself in its backward, as PyTorch's older checkpointing does."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, config.hidden, dtype=config.torch_dtype))
        self.inner = nn.Sequential(_linear(config), nn.Tanh(), _linear(config))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return checkpoint(self._run, value, use_reentrant=True)

    def _run(self, value: torch.Tensor) -> torch.Tensor:
        return value + self.inner(value) * self.scale


class CheckpointedOutside(nn.Module):
    """The same around modules that own parameters, in a layer that owns none."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.inner = nn.Sequential(_linear(config), nn.Tanh(), _linear(config))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value + checkpoint(self.inner, value, use_reentrant=True)


def checkpointed(config: RunConfig) -> Model:
    """Reentrant checkpointing, after a layer that makes its input differentiable."""
    kinds = [_linear, Checkpointed, CheckpointedOutside, _linear]
    return _model(config, [kinds[at % 4](config) for at in range(8)])


NAMES = [
    "listed_twice",
    "on_several_stages",
    "shared_parameter",
    "shared_on_meta",
    "shared_within_a_layer",
    "tied_in_three",
    "tied_to_frozen",
    "detached",
    "routed",
    "unused",
    "fused",
    "checkpointed",
]
