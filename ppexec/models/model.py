"""Model: what a pipeline trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ppexec.models.dropout import Randomness

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

Sample = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Place = tuple[int, str]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A chain of layers with its data and loss.

    layers: modules of one tensor in, one tensor out; each takes the one before's output. They may live on the meta
    device; then every rank makes only its own, and each module that owns a parameter needs `reset_parameters()`.
    sample: global microbatch index -> (inputs, targets). loss: (output, target) -> scalar, of one microbatch.
    plan: how one layer is sharded over tp, for parallelize_module; None or an empty dict: replicated.
    randomness: what the layers' dropout asks which step and samples it is in; None where nothing is dropped.
    tied: pairs of (layer, parameter name) that are one weight: the second starts as the first, and each gets the sum of
    both gradients.
    """

    layers: Sequence[nn.Module]
    sample: Sample
    loss: Loss
    plan: Callable[[nn.Module], dict[str, ParallelStyle]] | None = None
    randomness: Randomness | None = None
    tied: Sequence[tuple[Place, Place]] = ()
