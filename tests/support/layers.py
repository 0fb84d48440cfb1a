"""Layers of every kind whose backwards are split."""

from __future__ import annotations

import torch
from torch import nn


class Residual(nn.Module):
    """Pre-norm with a way around."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width, bias=False))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value + self.mlp(self.norm(value))


class SelfAttention(nn.Module):
    """A module that owns parameters, calls children that do, and is given one tensor thrice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.attention(value, value, value, need_weights=False)[0]


class Scaled(nn.Module):
    """A bare parameter around a child, and a nonlinearity of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.inner = nn.Linear(width, width)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(value) * self.scale)


class Recurrent(nn.Module):
    """The same linear layer twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.step = nn.Linear(width, width)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.step(torch.relu(self.step(value)))


class Conv(nn.Module):
    """Over the sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.conv(value.transpose(1, 2)).transpose(1, 2)


WIDTH = 8


LAYERS = [lambda: nn.Linear(WIDTH, WIDTH), lambda: Residual(WIDTH), lambda: SelfAttention(WIDTH), lambda: Scaled(WIDTH),
          lambda: Recurrent(WIDTH), lambda: Conv(WIDTH), lambda: nn.Tanh(), lambda: nn.RMSNorm(WIDTH)]  # fmt: skip
