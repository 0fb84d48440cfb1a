"""Model: layers wide enough to keep a GPU at work, with data that it draws itself."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ppexec.config.config import RunConfig
from ppexec.models.model import Model
from ppexec.models.seeds import derive


class WideLayer(nn.Module):
    """A linear layer and GELU; (..., hidden) in and out."""

    def __init__(self, hidden: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, hidden, dtype=dtype)
        self.activation = nn.GELU()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., hidden) -> (..., hidden)."""
        return self.activation(self.linear(inputs))


def wide(config: RunConfig) -> Model:
    """`config.layers` wide layers; normal samples and targets (micro_batch_size, seq, hidden), drawn on the GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        layers = [WideLayer(config.hidden, dtype=config.torch_dtype) for _ in range(config.layers)]

    def sample(microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        stream = torch.Generator(device).manual_seed(derive(config.seed, "wide", microbatch))
        shape = (2, config.micro_batch_size, config.seq, config.hidden)
        inputs, targets = torch.randn(shape, generator=stream, device=device, dtype=config.torch_dtype).unbind(0)
        return inputs, targets

    return Model(layers=layers, sample=sample, loss=functional.mse_loss)
