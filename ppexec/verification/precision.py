"""Precision: how far a step in a narrow type, mostly bfloat16, is from the same step in float32 or float64.

In one type the step of a pipeline is bit-equal to that of one process. This module asks whether the type itself is
precise enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from ppexec.config.config import RunConfig
from ppexec.models.batch import Batch
from ppexec.verification.reference import Reference, gradient_of
from ppexec.verification.rounding import NUDGES, largest_of, nudged, unit_rounding
from ppsim.errors import InputError

_Groups = list[list[torch.Tensor]]  # the tensors that have one tolerance: of an output, or a layer's gradients
_SPREAD = 4.0  # standard deviations of a sum of independent roundings


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """The largest differences from a step in a wider type, divided by their tolerances; 1 or less passes.

    Parameters
    ----------
    dtype, reference : str
        The two types.
    output_share, gradient_share : float
        Largest difference of an output, and of a layer's gradients, divided by its tolerance (see
        `precision_tolerance`). Infinite if one is NaN.
    max_gradient_diff : float
        The largest difference of a gradient, divided by the largest magnitude among the gradients of its layer in the
        wider type.
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
        Terms of the longest sum in a module, which kernels add up in float32. `compare_precision` takes the longest
        side of a parameter.
    terms : int
        Gradients that are added up in the narrower type, one for each microbatch.
    largest : float
        Magnitude of the largest element.
    moved : float
        The largest change of any element when every parameter is moved up or down by 2 u times itself: how much the
        layers amplify a rounding.

    Returns
    -------
    float
        4 sqrt(roundings + terms - 1 + roundings longest (u32 / u)**2) max(u largest, moved).

    Notes
    -----
    k independent roundings of mean 0 add up to about sqrt(k) u instead of k u (Higham and Mary, SIAM J. Sci. Comput.
    41, 2019, theorem 2.4). Three kinds are counted: `roundings` in the modules; `terms` - 1 from adding up gradients;
    and `longest` in the float32 sum of each module, which count (u32 / u)**2 each, since the unit rounding u32 of
    float32 is smaller (2**16 times than bfloat16's). 4 is the theorem's lambda: 2 exp(-lambda**2 / 2) = 7e-4 is how
    likely a sum is further off. `moved` moves all parameters at once, which is more than a rounding does, so the
    tolerance is generous: measured differences are a hundredth to a tenth of it.

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
    wider = replace(config, dtype=reference)
    rounding = unit_rounding(config.torch_dtype)
    if unit_rounding(wider.torch_dtype) >= rounding:
        raise InputError(f"reference {reference!r} is not wider than {config.dtype!r}: take float32 or float64")
    narrow, wide = Reference(config, device), Reference(wider, device)
    wide.batches = [_widened(batch, wider.torch_dtype) for batch in narrow.batches]
    orders = [(tuple(range(count)),) for count in config.microbatches_by_replica]
    narrow.run(*orders)

    def run_wide(number: int | None) -> tuple[_Groups, _Groups]:
        """Run the wide step with the narrow one's parameters, each moved by one rounding if a number is given."""
        pairs = zip(_parameters(wide.layers), _parameters(narrow.layers), strict=True)
        with torch.no_grad():
            for index, (parameter, value) in enumerate(pairs):
                parameter.copy_(value if number is None else nudged(value, config.seed, number, index))
        wide.run(*orders)
        return _found(wide)

    unmoved = run_wide(None)
    moved = [run_wide(number) for number in range(NUDGES)]
    leaves = sum(1 for layer in narrow.layers for module in layer.modules() if not list(module.children()))
    longest = max((side for p in _parameters(narrow.layers) for side in p.shape), default=1)
    outputs, gradients = (
        [
            _Difference(
                largest=_largest(wanted),
                difference=_difference(found, wanted),
                moved=largest_of(_difference(wanted, other) for other in others),
            )
            for found, wanted, *others in zip(*groups, strict=True)
        ]
        for groups in zip(_found(narrow), unmoved, *moved, strict=True)
    )

    def share(differences: list[_Difference], *, passes: int, terms: int) -> float:
        # In each pass a module without children rounds its result once.
        return largest_of(
            each.share(rounding=rounding, roundings=passes * leaves, longest=longest, terms=terms)
            for each in differences
        )

    return PrecisionReport(
        dtype=config.dtype,
        reference=reference,
        output_share=share(outputs, passes=1, terms=1),
        gradient_share=share(gradients, passes=2, terms=config.step_microbatches),
        max_gradient_diff=largest_of(_ratio(each.difference, each.largest) for each in gradients),
    )


@dataclass(frozen=True, kw_only=True)
class _Difference:
    """How far the tensors of one output, or one layer's gradients, are from those in the wider type.

    largest: magnitude of the largest element. difference: from the wider type. moved: as in `precision_tolerance`.
    """

    largest: float
    difference: float
    moved: float

    def share(self, *, rounding: float, roundings: int, longest: int, terms: int) -> float:
        """The difference divided by its tolerance."""
        tolerance = precision_tolerance(
            rounding, roundings=roundings, longest=longest, terms=terms, largest=self.largest, moved=self.moved
        )
        return _ratio(self.difference, tolerance)


def _ratio(difference: float, size: float) -> float:
    """A difference divided by a size; infinite for a difference from nothing."""
    if size:
        return difference / size
    return 0.0 if difference == 0 else math.inf


def _parameters(layers: list[nn.Module]) -> list[nn.Parameter]:
    return [parameter for layer in layers for parameter in layer.parameters()]


def _found(reference: Reference) -> tuple[_Groups, _Groups]:
    """The tensors of each microbatch's output, and the gradients of each layer, in float64."""
    outputs = [[tensor.double() for tensor in tensors] for tensors in reference.output_tensors()]
    gradients = [[gradient_of(p).double().clone() for p in layer.parameters()] for layer in reference.layers]
    return outputs, gradients


def _largest(tensors: Sequence[torch.Tensor]) -> float:
    return largest_of(float(each.abs().max()) for each in tensors if each.numel())


def _difference(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    return _largest([one - other for one, other in zip(some, others, strict=True)])


def _widened(batch: Batch, dtype: torch.dtype) -> Batch:
    """The same numbers in a wider type."""

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return replace(
        batch,
        inputs=[widen(each) for each in batch.inputs],
        targets=[widen(each) for each in batch.targets],
    )
