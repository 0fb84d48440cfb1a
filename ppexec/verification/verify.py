"""Verify: whether the pipeline computed what one process computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ppexec.config.config import RunConfig
from ppexec.verification.comparison import Comparison
from ppexec.verification.rounding import largest_of


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The last stage's outputs and all gradients, compared with one process without a pipeline.

    Parameters
    ----------
    outputs_bit_equal, gradients_bit_equal : bool
        Whether all outputs, and all gradients, have the same bits.
    gradients_equal : bool
        Whether every element of every gradient is within its tolerance.
    max_output_diff, max_gradient_diff : float
        The largest differences.
    tolerance : float
        The largest tolerance of an element of a gradient. 0 for dp = tp = 1, where the same operations run in the same
        order; only a tied weight has one there. With dp the microbatches are added up in another order, and with tp the
        features within a layer (see `Reference.rounding`).
    compared : int
        Number of tensors. Each rank of tp compares its outputs and its slices of gradients.
    first_difference : str or None
        The first tensor that is not bit-equal, with its difference. None if all are.
    config : dict
        The run's.
    outputs_equal : bool
        With tp, whether outputs are within their tolerance; else whether they are bit-equal.
    output_tolerance : float
        The largest tolerance of an output; 0 without tp.
    """

    outputs_bit_equal: bool
    gradients_bit_equal: bool
    gradients_equal: bool
    max_output_diff: float
    max_gradient_diff: float
    tolerance: float
    compared: int
    first_difference: str | None
    config: dict[str, Any]
    outputs_equal: bool
    output_tolerance: float

    @classmethod
    def of(cls, config: RunConfig, comparisons: Sequence[Comparison]) -> VerifyReport:
        """Sum up the comparisons of all workers. Raises InputError if an output is missing."""
        expected = config.step_microbatches * config.tp
        outputs = [c for c in comparisons if c.what == "output"]
        gradients = [c for c in comparisons if c.what == "gradient"]
        if len(outputs) != expected:
            raise RuntimeError(f"compared {len(outputs)} outputs of {expected}: the run is not complete")
        first = next((c for c in [*outputs, *gradients] if not c.bit_equal), None)
        return cls(
            outputs_bit_equal=all(c.bit_equal for c in outputs),
            gradients_bit_equal=all(c.bit_equal for c in gradients),
            gradients_equal=all(c.within for c in gradients),
            max_output_diff=_largest(outputs),
            max_gradient_diff=_largest(gradients),
            tolerance=max((c.tolerance for c in gradients), default=0.0),
            compared=len(comparisons),
            first_difference=None if first is None else _describe(first),
            config=config.to_dict(),
            outputs_equal=all(c.bit_equal or (config.tp > 1 and c.within) for c in outputs),
            output_tolerance=max(c.tolerance for c in outputs),
        )

    @property
    def passed(self) -> bool:
        """Whether outputs and gradients are equal, within their tolerances."""
        return self.outputs_equal and self.gradients_equal

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def _largest(comparisons: Sequence[Comparison]) -> float:
    """The largest difference. A NaN on one side only counts as infinite."""
    return largest_of(c.max_abs_diff for c in comparisons if not c.bit_equal)


def _describe(comparison: Comparison) -> str:
    where = (
        f"microbatch {comparison.name}"
        if comparison.what == "output"
        else f"layer {comparison.layer} {comparison.name}"
    )
    rounding = torch.finfo(torch.float32).eps * comparison.largest
    scale = f", {comparison.max_abs_diff / rounding:.1f} fp32 roundings of its largest element" if rounding > 0 else ""
    return f"{comparison.what} of {where} differs by up to {comparison.max_abs_diff:.3e}{scale}"
