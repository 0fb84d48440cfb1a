"""Precision: bfloat16 differs from wider types by what rounding explains, and by no more."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import nn

from ppexec import Model, RunConfig
from ppexec.verification.precision import Wider, _Difference, compare_precision
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


class Rare(nn.Module):
    """A gradient is NaN in bfloat16 alone: 1e-30 squared is below the smallest bfloat16 and no float64."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=dtype))
        tiny_number = self.weight.new_tensor(1e-30) ** 2
        self.weight.register_hook(lambda gradient: gradient * (tiny_number / tiny_number))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.weight


def rare(config: RunConfig) -> Model:
    """Layers whose first gradients are finite, and whose last layer's are not."""
    layers = [nn.Linear(2, 2, dtype=config.torch_dtype), Rare(config.torch_dtype)]
    return Model(layers=layers, sample=ones(config), loss=nn.functional.mse_loss)


def two_tensors(config: RunConfig) -> Model:
    """The last layer gives two tensors of different shapes."""
    layers = [nn.Linear(2, 2, dtype=config.torch_dtype), Halves()]
    return Model(layers=layers, sample=ones(config), loss=lambda given, _: given[0].square().mean() + given[1].sum())


class Halves(nn.Module):
    """A tensor as a pair of tensors."""

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs.tanh(), inputs[:, :1].exp()


def ones(config: RunConfig) -> Any:
    return lambda index: (torch.ones(1, 2, dtype=config.torch_dtype), torch.zeros(1, 2, dtype=config.torch_dtype))


def test_a_gradient_that_is_no_number_does_not_pass() -> None:
    """`max` of a number and NaN is the number: NaN in any layer but the first was taken for no difference."""
    report = compare_precision(tiny(dtype="bfloat16", model=f"{__name__}:rare", layers=2, ranks=1), "float64", CPU)
    assert not report.passed
    assert report.gradient_share == report.max_gradient_diff == math.inf


def test_several_tensors_of_the_last_layer_are_compared_one_by_one() -> None:
    """They were compared as the bytes of one message, of another length in each type."""
    config = tiny(dtype="bfloat16", model=f"{__name__}:two_tensors", layers=2, ranks=1)
    report = compare_precision(config, "float32", CPU)
    assert report.passed
    assert report.output_share > 0


def test_what_has_no_tolerance_must_be_equal() -> None:
    """A bound of 0 let any difference pass."""
    none = {"rounding": 2.0**-8, "roundings": 4, "longest": 8, "terms": 1}
    assert _Difference(largest=0.0, difference=0.0, moved=0.0).share(**none) == 0
    assert _Difference(largest=0.0, difference=1e-3, moved=0.0).share(**none) == math.inf
