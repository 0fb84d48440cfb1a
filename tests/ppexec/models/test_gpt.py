"""The built-in GPT: what it computes against a plain one, its text, how its chain is cut, and real runs of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ppexec
import ppsim
from ppexec import Session, WorkerPool
from ppexec.cli import main
from ppexec.config.config import RunConfig
from ppexec.models.gpt import Attention, Block, next_byte_loss, shard
from ppexec.models.initialize import initialize_layer
from ppexec.models.load import load_model
from ppexec.models.text import load_text, window
from tests.support.chains import named_schedules
from tests.support.remote import tiny
from tests.support.settings import with_workers
from tests.support.strategies import schedules

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")

CPU = torch.device("cpu")


def small(**changes: Any) -> RunConfig:
    """A GPT of two heads on bytes."""
    return tiny(**{"model": "gpt", "heads": 2, "seq": 5, **changes})


def real_layers(config: RunConfig) -> list[nn.Module]:
    layers = load_model(config).layers
    return [initialize_layer(layer, index=at, seed=config.seed, device=CPU) for at, layer in enumerate(layers)]


# What it computes


def plain_gpt(weights: dict[str, torch.Tensor], inputs: torch.Tensor, *, layers: int, heads: int) -> torch.Tensor:
    """The same network written out: attention by explicit softmax, head after head, GELU by its error function."""

    def normed(value: torch.Tensor, name: str) -> torch.Tensor:
        centred = value - value.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(value: torch.Tensor, name: str) -> torch.Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    seq = inputs.shape[1]
    value = weights["0.tokens.weight"][inputs] + weights["0.positions.weight"][:seq]
    hidden = torch.triu(torch.ones(seq, seq, dtype=torch.bool), 1)
    for layer in range(1, layers + 1):
        q, k, v = (linear(normed(value, f"{layer}.norm1"), f"{layer}.attention.{name}") for name in "qkv")
        parts = []
        for one, two, three in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            scores = (one @ two.mT / math.sqrt(one.shape[-1])).masked_fill(hidden, -math.inf)
            parts.append(scores.softmax(-1) @ three)
        value = value + linear(torch.cat(parts, -1), f"{layer}.attention.o")
        wide = linear(normed(value, f"{layer}.norm2"), f"{layer}.fc1")
        value = value + linear(wide * (1 + torch.erf(wide / math.sqrt(2))) / 2, f"{layer}.fc2")
    return normed(value, f"{layers + 1}.norm") @ weights[f"{layers + 1}.logits.weight"].T


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_it_computes_what_a_plain_gpt_computes(heads: int) -> None:
    config = small(layers=2, heads=heads, micro_batch_size=3, dtype="float64", ranks=1, seed=3)
    layers = real_layers(config)
    network = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))  # away from the small start, where much is almost linear
    inputs, target = load_model(config).sample(0)
    weights = dict(network.named_parameters())
    mine, plain = network(inputs), plain_gpt(weights, inputs, layers=2, heads=heads)
    torch.testing.assert_close(mine, plain, rtol=1e-11, atol=1e-11)
    loss = next_byte_loss(mine, target)
    by_hand = -plain.log_softmax(-1).gather(-1, target[..., None]).mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-11, atol=1e-11)
    ours = torch.autograd.grad(loss, list(weights.values()))
    theirs = torch.autograd.grad(by_hand, list(weights.values()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_a_byte_is_predicted_from_those_before_it_alone() -> None:
    network = nn.Sequential(*real_layers(small(layers=2, ranks=1)))
    inputs = torch.randint(256, (1, 5))
    changed = inputs.clone()
    changed[0, 3] = (inputs[0, 3] + 1) % 256
    one, other = network(inputs), network(changed)
    assert torch.equal(one[:, :3], other[:, :3])
    assert not torch.equal(one[:, 3], other[:, 3])


def test_it_starts_as_a_gpt_should() -> None:
    layers = real_layers(small(layers=8, hidden=128, ranks=1))
    block = layers[1]
    assert isinstance(block, Block)
    assert block.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.fc2.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert block.attention.o.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert layers[0].tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not block.fc1.bias.any()
    assert torch.equal(block.norm1.weight, torch.ones(128))
    loss = next_byte_loss(nn.Sequential(*layers)(torch.arange(5)[None]), torch.arange(5)[None])
    assert loss.item() == pytest.approx(math.log(256), rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_it_has_the_configured_sizes_and_takes_no_memory_until_cut(dtype: str) -> None:
    config = small(layers=3, hidden=8, intermediate=20, seq=6, dtype=dtype, partition="0,3")
    layers = load_model(config).layers
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    block = 4 * (8 * 8 + 8) + (8 * 20 + 20) + (20 * 8 + 8) + 2 * 2 * 8
    assert sum(parameter.numel() for parameter in parameters) == 256 * 8 + 6 * 8 + 3 * block + 2 * 8 + 256 * 8
    assert all(parameter.is_meta and parameter.dtype == config.torch_dtype for parameter in parameters)


# Tensor parallelism: whole heads and columns


def test_a_rank_with_half_of_the_columns_computes_half_of_the_heads() -> None:
    whole = Attention(8, 4, residual_std=1, dtype=torch.float64)
    inputs = torch.randn(2, 5, 8, dtype=torch.float64)
    total = whole.o.bias.detach().clone()
    for rank in range(2):
        part = Attention(8, 4, residual_std=1, dtype=torch.float64)
        columns = slice(4 * rank, 4 * rank + 4)
        for name in "qkv":
            mine, full = getattr(part, name), getattr(whole, name)
            mine.weight, mine.bias = nn.Parameter(full.weight[columns]), nn.Parameter(full.bias[columns])
        part.o.weight = nn.Parameter(whole.o.weight[:, columns])
        total = total + part(inputs) - part.o.bias
    torch.testing.assert_close(total, whole(inputs), rtol=1e-12, atol=1e-12)


def test_the_plan_names_a_blocks_linear_layers_and_nothing_else() -> None:
    model = load_model(small(layers=2, ranks=1))
    assert model.plan is shard
    for layer in (model.layers[0], model.layers[-1]):
        assert shard(layer) == {}
    plan = shard(model.layers[1])
    linear = [name for name, module in model.layers[1].named_modules() if isinstance(module, nn.Linear)]
    assert sorted(plan) == sorted(linear)
    by_rows = [name for name, style in plan.items() if type(style).__name__ == "RowwiseParallel"]
    assert sorted(by_rows) == ["attention.o", "fc2"]


# Text


def test_a_sample_is_a_window_of_the_text_and_its_targets_are_the_next_bytes(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)))
    sample = load_model(small(text=text, seq=7, micro_batch_size=4)).sample
    starts = set()
    for microbatch in range(8):
        inputs, target = sample(microbatch)
        assert inputs.shape == target.shape == (4, 7)
        assert inputs.dtype == target.dtype == torch.int64
        assert torch.equal(target, inputs + 1)
        starts |= set(inputs[:, 0].tolist())
    assert len(starts) > 20


@given(seed=st.integers(0, 2**40), sample=st.integers(0, 2**40), spare=st.integers(1, 30))
def test_a_window_lies_in_the_text_and_depends_on_seed_and_sample_alone(seed: int, sample: int, spare: int) -> None:
    text = torch.arange(10 + spare, dtype=torch.uint8)
    found = window(text, 10, seed=seed, sample=sample)
    start = int(found[0])
    assert found.tolist() == list(range(start, start + 11))
    assert torch.equal(found, window(text.clone(), 10, seed=seed, sample=sample))


def test_sample_five_is_sample_five_in_microbatches_of_any_size() -> None:
    one, three = load_model(small(micro_batch_size=1)).sample, load_model(small(micro_batch_size=3)).sample
    singles = [one(index) for index in range(3, 6)]
    inputs, targets = three(1)
    assert torch.equal(inputs, torch.cat([inputs for inputs, _ in singles]))
    assert torch.equal(targets, torch.cat([targets for _, targets in singles]))


def test_without_a_text_it_reads_this_toolkits_own_sources() -> None:
    text = bytes(load_text(None).tolist())
    for package in (ppexec, ppsim):
        assert Path(package.__file__ or "").read_bytes() in text
    assert text == bytes(load_text(None).tolist())


def test_a_text_that_is_too_short_or_missing_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"12345")
    with pytest.raises(ValueError, match="a text of 5 bytes has no window of seq \\+ 1 = 6: take a longer text"):
        load_model(small(text=text)).sample(0)
    with pytest.raises(ValueError, match="nowhere is not a file"):
        small(text=tmp_path / "nowhere")


# Configuration and cuts


@pytest.mark.parametrize(
    ("hidden", "heads"), [(512, 8), (768, 12), (256, 4), (64, 4), (8, 4), (6, 3), (7, 1), (4096, 64)]
)
def test_heads_are_of_64_or_four_smaller_ones(hidden: int, heads: int) -> None:
    assert RunConfig(model="gpt", hidden=hidden).heads == heads


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "gpt", "hidden": 10, "heads": 4}, "hidden 10 does not divide by heads 4: take heads 2"),
        ({"model": "gpt", "heads": -1}, "heads must be a whole number of 0 or more"),
        ({"model": "gpt", "dropout": 1.0}, "dropout must be a probability, 0 <= dropout < 1, got 1.0"),
        ({"model": "gpt", "dropout": -0.1}, "dropout must be a probability"),
        ({"model": "gpt", "dropout": math.nan}, "dropout must be a number, got nan"),
        ({"dropout": 0.1}, "dropout=0.1 has no meaning for model 'mlp': take --model gpt"),
        ({"tied": True}, "tied=True has no meaning for model 'mlp'"),
        ({"heads": 2}, "heads=2 has no meaning for model 'mlp'"),
    ],
)
def test_what_a_model_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**values)


@pytest.mark.parametrize(
    ("partition", "sizes"),
    [("even", [3, 3]), ("3,1", [4, 2]), ("0,4", [1, 5]), ("4,0", [5, 1])],
)
def test_even_and_sizes_count_blocks(partition: str, sizes: list[int]) -> None:
    assert small(partition=partition).layer_sizes == sizes


def test_one_stage_holds_the_whole_chain() -> None:
    assert small(ranks=1).layer_sizes == small(ranks=1, partition="4").layer_sizes == [6]


@pytest.mark.parametrize("partition", ["2,0,2", "4,4,4", "2,2", "-1,4,1"])
def test_a_stage_in_the_middle_needs_a_block(partition: str) -> None:
    with pytest.raises(ValueError, match="do not cut"):
        small(ranks=3, partition=partition)


def test_an_mlp_stage_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="do not cut 4 layers into 2 stages"):
        tiny(partition="0,4")


def test_costs_count_embedding_and_head_and_the_optimal_cut_knows_them(tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"
    seconds = [1.0, 2.0, 2.0, 2.0, 2.0, 7.0]  # the best largest stage of two is the head with one block
    layers = [ppsim.LayerCost(forward_s=s, backward_input_s=0, backward_weight_s=0) for s in seconds]
    ppsim.save_costs(layers, costs)
    assert small(costs=costs, partition="optimal").layer_sizes == [4, 2]
    assert small(costs=costs).layer_sizes == [3, 3]
    with pytest.raises(ValueError, match="has 6 layers, but layers is 3 with 2 more for embedding and head: pass 4"):
        small(layers=3, costs=costs, partition="1,2")
    with pytest.raises(ValueError, match="has 6 layers, but layers is 4: pass 6"):
        tiny(costs=costs)


# On real workers


@pytest.mark.parametrize("schedule", ["afab", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v"])
def test_a_gpt_is_bit_equal_to_one_process(schedule: str, pool: WorkerPool) -> None:
    report = ppexec.verify(small(schedule=schedule, micro_batch_size=2), pool=pool)
    assert report.first_difference is None
    assert report.passed
    assert report.compared == 4 + 2 + 4 * 16 + 3


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, Any], str]:
    """Values of a configuration, and the schedule as CSV where it has no name."""
    by_name, recompute = draw(st.booleans()), draw(st.booleans())
    any_order = schedules(max_microbatches=4, recompute=not recompute)  # every layer is recomputed, or R says which
    schedule = draw(named_schedules(max_ranks=3)) if by_name else draw(any_order)
    stages = schedule.model_stages
    blocks = [draw(st.integers(0 if at in (0, stages - 1) else 1, 2)) for at in range(stages)]
    blocks[0] += sum(blocks) == 0
    values = {
        "layers": sum(blocks),
        "partition": ",".join(map(str, blocks)),
        "ranks": schedule.ranks,
        "microbatches": schedule.microbatches,
        "micro_batch_size": draw(st.integers(1, 2)),
        "hidden": 2 * draw(st.integers(1, 4)),
        "seq": draw(st.integers(1, 6)),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
        "recompute": recompute,
        "seed": draw(st.integers(0, 2**32)),
        "dtype": draw(st.sampled_from(["float32", "float64"])),
        **({"schedule": schedule.name} if by_name else {}),
    }
    return values, "" if by_name else schedule.to_csv()


@with_workers
@given(run=runs())
def test_every_run_of_a_gpt_is_bit_equal_to_one_process(
    run: tuple[dict[str, Any], str], pool: WorkerPool, tmp_path: Path
) -> None:
    values, csv = run
    if csv:
        values["from_csv"] = tmp_path / f"{hash(csv) & 0xFFFFFFFF:x}.csv"
        values["from_csv"].write_text(csv, encoding="utf-8")
    report = ppexec.verify(small(**values), pool=pool)
    assert report.first_difference is None
    assert report.passed


def test_replicas_of_a_gpt_are_within_rounding(pool: WorkerPool) -> None:
    report = ppexec.verify(small(dp=2, microbatches=2, dropout=0.2, tied=True), pool=pool)
    assert report.passed
    assert 0 < report.tolerance < 1e-4


def test_a_profile_has_the_embedding_and_the_head(pool: WorkerPool) -> None:
    config = small(schedule="zb-h1", micro_batch_size=2)
    with Session(config, pool=pool) as session:
        layers = session.profile(1).layers
    assert [layer.name for layer in layers] == ["gpt embedding", *(f"gpt {at}" for at in range(4)), "gpt head"]
    assert all(layer.forward_s > 0 and layer.backward_input_s > 0 for layer in layers)
    assert [layer.output_bytes for layer in layers] == [2 * 5 * 8 * 4] * 5 + [2 * 5 * 256 * 4]
    assert layers[-1].parameter_bytes == (256 * 8 + 2 * 8) * 4


def test_an_evaluation_of_a_gpt_drops_nothing(pool: WorkerPool) -> None:
    config = small(forward_only=True, dropout=0.5)
    assert ppexec.verify(config, pool=pool).passed


def test_the_command_line_verifies_a_gpt(capsys: pytest.CaptureFixture[str]) -> None:
    words = "verify --model gpt --layers 2 --hidden 64 --seq 8 --ranks 2 --schedule zb-h1 --recompute --dropout 0.1"
    assert main([*words.split(), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["gradients_bit_equal"] is True
    assert report["config"]["heads"] == 4
