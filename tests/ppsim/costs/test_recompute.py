"""Costs under recomputation: longer backwards, less memory, nothing paid twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ppsim
from ppsim.simulation.memory_levels import activation_levels

_numbers = st.integers(0, 64).map(lambda n: n / 8)
_bytes = st.integers(0, 2**20)
_layers = st.lists(
    st.builds(
        ppsim.LayerCost,
        forward_s=_numbers,
        backward_input_s=_numbers,
        backward_weight_s=_numbers,
        backward_s=st.none() | _numbers,
        activation_bytes=_bytes,
        weight_activation_bytes=_bytes,
        output_bytes=_bytes,
        parameter_bytes=_bytes,
        name=st.sampled_from(["a", "b"]),
    ),
    min_size=1,
    max_size=6,
)


@given(_layers, _bytes, st.data())
def test_a_stage_pays_each_forward_once_more_and_holds_inputs_and_an_output(
    layers: list[ppsim.LayerCost], input_bytes: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(layers) - 1))
    last = data.draw(st.integers(first + 1, len(layers)))
    (plain,) = ppsim.partition(layers[first:last], stages=1)
    (anew,) = ppsim.partition(ppsim.recompute_layers(layers, input_bytes=input_bytes)[first:last], stages=1)
    assert anew.forward_s == plain.forward_s
    assert anew.backward_input_s == plain.backward_input_s + plain.forward_s
    assert anew.backward_weight_s == plain.backward_weight_s
    assert anew.full_backward_s == plain.full_backward_s + plain.forward_s
    inputs = [input_bytes, *(layer.output_bytes for layer in layers)][first:last]
    assert anew.activation_bytes == sum(inputs) + layers[last - 1].output_bytes
    assert anew.weight_activation_bytes == plain.weight_activation_bytes
    assert (anew.output_bytes, anew.parameter_bytes) == (plain.output_bytes, plain.parameter_bytes)


def test_a_step_takes_a_forward_more_for_each_microbatch_and_stage() -> None:
    """AFAB with equal stages: (m + p - 1) (F + B) becomes (m + p - 1) (2 F + B); memory falls to what F keeps."""
    layers = [
        ppsim.LayerCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=80, output_bytes=10)
    ] * 4
    schedule = ppsim.build_schedule("afab", ranks=4, microbatches=8)
    plain = ppsim.simulate(schedule, ppsim.partition(layers, stages=4))
    stages = ppsim.partition(ppsim.recompute_layers(layers, input_bytes=10), stages=4)
    anew = ppsim.simulate(schedule, stages)
    assert (plain.makespan_s, anew.makespan_s) == (11 * 3, 11 * 4)
    assert anew.peak_activation_bytes.tolist() == [8 * 20] * 4
    assert activation_levels(schedule.program, stages).max() == 8 * 20


def test_input_bytes_are_checked() -> None:
    layer = ppsim.LayerCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    with pytest.raises(ppsim.CostError, match="activation_bytes must be a whole number of bytes"):
        ppsim.recompute_layers([layer], input_bytes=-1)
