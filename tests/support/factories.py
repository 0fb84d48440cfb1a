"""Factories: models for tests, spelled as a model name, arguments included, so that workers can build them.

`spelled("chain", shape=[2, 8], layers=[["linear", 8, 4]])` is "tests.support.factories:chain__<JSON in hex>".
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ppexec import Model, RunConfig
from ppexec.models.dropout import Randomness, SeededDropout
from ppexec.models.gpt import gpt
from tests.support.forms import counting, handing

INTEGERS = 11  # what an embedding here can take


def spelled(factory: str, **arguments: Any) -> str:
    """A model name for `--model`."""
    return f"{__name__}:{factory}__{json.dumps(arguments).encode().hex()}"


_ELSEWHERE = {"counting": counting, "handing": handing}


def __getattr__(name: str) -> Callable[[RunConfig], Model]:
    factory, mark, words = name.partition("__")
    if not (factory and mark and words):
        raise AttributeError(name)
    return partial({**globals(), **_ELSEWHERE}[factory], **json.loads(bytes.fromhex(words)))


# What the newest chain built in this process did: its model, and the (output, target) of each loss.
_newest: dict[str, Any] = {}


class Shift(nn.Module):
    """A parameter that no reset_parameters() fills: every rank keeps what the factory drew."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(width, dtype=dtype))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.shift


class Residual(nn.Module):
    """A layer made of layers."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(width, dtype=dtype), nn.Linear(width, 2 * width, dtype=dtype), nn.GLU(dim=-1)
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.inner(inputs)


class Thrice(nn.Module):
    """Weights that a layer uses three times."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(self.linear(self.linear(inputs)).tanh())


class Cast(nn.Module):
    """Changes the dtype of what crosses the boundary."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.to(self.dtype)


class Strided(nn.Module):
    """A view of a part of its input, with gaps in memory where there is more than one sample."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs[:, -1:]


class LastPosition(Strided):
    """That part without gaps, as a message has it."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs).contiguous()


class Frozen(nn.Linear):
    """Takes part in the backward without a gradient of its own."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__(width, width, dtype=dtype)
        self.requires_grad_(False)


class Mask(nn.Module):
    """Saves a mask, as dropout does."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.where(inputs > -0.5, inputs, inputs / 4)


class Half(nn.Module):
    """A dense view of a part of its input: its storage is larger than it is."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs[:1]


class Skip(nn.Module):
    """A residual connection without parameters; the sum is held by nobody inside."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + inputs.sigmoid() * inputs


class Spread(nn.Module):
    """An output that takes less memory than its shape says."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.mean(-1, keepdim=True).expand_as(inputs)


class Turned(nn.Module):
    """The same numbers in another layout."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.transpose(0, -1).contiguous().transpose(0, -1)


class Scaled(nn.Module):
    """Saves a buffer, which is older than any step."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(1, 2, width, dtype=dtype))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.scale


class Table(nn.Module):
    """Saves a table that it makes in its first forward and keeps where no attribute shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[Any, torch.Tensor] = {}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        key = (inputs.shape[-1], inputs.dtype, inputs.device)
        if key not in self.tables:
            self.tables[key] = torch.linspace(1, 2, key[0], dtype=key[1], device=key[2])
        return inputs * self.tables[key]


class Remembers(nn.Module):
    """Keeps what it gave last in an attribute, for somebody to look at; autograd saves the same tensor."""

    last: torch.Tensor | None = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.last = inputs.sigmoid()
        return self.last * inputs


_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "embedding": lambda width, *, dtype: nn.Embedding(INTEGERS, width, dtype=dtype),
    "linear": lambda into, out, *, dtype: nn.Linear(into, out, dtype=dtype),
    "norm": lambda width, *, dtype: nn.LayerNorm(width, dtype=dtype),
    "tanh": lambda *, dtype: nn.Tanh(),
    "identity": lambda *, dtype: nn.Identity(),
    "shift": lambda width, *, dtype: Shift(width, dtype),
    "residual": lambda width, *, dtype: Residual(width, dtype),
    "thrice": lambda width, *, dtype: Thrice(width, dtype),
    "attention": lambda width, *, dtype: nn.TransformerEncoderLayer(
        width, 1, dim_feedforward=5, dropout=0, batch_first=True, dtype=dtype
    ),
    "frozen": lambda width, *, dtype: Frozen(width, dtype),
    "cast": lambda *, dtype: Cast(dtype),
    "last": lambda *, dtype: LastPosition(),
    "strided": lambda *, dtype: Strided(),
    "flatten": lambda *, dtype: nn.Flatten(),
    "relu_": lambda *, dtype: nn.ReLU(inplace=True),
    "gelu": lambda *, dtype: nn.GELU(),
    "mask": lambda *, dtype: Mask(),
    "half": lambda *, dtype: Half(),
    "skip": lambda *, dtype: Skip(),
    "spread": lambda *, dtype: Spread(),
    "turned": lambda *, dtype: Turned(),
    "scaled": lambda width, *, dtype: Scaled(width, dtype),
    "table": lambda *, dtype: Table(),
    "remembers": lambda *, dtype: Remembers(),
    "dropout": lambda *, dtype: nn.Dropout(0.3),
    "dropout_": lambda *, dtype: nn.Dropout(0.3, inplace=True),
}


def chain(config: RunConfig, *, shape: list[int], integers: bool, layers: list[list[Any]]) -> Model:
    """Layers that differ in kind, shape and dtype; each is [kind, sizes..., dtype]. Inputs have `shape`."""
    modules = [_LAYERS[kind](*sizes, dtype=getattr(torch, dtype)) for kind, *sizes, dtype in layers]
    first_dtype = getattr(torch, layers[0][-1])

    def sample(microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        stream = torch.Generator().manual_seed(1000 * config.seed + microbatch)
        if integers:
            return torch.randint(INTEGERS, shape, generator=stream), torch.tensor([float(microbatch)])
        return torch.randn(shape, generator=stream, dtype=first_dtype), torch.tensor([float(microbatch)])

    ran: list[tuple[torch.Tensor, torch.Tensor]] = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        ran.append((output.detach().clone(), target))
        return (output - target.to(output.dtype) / 7).square().mean()

    model = Model(layers=modules, sample=sample, loss=loss)
    _newest.update(model=model, ran=ran)
    return model


def newest_results() -> dict[str, Any]:
    """What this rank holds of the newest chain: its parameters and their gradients, and outputs by global sample."""
    parameters, gradients = {}, {}
    for layer, module in enumerate(_newest["model"].layers):
        for name, parameter in module.named_parameters():
            parameters[layer, name] = parameter.detach().clone()
            gradients[layer, name] = parameter.grad
    return {
        "parameters": parameters,
        "gradients": gradients,
        "outputs": {int(target): output for output, target in _newest["ran"]},
    }


def dropping(config: RunConfig) -> Model:
    """Dropout and nothing else, on ones; remembers each sample's output."""
    randomness = Randomness(config.seed)
    outputs: dict[int, torch.Tensor] = {}

    def sample(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        samples = torch.arange(index * config.micro_batch_size, (index + 1) * config.micro_batch_size)
        return torch.ones(len(samples), 16), samples

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        outputs.update(zip(target.tolist(), output.detach().clone(), strict=True))
        return output.sum()

    _newest.update(dropped=outputs)
    layers = [SeededDropout(0.3, layer=at, site="only", randomness=randomness) for at in range(config.layers)]
    return Model(layers=layers, sample=sample, loss=loss, randomness=randomness)


def newest_outputs() -> dict[int, torch.Tensor]:
    """What this rank's newest `dropping` model gave, by global sample."""
    return _newest["dropped"]


def kept_gpt(config: RunConfig) -> Model:
    """The built-in GPT whose embedding and head count as layers; remembered for `kept_gradients`."""
    model = gpt(replace(config, model="gpt", layers=config.layers - 2, partition="even"))
    _newest.update(model=model)
    return model


def kept_gradients() -> dict[tuple[int, str], torch.Tensor]:
    """The gradients on this rank, by layer and name."""
    named = [(at, *item) for at, layer in enumerate(_newest["model"].layers) for item in layer.named_parameters()]
    return {(at, name): parameter.grad for at, name, parameter in named if parameter.grad is not None}


def _nothing(config: RunConfig) -> Model:
    """A model that can be set up and has nothing to do."""
    return Model(
        layers=[nn.Identity() for _ in range(config.layers)],
        sample=lambda index: (torch.zeros(1), torch.zeros(1)),
        loss=lambda output, target: output.sum(),
    )


def calling(config: RunConfig, *, function: str, directory: str, arguments: dict[str, Any]) -> Model:
    """Calls a function in every worker while the model is built, when the ranks already form a world."""
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(**arguments)
    Path(directory, f"{dist.get_rank()}.pickle").write_bytes(pickle.dumps(result))
    return _nothing(config)


class _Wrong(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (1 + dist.get_rank() * 2**-20)


class Linear(nn.Linear):
    """Does nothing wrong."""


class WrongBackward(nn.Linear):
    """Its output is right everywhere; the gradients that pass it are right on rank 0 alone."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return _Wrong.apply(super().forward(inputs))


class WrongForward(nn.Linear):
    """Its output depends on the process that computes it."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) + (os.getpid() if dist.get_rank() else 0)


class NotANumber(nn.Linear):
    """Gives NaN everywhere but on rank 0."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) * (float("nan") if dist.get_rank() else 1)


class Steep(nn.Linear):
    """Its output is a number, and its slope is none: that of the root at zero."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs).clamp(min=0).mul(0).sqrt()


class Loud(nn.Linear):
    """Gives numbers whose gradients have squares that float32 does not hold."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) * 1e15


class Dies(nn.Linear):
    """Kills its process in the first real forward on a rank."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not inputs.is_meta:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(inputs)


class Raises(nn.Linear):
    """Refuses its input, as a user's layer may."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not inputs.is_meta:
            raise ValueError("this layer takes no such input: give it another")
        return super().forward(inputs)


class Breaks(nn.Linear):
    """Fails in a way that no input explains."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not inputs.is_meta:
            raise KeyError("lost")
        return super().forward(inputs)


class Sleeps(nn.Linear):
    """Never ends by itself, so that it can be killed in the middle of a step."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not inputs.is_meta:
            time.sleep(600)
        return super().forward(inputs)


def with_one(config: RunConfig, *, kind: str, at: int) -> Model:
    """Linear layers, one of which is of another kind."""
    width = config.hidden
    return Model(
        layers=[globals()[kind](width, width) if n == at else nn.Linear(width, width) for n in range(config.layers)],
        sample=lambda index: (torch.full((2, width), float(index + 1)), torch.zeros(2, width)),
        loss=lambda output, target: (output - target).square().mean(),
    )


def odd_loss(config: RunConfig, *, at: int) -> Model:
    """Linear layers, and one microbatch with a target that is no number."""
    width, dtype = config.hidden, config.torch_dtype

    def sample(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        stream = torch.Generator().manual_seed(index)
        target = float("inf") if index == at else 1.0
        return torch.randn(2, width, generator=stream, dtype=dtype), torch.full((2, width), target, dtype=dtype)

    return Model(
        layers=[nn.Linear(width, width, dtype=dtype) for _ in range(config.layers)],
        sample=sample,
        loss=lambda output, target: (output - target).square().mean(),
    )


def norms(config: RunConfig) -> Model:
    """Layers that compute in another way in evaluation mode, one of which is in that mode at all times."""
    width, dtype = config.hidden, config.torch_dtype

    def sample(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        stream = torch.Generator().manual_seed(index)
        return torch.randn(4, width, generator=stream, dtype=dtype), torch.ones(4, width, dtype=dtype)

    frozen = nn.BatchNorm1d(width, dtype=dtype).eval()
    # Without the bias, whose gradient would be the rounding of zero, which AdamW makes large.
    first = nn.Linear(width, width, bias=False, dtype=dtype)
    between = [nn.BatchNorm1d(width, dtype=dtype), nn.Linear(width, width, dtype=dtype)]
    return Model(
        layers=[first, *between, nn.Sequential(frozen, nn.Tanh())],
        sample=sample,
        loss=nn.functional.mse_loss,
    )


def with_held_out(config: RunConfig, *, target: float) -> Model:
    """Linear layers; held-out data has a target of its own."""
    width = config.hidden
    return Model(
        layers=[nn.Linear(width, width) for _ in range(config.layers)],
        sample=lambda index: (torch.full((2, width), 1.0 / (index + 1)), torch.zeros(2, width)),
        loss=nn.functional.mse_loss,
        held_out=lambda index: (torch.full((2, width), 1.0 / (index + 1)), torch.full((2, width), target)),
    )


def noting(config: RunConfig, *, directory: str) -> Model:
    """Notes in a directory which rank read which sample."""

    def sample(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        Path(directory, f"{dist.get_rank()}-{index}").touch()
        return torch.full((2, config.hidden), float(index)), torch.zeros(2, config.hidden)

    return Model(
        layers=[nn.Linear(config.hidden, config.hidden) for _ in range(config.layers)],
        sample=sample,
        loss=lambda output, target: (output - target).square().mean(),
    )


def not_a_model(config: RunConfig) -> Any:
    """What a factory must not give."""
    return [nn.Linear(config.hidden, config.hidden)] * config.layers


def bad_sample(config: RunConfig, *, gives: str) -> Model:
    """A sample that is not a pair of tensors."""
    wrong: dict[str, Any] = {
        "one": torch.zeros(2, 4),
        "three": (torch.zeros(1),) * 3,
        "list": [[1.0], [2.0]],
        "none": None,
    }
    return Model(
        layers=_nothing(config).layers, sample=lambda index: wrong[gives], loss=lambda output, target: output.sum()
    )
