"""Precision: how far a step in bfloat16 is from the same step in float32 or float64.

Against its own type a pipeline's step is bit-equal. This asks the other question: whether the type itself is enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from ppexec.config.config import RunConfig
from ppexec.models.batch import Batch
from ppexec.verification.reference import Reference, gradient_of
from ppexec.verification.rounding import NUDGES, nudged, unit_rounding
from ppsim.errors import InputError

_SPREAD = 4.0  # standard deviations of a sum of independent roundings


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """The largest differences from a step in a wider type, as shares of what rounding explains.

    Parameters
    ----------
    dtype, reference : str
        The two types.
    output_share, gradient_share : float
        Largest difference of an output, and of a layer's gradients, over its tolerance (see `precision_tolerance`).
    max_gradient_diff : float
        The largest difference of a gradient over the largest gradient of its layer.
    """

    dtype: str
    reference: str
    output_share: float
    gradient_share: float
    max_gradient_diff: float

    @property
    def passed(self) -> bool:
        """Whether rounding explains every difference."""
        return self.output_share <= 1 and self.gradient_share <= 1


def precision_tolerance(
    rounding: float, *, roundings: int, longest: int, terms: int, largest: float, moved: float
) -> float:
    """The difference from a wider type that rounding explains.

    Parameters
    ----------
    rounding : float
        Unit rounding u of the narrower type; 2**-8 for bfloat16.
    roundings : int
        How many times in a row a value is rounded on its way: once for each module, forwards and backwards.
    longest : int
        Terms of the longest sum in a module, which kernels add up in float32.
    terms : int
        Gradients that are added up in the narrower type, one for each microbatch.
    largest : float
        Magnitude of the largest element.
    moved : float
        Its largest change when every parameter is moved by one rounding of the narrower type: how much the chain
        amplifies.

    Returns
    -------
    float
        4 sqrt(roundings + terms - 1 + roundings n (u32 / u)**2) max(u largest, moved).

    Notes
    -----
    k independent roundings of mean 0 add up to about sqrt(k) u instead of k u (Higham and Mary, SIAM J. Sci. Comput.
    41, 2019, theorem 2.4). There are as many as `roundings`, one for each gradient but the first that is added to the
    sum, and n for each of the sums in float32, whose unit rounding u32 is 2**16 times smaller. 4 is the theorem's
    lambda: 2 exp(-lambda**2 / 2) = 7e-4 is how likely a sum is further off. `moved` is of all parameters at once, so
    the tolerance is generous: differences are a hundredth to a tenth of it.

    Examples
    --------
    >>> precision_tolerance(2.0**-8, roundings=16, longest=4096, terms=1, largest=1.0, moved=0.0)
    0.0625...
    """
    in_sums = roundings * longest * (unit_rounding(torch.float32) / rounding) ** 2
    return _SPREAD * math.sqrt(roundings + terms - 1 + in_sums) * max(rounding * largest, moved)


Wider = Literal["float32", "float64"]


def compare_precision(config: RunConfig, reference: Wider, device: torch.device) -> PrecisionReport:
    """Compare a step of one process with the same step, of the same parameters and data, in a wider type.

    Parameters
    ----------
    config : RunConfig
        Its dtype is the narrower type.
    reference : str
        The wider one: "float32" or "float64".
    device : torch.device
        Where to compute.

    Raises
    ------
    InputError
        If the reference is not wider.
    """
    narrow = Reference(config, device)
    wide = Reference(replace(config, dtype=reference), device)
    rounding = unit_rounding(config.torch_dtype)
    wider = replace(config, dtype=reference).torch_dtype
    if unit_rounding(wider) >= rounding:
        raise InputError(f"reference {reference!r} is not wider than {config.dtype!r}: take float32 or float64")
    wide.batches = [_widened(batch, wider) for batch in narrow.batches]
    orders = [(tuple(range(count)),) for count in config.microbatches_by_replica]
    narrow.run(*orders)

    def run_wide(number: int | None) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        """With the narrower type's parameters, moved by one rounding if a number is given."""
        pairs = zip(_parameters(wide.layers), _parameters(narrow.layers), strict=True)
        with torch.no_grad():
            for index, (parameter, value) in enumerate(pairs):
                parameter.copy_(value if number is None else nudged(value, config.seed, number, index))
        wide.run(*orders)
        return _found(wide)

    outputs, gradients = run_wide(None)
    moved_outputs, moved_gradients = [0.0] * len(outputs), [0.0] * len(gradients)
    for number in range(NUDGES):
        others, other_gradients = run_wide(number)
        moved_outputs = [max(m, _far(a, b)) for m, a, b in zip(moved_outputs, outputs, others, strict=True)]
        moved_gradients = [
            max(m, max(map(_far, a, b), default=0.0))
            for m, a, b in zip(moved_gradients, gradients, other_gradients, strict=True)
        ]
    modules = sum(1 for layer in narrow.layers for module in layer.modules() if not list(module.children()))
    longest = max((side for p in _parameters(narrow.layers) for side in p.shape), default=1)
    own_outputs, own_gradients = _found(narrow)

    def share(own: list[torch.Tensor], theirs: list[torch.Tensor], moved: float, passes: int, terms: int) -> float:
        largest = max((float(each.abs().max()) for each in theirs if each.numel()), default=0.0)
        bound = precision_tolerance(
            rounding, roundings=passes * modules, longest=longest, terms=terms, largest=largest, moved=moved
        )
        return max(map(_far, own, theirs), default=0.0) / bound if bound else 0.0

    found = list(zip(own_gradients, gradients, moved_gradients, strict=True))
    return PrecisionReport(
        dtype=config.dtype,
        reference=reference,
        output_share=max(
            share([a], [b], moved, 1, 1) for a, b, moved in zip(own_outputs, outputs, moved_outputs, strict=True)
        ),
        gradient_share=max((share(a, b, moved, 2, config.step_microbatches) for a, b, moved in found), default=0.0),
        max_gradient_diff=max(
            (max(map(_far, a, b)) / max(max(float(g.abs().max()) for g in b), 1e-300) for a, b, _ in found if b),
            default=0.0,
        ),
    )


def _parameters(layers: list[nn.Module]) -> list[nn.Parameter]:
    return [parameter for layer in layers for parameter in layer.parameters()]


def _found(reference: Reference) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Outputs by microbatch, and gradients by layer, in float64."""
    outputs = [each.double() for of_replica in reference.outputs for _, each in sorted(of_replica.items())]
    gradients = [[gradient_of(p).double().clone() for p in layer.parameters()] for layer in reference.layers]
    return outputs, gradients


def _far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max()) if one.numel() else 0.0


def _widened(batch: Batch, dtype: torch.dtype) -> Batch:
    """The same numbers in a wider type."""

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return replace(
        batch,
        inputs=[widen(each) for each in batch.inputs],
        targets=[widen(each) for each in batch.targets],
    )
