"""Dropout: which elements are dropped depends on what they are, not on where or when they are computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ppexec.models.seeds import dropout_mask


class Randomness:
    """Which step and which samples the forward under way is of; a model's dropout modules share one.

    Whoever runs a forward says so first, with `at`; a layer that is computed anew for its backward is told the same
    again, and so drops the same. Until then, and after `off`, nothing is dropped, as in an evaluation.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self.samples: Sequence[int] | None = None

    def at(self, step: int, samples: Sequence[int]) -> None:
        """What is computed next is of this step and these global samples, one for each row of the batch."""
        self.step, self.samples = step, samples

    def off(self) -> None:
        """Drop nothing."""
        self.samples = None


class SeededDropout(nn.Module):
    """Dropout keyed by (seed, step, global sample, layer, site); what stays is scaled by 1 / (1 - drop).

    drop: probability that an element is dropped, 0 <= drop < 1. layer: position in the model's chain. site: which of
    the layer's dropouts this is. The first dimension of what it is given counts samples. Under tensor parallelism it
    belongs where activations are whole on every rank: all of them then draw the same mask.
    """

    def __init__(self, drop: float, *, layer: int, site: str, randomness: Randomness) -> None:
        super().__init__()
        self.drop, self.layer, self.site = drop, layer, site
        self.randomness = randomness

    def extra_repr(self) -> str:
        """For printing a model."""
        return f"drop={self.drop}, layer={self.layer}, site={self.site!r}"

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(samples, ...) -> (samples, ...). Raises ValueError if the samples are not as many as were announced."""
        samples = self.randomness.samples
        if not self.drop or samples is None or inputs.is_meta:
            return inputs
        if len(samples) != len(inputs):
            raise ValueError(
                f"dropout {self.site!r} of layer {self.layer} is given {len(inputs)} samples in a microbatch of "
                f"{len(samples)}: let the first dimension count the micro batch's samples"
            )
        mask = dropout_mask(
            self.randomness.seed,
            step=self.randomness.step,
            samples=samples,
            layer=self.layer,
            shape=tuple(inputs.shape[1:]),
            drop=self.drop,
            site=self.site,
        )
        # In two steps, so that autograd keeps the mask as one byte an element.
        return inputs * mask.to(inputs.device) * (1 / (1 - self.drop))
