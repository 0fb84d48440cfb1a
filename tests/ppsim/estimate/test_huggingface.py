"""config.json files as they were published give the published parameter counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppsim import read_huggingface_config
from tests.support.transformers import PUBLISHED


def _written(folder: Path, name: str, **changes: object) -> Path:
    """A published configuration with changes; `...` takes a field out."""
    content = {key: value for key, value in {**PUBLISHED[name][1], **changes}.items() if value is not ...}
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(tmp_path: Path, name: str) -> None:
    assert read_huggingface_config(_written(tmp_path, name)).parameters == PUBLISHED[name][0]


def test_shapes_come_from_the_fields_they_are_in(tmp_path: Path) -> None:
    model = read_huggingface_config(_written(tmp_path, "mistral-7b-v0.1", head_dim=96, sliding_window=512))
    assert (model.heads, model.kv_heads, model.head_dim, model.window) == (32, 8, 96, 512)
    assert model.gated
    assert not model.positions
    assert read_huggingface_config(_written(tmp_path, "mistral-7b-v0.1", sliding_window=None)).window is None
    assert read_huggingface_config(_written(tmp_path, "gpt2", n_inner=1000)).intermediate == 1000
    assert read_huggingface_config(_written(tmp_path, "gpt2", n_inner=None)).intermediate == 3072


@pytest.mark.parametrize(("name", "heads"), [("llama-2-7b", 32), ("mistral-7b-v0.1", 8)])
def test_a_field_left_out_takes_the_librarys_default(tmp_path: Path, name: str, heads: int) -> None:
    """The defaults differ by model; null always says as many as there are heads."""
    assert read_huggingface_config(_written(tmp_path, name, num_key_value_heads=...)).kv_heads == heads
    assert read_huggingface_config(_written(tmp_path, name, num_key_value_heads=None)).kv_heads == 32


def test_biases_are_where_the_model_has_them(tmp_path: Path) -> None:
    qwen = read_huggingface_config(_written(tmp_path, "qwen2-7b"))
    assert (qwen.qkv_bias, qwen.output_bias, qwen.mlp_bias, qwen.head_bias) == (True, False, False, False)
    llama = read_huggingface_config(_written(tmp_path, "llama-2-7b", attention_bias=True, mlp_bias=True))
    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias, llama.head_bias) == (True, True, True, False)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (
            "gpt2",
            {"model_type": "bert"},
            "qwen2_moe, qwen3, qwen3_moe, qwen3_vl_moe_text, qwen3_vl_text, seed_oss, smollm3, starcoder2, got 'bert'",
        ),
        ("gpt2", {"model_type": ...}, "got None"),
        ("gpt2", {"model_type": ["gpt2"]}, "model_type must be one of"),
        ("gpt2", {"n_embd": ...}, "n_embd is missing"),
        ("gpt2", {"n_head": 7}, "n_head 7 must divide n_embd 768"),
        ("gpt2", {"n_layer": "12"}, "n_layer must be a whole number of 1 or more, got '12'"),
        # It was built layer by layer, for more than a minute.
        ("gpt2", {"n_layer": 10**7}, "n_layer is 10000000, more layers than this can hold: take at most 100000"),
        ("llama-2-7b", {"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000, more layers than this can hold"),
        ("llama-2-7b", {"hidden_size": -1}, "hidden_size must be a whole number of 1 or more, got -1"),
        ("llama-2-7b", {"vocab_size": True}, "vocab_size must be a whole number of 1 or more, got True"),
        ("llama-2-7b", {"num_key_value_heads": 5}, "kv_heads 5 must divide heads 32"),
        ("llama-2-7b", {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        ("llama-2-7b", {"use_sliding_window": True}, "use_sliding_window true"),
        ("llama-2-7b", {"num_experts": 4}, "num_experts 4 may change what is counted, and no llama"),
        ("qwen2-7b", {"kv_lora_rank": 64}, "kv_lora_rank 64 may change what is counted"),
    ],
)
def test_a_mistake_is_named_with_file_field_and_value(tmp_path: Path, name: str, changes: dict, said: str) -> None:
    path = _written(tmp_path, name, **changes)
    with pytest.raises(ValueError, match=r"config\.json: ") as caught:
        read_huggingface_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).count(str(path)) == 1
    assert said in str(caught.value)


@pytest.mark.parametrize(("content", "said"), [(b"{", "is not JSON"), (b"\xff", "is not text"), (b"[]", "JSON object")])
def test_what_is_no_configuration_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_huggingface_config(tmp_path / "config.json")
