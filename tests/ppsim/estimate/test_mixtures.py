"""Experts, latent attention and windows: counts and products are those of the published models and of the library."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppsim import Execution, Transformer, read_huggingface_config, transformer_work
from tests.support.transformers import CONFIGS, SMALL_CONFIGS, read_config

# Millions of parameters that a token goes through, as the models' cards state them; True where the cards leave out the
# table of tokens. gpt-oss: OpenAI, gpt-oss model card, 2025, table 1. DeepSeek-V3: README ("37B"). Gemma 3 technical
# report, 2025, table 1, "non-embedding". Others: README or model card on huggingface.co.
CARDS = [
    ("gpt-oss-20b", True, 3610, 10),
    ("gpt-oss-120b", True, 5130, 10),
    ("deepseek-v3", True, 37_000, 1000),
    ("deepseek-v2", False, 21_000, 1000),
    ("kimi-k2", True, 32_000, 1000),
    ("mixtral-8x7b", False, 12_900, 100),
    ("mixtral-8x22b", False, 39_000, 1000),
    ("qwen3-235b-a22b", False, 22_000, 1000),
    ("llama-4-scout", False, 17_000, 1000),
    ("llama-4-maverick", False, 17_000, 1000),
    ("olmoe-1b-7b", False, 1300, 100),
    ("gemma-3-1b", True, 698, 1),
    ("gemma-3-4b", True, 3209, 1),
    ("gemma-3-12b", True, 10_759, 1),
    ("gemma-3-27b", True, 25_600, 1),
]


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_the_librarys(tmp_path: Path, name: str) -> None:
    assert read_config(tmp_path, CONFIGS[name]["config"]).parameters == CONFIGS[name]["parameters"]


@pytest.mark.parametrize(("name", "without_table", "millions", "rounded"), CARDS)
def test_active_parameters_are_those_of_the_cards(
    tmp_path: Path, name: str, without_table: bool, millions: int, rounded: int
) -> None:
    model = read_config(tmp_path, CONFIGS[name]["config"])
    active = model.active_parameters - (model.embedding_parameters if without_table else 0)
    assert round(active / 1e6 / rounded) * rounded == millions


@pytest.mark.parametrize("kind", SMALL_CONFIGS)
def test_products_are_those_the_library_runs(tmp_path: Path, kind: str) -> None:
    """Without what it computes for nothing: its Llama 4 sends each token through all experts."""
    facts = SMALL_CONFIGS[kind]
    model = read_config(tmp_path, facts["config"])
    assert model.parameters == facts["parameters"]
    execution = Execution(micro_batch_size=2, seq=16, attention="unfused")
    idle = 0
    if kind == "llama4_text":
        sparse = model.layers - len(model.dense_blocks)
        idle = sparse * 3 * (2 * 32) * 3 * model.hidden * model.experts.intermediate
    assert sum(work.forward_flops for work in transformer_work(model, execution)) == facts["forward_flops"] - idle


def test_deepseek_v3_is_the_published_one(tmp_path: Path) -> None:
    """671B without, and about 11.5B more with the prediction of a further token: README_WEIGHTS.md of DeepSeek-V3."""
    path = tmp_path / "config.json"
    model = read_config(tmp_path, CONFIGS["deepseek-v3"]["config"])
    assert model.parameters == 671_026_419_200
    assert model.left_out == ("num_nextn_predict_layers: 1 layers that predict further tokens",)
    further = read_huggingface_config(path, mtp=True)
    assert further.left_out == ()
    # The projection of 2 h to h, three norms, and one more block with all its experts.
    block = model.blocks[-1].parameters()
    assert further.parameters - model.parameters == 2 * 7168**2 + 3 * 7168 + block == 11_610_068_224


def test_blocks_differ_where_the_model_says_so(tmp_path: Path) -> None:
    deepseek = read_config(tmp_path, CONFIGS["deepseek-v3"]["config"])
    assert [block.experts is None for block in deepseek.blocks[:4]] == [True, True, True, False]
    maverick = read_config(tmp_path, CONFIGS["llama-4-maverick"]["config"])
    assert [block.experts is None for block in maverick.blocks[:4]] == [True, False, True, False]
    assert [block.window for block in maverick.blocks[:4]] == [8192, 8192, 8192, None]
    assert maverick.blocks[0].chunked
    gemma = read_config(tmp_path, CONFIGS["gemma-3-1b"]["config"])
    assert [block.window for block in gemma.blocks[:7]] == [512] * 5 + [None, 512]
    oss = read_config(tmp_path, CONFIGS["gpt-oss-20b"]["config"])
    assert [block.window for block in oss.blocks[:3]] == [128, None, 128]
    qwen = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 64, "num_hidden_layers": 4}
    windows = [block.window for block in read_config(tmp_path, CONFIGS["qwen3-0.6b"]["config"], **qwen).blocks]
    assert windows == [None, None, 64, 64]


def test_a_model_of_pictures_is_read_as_its_language_model(tmp_path: Path) -> None:
    text = CONFIGS["gemma-3-4b"]["config"]
    whole = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"hidden_size": 1152},
        "image_token_index": 9,
    }
    model = read_config(tmp_path, whole)
    assert model.parameters == CONFIGS["gemma-3-4b"]["parameters"]
    assert model.left_out == ("vision_config: the model's vision part",)
    untied = read_config(tmp_path, {**whole, "tie_word_embeddings": False})
    assert untied.parameters - model.parameters == model.vocabulary * model.hidden


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("deepseek-v3", {"index_n_heads": 64}, "index_n_heads 64 may change what is counted, and no deepseek_v3"),
        ("deepseek-v3", {"v_head_dim": ...}, "v_head_dim is missing"),
        ("deepseek-v3", {"num_experts_per_tok": 300}, "active 300 exceeds the 256 experts"),
        (
            "gpt-oss-20b",
            {"layer_types": ["linear_attention"] * 24},
            "layer_types[0] is 'linear_attention', which is not",
        ),
        ("gpt-oss-20b", {"layer_types": ["full_attention"] * 3}, "layer_types must be a list of 24 words"),
        ("llama-4-scout", {"no_rope_layers": [1, "x"]}, "no_rope_layers must be a list of whole numbers"),
        # Causes of bugs: an IndexError, a TypeError.
        ("llama-4-scout", {"no_rope_layers": [1, 0]}, "no_rope_layers must have 48 numbers, one for each layer"),
        ("gpt-oss-20b", {"layer_types": [["full_attention"]] * 24}, "layer_types[0] is ['full_attention'], which"),
        ("mixtral-8x7b", {"num_local_experts": ...}, "num_local_experts is missing"),
    ],
)
def test_what_is_not_known_is_named(tmp_path: Path, name: str, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json: ") as caught:
        read_config(tmp_path, CONFIGS[name]["config"], **changes)
    assert said in str(caught.value)


def test_fields_that_change_no_count_are_let_be(tmp_path: Path) -> None:
    """Of DeepSeek-V3's published file."""
    harmless = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "aux_loss_alpha": 0.001,
        "bos_token_id": 0,
        "ep_size": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 163840,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"factor": 40, "type": "yarn"},
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    assert read_config(tmp_path, CONFIGS["deepseek-v3"]["config"], **harmless).parameters == 671_026_419_200


@pytest.mark.parametrize("name", ["deepseek-v3", "mixtral-8x7b", "gpt-oss-20b", "qwen1.5-moe-a2.7b"])
@pytest.mark.parametrize(("tp", "ep", "expert_tp"), [(1, 2, 1), (2, 4, 2), (4, 4, 1)])
def test_shards_add_up_to_the_block(tmp_path: Path, name: str, tp: int, ep: int, expert_tp: int) -> None:
    """What tensor-parallel ranks cut is there once among them, experts once among ep x expert_tp ranks."""
    model = read_config(tmp_path, CONFIGS[name]["config"])
    block = next(block for block in model.blocks if block.experts is not None)
    part = block.parameters(tp=tp, ep=ep, expert_tp=expert_tp)
    experts = block.experts.count * block.expert_parameters(1)
    own = block.experts.count // ep * block.expert_parameters(expert_tp)
    # The bias of a cut expert's last product is whole on every rank.
    biases = block.experts.count * (expert_tp - 1) * block.hidden * block.mlp_bias
    assert own * ep * expert_tp == experts + biases
    rest, whole = part - own, block.parameters() - experts
    assert whole <= tp * rest <= tp * whole
    assert block.parameters(tp=tp) - block.parameters(tp=tp, ep=ep) == (1 - 1 / ep) * (
        block.experts.count * block.expert_parameters(1)
    )


def test_a_model_without_experts_has_none_to_deal_out(tmp_path: Path) -> None:
    gemma = read_config(tmp_path, CONFIGS["gemma-3-1b"]["config"])
    with pytest.raises(ValueError, match="ep 2 deals out experts, and the model has none"):
        transformer_work(gemma, Execution(micro_batch_size=1, seq=8, ep=2))
    mixtral = read_config(tmp_path, CONFIGS["mixtral-8x7b"]["config"])
    with pytest.raises(ValueError, match="ep 3 must divide the count of experts 8"):
        transformer_work(mixtral, Execution(micro_batch_size=1, seq=8, ep=3))
    with pytest.raises(ValueError, match="set sequence_parallel"):
        Execution(micro_batch_size=1, seq=8, ep=2, tp=2)


def test_a_block_that_is_not_there_is_refused() -> None:
    shapes = {"layers": 2, "hidden": 8, "intermediate": 8, "heads": 2, "kv_heads": 2, "head_dim": 4, "vocabulary": 9}
    with pytest.raises(ValueError, match="dense_blocks has 2: take blocks from 0 to 1"):
        Transformer(**shapes, dense_blocks=(0, 2))


def test_a_chunk_ends_what_a_token_sees(tmp_path: Path) -> None:
    scout = read_config(tmp_path, CONFIGS["llama-4-scout"]["config"], attention_chunk_size=5)
    for seq in (3, 5, 13):
        seen = [(q, k) for q in range(seq) for k in range(q + 1) if q // 5 == k // 5]
        assert scout.blocks[0].pairs(seq, masked=True) == len(seen)
