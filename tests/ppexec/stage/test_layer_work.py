"""What ppsim derives from shapes equals what PyTorch counts on modules: parameters, FLOPs, bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ppexec.stage.ledger import Ledger, tensors_of
from ppexec.stage.stage import Stage
from ppsim import Execution, Transformer, transformer_work

GPT = Transformer.gpt(layers=2, hidden=24, heads=4, vocabulary=31, positions=9, tied=False)
LLAMA = Transformer(
    layers=2,
    hidden=24,
    intermediate=40,
    heads=6,
    kv_heads=2,
    head_dim=5,
    vocabulary=31,
    gated=True,
    norm="rmsnorm",
    qkv_bias=True,
)
BATCH, SEQ = 3, 7
EXECUTION = Execution(micro_batch_size=BATCH, seq=SEQ, dtype_bytes=4, skip_masked=False)

# PyTorch counts its CPU's fused attention by no formula, though it has those of the same operation on a GPU.
_aten = torch.ops.aten
_ON_CPU = {
    on_cpu: flop_registry[on_gpu].__wrapped__  # a mapping's formulas take shapes, the registry's take tensors
    for on_cpu, on_gpu in (
        (_aten._scaled_dot_product_flash_attention_for_cpu, _aten._scaled_dot_product_flash_attention),
        (
            _aten._scaled_dot_product_flash_attention_for_cpu_backward,
            _aten._scaled_dot_product_flash_attention_backward,
        ),
    )
}


class Positions(nn.Embedding):
    """A vector for each position."""

    def forward(self, seq: int) -> torch.Tensor:
        return self.weight[:seq]


class Embedding(nn.Module):
    """Tokens, and learned positions where the model has them."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.tokens = nn.Embedding(model.vocabulary, model.hidden)
        self.positions = Positions(model.positions, model.hidden) if model.positions else None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found = self.tokens(tokens)
        return found if self.positions is None else found + self.positions(tokens.shape[1])


class Block(nn.Module):
    """Pre-norm, q, k, v and o of their own, fused attention."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        make = nn.LayerNorm if model.norm == "layernorm" else nn.RMSNorm
        self.norm1, self.norm2 = make(model.hidden), make(model.hidden)
        self.q = nn.Linear(model.hidden, model.query_width, bias=model.qkv_bias)
        self.k = nn.Linear(model.hidden, model.kv_width, bias=model.qkv_bias)
        self.v = nn.Linear(model.hidden, model.kv_width, bias=model.qkv_bias)
        self.o = nn.Linear(model.query_width, model.hidden, bias=model.output_bias)
        self.up = nn.Linear(model.hidden, model.intermediate, bias=model.mlp_bias)
        self.gate = nn.Linear(model.hidden, model.intermediate, bias=model.mlp_bias) if model.gated else None
        self.down = nn.Linear(model.intermediate, model.hidden, bias=model.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq, _ = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(batch, seq, -1, self.model.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        grouped = self.model.kv_heads != self.model.heads
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        x = x + self.o(attended.transpose(1, 2).reshape(batch, seq, -1))
        y = self.norm2(x)
        inner = functional.gelu(self.up(y)) if self.gate is None else functional.silu(self.gate(y)) * self.up(y)
        return x + self.down(inner)


class Head(nn.Module):
    """Final norm and projection."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(model.hidden) if model.norm == "layernorm" else nn.RMSNorm(model.hidden)
        self.projection = nn.Linear(model.hidden, model.vocabulary, bias=model.head_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(self.norm(x))


def _layers(model: Transformer) -> list[nn.Module]:
    return [Embedding(model), *(Block(model) for _ in range(model.layers)), Head(model)]


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("model", [GPT, LLAMA], ids=["gpt", "llama"])
def test_parameters_are_the_modules(model: Transformer) -> None:
    with torch.device("meta"):
        layers = _layers(model)
    works = transformer_work(model, EXECUTION)
    assert [work.parameter_bytes for work in works] == [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    assert model.parameters == sum(p.numel() for layer in layers for p in layer.parameters())


@pytest.mark.parametrize("model", [GPT, LLAMA], ids=["gpt", "llama"])
def test_flops_are_those_pytorch_counts(model: Transformer) -> None:
    """On layers that run, each by itself: a block's backward, and its input's gradient among it."""
    for layer, work in zip(_layers(model), transformer_work(model, EXECUTION), strict=True):
        inputs = _inputs(model, work.name)
        forward = FlopCounterMode(display=False, custom_mapping=_ON_CPU)
        with forward:
            output = layer(inputs)
        backward = FlopCounterMode(display=False, custom_mapping=_ON_CPU)
        with backward:
            output.sum().backward()
        assert (work.forward_flops, work.backward_flops) == (forward.get_total_flops(), backward.get_total_flops())
        assert work.name == "embedding" or work.forward_flops > 0


def _inputs(model: Transformer, name: str) -> torch.Tensor:
    if name == "embedding":
        return torch.randint(model.vocabulary, (BATCH, SEQ))
    return torch.randn(BATCH, SEQ, model.hidden, requires_grad=True)


@pytest.mark.parametrize("split", [False, True], ids=["B", "I-W"])
def test_bytes_are_those_autograd_keeps(split: bool) -> None:
    """Each layer as a stage of its own, counted by the executor's ledger; the head with its loss."""
    for index, (layer, work) in enumerate(zip(_layers(GPT), transformer_work(GPT, EXECUTION), strict=True)):
        is_last = work.name == "head"
        stage = Stage(
            0 if index == 0 else 1,
            [layer],
            first_layer=index,
            loss=_loss if is_last else None,
            microbatches=1,
            trains=True,
        )
        targets = torch.randint(GPT.vocabulary, (BATCH, SEQ)) if is_last else None
        stage.ledger = ledger = Ledger([*tensors_of([layer]), *([targets] if is_last else [])])
        output = stage.forward(0, _inputs(GPT, work.name).detach(), targets, split=split)
        assert output.nbytes == work.output_bytes
        gradient = None if is_last else torch.randn_like(output)
        if split:
            stage.backward_input(0, gradient)
            assert ledger.level_bytes == work.weight_activation_bytes, work.name
            stage.backward_weight(0)
        else:
            assert ledger.level_bytes == work.activation_bytes, work.name
            stage.backward(0, gradient)
        del gradient, output
        assert ledger.level_bytes == 0
