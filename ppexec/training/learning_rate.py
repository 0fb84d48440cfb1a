"""Learning rate: a function of the step's number alone, so that a resumed training goes on where it stopped."""

from __future__ import annotations

from math import cos, pi

from ppexec.config.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """The learning rate of an optimizer step.

    Parameters
    ----------
    config : RunConfig
        Its learning rate, warm-up and decay.
    step : int
        Number of the step, from 0.

    Notes
    -----
    In the warm-up the rate rises by equal parts, and its last step has all of it. Then comes the decay, if there is
    one: n steps from `learning_rate` towards `min_learning_rate`, which all later steps have. It is linear, or half a
    cosine (Loshchilov and Hutter, 2017, "SGDR", without restarts). PyTorch has these as LinearLR, which starts at
    1 / warm-up and ends after warm-up - 1 steps, and CosineAnnealingLR, joined by SequentialLR.

    Examples
    --------
    >>> config = RunConfig(
    ...     learning_rate=1.0, learning_rate_warmup=2, learning_rate_decay="linear", learning_rate_decay_steps=4
    ... )
    >>> [learning_rate(config, step) for step in range(8)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    warmup, most, least = config.learning_rate_warmup, config.learning_rate, config.min_learning_rate
    if step < warmup:
        return most * (step + 1) / warmup
    if config.learning_rate_decay == "none":
        return most
    done = min((step - warmup) / config.learning_rate_decay_steps, 1.0)
    left = 1 - done if config.learning_rate_decay == "linear" else (1 + cos(pi * done)) / 2
    return least + (most - least) * left
