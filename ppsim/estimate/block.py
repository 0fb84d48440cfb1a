"""Block: the shapes of one block of a transformer, its attention and its MLP or experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ppsim.checks import check_fields, check_whole
from ppsim.errors import InputError

Norm = Literal["layernorm", "rmsnorm"]
QueryKeyNorm = Literal["none", "plain", "head", "width"]


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Attention whose keys and values are made from one narrow vector per token (DeepSeek-AI, DeepSeek-V2, 2024).

    Parameters
    ----------
    kv_rank : int
        Width of that vector, from which all heads' keys and values are projected.
    query_rank : int, optional
        Width of the same for queries. By default queries are projected from the residual stream.
    nope_dim, rope_dim : int
        Width of a head's query and key without positions, and with rotary positions. All heads share the latter of the
        key.
    value_dim : int
        Width of a head's value.

    Raises
    ------
    InputError
        For a width below 1.
    """

    kv_rank: int
    query_rank: int | None = None
    nope_dim: int
    rope_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("kv_rank", "nope_dim", "rope_dim", "value_dim"):
            check_whole(name, getattr(self, name), least=1)
        if self.query_rank is not None:
            check_whole("query_rank", self.query_rank, least=1)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in the place of an MLP.

    Parameters
    ----------
    count : int
        Experts E, each an MLP.
    active : int
        How many of them each token goes through, k.
    intermediate : int
        Width of an expert.
    shared_intermediate : int
        Width of the MLP that every token goes through besides; 0 if there is none. Several shared experts are one MLP
        of their widths together.
    shared_gate : bool
        Whether each token weighs the shared MLP by a number that a projection of its own gives.
    router_bias : bool
        Whether the router has a number for each expert besides its matrix: a bias, or the correction that balances the
        load.

    Raises
    ------
    InputError
        If the numbers do not fit together.
    """

    count: int
    active: int
    intermediate: int
    shared_intermediate: int = 0
    shared_gate: bool = False
    router_bias: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("count", "active", "intermediate"):
            check_whole(name, getattr(self, name), least=1)
        check_whole("shared_intermediate", self.shared_intermediate, least=0)
        if self.active > self.count:
            raise InputError(f"active {self.active} exceeds the {self.count} experts: take at most so many")
        if self.shared_gate and not self.shared_intermediate:
            raise InputError("shared_gate weighs a shared MLP, and shared_intermediate is 0: give its width")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a transformer; its fields are those of `Transformer`, as they hold for this block.

    experts: in the place of the MLP, whose `intermediate` then is not used. window: how many positions a token sees,
    itself and those before it; if `chunked`, those of its own chunk of so many positions.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary: bool
    gated: bool
    norm: Norm
    norms: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: QueryKeyNorm
    sinks: bool
    latent: LatentAttention | None
    experts: Experts | None
    window: int | None
    chunked: bool

    @property
    def query_width(self) -> int:
        """Width of all queries together, a d."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all keys together, as attention takes them."""
        return self.query_width if self.latent else self.kv_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's value and output."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def value_width(self) -> int:
        """Width of all values together, as attention takes them."""
        return (self.heads if self.latent else self.kv_heads) * self.value_dim

    @property
    def output_width(self) -> int:
        """Width of attention's output before its projection."""
        return self.heads * self.value_dim

    @property
    def norm_parameters(self) -> int:
        """Of one norm of the residual stream."""
        return self.hidden * (2 if self.norm == "layernorm" else 1)

    @property
    def words(self) -> str:
        """What tells the block from others of its model."""
        mlp = "dense" if self.experts is None else f"{self.experts.active} of {self.experts.count} experts"
        if self.window is None:
            return mlp
        return f"{mlp}, {'chunks' if self.chunked else 'window'} of {self.window}"

    def parameters(self, *, tp: int = 1, ep: int = 1, expert_tp: int = 1) -> int:
        """How many parameters one rank holds of the block: see `Transformer.shard_parameters`."""
        return (
            self.attention_parameters(tp) + self._mlp_parameters(tp, ep, expert_tp) + self.norms * self.norm_parameters
        )

    @property
    def active_parameters(self) -> int:
        """Of the block, those that one token goes through."""
        if self.experts is None:
            return self.parameters()
        idle = self.experts.count - self.experts.active
        return self.parameters() - idle * self.expert_parameters(1)

    def attention_parameters(self, tp: int) -> int:
        """Of attention on one of `tp` ranks."""
        output = self.output_width // tp * self.hidden + self.hidden * self.output_bias
        extra = (self.heads // tp if self.sinks else 0) + self._qk_norm_parameters(tp)
        if self.latent is None:
            made = (self.query_width + self.key_width + self.value_width) // tp
            return made * (self.hidden + self.qkv_bias) + output + extra
        latent = self.latent
        query_rank, query = latent.query_rank, self.query_width // tp
        # The projections to the narrow vectors, and their norms, are whole on every rank.
        narrow = latent.kv_rank + latent.rope_dim
        queries = self.hidden * query if query_rank is None else query_rank * (self.hidden + 1 + query)
        biases = (narrow + (query_rank or 0)) * self.qkv_bias
        made = self.heads // tp * (latent.nope_dim + latent.value_dim)
        return queries + self.hidden * narrow + latent.kv_rank * (1 + made) + biases + output + extra

    def expert_parameters(self, expert_tp: int) -> int:
        """Of one expert on one of `expert_tp` ranks."""
        return 0 if self.experts is None else self._dense_parameters(self.experts.intermediate // expert_tp)

    def pairs(self, seq: int, *, masked: bool) -> int:
        """Pairs of (query, key) whose score one head computes for a sequence: see `Transformer.pairs`."""
        if not masked:
            return seq * seq
        window = seq if self.window is None else min(seq, self.window)
        if self.chunked:
            whole, rest = divmod(seq, window)
            return whole * _triangle(window) + _triangle(rest)
        return _triangle(window) + (seq - window) * window

    def undivided(self, tp: int, ep: int = 1, expert_tp: int = 1) -> str | None:
        """Of the first width that so many ranks cannot share evenly: what it is and how much, and how many ranks."""
        widths = {"heads": self.heads}
        if self.latent is None:
            widths["kv_heads"] = self.kv_heads
        if self.experts is None:
            widths["intermediate"] = self.intermediate
        elif self.experts.shared_intermediate:
            widths["shared_intermediate"] = self.experts.shared_intermediate
        shares = [("tp", tp, name, width) for name, width in widths.items()]
        if self.experts is not None:
            shares.append(("expert_tp", expert_tp, "intermediate of experts", self.experts.intermediate))
            shares.append(("ep", ep, "the count of experts", self.experts.count))
        for ranks, count, name, width in shares:
            if width % count:
                return f"{ranks} {count} must divide {name} {width}: take a divisor"
        return None

    def _mlp_parameters(self, tp: int, ep: int, expert_tp: int) -> int:
        experts = self.experts
        if experts is None:
            return self._dense_parameters(self.intermediate // tp)
        router = experts.count * (self.hidden + experts.router_bias)
        own = experts.count // ep * self.expert_parameters(expert_tp)
        shared = self._dense_parameters(experts.shared_intermediate // tp) if experts.shared_intermediate else 0
        return router + own + shared + self.hidden * experts.shared_gate

    def _dense_parameters(self, width: int) -> int:
        """Of an MLP of this width."""
        ups = 2 if self.gated else 1
        return self.hidden * width * (ups + 1) + (ups * width + self.hidden) * self.mlp_bias

    def _qk_norm_parameters(self, tp: int) -> int:
        if self.qk_norm == "head":
            return 2 * self.head_dim
        return (self.query_width + self.key_width) // tp if self.qk_norm == "width" else 0


def _triangle(width: int) -> int:
    return width * (width + 1) // 2
