"""Partitions cover the layers in order; the optimal one is, by brute force."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import LayerCost, partition, partition_sizes
from ppsim.costs.partition import bounds


def _layer(work_s: float, name: str = "") -> LayerCost:
    return LayerCost(forward_s=work_s, backward_input_s=0, backward_weight_s=0, name=name)


def _brute_force(work: list[int], stages: int) -> int:
    """The least largest stage over all ways to put stages - 1 walls between the layers."""
    walls = combinations(range(1, len(work)), stages - 1)
    return min(max(sum(work[a:b]) for a, b in zip((0, *wall), (*wall, len(work)), strict=True)) for wall in walls)


_work = st.lists(st.integers(0, 20), min_size=1, max_size=10)


@given(_work, st.data())
def test_optimal_is_the_minimum_of_the_largest_stage(work: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(work)))
    sizes = partition_sizes(len(work), stages=stages, method="optimal", work_s=work)
    assert len(sizes) == stages
    assert sum(sizes) == len(work)
    assert min(sizes) >= 1
    assert max(sum(work[a:b]) for a, b in bounds(sizes)) == _brute_force(work, stages)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.data())
def test_optimal_with_floats(work: list[float], data: st.DataObject) -> None:
    """Up to rounding: prefix sums and direct sums differ in their last digits."""
    stages = data.draw(st.integers(1, len(work)))
    sizes = partition_sizes(len(work), stages=stages, method="optimal", work_s=work)
    assert min(sizes) >= 1
    largest = max(math.fsum(work[a:b]) for a, b in bounds(sizes))
    assert largest <= _brute_force(work, stages) + 1e-12 * sum(work)  # type: ignore[arg-type]


@given(_work, st.data())
def test_any_cut_covers_the_layers_in_order(work: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(work)))
    walls = sorted(data.draw(st.permutations(range(1, len(work))))[: stages - 1])
    explicit = [b - a for a, b in zip([0, *walls], [*walls, len(work)], strict=True)]
    methods = ["optimal", explicit] + (["even"] if len(work) % stages == 0 else [])
    for method in methods:
        sizes = partition_sizes(len(work), stages=stages, method=method, work_s=work)
        covered = [layer for first, last in bounds(sizes) for layer in range(first, last)]
        assert covered == list(range(len(work)))
        stage_costs = partition([_layer(w) for w in work], stages=stages, method=method)
        assert [stage.forward_s for stage in stage_costs] == [sum(work[a:b]) for a, b in bounds(sizes)]


@given(st.integers(1, 60), st.integers(1, 60))
def test_even_is_equal_counts_or_a_refusal_whose_remedies_work(layers: int, stages: int) -> None:
    if layers % stages == 0:
        assert partition_sizes(layers, stages=stages) == [layers // stages] * stages
        return
    with pytest.raises(ValueError, match="layers") as caught:
        partition_sizes(layers, stages=stages)
    said = str(caught.value)
    assert str(layers) in said
    assert str(stages) in said
    if stages < layers:  # "... take 8 or 12 layers, or 2 or 5 stages, or the method 'optimal', or ..."
        fewer, more = (int(number) for number in said.split("take ")[1].split(" layers")[0].split(" or "))
        assert fewer < layers < more
        assert more - fewer == stages
        for count in said.split("layers, or ")[1].split(" stages")[0].split(" or "):
            assert partition_sizes(layers, stages=int(count))
        partition_sizes(fewer, stages=stages)
        partition_sizes(more, stages=stages)


def test_the_assignments_example() -> None:
    """Q5: 12 layers on 4 stages are 3 each, in order."""
    assert bounds(partition_sizes(12, stages=4)) == [(0, 3), (3, 6), (6, 9), (9, 12)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"stages": 5}, "12 layers do not divide evenly over 5 stages: take 10 or 15 layers, or 4 or 6 stages"),
        ({"stages": 13}, "12 layers cannot fill 13 stages: take 1 to 12 stages"),
        ({"stages": 0}, "12 layers cannot fill 0 stages"),
        ({"stages": -3}, "12 layers cannot fill -3 stages"),
        ({"stages": 3, "method": "best"}, "unknown partition method 'best': take 'even', 'optimal' or explicit sizes"),
        ({"stages": 3, "method": [4, 4]}, "give 3 numbers of 1 or more that add up to 12 (these: 2 numbers, sum 8)"),
        ({"stages": 3, "method": [12, 0, 0]}, "give 3 numbers of 1 or more"),
        ({"stages": 3, "method": [4, 4, 5]}, "(these: 3 numbers, sum 13)"),
        ({"stages": 3, "method": "optimal"}, "an optimal partition needs the layers' costs"),
        # Cause of a bug: sizes for another number of layers came out.
        ({"stages": 3, "method": "optimal", "work_s": [1.0] * 5}, "5 costs for 12 layers: give one for each"),
        ({"stages": 3, "method": "optimal", "work_s": [1e308] * 12}, "add up to more than a float holds"),
    ],
)
def test_impossible_cuts_are_refused_with_a_remedy(arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=r"take|give|add up") as caught:
        partition_sizes(12, **arguments)
    assert said in str(caught.value)


def test_a_stage_sends_and_gets_back_what_its_last_layer_does() -> None:
    layers = [replace(_layer(1), output_bytes=size, output_gradient_bytes=back) for size, back in [(9, 4), (8, None)]]
    assert [stage.backward_message_bytes for stage in partition(layers, stages=2)] == [4, 8]
    assert partition(layers[::-1], stages=1)[0].output_gradient_bytes == 4


def test_stages_that_free_what_they_sent_hold_their_output_no_longer() -> None:
    """All but the last, which sends nothing; times and messages stay."""
    layer = replace(_layer(1.0), activation_bytes=10, output_bytes=3)
    kept = partition([layer] * 6, stages=3)
    freed = partition([layer] * 6, stages=3, frees_outputs=True)
    assert [stage.activation_bytes for stage in kept] == [17, 17, 17]
    assert [stage.activation_bytes for stage in freed] == [14, 14, 17]
    assert [replace(stage, activation_bytes=0) for stage in freed] == [
        replace(stage, activation_bytes=0) for stage in kept
    ]
