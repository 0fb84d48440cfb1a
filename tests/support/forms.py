"""Forms: models whose layers hand on several tensors, as a tuple, a list, a dict or a dataclass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ppexec import Model, RunConfig

VOCABULARY = 11


@dataclass
class Handed:
    hidden: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


FORMS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {  # how to build one, and how to take it apart
    "tuple": (lambda *parts: parts, lambda value: value),
    "list": (lambda *parts: [*parts], lambda value: value),
    "dict": (lambda h, m, p: {"hidden": h, "rest": (m, p)}, lambda value: (value["hidden"], *value["rest"])),
    "dataclass": (Handed, lambda value: (value.hidden, value.mask, value.positions)),
}


class Enter(nn.Module):
    """Tokens and a mask of any number of rows."""

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.build = FORMS[form][0]

    def forward(self, inputs: dict[str, torch.Tensor]) -> Any:
        tokens, mask = inputs["tokens"], inputs["mask"]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.build(self.embedding(tokens), mask, positions)


class Between(nn.Module):
    """Uses all that it is given; mask and positions go on as they are."""

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.places = nn.Embedding(64, width)
        self.build, self.take = FORMS[form]

    def forward(self, value: Any) -> Any:
        hidden, mask, positions = self.take(value)
        changed = torch.tanh(self.linear(hidden) + self.places(positions)) * mask[..., None]
        return self.build(hidden + changed, mask, positions)


class OnlyPositions(nn.Module):
    """A layer without parameters that makes more of what has no gradient."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.build, self.take = FORMS[form]

    def forward(self, value: Any) -> Any:
        hidden, mask, positions = self.take(value)
        return self.build(hidden, ~mask | mask, positions + 1)


def handing(config: RunConfig, *, form: str, rows: list[int] | None = None, lengths: list[int] | None = None) -> Model:
    """`config.layers` layers. Microbatch i has rows[i mod n] rows and lengths[i mod n] positions."""
    width = config.hidden
    layers: list[nn.Module] = [Enter(width, form)]
    for at in range(1, config.layers):
        layers.append(OnlyPositions(form) if at % 3 == 2 else Between(width, form))

    def sample(index: int) -> tuple[Any, Any]:
        count = config.micro_batch_size if rows is None else rows[index % len(rows)]
        length = config.seq if lengths is None else lengths[index % len(lengths)]
        stream = torch.Generator().manual_seed(1000 * config.seed + index)
        tokens = torch.randint(VOCABULARY, (count, length), generator=stream)
        mask = torch.rand(count, length, generator=stream) > 0.3
        return {"tokens": tokens, "mask": mask}, (torch.randn(count, length, width, generator=stream), mask)

    def loss(output: Any, target: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        hidden, _, _ = FORMS[form][1](output)
        values, mask = target
        return ((hidden - values).square() * mask[..., None]).mean()

    return Model(layers=layers, sample=sample, loss=loss)


class Count(nn.Module):
    """Gives integers alone, which have no gradient."""

    def forward(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return value + 1, value > 3


class Uncount(nn.Module):
    """Takes them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY + 1, width)

    def forward(self, value: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.embedding(value[0]) * value[1][..., None]


def counting(config: RunConfig) -> Model:
    """Integers cross the first boundaries; no gradient comes back over them."""
    width = config.hidden
    layers: list[nn.Module] = [nn.Identity(), Count(), Uncount(width)]
    layers += [nn.Linear(width, width) for _ in range(config.layers - 3)]

    def sample(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        stream = torch.Generator().manual_seed(index)
        tokens = torch.randint(VOCABULARY, (config.micro_batch_size, config.seq), generator=stream)
        return tokens, torch.randn(*tokens.shape, width, generator=stream)

    return Model(layers=layers, sample=sample, loss=nn.functional.mse_loss)
