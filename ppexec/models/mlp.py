"""The built-in MLP: blocks of two linear layers that keep the shape of what they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from ppexec.models.model import Model
from ppexec.models.seeds import sample_generator

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

    from ppexec.config.config import RunConfig


class MLPBlock(nn.Module):
    """A linear layer, GELU and a linear layer: (..., hidden) -> (..., intermediate) -> (..., hidden)."""

    def __init__(self, hidden: int, intermediate: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, intermediate, dtype=dtype)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(intermediate, hidden, dtype=dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., hidden) -> (..., hidden)."""
        return self.fc2(self.activation(self.fc1(inputs)))


def _plan(layer: nn.Module) -> dict[str, ParallelStyle]:
    """Each tensor-parallel rank computes a slice of the intermediate features; fc2 adds up the ranks' partial outputs.

    Source: Shoeybi et al., Megatron-LM, 2019, section 3. All layers have this plan.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}


def mlp(config: RunConfig) -> Model:
    """Build the built-in MLP: a chain of `config.layers` blocks.

    Inputs and targets are drawn from a normal distribution, of shape (samples, seq, hidden). The loss is the mean
    squared error.
    """
    with torch.device("meta"):  # each rank makes only its own layers real
        layers = [MLPBlock(config.hidden, config.intermediate, dtype=config.torch_dtype) for _ in range(config.layers)]

    def sample(microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        samples = [
            # an input and a target
            torch.randn(2, config.seq, config.hidden, generator=sample_generator(config.seed, sample=index))
            for index in config.samples_of(microbatch)
        ]
        inputs, targets = torch.stack(samples, dim=1).to(config.torch_dtype)
        return inputs, targets

    return Model(layers=layers, sample=sample, loss=functional.mse_loss, plan=_plan)
