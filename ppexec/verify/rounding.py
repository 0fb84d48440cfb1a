"""Rounding: how far a step over tp ranks may be from one process's, stated before it is run."""

from __future__ import annotations

import math

import torch

from ppexec.config.config import RunConfig
from ppexec.models.model import Model
from ppexec.models.seeds import derive
from ppexec.stage.tensor_parallel import planned_modules

NUDGES = 2  # controls: one alone may leave a tensor of a few elements unchanged by chance


def sharded_roundings(model: Model, config: RunConfig) -> float:
    """By how many roundings a tensor of a run over tp ranks may differ from one process's; 0 for tp = 1.

    A module cut by rows adds up the tp parts of its output, one cut by columns those of its input's gradient, where one
    process takes one sum; no other module sums anything in parts. A sum of n terms in any order is off by about sqrt(n)
    u times their size, not by n u, as roundings are independent (Higham and Mary, SIAM J. Sci. Comput. 41, 2019,
    theorem 2.4); both sums are, and the tp parts and the two results are rounded besides. All that comes after such a
    sum differs as well, so the differences of all sums add up, at worst in full:

        sum over the cut modules of (2 sqrt(n) u_accumulate / u + tp + 1)

    with n the longest side of a module's own weights: its other products may be blocked otherwise too, once they are
    narrower. u_accumulate is that of float32 for shorter types, which kernels add up in it.
    """
    if config.tp == 1:
        return 0.0
    rounding = unit_rounding(config.torch_dtype)
    accumulated = min(rounding, unit_rounding(torch.float32))
    longest = [
        max((side for parameter in module.parameters() for side in parameter.shape), default=1)
        for module in planned_modules(model)
    ]
    return math.fsum(2 * math.sqrt(side) * accumulated / rounding + config.tp + 1 for side in longest)


def allowed(roundings: float, dtype: torch.dtype, *, largest: float, moved: float) -> float:
    """The difference that so many roundings may make to a tensor; in float64 at least 1e-12 of its largest element.

    largest: magnitude of the tensor's largest element. moved: by how much it moves when every parameter moves by one
    rounding: what one rounding somewhere in the chain really does to it, where the chain or the loss amplifies. Each of
    the roundings counts as the larger of the two.
    """
    difference = roundings * max(unit_rounding(dtype) * largest, moved)
    return max(difference, 1e-12 * largest) if dtype == torch.float64 and roundings else difference


def unit_rounding(dtype: torch.dtype) -> float:
    """u: the largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def nudged(parameter: torch.Tensor, seed: int, *key: int | str) -> torch.Tensor:
    """A full parameter with every element one rounding (2 u) up or down, by (seed, key) alone."""
    stream = torch.Generator().manual_seed(derive(seed, "nudge", *key))
    signs = torch.randint(0, 2, parameter.shape, generator=stream) * 2 - 1
    return parameter * (1 + signs.to(parameter.device, parameter.dtype) * torch.finfo(parameter.dtype).eps)
