"""Precision: bfloat16 differs from wider types by what rounding explains, and by no more."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from ppexec.verification.precision import Wider, compare_precision
from tests.support.remote import tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("reference", ["float32", "float64"])
@pytest.mark.parametrize(
    "changes", [{}, {"hidden": 128, "seq": 16, "layers": 8, "microbatches": 16}, {"model": "gpt"}], ids=str
)
def test_rounding_explains_what_bfloat16_differs_by(reference: Wider, changes: dict[str, Any]) -> None:
    report = compare_precision(tiny(dtype="bfloat16", **changes), reference, CPU)
    assert report.passed, report
    assert report.gradient_share > report.max_gradient_diff  # so one that is off by its own size does not pass
    assert report.max_gradient_diff < 0.02


def test_the_two_references_say_the_same_of_bfloat16() -> None:
    """Beside bfloat16's roundings those of float32 do not show."""
    one, other = (compare_precision(tiny(dtype="bfloat16"), each, CPU) for each in get_args(Wider))
    assert one.gradient_share == pytest.approx(other.gradient_share, rel=1e-2)


def test_a_reference_that_is_not_wider_is_refused() -> None:
    with pytest.raises(ValueError, match="reference 'float32' is not wider than 'float32'"):
        compare_precision(tiny(dtype="float32"), "float32", CPU)
