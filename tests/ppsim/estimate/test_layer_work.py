"""FLOPs and saved bytes equal the formulas of the papers they are counted in."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Execution, Transformer, transformer_work
from tests.support.transformers import GPT

LLAMA = Transformer(
    layers=1,
    hidden=24,
    intermediate=40,
    heads=4,
    kv_heads=2,
    head_dim=6,
    vocabulary=50,
    gated=True,
    norm="rmsnorm",
)
_sizes = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))


def _flops(model: Transformer, execution: Execution) -> int:
    return sum(layer.forward_flops + layer.backward_flops for layer in transformer_work(model, execution))


@given(sizes=_sizes)
def test_flops_of_a_step_are_megatrons(sizes: tuple[int, ...]) -> None:
    """96 B s l h^2 (1 + s / 6h + V / 16 l h), with full recomputation: Narayanan et al., SC 2021, appendix."""
    batch, seq, heads, layers, more = sizes
    hidden, vocabulary = heads * 8, 16 * more
    model = Transformer.gpt(layers=layers, hidden=hidden, heads=heads, vocabulary=vocabulary, positions=seq)
    execution = Execution(micro_batch_size=batch, seq=seq, attention="unfused", recompute="full")
    terms = 1 + Fraction(seq, 6 * hidden) + Fraction(vocabulary, 16 * layers * hidden)
    assert _flops(model, execution) == 96 * batch * seq * layers * hidden**2 * terms


def test_flops_of_the_trillion_parameter_model() -> None:
    """Table 1 there: 1,008 billion parameters, batch 3,072 on 3,072 GPUs at 163 TFLOP/s: a step of about 150 s.

    Section 5.1 gives 450 billion tokens in 84 days.
    """
    model = Transformer.gpt(layers=128, hidden=25600, heads=160, vocabulary=51200, positions=2048)
    execution = Execution(micro_batch_size=1, seq=2048, attention="unfused", recompute="full")
    step_s = 3072 * _flops(model, execution) / (3072 * 163e12)
    days = 450e9 / (3072 * 2048) * step_s / 86400
    assert days == pytest.approx(84, rel=0.03)


@given(sizes=_sizes, tp=st.sampled_from([1, 2, 4]))
def test_saved_bytes_are_korthikantis(sizes: tuple[int, ...], tp: int) -> None:
    """s b h (10 + 24 / t + 5 a s / (h t)), and without the scores' part where those are recomputed."""
    batch, seq, more, _, dim = sizes
    heads = 4 * more
    hidden = heads * dim
    model = Transformer.gpt(layers=1, hidden=hidden, heads=heads, vocabulary=4, positions=seq)
    execution = Execution(micro_batch_size=batch, seq=seq, attention="unfused", dropout=True, tp=tp)
    scores = Fraction(5 * heads * seq, hidden * tp)
    classic = seq * batch * hidden * (10 + Fraction(24, tp))
    assert _block_bytes(model, execution) == classic + seq * batch * hidden * scores
    selective = dataclasses.replace(execution, recompute="selective")
    assert _block_bytes(model, selective) == classic
    full = dataclasses.replace(execution, recompute="full")
    assert _block_bytes(model, full) == 2 * seq * batch * hidden
    if tp == 1:
        assert classic == 34 * seq * batch * hidden


def _block_bytes(model: Transformer, execution: Execution) -> int:
    """What the paper counts: small per-token numbers are left out there."""
    saved = transformer_work(model, execution)[1].saved
    return sum(size for name, size in saved.items() if not name.startswith("statistics"))


@pytest.mark.parametrize("model", [GPT, LLAMA], ids=["gpt", "llama"])
def test_matrix_products_of_a_block_are_two_per_parameter_and_token(model: Transformer) -> None:
    """2 N FLOPs a token forward and 4 N backward (Kaplan et al., 2020), N without norms and biases; plus attention."""
    execution = Execution(micro_batch_size=3, seq=5, skip_masked=False)
    bare = dataclasses.replace(model, qkv_bias=False, output_bias=False, mlp_bias=False)
    matrices = bare.block_parameters - 2 * bare.norm_parameters
    block = transformer_work(model, execution)[1]
    attention = 2 * 3 * 5 * 5 * model.query_width
    assert block.forward_flops == 2 * 15 * matrices + 2 * attention
    assert block.backward_flops == 4 * 15 * matrices + 5 * attention


def test_masked_pairs_are_left_out() -> None:
    full, masked = (
        transformer_work(GPT, Execution(micro_batch_size=1, seq=6, skip_masked=skip))[1] for skip in (False, True)
    )
    assert full.forward_flops - masked.forward_flops == 4 * GPT.query_width * (36 - 21)
    unfused = Execution(micro_batch_size=1, seq=6, attention="unfused")
    assert transformer_work(GPT, unfused)[1].forward_flops == full.forward_flops


@pytest.mark.parametrize("model", [GPT, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("attention", ["fused", "unfused"])
def test_shards_share_the_products(model: Transformer, attention: str) -> None:
    whole = Execution(micro_batch_size=2, seq=4, attention=attention)
    layers = transformer_work(model, whole)
    shards = transformer_work(model, dataclasses.replace(whole, tp=2, split_vocabulary=True))
    for one, half in zip(layers, shards, strict=True):
        assert half.forward_flops * 2 == one.forward_flops
        assert half.backward_flops * 2 == one.backward_flops
        assert one.forward_reduces == one.backward_reduces == 0
    assert [(half.forward_reduces, half.backward_reduces) for half in shards] == [
        (1, 0),
        *[(2, 2)] * model.layers,
        (0, 1),
    ]
    uncut = transformer_work(model, dataclasses.replace(whole, tp=2))
    assert [uncut[0], uncut[-1]] == [layers[0], layers[-1]]


@pytest.mark.parametrize("model", [GPT, LLAMA], ids=["gpt", "llama"])
def test_full_recomputation_pays_one_forward_in_the_first_half_of_the_backward(model: Transformer) -> None:
    execution = Execution(micro_batch_size=2, seq=4)
    plain = transformer_work(model, execution)[1]
    full = transformer_work(model, dataclasses.replace(execution, recompute="full"))[1]
    assert full.forward_work == plain.forward_work
    assert full.backward_input_work == plain.forward_work + plain.backward_input_work
    assert full.backward_weight_work == plain.backward_weight_work
    assert full.saved == {"input": 2 * 4 * model.hidden * 2}
    assert full.kept == plain.kept


def test_parameters_are_the_layers() -> None:
    layers = transformer_work(GPT, Execution(micro_batch_size=1, seq=4, dtype_bytes=1))
    tied_again = GPT.vocabulary * GPT.hidden
    assert sum(layer.parameter_bytes for layer in layers) == GPT.parameters + tied_again
    untied = dataclasses.replace(GPT, tied=False)
    assert untied.parameters == GPT.parameters + tied_again


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seq": 7}, "seq 7 exceeds the model's 6 positions"),
        ({"tp": 4}, "tp 4 must divide heads 2"),
        ({"micro_batch_size": 0}, "micro_batch_size must be a whole number of 1 or more, got 0"),
        ({"attention": "flash"}, "attention must be"),
        ({"recompute": "some"}, "recompute must be"),
        ({"recompute": "selective"}, "take 'none' or 'full', or attention 'unfused'"),
    ],
)
def test_impossible_executions_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        transformer_work(GPT, Execution(**{"micro_batch_size": 1, "seq": 4, **changes}))


def test_an_odd_vocabulary_is_not_cut() -> None:
    model = dataclasses.replace(GPT, vocabulary=11)
    with pytest.raises(ValueError, match="tp 2 does not divide the vocabulary 11: pad"):
        transformer_work(model, Execution(micro_batch_size=1, seq=4, tp=2, split_vocabulary=True))
