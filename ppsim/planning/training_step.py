"""Training step: a model, how it is spread over devices, and how its microbatches run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.checks import check_fields, check_whole
from ppsim.errors import InputError
from ppsim.estimate.layer_work import block_work, embedding_work, head_work
from ppsim.estimate.machine import Machine, Seconds
from ppsim.estimate.transformer import Transformer
from ppsim.estimate.work import Attention, Execution, LayerWork, Recompute
from ppsim.schedule.named.registry import schedule_copies, schedule_placement, unmet_requirement

Sharding = Literal["none", "optimizer"]
_VOCABULARY_MULTIPLE = 128  # columns of a rank: Megatron-LM's --make-vocab-size-divisible-by


class LayerWorks(NamedTuple):
    """What a microbatch makes of each kind of layer, on one tensor-parallel rank; blocks as in `Transformer.kinds`."""

    embedding: LayerWork
    blocks: tuple[LayerWork, ...]
    head: LayerWork

    @property
    def layers(self) -> tuple[LayerWork, ...]:
        """All of them in this order."""
        return self.embedding, *self.blocks, self.head


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """One optimizer step of a transformer on tp x cp x dp x pp devices.

    Parameters
    ----------
    model : Transformer
        The model's shapes. Where tp cuts the vocabulary, it is padded so that each rank has a multiple of 128 columns.
    seq : int
        Tokens of a sample.
    micro_batch_size, microbatches : int
        b samples in each of m microbatches of a replica.
    tp, dp, pp : int
        Tensor-parallel ranks, data-parallel replicas and pipeline ranks. Devices are numbered tp first, then
        cp, dp and pp.
    cp : int
        Context-parallel ranks that share each sequence. They hold the same weights, so that their gradients are added
        up as those of replicas are.
    ep, expert_tp : int
        Ranks of a pipeline stage over which experts are dealt, and tensor-parallel ranks that share each, by default
        all of them. Copies of the same experts are on what is left of a stage's ranks.
    schedule : str
        A name of `ppsim.schedule_names()`.
    stages_per_rank : int
        v.
    blocks : tuple of int, optional
        Blocks of each stage; the embedding goes with the first stage and the head with the last. By default as even as
        can be.
    recompute, attention, dropout, sequence_parallel, softmax_multiple, float32_loss
        As in `ppsim.Execution`.
    gradient_bytes : int
        Bytes of an element of the gradients that replicas add up.
    sharding : "none" or "optimizer"
        "optimizer" cuts master weights and moments over the replicas (ZeRO-1: Rajbhandari et al., 2020).
    overlap_gradients : float
        The share of the last backward under which the sum over replicas can hide, from 0 to 1.

    Raises
    ------
    InputError
        If the numbers do not fit together.
    """

    model: Transformer
    seq: int
    micro_batch_size: int
    microbatches: int
    tp: int = 1
    dp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    expert_tp: int | None = None
    schedule: str = "1f1b"
    stages_per_rank: int = 1
    blocks: tuple[int, ...] | None = None
    recompute: Recompute = "none"
    attention: Attention = "fused"
    dropout: bool = False
    sequence_parallel: bool = False
    softmax_multiple: int = 1
    float32_loss: bool = False
    gradient_bytes: int = 2
    sharding: Sharding = "none"
    overlap_gradients: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in (
            "seq",
            "micro_batch_size",
            "microbatches",
            "tp",
            "dp",
            "pp",
            "cp",
            "stages_per_rank",
            "gradient_bytes",
        ):
            check_whole(name, getattr(self, name))
        if not 0 <= self.overlap_gradients <= 1:
            raise InputError(f"overlap_gradients must be a share from 0 to 1, got {self.overlap_gradients!r}")
        if self.blocks is None:
            if self.model.layers < self.stages:
                raise InputError(
                    f"{self.model.layers} blocks do not fill {self.stages} stages: take fewer ranks or stages per rank"
                )
        elif len(self.blocks) != self.stages or sum(self.blocks) != self.model.layers or min(self.blocks) < 0:
            raise InputError(
                f"blocks {self.blocks} do not cut {self.model.layers} blocks into {self.stages} stages: give so many "
                "numbers of 0 or more that add up"
            )
        if self.model.mtp_layers:
            raise InputError("layers that predict further tokens are not modelled in a training step: leave them out")
        self.model.check_shards(self.tp, ep=self.ep, expert_tp=self.expert_tp)
        dealt = self.ep * self.execution.expert_ranks  # and the execution checks its own fields
        if self.model.experts is not None and self.stage_ranks % dealt:
            raise InputError(
                f"ep {self.ep} x expert_tp {self.execution.expert_ranks} = {dealt} ranks for experts must divide the "
                f"{self.stage_ranks} ranks of a pipeline stage: take a divisor"
            )
        self.model.check_seq(self.seq)
        if schedule_copies(self.schedule) > 1:
            raise InputError(
                f"{self.schedule} holds {schedule_copies(self.schedule)} copies of the model, which a training step "
                "does not count: take a schedule in one direction"
            )
        complaint = unmet_requirement(self.schedule, self.pp, self.microbatches, self.stages_per_rank)
        if complaint:
            raise InputError(complaint)

    @property
    def devices(self) -> int:
        """tp cp dp pp."""
        return self.stage_ranks * self.pp

    @property
    def stage_ranks(self) -> int:
        """tp cp dp, the devices of a pipeline rank."""
        return self.tp * self.cp * self.dp

    @property
    def replicas(self) -> int:
        """cp dp, how many ranks hold copies of the same weights, experts excepted."""
        return self.cp * self.dp

    @property
    def stages(self) -> int:
        """p v."""
        return self.pp * self.stages_per_rank

    @property
    def global_batch(self) -> int:
        """Samples of a step."""
        return self.micro_batch_size * self.microbatches * self.dp

    @property
    def words(self) -> str:
        """The way in one line, for messages and figures."""
        chunks = f" x {self.stages_per_rank}" if self.stages_per_rank > 1 else ""
        context = f", cp {self.cp}" if self.cp > 1 else ""
        experts = f", ep {self.ep}" if self.model.experts is not None else ""
        return (
            f"tp {self.tp}, pp {self.pp}, dp {self.dp}{context}{experts}, micro batch {self.micro_batch_size}, "
            f"{self.schedule}{chunks}, recompute {self.recompute}"
        )

    @cached_property
    def placement(self) -> npt.NDArray[np.int64]:
        """The pipeline rank of each stage, shape (stages,)."""
        return np.array(schedule_placement(self.schedule, self.pp, self.stages_per_rank), np.int64)

    @cached_property
    def stage_blocks(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        if self.blocks is not None:
            return self.blocks
        least, more = divmod(self.model.layers, self.stages)
        # Stages in the middle take what is left over: the first has the embedding besides, and the last the head.
        first = (self.stages - more) // 2
        return tuple(least + (first <= stage < first + more) for stage in range(self.stages))

    @cached_property
    def padded_model(self) -> Transformer:
        """The model with a vocabulary that tp cuts into equal parts."""
        return _padded_model(self.model, self.tp)

    @cached_property
    def execution(self) -> Execution:
        """How a microbatch is computed."""
        return Execution(
            micro_batch_size=self.micro_batch_size,
            seq=self.seq,
            tp=self.tp,
            split_vocabulary=self.tp > 1,
            attention=self.attention,
            dropout=self.dropout,
            recompute=self.recompute,
            sequence_parallel=self.sequence_parallel and self.tp > 1,
            joint_projections=True,
            softmax_multiple=self.softmax_multiple,
            float32_loss=self.float32_loss,
            ep=self.ep,
            expert_tp=self.expert_tp,
            cp=self.cp,
        )

    @cached_property
    def layer_key(self) -> tuple[Transformer, Execution]:
        """What the work of layers depends on: a model with a block of each kind, and its execution."""
        return _shortest(self.padded_model), self.execution

    @property
    def layer_shapes(self) -> tuple[str, str]:
        """Names of what the time of its layers depends on: of embedding and head, and of its blocks."""
        return _layer_shapes(*self.layer_key)

    @property
    def layer_works(self) -> LayerWorks:
        """The work of its layers."""
        return works_of(*self.layer_key)

    @cached_property
    def rank_parameters(self) -> npt.NDArray[np.float64]:
        """How many parameters each pipeline rank holds, shape (p,); a tied table stands on both ends of a pipeline."""
        embedding, *blocks, head = (
            each.parameter_bytes // self.execution.dtype_bytes for each in self.layer_works.layers
        )
        stages = self.stage_kinds @ np.array(blocks, np.float64)
        stages[0] += embedding
        stages[-1] += head
        if self.model.tied and self.pp == 1:
            stages[-1] -= self.table_parameters
        return self._by_rank(stages)

    @cached_property
    def rank_expert_parameters(self) -> npt.NDArray[np.float64]:
        """Of them, those of experts, which have copies on other ranks than the rest, shape (p,)."""
        ranks = self.execution.expert_ranks
        own = [
            0 if kind.experts is None else kind.experts.count // self.ep * kind.expert_parameters(ranks)
            for kind in self.model.kinds
        ]
        return self._by_rank(self.stage_kinds @ np.array(own, np.float64))

    @property
    def expert_replicas(self) -> int:
        """How many ranks hold copies of the same experts."""
        return self.stage_ranks // (self.ep * self.execution.expert_ranks) if self.model.experts else self.replicas

    @cached_property
    def stage_kinds(self) -> npt.NDArray[np.float64]:
        """How many blocks of each kind each stage has, shape (stages, kinds)."""
        kinds, blocks = self.model.kinds, self.model.blocks
        if len(kinds) == 1:
            return np.array(self.stage_blocks, np.float64)[:, None]
        numbers = {id(kind): number for number, kind in enumerate(kinds)}
        found = np.zeros((self.stages, len(kinds)))
        stage = np.repeat(np.arange(self.stages), self.stage_blocks)
        np.add.at(found, (stage, np.array([numbers[id(block)] for block in blocks], np.int64)), 1.0)
        return found

    def _by_rank(self, stages: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.bincount(self.placement, weights=stages, minlength=self.pp).astype(np.float64)

    @property
    def table_parameters(self) -> int:
        """How many parameters of the table of tokens one tensor-parallel rank holds."""
        return self.padded_model.vocabulary // self.tp * self.model.hidden


@lru_cache(maxsize=4096)
def _padded_model(model: Transformer, tp: int) -> Transformer:
    if tp == 1:
        return model
    multiple = _VOCABULARY_MULTIPLE * tp
    return replace(model, vocabulary=-(-model.vocabulary // multiple) * multiple)


@lru_cache(maxsize=4096)
def _shortest(model: Transformer) -> Transformer:
    """The same for any depth, if blocks do not differ."""
    if len(model.kinds) > 1:
        return model
    return replace(model, layers=1, dense_blocks=model.dense_blocks[:1], full_blocks=model.full_blocks[:1])


@lru_cache(maxsize=4096)
def works_of(model: Transformer, execution: Execution) -> LayerWorks:
    """The work of a model's layers on one tensor-parallel rank."""
    blocks = tuple(block_work(kind, execution) for kind in model.kinds)
    return LayerWorks(embedding_work(model, execution), blocks, head_work(model, execution))


@lru_cache(maxsize=4096)
def _layer_shapes(model: Transformer, execution: Execution) -> tuple[str, str]:
    said = f"{_said(model)}; {_said(execution)}"
    return f"ends: {said}", f"blocks: {said}"


def _said(value: Transformer | Execution) -> str:
    """The fields that are not as by default."""
    pairs = ((each, getattr(value, each.name)) for each in fields(value))
    return ", ".join(
        f"{each.name} {given}" for each, given in pairs if each.default is MISSING or given != each.default
    )


def measured_factors(keys: Sequence[tuple[Transformer, Execution]], machine: Machine) -> Seconds | None:
    """The machine's factors of the layers of `works_of` of each key, one key after another; None if it has none."""
    if not machine.layer_factors:
        return None
    found = []
    for model, execution in keys:
        ends, blocks = (machine.layer_factors.get(name, 1.0) for name in _layer_shapes(model, execution))
        found += [ends, *[blocks] * len(model.kinds), ends]
    return np.array(found)
