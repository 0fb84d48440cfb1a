"""Model: what a pipeline trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

Sample = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A chain of layers with its data and loss.

    layers: modules of one tensor in, one tensor out; each takes the one before's output. They may live on the meta
    device; then every rank makes only its own, and each module that owns a parameter needs `reset_parameters()`.
    sample: global microbatch index -> (inputs, targets). loss: (output, target) -> scalar, of one microbatch.
    """

    layers: Sequence[nn.Module]
    sample: Sample
    loss: Loss
