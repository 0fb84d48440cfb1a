"""Transformer: the shapes of a decoder-only language model, and what follows from them alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ppsim.checks import check_fields, checked
from ppsim.errors import InputError

Norm = Literal["layernorm", "rmsnorm"]
_WHOLE = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary")


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """An embedding, `layers` pre-norm blocks of attention and MLP, and a head of a final norm and a projection.

    Parameters
    ----------
    layers : int
        Number of blocks.
    hidden : int
        Width h of the residual stream.
    intermediate : int
        Width f of the MLP.
    heads, kv_heads : int
        Heads a of queries, and heads of keys and values. Fewer of the latter is grouped-query attention.
    head_dim : int
        Width d of a head, mostly h / a.
    vocabulary : int
        V.
    positions : int
        Rows of a learned table of positions. 0 if positions have no parameters, as with rotary embeddings.
    gated : bool
        Whether the MLP is down(act(gate(x)) * up(x)), three matrices, instead of fc2(act(fc1(x))), two.
    tied : bool
        Whether the head's projection is the embedding's table.
    norm : "layernorm" or "rmsnorm"
        The former has weight and bias, the latter a weight.
    qkv_bias, output_bias, mlp_bias, head_bias : bool
        Which linear layers have biases.
    window : int, optional
        How many positions a token sees, itself and those before it. By default all.

    Raises
    ------
    InputError
        If the shapes do not fit together.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int = 0
    gated: bool = False
    tied: bool = False
    norm: Norm = "layernorm"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in _WHOLE:
            _check_whole(name, getattr(self, name), least=1)
        _check_whole("positions", self.positions, least=0)
        if self.window is not None:
            _check_whole("window", self.window, least=1)
        if self.heads % self.kv_heads:
            raise InputError(
                f"kv_heads {self.kv_heads} must divide heads {self.heads}: every group has as many query heads"
            )
        if self.norm not in ("layernorm", "rmsnorm"):
            raise InputError(f"norm must be 'layernorm' or 'rmsnorm', got {self.norm!r}")

    @classmethod
    @checked
    def gpt(
        cls, *, layers: int, hidden: int, heads: int, vocabulary: int, positions: int, tied: bool = True
    ) -> Transformer:
        """A GPT: learned positions, layer norms, biases everywhere but in the head, f = 4 h, d = h / a.

        Examples
        --------
        >>> gpt2 = Transformer.gpt(layers=12, hidden=768, heads=12, vocabulary=50257, positions=1024)
        >>> gpt2.parameters
        124439808
        """
        for name, value in (("hidden", hidden), ("heads", heads)):
            _check_whole(name, value, least=1)
        if hidden % heads:
            raise InputError(f"heads {heads} must divide hidden {hidden}")
        return cls(
            layers=layers,
            hidden=hidden,
            intermediate=4 * hidden,
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            vocabulary=vocabulary,
            positions=positions,
            tied=tied,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
        )

    @property
    def query_width(self) -> int:
        """Width of all queries together, a d."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all keys (or all values) together."""
        return self.kv_heads * self.head_dim

    @property
    def norm_parameters(self) -> int:
        """Of one norm."""
        return self.hidden * (2 if self.norm == "layernorm" else 1)

    @property
    def embedding_parameters(self) -> int:
        """The tables of tokens and positions."""
        return (self.vocabulary + self.positions) * self.hidden

    @property
    def block_parameters(self) -> int:
        """Of one block: q, k, v, o, the MLP's two or three matrices, two norms."""
        return self.shard_parameters(1)

    @property
    def head_parameters(self) -> int:
        """What the head owns: the final norm, its bias, and its matrix unless that is the embedding's table."""
        return self.norm_parameters + self._head_bias + (0 if self.tied else self.vocabulary * self.hidden)

    @property
    def parameters(self) -> int:
        """Of the whole model; a tied table counts once."""
        return self.embedding_parameters + self.layers * self.block_parameters + self.head_parameters

    @checked
    def shard_parameters(self, tp: int) -> int:
        """Of one block on one of `tp` tensor-parallel ranks (Shoeybi et al., Megatron-LM, 2019).

        q, k, v and fc1 (gate, up) are cut by columns with their biases, o and fc2 by rows; norms and the biases of o
        and fc2 are whole on every rank. Raises InputError for a tp that does not divide.
        """
        self.check_shards(tp)
        query, kv, width = self.query_width // tp, self.kv_width // tp, self.intermediate // tp
        ups = 2 if self.gated else 1
        attention = self.hidden * (2 * query + 2 * kv)
        attention += (query + 2 * kv) * self.qkv_bias + self.hidden * self.output_bias
        mlp = self.hidden * width * (ups + 1) + (ups * width + self.hidden) * self.mlp_bias
        return attention + mlp + 2 * self.norm_parameters

    @checked
    def shards(self, tp: int) -> bool:
        """Whether every rank of `tp` gets as many heads and columns as the others. Raises InputError for tp < 1."""
        return self._undivided(tp) is None

    @checked
    def check_shards(self, tp: int) -> None:
        """Raise InputError unless the model `shards`."""
        name = self._undivided(tp)
        if name is not None:
            raise InputError(f"tp {tp} must divide {name} {getattr(self, name)}: take a divisor")

    @checked
    def check_seq(self, seq: int) -> None:
        """Raise InputError for a sequence longer than a learned table of positions."""
        if self.positions and seq > self.positions:
            raise InputError(f"seq {seq} exceeds the model's {self.positions} positions: take a shorter one")

    @checked
    def pairs(self, seq: int, *, masked: bool) -> int:
        """Pairs of (query, key) whose score one head computes for a sequence.

        masked: True counts what the causal mask and the window leave, sum over i of min(i + 1, window), as kernels
        that skip masked blocks do in the limit; False counts all seq^2, as published FLOP formulas do.
        """
        if not masked:
            return seq * seq
        window = seq if self.window is None else min(seq, self.window)
        return window * (window + 1) // 2 + (seq - window) * window

    def _undivided(self, tp: int) -> str | None:
        """The first of the widths that `tp` ranks cannot share evenly."""
        _check_whole("tp", tp, least=1)
        return next((name for name in ("heads", "kv_heads", "intermediate") if getattr(self, name) % tp), None)

    @property
    def _head_bias(self) -> int:
        return self.vocabulary if self.head_bias else 0


def _check_whole(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number of {least} or more, got {value!r}")
