"""Dropout: which elements are dropped depends on what they are, not on where or when they are computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ppexec.models.seeds import dropout_mask
from ppsim.errors import InputError


class Randomness:
    """The step and the samples of the forward under way. All dropout modules of a model share one.

    Parameters
    ----------
    seed : int
        The run's.

    Notes
    -----
    A stage calls `at` before each forward. A layer that is recomputed for its backward is told the same step and
    samples again, so it drops the same elements. Before the first `at`, and after `off`, nothing is dropped.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self.samples: Sequence[int] | None = None

    def at(self, step: int, samples: Sequence[int]) -> None:
        """Say what is computed next: the step, and the global index of each sample of the microbatch."""
        self.step, self.samples = step, samples

    def off(self) -> None:
        """Drop nothing from now on, as in an evaluation."""
        self.samples = None


class SeededDropout(nn.Module):
    """Dropout keyed by (seed, step, global sample, layer, site); elements that stay are scaled by 1 / (1 - drop).

    Parameters
    ----------
    drop : float
        Probability that an element is dropped, 0 <= drop < 1.
    layer : int
        Position in the model's chain.
    site : str
        Which of the layer's dropouts this is.
    randomness : Randomness
        The model's.

    Notes
    -----
    The first dimension of its input counts samples. Under tensor parallelism it belongs where activations are whole on
    every rank: all ranks of tp then draw the same mask.
    """

    def __init__(self, drop: float, *, layer: int, site: str, randomness: Randomness) -> None:
        super().__init__()
        self.drop, self.layer, self.site = drop, layer, site
        self.randomness = randomness

    def extra_repr(self) -> str:
        """For printing a model."""
        return f"drop={self.drop}, layer={self.layer}, site={self.site!r}"

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(samples, ...) -> (samples, ...). Raises InputError for another number of samples than was announced."""
        samples = self.randomness.samples
        if not self.drop or samples is None or inputs.is_meta:
            return inputs
        if len(samples) != len(inputs):
            raise InputError(
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
