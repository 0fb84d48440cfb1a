"""Verify: whether the pipeline computed what one process computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ppexec.config.config import RunConfig
from ppexec.verify.reference import Comparison


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Outputs on the last stage and every parameter's gradient against the reference.

    tolerance: by how much any gradient may differ; 0 where bits must be equal (dp = tp = 1 on the CPU), since the same
    operations run in the same order. With replicas the microbatches are added up in another order, with tp the features
    within a layer; every element is held to the bound of that (see `Reference.rounding`), of which this is the largest.
    output_tolerance: the same for outputs, 0 without tp. outputs_equal: bit-equal without tp, else within it.
    first_difference: the first tensor that is not bit-equal, and by how much; None if all are. compared: number of
    tensors, where each rank of tp compares its outputs and its slices of gradients.
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
        """A report from all ranks' comparisons. Raises ValueError unless every tensor was compared."""
        expected = config.microbatches * config.dp * config.tp
        outputs = [c for c in comparisons if c.what == "output"]
        gradients = [c for c in comparisons if c.what == "gradient"]
        if len(outputs) != expected:
            raise ValueError(f"compared {len(outputs)} outputs of {expected}: the run is not complete")
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
        """Outputs and gradients agree."""
        return self.outputs_equal and self.gradients_equal

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def _largest(comparisons: Sequence[Comparison]) -> float:
    """The largest difference; a NaN, which no comparison would find, counts as infinite."""
    values = [
        float("inf") if c.max_abs_diff != c.max_abs_diff and not c.bit_equal else c.max_abs_diff for c in comparisons
    ]
    return max((value for value in values if value == value), default=0.0)


def _describe(comparison: Comparison) -> str:
    where = (
        f"microbatch {comparison.name}"
        if comparison.what == "output"
        else f"layer {comparison.layer} {comparison.name}"
    )
    rounding = torch.finfo(torch.float32).eps * comparison.largest
    scale = f", {comparison.max_abs_diff / rounding:.1f} fp32 roundings of its largest element" if rounding > 0 else ""
    return f"{comparison.what} of {where} differs by up to {comparison.max_abs_diff:.3e}{scale}"
