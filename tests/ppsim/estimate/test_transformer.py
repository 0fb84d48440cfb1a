"""Shapes give the parameter counts that were published."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Transformer
from tests.support.transformers import GPT

# Narayanan et al., Efficient Large-Scale Language Model Training, SC 2021, table 1: heads, hidden, layers, billions.
MEGATRON = [
    (24, 2304, 24, 1.7),
    (32, 3072, 30, 3.6),
    (32, 4096, 36, 7.5),
    (48, 6144, 40, 18.4),
    (64, 8192, 48, 39.1),
    (80, 10240, 60, 76.1),
    (96, 12288, 80, 145.6),
    (128, 16384, 96, 310.1),
    (128, 20480, 105, 529.6),
    (160, 25600, 128, 1008.0),
]


@pytest.mark.parametrize(("heads", "hidden", "layers", "billions"), MEGATRON)
def test_megatron_sizes_are_those_published(heads: int, hidden: int, layers: int, billions: float) -> None:
    vocabulary, seq = 51200, 2048
    model = Transformer.gpt(layers=layers, hidden=hidden, heads=heads, vocabulary=vocabulary, positions=seq)
    assert round(model.parameters / 1e9, 1) == billions
    # Equation 2 there, P = 12 l h^2 (1 + 13 / 12 h + (V + s) / 12 l h), leaves out the final norm.
    formula = 12 * layers * hidden**2 + 13 * layers * hidden + (vocabulary + seq) * hidden
    assert model.parameters == formula + 2 * hidden


def test_grouped_queries_shrink_keys_and_values_alone() -> None:
    grouped = dataclasses.replace(GPT, kv_heads=1)
    saved = 2 * (8 * 4 + 4)  # two matrices of 8 x 4 with biases
    assert GPT.block_parameters - grouped.block_parameters == saved


@given(tp=st.sampled_from([1, 2, 4]), biases=st.booleans(), gated=st.booleans())
def test_shards_add_up_to_the_block(tp: int, biases: bool, gated: bool) -> None:
    model = Transformer(
        layers=1,
        hidden=24,
        intermediate=32,
        heads=8,
        kv_heads=4,
        head_dim=3,
        vocabulary=7,
        gated=gated,
        qkv_bias=biases,
        output_bias=biases,
        mlp_bias=biases,
    )
    whole_everywhere = 2 * 2 * 24 + 2 * 24 * biases  # norms, and the biases of o and fc2
    assert tp * model.shard_parameters(tp) == model.block_parameters + (tp - 1) * whole_everywhere


@given(seq=st.integers(1, 30), window=st.none() | st.integers(1, 40))
def test_pairs_are_those_of_the_mask(seq: int, window: int | None) -> None:
    model = dataclasses.replace(GPT, window=window)
    seen = [(q, k) for q in range(seq) for k in range(q + 1) if window is None or q - k < window]
    assert model.pairs(seq, masked=True) == len(seen)
    assert model.pairs(seq, masked=False) == seq**2


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("layers", 0, "layers must be a whole number of 1 or more, got 0"),
        ("layers", 100_001, "layers is 100001, more layers than this can hold: take at most 100000"),
        ("hidden", 1.5, "hidden must be a whole number, got 1.5"),
        ("kv_heads", 3, "kv_heads 3 must divide heads 2"),
        ("positions", -1, "positions must be a whole number of 0 or more"),
        ("window", 0, "window must be"),
        ("norm", "batchnorm", "norm must be one of layernorm, rmsnorm, got 'batchnorm'"),
    ],
)
def test_impossible_shapes_are_refused(field: str, value: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(GPT, **{field: value})


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="heads 3 must divide hidden 8"):
        Transformer.gpt(layers=1, hidden=8, heads=3, vocabulary=5, positions=4)
    with pytest.raises(ValueError, match="tp 4 must divide heads 2"):
        GPT.shard_parameters(4)
