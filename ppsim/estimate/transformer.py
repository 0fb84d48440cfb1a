"""Transformer: the shapes of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ppsim.checks import check_fields, check_whole, checked
from ppsim.errors import InputError
from ppsim.estimate.block import Block, Experts, LatentAttention, Norm, QueryKeyNorm

_WHOLE = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary")
_MOST_LAYERS = 100_000  # each is an object; a mistyped number would fill the memory
_COUNTS = ("positions", "mtp_layers", "norms")


def check_layers(name: str, count: int) -> None:
    """Refuse models of more layers than can be held."""
    if count > _MOST_LAYERS:
        raise InputError(f"{name} is {count}, more layers than this can hold: take at most {_MOST_LAYERS}")


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """An embedding, `layers` blocks of attention and MLP or experts, and a head of a final norm and a projection.

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
    chunked : bool
        Whether the window is a chunk of so many positions, the same for all tokens in it, instead of moving along.
    full_blocks : tuple of int
        Blocks that see all positions although there is a window.
    norms : int
        Norms of the residual stream in each block: one before attention and one before the MLP, or also one after each
        (4), or one for both, which then run side by side (1).
    qk_norm : "none", "plain", "head" or "width"
        Whether queries and keys are normed, and with which weights: none of their own, some for each position of a
        head, or for all heads together.
    sinks : bool
        Whether each head has a learned score that no token has (gpt-oss).
    latent : LatentAttention, optional
        Keys and values from a narrow vector. kv_heads is then heads, and head_dim the query's whole width.
    experts : Experts, optional
        A mixture of experts instead of the MLP.
    dense_blocks : tuple of int
        Blocks that have the MLP although there are experts.
    mtp_layers : int
        Layers that predict further tokens (DeepSeek-AI, DeepSeek-V3, 2024, section 2.2), each two norms, a projection
        of twice the width, a block as the last one and a final norm. They use the embedding and the head.
    left_out : tuple of str
        What a file says of the model beside these shapes, for readers; it is not counted.

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
    chunked: bool = False
    full_blocks: tuple[int, ...] = ()
    norms: int = 2
    qk_norm: QueryKeyNorm = "none"
    sinks: bool = False
    latent: LatentAttention | None = None
    experts: Experts | None = None
    dense_blocks: tuple[int, ...] = ()
    mtp_layers: int = 0
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        for name in _WHOLE:
            check_whole(name, getattr(self, name), least=1)
        for name in _COUNTS:
            check_whole(name, getattr(self, name), least=0)
        check_layers("layers", self.layers)
        check_layers("mtp_layers", self.mtp_layers)
        if self.window is not None:
            check_whole("window", self.window, least=1)
        for name in ("full_blocks", "dense_blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for block in getattr(self, name):
                if not 0 <= block < self.layers:
                    raise InputError(f"{name} has {block!r}: take blocks from 0 to {self.layers - 1}")
        if self.heads % self.kv_heads:
            raise InputError(
                f"kv_heads {self.kv_heads} must divide heads {self.heads}: every group has as many query heads"
            )
        if self.latent is not None:
            whole = self.latent.nope_dim + self.latent.rope_dim
            if (self.kv_heads, self.head_dim) != (self.heads, whole):
                raise InputError(
                    f"latent attention has a key and a value for each of {self.heads} heads, and heads of nope_dim + "
                    f"rope_dim = {whole}: set kv_heads and head_dim so, not {self.kv_heads} and {self.head_dim}"
                )

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
            check_whole(name, value, least=1)
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

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Each block's shapes; blocks that are alike are one object."""
        dense, full = set(self.dense_blocks), set(self.full_blocks)
        kinds: dict[tuple[bool, bool], Block] = {}
        for index in range(self.layers):
            key = (index in dense, index in full)
            if key not in kinds:
                kinds[key] = self._block(*key)
        return tuple(kinds[index in dense, index in full] for index in range(self.layers))

    @cached_property
    def kinds(self) -> tuple[Block, ...]:
        """Blocks that differ, in the order in which they first appear."""
        return tuple(dict.fromkeys(self.blocks))

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
        return self._usual.norm_parameters

    @property
    def embedding_parameters(self) -> int:
        """The tables of tokens and positions."""
        return (self.vocabulary + self.positions) * self.hidden

    @property
    def block_parameters(self) -> int:
        """Of one block that neither `dense_blocks` nor `full_blocks` names: attention, MLP or all experts, norms."""
        return self.shard_parameters(1)

    @property
    def head_parameters(self) -> int:
        """What the head owns: the final norm, its bias, and its matrix unless that is the embedding's table."""
        return self.norm_parameters + self._head_bias + (0 if self.tied else self.vocabulary * self.hidden)

    @property
    def mtp_parameters(self) -> int:
        """Of all layers that predict further tokens, without the embedding and the head that they use."""
        return self.mtp_layers * (self._mtp_own_parameters + self.blocks[-1].parameters())

    @property
    def parameters(self) -> int:
        """Of the whole model; a tied table counts once."""
        blocks = sum(block.parameters() for block in self.blocks)
        return self.embedding_parameters + blocks + self.head_parameters + self.mtp_parameters

    @property
    def active_parameters(self) -> int:
        """Those that one token goes through: all but the experts that it is not sent to.

        The whole table of tokens counts, as in most models' cards; some leave it out, of which a token takes one row.
        Layers that predict further tokens count.
        """
        blocks = sum(block.active_parameters for block in self.blocks)
        further = self.mtp_layers * (self._mtp_own_parameters + self.blocks[-1].active_parameters)
        return self.embedding_parameters + blocks + self.head_parameters + further

    @checked
    def shard_parameters(self, tp: int, *, ep: int = 1, expert_tp: int | None = None) -> int:
        """Of one block on one of `tp` tensor-parallel ranks (Shoeybi et al., Megatron-LM, 2019).

        q, k, v and fc1 (gate, up) are cut by columns with their biases, o and fc2 by rows; norms, routers, the biases
        of o and fc2, and the projections to latent vectors are whole on every rank. Experts are dealt over `ep` ranks,
        and each is cut over `expert_tp`, by default tp. Raises InputError for numbers that do not divide.
        """
        expert_tp = tp if expert_tp is None else expert_tp
        self.check_shards(tp, ep=ep, expert_tp=expert_tp)
        return self._usual.parameters(tp=tp, ep=ep, expert_tp=expert_tp)

    @checked
    def shards(self, tp: int, *, ep: int = 1, expert_tp: int | None = None) -> bool:
        """Whether every rank gets as many heads, columns and experts as the others. Raises InputError for tp < 1."""
        return self._undivided(tp, ep, expert_tp) is None

    @checked
    def check_shards(self, tp: int, *, ep: int = 1, expert_tp: int | None = None) -> None:
        """Raise InputError unless the model `shards`."""
        complaint = self._undivided(tp, ep, expert_tp)
        if complaint is not None:
            raise InputError(complaint)

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
        return self._usual.pairs(seq, masked=masked)

    def _undivided(self, tp: int, ep: int, expert_tp: int | None) -> str | None:
        """What so many ranks cannot share evenly."""
        expert_tp = tp if expert_tp is None else expert_tp
        for name, ranks in (("tp", tp), ("ep", ep), ("expert_tp", expert_tp)):
            check_whole(name, ranks, least=1)
        if ep > 1 and self.experts is None:
            return f"ep {ep} deals out experts, and the model has none: take 1"
        return next((said for kind in self.kinds if (said := kind.undivided(tp, ep, expert_tp))), None)

    @cached_property
    def _usual(self) -> Block:
        """A block that no list names."""
        return self._block(is_dense=False, is_full=False)

    def _block(self, is_dense: bool, is_full: bool) -> Block:
        return Block(
            hidden=self.hidden,
            intermediate=self.intermediate,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rotary=not self.positions,
            gated=self.gated,
            norm=self.norm,
            norms=self.norms,
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            mlp_bias=self.mlp_bias,
            qk_norm=self.qk_norm,
            sinks=self.sinks,
            latent=self.latent,
            experts=None if is_dense else self.experts,
            window=None if is_full else self.window,
            chunked=self.chunked and not is_full and self.window is not None,
        )

    @property
    def _head_bias(self) -> int:
        return self.vocabulary if self.head_bias else 0

    @property
    def _mtp_own_parameters(self) -> int:
        """Of one such layer beside its block."""
        return 2 * self.hidden * self.hidden + 3 * self.norm_parameters
