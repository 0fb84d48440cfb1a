"""Rounding: how much a step over tp ranks may differ from one process's."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ppexec.config.config import RunConfig
from ppexec.models.model import Model
from ppexec.models.seeds import derive
from ppexec.stage.tensor_parallel import planned_modules

NUDGES = 2
"""How many steps with moved parameters are computed. One may leave a tensor of few elements unchanged by chance."""


def sharded_roundings(model: Model, config: RunConfig) -> float:
    """The number of roundings by which a tensor of a run over tp ranks may differ from one process's.

    Parameters
    ----------
    model : Model
        Its plan says which modules are cut.
    config : RunConfig
        Its tp and dtype count.

    Returns
    -------
    float
        0 for tp = 1.

    Notes
    -----
    A module cut by rows adds up its output in tp parts, and one cut by columns the gradient of its input. One process
    computes each of these as one sum. A sum of n terms in any order is off by about sqrt(n) u times their magnitude
    instead of n u, since roundings are independent (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, theorem 2.4). Both
    sums are off by that, and the tp parts and both results are rounded once more. The differences of all such sums add
    up, at worst in full:

        sum over the cut modules of (2 sqrt(n) u_accumulate / u + tp + 1)

    Here n is the longest side of a module's weights, since narrower products may be computed in other blocks too.
    u_accumulate is the unit rounding of float32 for shorter types, which kernels add up in float32.
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
    """The difference that a number of roundings may make to a tensor.

    Parameters
    ----------
    roundings : float
        From `sharded_roundings`.
    dtype : torch.dtype
        Of the tensor.
    largest : float
        Magnitude of its largest element.
    moved : float
        Its largest change when every parameter is moved by one rounding. It shows how much the chain and the loss
        amplify a rounding.

    Returns
    -------
    float
        Each rounding counts as u largest or as moved, whichever is larger. In float64 at least 1e-12 largest.
    """
    difference = roundings * max(unit_rounding(dtype) * largest, moved)
    return max(difference, 1e-12 * largest) if dtype == torch.float64 and roundings else difference


def unit_rounding(dtype: torch.dtype) -> float:
    """The unit rounding u: the largest relative error of rounding to the nearest number of this type.

    Examples
    --------
    >>> unit_rounding(torch.float32) == 2.0**-24
    True
    """
    return torch.finfo(dtype).eps / 2


def nudged(parameter: torch.Tensor, seed: int, *key: int | str) -> torch.Tensor:
    """A full parameter with every element moved by one rounding (2 u), up or down by (seed, key) alone."""
    stream = torch.Generator().manual_seed(derive(seed, "nudge", *key))
    signs = torch.randint(0, 2, parameter.shape, generator=stream) * 2 - 1
    return parameter * (1 + signs.to(parameter.device, parameter.dtype) * torch.finfo(parameter.dtype).eps)


def largest_of(differences: Iterable[float]) -> float:
    """The largest of some differences, 0 of none. A NaN, which `max` may drop, counts as infinite."""
    return max((math.inf if math.isnan(difference) else difference for difference in differences), default=0.0)
