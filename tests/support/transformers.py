"""Transformers: a tiny one, and those whose configurations are published."""

from __future__ import annotations

import json
from pathlib import Path

from ppsim import Transformer, read_huggingface_config

GPT = Transformer.gpt(layers=2, hidden=8, heads=2, vocabulary=10, positions=6)

PUBLISHED = {
    "gpt2": (
        124_439_808,
        {
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "vocab_size": 50257,
        },
    ),
    "llama-2-7b": (
        6_738_415_616,
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
    ),
    "llama-3-8b": (
        8_030_261_248,
        {
            "model_type": "llama",
            "attention_bias": False,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
            "vocab_size": 128256,
        },
    ),
    "mistral-7b-v0.1": (
        7_241_732_096,
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
    ),
    "qwen2-7b": (
        7_615_616_512,
        {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
    ),
    "qwen2-0.5b": (
        494_032_768,
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
}

_FACTS = json.loads((Path(__file__).parent / "model_configs.json").read_text())
# Each with parameters and config: models as published, and small ones with forward_flops; sources are in the file.
CONFIGS, SMALL_CONFIGS = _FACTS["published"], _FACTS["small"]


def read_config(folder: Path, config: dict[str, object], **changes: object) -> Transformer:
    """The model of a configuration with changes; `...` takes a field out."""
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in {**config, **changes}.items() if value is not ...}))
    return read_huggingface_config(path)
