"""Seeds: streams depend on what they are for, not on who draws them, where, or in which process."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppexec.models import seeds

numbers = st.integers(0, 2**40)
names = st.sampled_from(["weight", "bias", "fc1.weight", "fc2.weight", "fc1.bias"])


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@given(seed=numbers, layer=st.integers(0, 999), name=names)
def test_a_seed_is_a_pure_function_of_63_bits(seed: int, layer: int, name: str) -> None:
    first = seeds.parameter_seed(seed, layer=layer, name=name)
    torch.rand(3)
    assert first == seeds.parameter_seed(seed, layer=layer, name=name)
    assert 0 <= first < 2**63


@given(keys=st.sets(st.tuples(numbers, st.integers(0, 999), names), min_size=2, max_size=20))
def test_every_seed_layer_and_name_has_its_own_parameter_stream(keys: set[tuple[int, int, str]]) -> None:
    assert len({seeds.parameter_seed(seed, layer=layer, name=name) for seed, layer, name in keys}) == len(keys)


@given(keys=st.sets(st.tuples(numbers, st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)), min_size=2))
def test_every_step_sample_and_layer_has_its_own_dropout_stream(keys: set[tuple[int, int, int, int]]) -> None:
    drawn = {seeds.dropout_seed(seed, step=step, sample=sample, layer=layer) for seed, step, sample, layer in keys}
    assert len(drawn) == len(keys)


@given(seed=numbers, number=st.integers(0, 99))
def test_streams_for_different_purposes_never_share_a_seed(seed: int, number: int) -> None:
    purposes = ["parameter", "dropout", "order", "sample", "model"]
    assert len({seeds.derive(seed, purpose, number) for purpose in purposes}) == len(purposes)


def test_a_key_of_parts_is_not_the_key_of_their_concatenation_nor_of_another_type() -> None:
    keys = [("a", "bc"), ("ab", "c"), ("abc",), ("1",), (1,), (1, 1), (11,), ()]
    assert len({seeds.derive(0, *key) for key in keys}) == len(keys)
    assert seeds.derive(1, 2) != seeds.derive(12)


def test_streams_are_the_same_in_every_process() -> None:
    """Python's hash() of a string is another in every process; these literals were drawn once and for all."""
    program = (
        "from ppexec.models import seeds;"
        "print(seeds.parameter_seed(0, layer=3, name='fc1.weight'), seeds.derive(7, 'x', 1),"
        " seeds.microbatch_order(5, step=2, microbatches=4).tolist())"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("1", "2")
    ]
    for process in processes:
        text, _ = process.communicate()
        assert text.split(maxsplit=2) == ["8501240655854335300", "5126245239889146724", "[9, 10, 8, 11]\n"]


def test_a_made_up_sample_has_literal_values() -> None:
    """Draws change only if a stream is derived anew, which would change every published result."""
    values = torch.randn(3, generator=seeds.sample_generator(0, sample=1)).tolist()
    assert values == pytest.approx([1.098784, -0.030651, 0.035386], abs=1e-6)


# Parameters: every rank of every mesh takes its slice of one full tensor.


def full_parameter(seed: int, layer: int, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seeds.parameter_seed(seed, layer=layer, name="weight"))
    return torch.randn(rows, columns, generator=generator)


@given(st.data(), numbers)
def test_shards_over_dp_tp_and_pp_join_to_the_full_model(data: st.DataObject, seed: int) -> None:
    dp, tp, pp = (data.draw(st.integers(1, 4)) for _ in range(3))
    layers, columns = 2 * pp, 3 * tp
    shards: dict[tuple[int, int, int], torch.Tensor] = {}
    for d, t, p in itertools.product(range(dp), range(tp), range(pp)):  # each as if in a process of its own
        for layer in range(2 * p, 2 * p + 2):
            shards[d, t, layer] = full_parameter(seed, layer, 2, columns)[:, 3 * t : 3 * t + 3]
    for d, layer in itertools.product(range(dp), range(layers)):
        joined = torch.cat([shards[d, t, layer] for t in range(tp)], dim=1)
        assert torch.equal(joined, full_parameter(seed, layer, 2, columns))
    assert len({tuple(shards[0, 0, layer].flatten().tolist()) for layer in range(layers)}) == layers


# Dropout


@given(
    st.data(),
    numbers,
    st.sampled_from([2, 4, 6, 12]),
    st.lists(st.integers(0, 50), min_size=1, max_size=5, unique=True),
)
def test_a_tp_ranks_dropout_mask_is_its_slice_of_the_full_mask(
    data: st.DataObject, seed: int, width: int, samples: list[int]
) -> None:
    tp = data.draw(st.sampled_from(divisors(width)))
    common = {"step": 3, "samples": samples, "layer": 1, "shape": (2, width), "drop": 0.4}
    full = seeds.dropout_mask(seed, **common)
    slices = [seeds.dropout_mask(seed, **common, tp=tp, tp_rank=rank) for rank in range(tp)]
    assert torch.equal(torch.cat(slices, dim=-1), full)
    assert full.shape == (len(samples), 2, width)
    assert full.dtype == torch.bool


@given(numbers, st.permutations(list(range(6))), st.integers(1, 6))
def test_a_samples_mask_does_not_depend_on_its_microbatch(seed: int, samples: list[int], size: int) -> None:
    common = {"step": 0, "layer": 2, "shape": (3, 4), "drop": 0.5}
    whole = seeds.dropout_mask(seed, samples=list(range(6)), **common)
    for begin in range(0, 6, size):
        part = samples[begin : begin + size]
        assert torch.equal(seeds.dropout_mask(seed, samples=part, **common), whole[part])


def test_masks_differ_by_step_sample_layer_and_seed() -> None:
    def mask(seed: int = 0, step: int = 0, sample: int = 0, layer: int = 0) -> tuple[bool, ...]:
        drawn = seeds.dropout_mask(seed, step=step, samples=[sample], layer=layer, shape=(64,), drop=0.5)
        return tuple(drawn.flatten().tolist())

    assert len({mask(), mask(seed=1), mask(step=1), mask(sample=1), mask(layer=1)}) == 5


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_the_probability(drop: float) -> None:
    stays = seeds.dropout_mask(0, step=0, samples=list(range(100)), layer=0, shape=(100,), drop=drop)
    assert 1 - stays.double().mean().item() == pytest.approx(drop, abs=0.02)


@pytest.mark.parametrize("drop", [-0.1, 1.0, 1.5, float("nan")])
def test_a_probability_outside_of_0_to_1_is_refused(drop: float) -> None:
    with pytest.raises(ValueError, match="drop must be a probability"):
        seeds.dropout_mask(0, step=0, samples=[0], layer=0, shape=(4,), drop=drop)


def test_a_mask_that_does_not_divide_over_tp_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="last dimension 10 does not divide over tp=4"):
        seeds.dropout_mask(0, step=0, samples=[0], layer=0, shape=(10,), drop=0.5, tp=4)


# Order of the data


@given(st.data(), numbers, st.integers(0, 20), st.integers(1, 24))
def test_replicas_split_one_global_batch_whatever_their_shares(
    data: st.DataObject, seed: int, step: int, total: int
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=total - 1)))
    shares = np.diff([0, *cuts, total]).tolist()
    parts = [seeds.microbatch_order(seed, step=step, microbatches=shares, dp_rank=rank) for rank in range(len(shares))]
    assert [len(part) for part in parts] == shares
    assert np.array_equal(np.concatenate(parts), seeds.microbatch_order(seed, step=step, microbatches=total))
    assert sorted(np.concatenate(parts)) == list(range(step * total, (step + 1) * total))


def test_the_order_changes_from_step_to_step_and_from_seed_to_seed() -> None:
    def order(seed: int, step: int) -> tuple[int, ...]:
        return tuple(seeds.microbatch_order(seed, step=step, microbatches=32) - 32 * step)

    assert len({order(0, 0), order(0, 1), order(1, 0), tuple(range(32))}) == 4
