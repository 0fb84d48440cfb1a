"""Hugging Face families: how each kind of model that the transformers library knows is read from its fields."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ppsim.errors import InputError
from ppsim.estimate.block import Experts, LatentAttention, QueryKeyNorm
from ppsim.estimate.config_fields import ConfigFields
from ppsim.estimate.transformer import Transformer

_SEEN = {"full_attention": "full", "sliding_attention": "window", "chunked_attention": "chunk"}


def _gpt2(fields: ConfigFields) -> Transformer:
    if fields.flag("add_cross_attention", False):
        raise InputError("add_cross_attention true is not modelled: set it false")
    hidden, heads = fields.whole("n_embd"), fields.whole("n_head")
    return Transformer(
        layers=fields.layers("n_layer"),
        hidden=hidden,
        intermediate=fields.whole("n_inner", 4 * hidden),
        heads=heads,
        kv_heads=heads,
        head_dim=fields.share("n_embd", "n_head"),
        vocabulary=fields.whole("vocab_size"),
        positions=fields.whole("n_positions", 1024),
        tied=fields.flag("tie_word_embeddings", True),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def _gated(fields: ConfigFields, *, kv_heads: int = 0, tied: bool = False, **differences: Any) -> Transformer:
    """What llama and its descendants share: gated MLP, RMS norms, rotary positions, grouped queries.

    kv_heads: the library's default where the file does not say, 0 for as many as heads; null says the latter too.
    """
    heads = fields.whole("num_attention_heads", differences.pop("heads", None))
    default = heads if fields.is_null("num_key_value_heads") or not kv_heads else kv_heads
    kv_heads = differences.pop("kv_heads_read", None) or fields.whole("num_key_value_heads", default)
    head_dim = differences.pop("head_dim", None)
    if head_dim is None and fields.has_value("head_dim"):
        head_dim = fields.whole("head_dim")
    return Transformer(
        layers=fields.layers("num_hidden_layers"),
        hidden=fields.whole("hidden_size"),
        intermediate=differences.pop("intermediate", None) or fields.whole("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim or fields.share("hidden_size", "num_attention_heads"),
        vocabulary=fields.whole("vocab_size", differences.pop("vocabulary", None)),
        tied=fields.flag("tie_word_embeddings", tied),
        **{"gated": True, "norm": "rmsnorm", **differences},
    )


def _layers(fields: ConfigFields) -> range:
    return range(fields.layers("num_hidden_layers"))


def _all_windows(fields: ConfigFields, default: int = 0) -> dict[str, Any]:
    """Every block has the window that the file names."""
    window = 0 if fields.is_null("sliding_window") else fields.whole("sliding_window", default, least=0)
    return {"window": window or None}


def _some_windows(
    fields: ConfigFields, is_full: Callable[[int], bool], window: str, default: int = 0
) -> dict[str, Any]:
    """Blocks see a window or all positions: as `layer_types` says, else as the rule."""
    size = 0 if fields.is_null(window) else fields.whole(window, default, least=0)
    layers = _layers(fields)
    seen = fields.words("layer_types", len(layers), _SEEN)
    full = tuple(layer for layer in layers if (seen[layer] == "full" if seen else is_full(layer)))
    if not size or len(full) == len(layers):
        return {}
    chunked = window == "attention_chunk_size" or bool(seen and "chunk" in seen)
    return {"window": size, "full_blocks": full, "chunked": chunked}


def _every(period: int) -> Callable[[int], bool]:
    """Whether a block is the last of so many."""
    return lambda layer: (layer + 1) % period == 0


def _asked_windows(fields: ConfigFields, *, has_most: bool) -> dict[str, Any]:
    """Qwen's windows: only if asked for; in dense models the first `max_window_layers` blocks see all positions."""
    first = fields.whole("max_window_layers", 28, least=0) if has_most else 0
    fields.ignore("max_window_layers")
    if not fields.flag("use_sliding_window", False):
        fields.ignore("sliding_window", "layer_types")
        return {}
    return _some_windows(fields, lambda layer: layer < first, "sliding_window", 4096)


def _attention_bias(fields: ConfigFields, *, default: bool = False, output: bool = True) -> dict[str, Any]:
    bias = fields.flag("attention_bias", default)
    return {"qkv_bias": bias, "output_bias": bias and output}


def _llama(fields: ConfigFields, *, tied: bool = False, kv_heads: int = 0) -> Transformer:
    fields.ignore("no_rope_layers", "no_rope_layer_interval", "layer_types", "sliding_window")
    if fields.flag("use_sliding_window", False):
        raise InputError("use_sliding_window true is not modelled for this model: set it false")
    biases = _attention_bias(fields)
    return _gated(fields, tied=tied, kv_heads=kv_heads, mlp_bias=fields.flag("mlp_bias", False), **biases)


def _mistral(fields: ConfigFields) -> Transformer:
    return _gated(fields, kv_heads=8, **_all_windows(fields, 4096))


def _ministral3(fields: ConfigFields) -> Transformer:
    return _gated(fields, kv_heads=8, **_all_windows(fields))


def _phi3(fields: ConfigFields) -> Transformer:
    return _gated(fields, **_all_windows(fields))


def _qwen2(fields: ConfigFields) -> Transformer:
    return _gated(fields, kv_heads=32, qkv_bias=True, **_asked_windows(fields, has_most=True))


def _qwen3(fields: ConfigFields) -> Transformer:
    windows, biases = _asked_windows(fields, has_most=True), _attention_bias(fields)
    head_dim = fields.whole("head_dim", 128)
    return _gated(fields, kv_heads=32, head_dim=head_dim, qk_norm="head", **windows, **biases)


def _starcoder2(fields: ConfigFields) -> Transformer:
    bias = fields.flag("use_bias", True)
    biases = {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bias}
    windows = _all_windows(fields)
    return _gated(fields, kv_heads=2, tied=True, gated=False, norm="layernorm", **biases, **windows)


def _seed_oss(fields: ConfigFields) -> Transformer:
    biases = {"qkv_bias": fields.flag("attention_bias", True), "output_bias": fields.flag("attention_out_bias", False)}
    head_dim = fields.whole("head_dim", 128)
    return _gated(fields, kv_heads=8, head_dim=head_dim, mlp_bias=fields.flag("mlp_bias", False), **biases)


def _glm4(fields: ConfigFields) -> Transformer:
    biases = _attention_bias(fields, default=True, output=False)
    return _gated(fields, kv_heads=2, head_dim=fields.whole("head_dim", 128), norms=4, **biases)


def _olmo(fields: ConfigFields, *, windows: bool) -> Transformer:
    """OLMo 2 and 3: norms after attention and MLP; queries and keys are normed over all heads."""
    seen = _some_windows(fields, _every(4), "sliding_window", 4096) if windows else {}
    return _gated(fields, qk_norm="width", **_attention_bias(fields), **seen)


def _exaone4(fields: ConfigFields) -> Transformer:
    pattern = fields.text("sliding_window_pattern")
    if pattern:
        windows = _some_windows(fields, lambda layer: pattern[layer % len(pattern)] == "G", "sliding_window")
    else:
        period = fields.whole("sliding_window_pattern", 4)
        windows = _some_windows(fields, _every(period), "sliding_window")
    return _gated(fields, qk_norm="head", **windows)


def _gemma(fields: ConfigFields) -> Transformer:
    head_dim, biases = fields.whole("head_dim", 256), _attention_bias(fields)
    return _gated(fields, kv_heads=16, tied=True, head_dim=head_dim, **biases)


def _gemma2(fields: ConfigFields) -> Transformer:
    windows = _some_windows(fields, _every(2), "sliding_window", 4096)
    head_dim, biases = fields.whole("head_dim", 256), _attention_bias(fields)
    return _gated(fields, kv_heads=4, tied=True, head_dim=head_dim, norms=4, **windows, **biases)


def _gemma3(fields: ConfigFields) -> Transformer:
    """Published files of this family leave out what equals the library's defaults, sizes too."""
    period = fields.whole("sliding_window_pattern", fields.whole("_sliding_window_pattern", 6))
    windows = _some_windows(fields, _every(period), "sliding_window", 4096)
    sizes = {"heads": 8, "vocabulary": 262_208, "head_dim": fields.whole("head_dim", 256)}
    return _gated(fields, kv_heads=4, tied=True, norms=4, qk_norm="head", **sizes, **windows, **_attention_bias(fields))


def _local_experts(fields: ConfigFields, **differences: Any) -> Experts:
    """Experts as mixtral's files name them; all blocks have them."""
    return Experts(
        count=fields.first_whole("num_local_experts", "num_experts"),
        active=fields.first_whole("num_experts_per_tok", "experts_per_token"),
        intermediate=fields.whole("intermediate_size"),
        **differences,
    )


def _mixtral(fields: ConfigFields) -> Transformer:
    return _gated(fields, kv_heads=8, experts=_local_experts(fields), **_all_windows(fields))


def _phimoe(fields: ConfigFields) -> Transformer:
    biases, windows = _attention_bias(fields), _all_windows(fields)
    head_bias = fields.flag("lm_head_bias", False)
    experts = _local_experts(fields)
    return _gated(fields, kv_heads=8, norm="layernorm", head_bias=head_bias, experts=experts, **biases, **windows)


def _granitemoe(fields: ConfigFields) -> Transformer:
    return _gated(fields, experts=_local_experts(fields), **_attention_bias(fields))


def _olmoe(fields: ConfigFields) -> Transformer:
    return _gated(fields, qk_norm="width", experts=_local_experts(fields), **_attention_bias(fields))


def _minimax_m2(fields: ConfigFields) -> Transformer:
    fields.ignore("num_mtp_modules", "mtp_transformer_layers", "use_mtp", "attn_type_list", "qk_norm_type")
    qk_norm: QueryKeyNorm = "width" if fields.flag("use_qk_norm", True) else "none"
    shared = fields.whole("shared_intermediate_size", 0, least=0)
    fields.ignore("use_routing_bias")
    experts = _local_experts(fields, router_bias=True, shared_intermediate=shared)
    return _gated(fields, kv_heads=8, qk_norm=qk_norm, experts=experts)


def _gpt_oss(fields: ConfigFields) -> Transformer:
    """Biases everywhere but in the head, also in each expert; every other block has a window."""
    windows = _some_windows(fields, _every(2), "sliding_window", 128)
    biases, head_dim = _attention_bias(fields, default=True), fields.whole("head_dim", 64)
    experts = _local_experts(fields, router_bias=True)
    return _gated(
        fields, kv_heads=8, head_dim=head_dim, mlp_bias=True, sinks=True, experts=experts, **windows, **biases
    )


def _qwen_moe(fields: ConfigFields, *, generation: int) -> Transformer:
    """Experts in every `decoder_sparse_step`-th block but those named; from the third generation on none is shared."""
    shared = fields.whole("shared_expert_intermediate_size", least=0) if generation == 2 else 0
    experts = Experts(
        count=fields.first_whole("num_experts", "num_local_experts"),
        active=fields.whole("num_experts_per_tok"),
        intermediate=fields.whole("moe_intermediate_size"),
        shared_intermediate=shared,
        shared_gate=shared > 0,
    )
    period = fields.whole("decoder_sparse_step", 1)
    named = set(fields.numbers("mlp_only_layers") or ())
    dense = tuple(layer for layer in _layers(fields) if layer in named or (layer + 1) % period)
    windows = _asked_windows(fields, has_most=generation == 2)
    if generation == 2:
        qkv_bias = fields.flag("qkv_bias", True)
        return _gated(fields, kv_heads=16, experts=experts, dense_blocks=dense, qkv_bias=qkv_bias, **windows)
    biases = _attention_bias(fields)
    return _gated(fields, kv_heads=4, experts=experts, dense_blocks=dense, qk_norm="head", **windows, **biases)


def _routed_experts(fields: ConfigFields, *, router_bias: bool) -> dict[str, Any]:
    """Experts as DeepSeek's files name them: the first blocks are dense, and shared experts are as wide as others."""
    if not fields.has_value("n_routed_experts"):
        return {}
    width = fields.whole("moe_intermediate_size")
    experts = Experts(
        count=fields.whole("n_routed_experts"),
        active=fields.whole("num_experts_per_tok"),
        intermediate=width,
        shared_intermediate=width * fields.whole("n_shared_experts", 0, least=0),
        router_bias=router_bias,
    )
    layers = _layers(fields)
    kinds = fields.words("mlp_layer_types", len(layers), {"dense": "dense", "sparse": "sparse"})
    first, period = fields.whole("first_k_dense_replace", 0, least=0), fields.whole("moe_layer_freq", 1)
    dense = [layer for layer in layers if (kinds[layer] == "dense" if kinds else layer < first or layer % period)]
    return {"experts": experts, "dense_blocks": tuple(dense)}


def _latent(fields: ConfigFields) -> dict[str, Any]:
    """Multi-head latent attention."""
    fields.ignore("num_key_value_heads", "head_dim", "qk_head_dim", "rope_interleave")
    latent = LatentAttention(
        kv_rank=fields.whole("kv_lora_rank"),
        query_rank=fields.whole("q_lora_rank") if fields.has_value("q_lora_rank") else None,
        nope_dim=fields.whole("qk_nope_head_dim"),
        rope_dim=fields.whole("qk_rope_head_dim"),
        value_dim=fields.whole("v_head_dim"),
    )
    return {
        "latent": latent,
        "head_dim": latent.nope_dim + latent.rope_dim,
        "kv_heads_read": fields.whole("num_attention_heads"),
    }


def _deepseek(fields: ConfigFields, *, router_bias: bool) -> Transformer:
    """Version 3 corrects each expert's score by a number that balances the load."""
    experts = _routed_experts(fields, router_bias=router_bias)
    biases = _attention_bias(fields)
    return _gated(fields, mlp_bias=fields.flag("mlp_bias", False), **_latent(fields), **experts, **biases)


def _glm4_moe(fields: ConfigFields) -> Transformer:
    experts = _routed_experts(fields, router_bias=True)
    biases = _attention_bias(fields, output=False)
    qk_norm: QueryKeyNorm = "head" if fields.flag("use_qk_norm", False) else "none"
    return _gated(fields, kv_heads=8, qk_norm=qk_norm, **experts, **biases)


def _dots1(fields: ConfigFields) -> Transformer:
    experts = _routed_experts(fields, router_bias=True)
    windows = _some_windows(fields, lambda layer: layer < fields.whole("max_window_layers", 62), "sliding_window")
    fields.ignore("max_window_layers")
    return _gated(fields, kv_heads=32, qk_norm="head", **experts, **windows, **_attention_bias(fields))


def _ernie(fields: ConfigFields, *, has_experts: bool) -> Transformer:
    bias = fields.flag("use_bias", False)
    biases = {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bias}
    if not has_experts:
        return _gated(fields, kv_heads=2, tied=True, head_dim=fields.whole("head_dim", 128), **biases)
    width, layers = fields.whole("moe_intermediate_size"), _layers(fields)
    experts = Experts(
        count=fields.whole("moe_num_experts"),
        active=fields.whole("moe_k"),
        intermediate=width,
        shared_intermediate=width * fields.whole("moe_num_shared_experts", 0, least=0),
        router_bias=True,
    )
    first, period = fields.whole("moe_layer_start_index", 1, least=0), fields.whole("moe_layer_interval", 1)
    end = fields.whole("moe_layer_end_index", -1, least=-1)
    last = len(layers) - 1 if end < 0 else end
    dense = tuple(layer for layer in layers if not first <= layer <= last or (layer + 1) % period)
    return _gated(fields, kv_heads=4, tied=True, experts=experts, dense_blocks=dense, **biases)


def _llama4(fields: ConfigFields) -> Transformer:
    """Experts in some blocks, each beside a shared one as wide; every fourth block sees more than its chunk."""
    layers = _layers(fields)
    turned = fields.numbers("no_rope_layers", len(layers))  # 1 for blocks with rotary positions, which see their chunk
    period = fields.whole("no_rope_layer_interval", 4)
    windows = _some_windows(
        fields, (lambda layer: not turned[layer]) if turned else _every(period), "attention_chunk_size", 8192
    )
    named, step = fields.numbers("moe_layers"), fields.whole("interleave_moe_layer_step", 1)
    sparse = set(layers[step - 1 :: step] if named is None else named)
    width = fields.whole("intermediate_size")
    return _gated(
        fields,
        kv_heads=8,
        head_dim=fields.whole("head_dim", 128),
        intermediate=fields.whole("intermediate_size_mlp", 16_384),
        experts=_local_experts(fields, shared_intermediate=width),
        dense_blocks=tuple(layer for layer in layers if layer not in sparse),
        qk_norm="plain" if fields.flag("use_qk_norm", True) else "none",
        **windows,
        **_attention_bias(fields),
    )


FAMILIES: dict[str, Callable[[ConfigFields], Transformer]] = {
    "deepseek_v2": partial(_deepseek, router_bias=False),
    "deepseek_v3": partial(_deepseek, router_bias=True),
    "dots1": _dots1,
    "ernie4_5": partial(_ernie, has_experts=False),
    "ernie4_5_moe": partial(_ernie, has_experts=True),
    "exaone4": _exaone4,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3,
    "glm4": _glm4,
    "glm4_moe": _glm4_moe,
    "glm4_moe_lite": partial(_deepseek, router_bias=True),
    "gpt2": _gpt2,
    "gpt_oss": _gpt_oss,
    "granite": _llama,
    "granitemoe": _granitemoe,
    "kimi_k2": partial(_deepseek, router_bias=True),
    "llama": _llama,
    "llama4": _llama4,
    "llama4_text": _llama4,
    "minimax_m2": _minimax_m2,
    "ministral3": _ministral3,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "olmo2": partial(_olmo, windows=False),
    "olmo3": partial(_olmo, windows=True),
    "olmoe": _olmoe,
    "phi3": _phi3,
    "phimoe": _phimoe,
    "qwen2": _qwen2,
    "qwen2_5_vl_text": _qwen2,
    "qwen2_moe": partial(_qwen_moe, generation=2),
    "qwen3": _qwen3,
    "qwen3_moe": partial(_qwen_moe, generation=3),
    "qwen3_vl_moe_text": partial(_qwen_moe, generation=3),
    "qwen3_vl_text": _qwen3,
    "seed_oss": _seed_oss,
    "smollm3": partial(_llama, tied=True, kv_heads=4),
    "starcoder2": _starcoder2,
}
