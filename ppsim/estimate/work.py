"""Work: the FLOPs and the bytes of a transformer's layers, operation by operation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ppsim.checks import check_fields, check_whole
from ppsim.errors import InputError

Recompute = Literal["none", "selective", "full"]
Attention = Literal["fused", "unfused"]
INDEX_BYTES = 8  # a token id is int64
STATISTIC_BYTES = 4  # means, reciprocal deviations and log-sum-exps are float32


class Product(NamedTuple):
    """`times` products of (rows, inner) by (inner, columns) in one kernel."""

    rows: int
    columns: int
    inner: int
    times: int = 1


@dataclass(frozen=True, kw_only=True)
class Work:
    """flops: of matrix products, 2 m n k each; nothing else counts. traffic_bytes: read from and written to memory.

    products: the shapes of those products, each a kernel. None for one fused kernel, and where memory only moves.
    """

    flops: int = 0
    traffic_bytes: int = 0
    products: tuple[Product, ...] = ()


_NOTHING = Work()


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of a layer: its forward, its backward for the input and for the weights."""

    name: str
    forward: Work
    backward_input: Work = _NOTHING
    backward_weight: Work = _NOTHING


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How one microbatch is computed on one rank.

    micro_batch_size: b. seq: s. dtype_bytes: of a weight and of an activation alike. tp: t tensor-parallel ranks
    (Shoeybi et al., Megatron-LM, 2019). split_vocabulary: whether tp cuts embedding and head too; otherwise
    every rank has them whole. attention: "fused" keeps no scores and computes them again in the backward (five
    products instead of four: Dao et al., FlashAttention, 2022); "unfused" keeps them. skip_masked: whether fused
    attention leaves out masked pairs; unfused attention never does. dropout: masks of one byte per element after
    attention and MLP, and on unfused scores. recompute: per block, "none", "selective" (unfused scores; Korthikanti et
    al., 2022) or "full" (all but the block's input). loss: whether the head computes the cross entropy.
    sequence_parallel: whether norms, dropouts and residuals are cut over the tp ranks too (Korthikanti et al., 2022);
    a block's input and output are then 1 / t. joint_projections: whether q, k, v are one product, and gate, up another.
    softmax_multiple: how many scores' matrices unfused attention's softmax kernel takes at a time; another number of
    them goes through five operations instead (Megatron-LM's fused kernel takes 4). float32_loss: whether the loss
    casts logits to float32, takes its softmax operation by operation and keeps that in float32, as Megatron-LM's does.
    ep: ranks over which a block's experts are dealt, each with a microbatch of its own. expert_tp: tensor-parallel
    ranks that share each expert, by default tp; 1 leaves experts whole, and the ranks of a tensor-parallel group are
    then some of the ep ranks. cp: context-parallel ranks that share each sequence, each with as many pairs of query and
    key as the others; fused attention passes keys and values around a ring of them (Liu et al., Ring Attention, 2023).

    Raises InputError for values that have no meaning.
    """

    micro_batch_size: int
    seq: int
    dtype_bytes: int = 2
    tp: int = 1
    split_vocabulary: bool = False
    attention: Attention = "fused"
    skip_masked: bool = True
    dropout: bool = False
    recompute: Recompute = "none"
    loss: bool = True
    sequence_parallel: bool = False
    joint_projections: bool = False
    softmax_multiple: int = 1
    float32_loss: bool = False
    ep: int = 1
    expert_tp: int | None = None
    cp: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("micro_batch_size", "seq", "dtype_bytes", "tp", "softmax_multiple", "ep", "expert_ranks", "cp"):
            check_whole(name, getattr(self, name))
        if self.recompute == "selective" and self.attention == "fused":
            raise InputError(
                "recompute 'selective' drops the attention scores, which fused attention does not keep: "
                "take 'none' or 'full', or attention 'unfused'"
            )
        if self.seq % self.cp:
            raise InputError(f"cp {self.cp} must divide seq {self.seq}: take a divisor")
        if self.cp > 1 and self.attention == "unfused":
            raise InputError("attention 'unfused' keeps scores of whole sequences: take 'fused', or cp 1")
        if self.sequence_parallel and self.seq // self.cp % self.tp:
            raise InputError(
                f"sequence parallelism cuts seq {self.seq // self.cp} over tp {self.tp} ranks: take a seq that tp "
                "divides"
            )
        if self.tp % self.expert_ranks:
            raise InputError(f"expert_tp {self.expert_ranks} must divide tp {self.tp}: take a divisor")
        if self.tp > 1 and not self.sequence_parallel and (self.ep > 1 or self.expert_ranks != self.tp):
            raise InputError(
                f"experts on ep {self.ep} ranks, each on {self.expert_ranks} of tp {self.tp}, need every rank to route "
                "tokens of its own: set sequence_parallel"
            )

    @property
    def expert_ranks(self) -> int:
        """Tensor-parallel ranks that share an expert."""
        return self.tp if self.expert_tp is None else self.expert_tp

    @property
    def tokens(self) -> int:
        """b s, or this rank's share of it: b s / c."""
        return self.micro_batch_size * self.seq // self.cp

    @property
    def stream_tokens(self) -> int:
        """Tokens of the residual stream that this rank holds between attention and MLP: all, or its share."""
        return self.tokens // self.tp if self.sequence_parallel else self.tokens


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """What one microbatch makes one layer do, on one rank.

    operations: in forward order. recomputed: those that the backward runs forward once more. forward_reduces,
    backward_reduces: all-reduces of `reduced_bytes` over the tp ranks; row_reduces: those of `row_bytes` in F.
    forward_expert_reduces, backward_expert_reduces: the same of `expert_reduced_bytes` over the ranks that share an
    expert. forward_exchanges, backward_exchanges: all-to-alls over the ep ranks, each rank with `exchanged_bytes`.
    forward_ring_bytes, backward_ring_bytes: passed on to the next context-parallel rank while attention computes.
    saved: bytes of each thing held from F to the end of B besides the output, the input among them; kept: the same from
    I to W. output_bytes, parameter_bytes.
    """

    name: str
    operations: tuple[Operation, ...]
    recomputed: tuple[Operation, ...] = ()
    forward_reduces: int = 0
    backward_reduces: int = 0
    row_reduces: int = 0
    row_bytes: int = 0
    reduced_bytes: int = 0
    forward_expert_reduces: int = 0
    backward_expert_reduces: int = 0
    expert_reduced_bytes: int = 0
    forward_ring_bytes: int = 0
    backward_ring_bytes: int = 0
    forward_exchanges: int = 0
    backward_exchanges: int = 0
    exchanged_bytes: int = 0
    saved: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    output_bytes: int = 0
    parameter_bytes: int = 0

    @property
    def forward_work(self) -> list[Work]:
        """Of F, one for each operation that has some."""
        return _some(op.forward for op in self.operations)

    @property
    def backward_input_work(self) -> list[Work]:
        """Of I, what it recomputes first; W then recomputes nothing, so a split backward pays once."""
        return _some([*(op.forward for op in self.recomputed), *(op.backward_input for op in self.operations)])

    @property
    def backward_weight_work(self) -> list[Work]:
        """Of W."""
        return _some(op.backward_weight for op in self.operations)

    @property
    def forward_flops(self) -> int:
        """FLOPs of F."""
        return sum(work.flops for work in self.forward_work)

    @property
    def backward_flops(self) -> int:
        """FLOPs of B = I + W, recomputation included."""
        return sum(work.flops for work in self.backward_input_work + self.backward_weight_work)

    @property
    def activation_bytes(self) -> int:
        """Held from F to the end of B: what is saved, and the output."""
        return sum(self.saved.values()) + self.output_bytes

    @property
    def weight_activation_bytes(self) -> int:
        """Held from the end of I to the end of W."""
        return sum(self.kept.values())


def _some(works: Iterable[Work]) -> list[Work]:
    return [work for work in works if work != _NOTHING]
