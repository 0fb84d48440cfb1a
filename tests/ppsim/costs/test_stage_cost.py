"""Costs are validated where they are made, and layers add up to stages."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import CostError, LayerCost, StageCost
from ppsim.costs.stage_cost import stage_cost

_GOOD = {"forward_s": 1.0, "backward_input_s": 2.0, "backward_weight_s": 3.0}
_SECONDS = ["forward_s", "backward_input_s", "backward_weight_s", "backward_s"]
_BYTES = ["activation_bytes", "weight_activation_bytes", "output_bytes", "parameter_bytes"]


def test_the_full_backward_is_both_halves_unless_given() -> None:
    assert StageCost(**_GOOD).full_backward_s == 5.0
    assert StageCost(**_GOOD).work_s == 6.0
    assert StageCost(**_GOOD, backward_s=4.0).full_backward_s == 4.0
    assert StageCost(**_GOOD, backward_s=0).full_backward_s == 0
    assert StageCost(**_GOOD, backward_s=4.0).work_s == 5.0


@pytest.mark.parametrize("name", _SECONDS)
# 10**400: cause of a bug, an OverflowError came out, which is no ValueError.
@pytest.mark.parametrize(
    "value",
    [
        -1e-9,
        math.nan,
        np.float32("inf"),
        math.inf,
        -math.inf,
        "1",
        True,
        [1.0],
        1j,
        10**400,
        pytest.param(10**5000, id="huge"),
    ],
)
def test_seconds_without_meaning_are_refused(name: str, value: object) -> None:
    with pytest.raises(CostError, match=f"^{name} must be seconds, finite and >= 0, got "):
        StageCost(**{**_GOOD, name: value})


@pytest.mark.parametrize("name", _BYTES)
# 2**53 + 1 and more: cause of a bug, NumPy's OverflowError came out of `simulate`.
@pytest.mark.parametrize("value", [-1, 0.5, math.nan, math.inf, "1", None, False, 2**53 + 1, 2**64, 10**400])
def test_bytes_without_meaning_are_refused(name: str, value: object) -> None:
    with pytest.raises(CostError, match=rf"^{name} must be a whole number of bytes from 0 to 2\*\*53, got "):
        StageCost(**{**_GOOD, name: value})


@pytest.mark.parametrize("name", _SECONDS[:3])
def test_only_the_full_backward_may_be_left_open(name: str) -> None:
    with pytest.raises(CostError, match=f"^{name} must be seconds"):
        StageCost(**{**_GOOD, name: None})


def test_numbers_of_other_libraries_are_numbers() -> None:
    cost = StageCost(
        forward_s=np.float32(0.5),
        backward_input_s=Fraction(1, 4),
        backward_weight_s=0,
        output_bytes=np.int64(7),
        activation_bytes=1e6,
    )
    assert cost.work_s == 0.75


def test_costs_are_values() -> None:
    assert StageCost(**_GOOD) == StageCost(**_GOOD)
    with pytest.raises(AttributeError):
        StageCost(**_GOOD).forward_s = 2.0  # type: ignore[misc]


_dyadic = st.integers(0, 1000).map(lambda k: k / 8)
_layers = st.lists(
    st.builds(
        LayerCost,
        forward_s=_dyadic,
        backward_input_s=_dyadic,
        backward_weight_s=_dyadic,
        backward_s=st.none() | _dyadic,
        activation_bytes=st.integers(500, 1000),
        weight_activation_bytes=st.integers(0, 1000),
        output_bytes=st.integers(0, 500),
        parameter_bytes=st.integers(0, 1000),
    ),
    min_size=1,
    max_size=6,
)


@given(_layers)
def test_layers_add_up_to_a_stage(layers: list[LayerCost]) -> None:
    stage = stage_cost(layers)
    for name in [*_SECONDS[:3], "weight_activation_bytes", "parameter_bytes"]:
        assert getattr(stage, name) == sum(getattr(layer, name) for layer in layers)
    assert stage.full_backward_s == sum(layer.full_backward_s for layer in layers)
    assert (stage.backward_s is None) == all(layer.backward_s is None for layer in layers)
    assert stage.output_bytes == layers[-1].output_bytes
    between = sum(layer.output_bytes for layer in layers[:-1])  # an output is the next input: held once
    assert stage.activation_bytes == sum(layer.activation_bytes for layer in layers) - between


def test_a_stage_needs_a_layer() -> None:
    with pytest.raises(CostError, match="at least one layer"):
        stage_cost([])


def test_sums_that_no_float_holds_are_refused() -> None:
    """Cause of a bug: math.fsum raises OverflowError, which is no ValueError."""
    layer = LayerCost(forward_s=1e308, backward_input_s=0, backward_weight_s=0)
    with pytest.raises(CostError, match="forward_s must be seconds, finite and >= 0, got inf"):
        stage_cost([layer, layer])
