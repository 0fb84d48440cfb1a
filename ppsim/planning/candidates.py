"""Candidates: the ways to spread a training step over devices."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import product

from ppsim.checks import check_fields, check_whole
from ppsim.errors import InputError
from ppsim.estimate.machine import Machine
from ppsim.estimate.transformer import Transformer
from ppsim.estimate.work import Recompute
from ppsim.planning.training_step import TrainingStep
from ppsim.schedule.named.registry import (
    natural_stages_per_rank,
    schedule_copies,
    takes_stages_per_rank,
    unmet_requirement,
)

# Chosen: so that one candidate is simulated within about a second.
_MOST_RANKS = 1024  # ranks of a pipeline; published runs have up to 64
_MOST_ACTIONS = 2_000_000
# Chosen, between 0 and 1: frameworks sum gradients bucket by bucket, and the first buckets are ready early in the last
# backward, the last ones only at its end.
_OVERLAP = 0.5


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices of one kind.

    Parameters
    ----------
    machine : Machine
        What they are.
    devices : int
        N, how many.

    Raises
    ------
    InputError
        For less than one device.
    """

    machine: Machine
    devices: int

    def __post_init__(self) -> None:
        check_fields(self)
        check_whole("devices", self.devices)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a plan may choose from. Numbers are 1 or more, and no list is empty.

    Parameters
    ----------
    schedules : sequence of str
        Names of schedules.
    stages_per_rank : sequence of int
        v of schedules that leave it free.
    micro_batch_sizes : sequence of int
        b.
    recompute : sequence of str
        "none", "full".
    tp, pp : sequence of int, optional
        By default powers of two up to a node, and divisors of what is left.
    cp : sequence of int
        Context-parallel ranks. By default 1 alone.
    ep : sequence of int, optional
        Ranks over which experts are dealt, each expert whole on its rank. By default powers of two. Models without
        experts take 1 alone.

    Raises
    ------
    InputError
        For an empty list, an unknown schedule, or a number below 1.
    """

    schedules: Sequence[str] = ("1f1b", "interleaved-1f1b", "zb-h1", "zb-v")
    stages_per_rank: Sequence[int] = (2, 3, 4, 6, 8)
    micro_batch_sizes: Sequence[int] = (1, 2, 4, 8, 16)
    recompute: Sequence[Recompute] = ("none", "full")
    tp: Sequence[int] | None = None
    pp: Sequence[int] | None = None
    ep: Sequence[int] | None = None
    cp: Sequence[int] = (1,)

    def __post_init__(self) -> None:
        check_fields(self)
        for each in fields(self):
            given = getattr(self, each.name)
            if given is None:
                continue
            if not len(given):
                raise InputError(f"{each.name} is empty: give at least one")
            for number, value in enumerate(given):
                if not isinstance(value, str):
                    check_whole(f"{each.name}[{number}]", value)
        for name in self.schedules:
            if schedule_copies(name) > 1:  # it refuses an unknown one
                raise InputError(
                    f"{name} holds {schedule_copies(name)} copies of the model, which a plan does not count: take "
                    "schedules in one direction"
                )


def candidates(
    model: Transformer, cluster: Cluster, *, seq: int, global_batch: int, choices: Choices
) -> Iterator[TrainingStep]:
    """All steps that use all devices and divide the batch, the blocks and the heads."""
    most_ranks = min(model.layers, _MOST_RANKS)
    for tp in _powers(cluster.machine.devices_per_node) if choices.tp is None else choices.tp:
        if cluster.devices % tp or seq % tp or not model.shards(tp, expert_tp=1):
            continue
        for cp, pp in product(choices.cp, range(1, most_ranks + 1) if choices.pp is None else choices.pp):
            if (cluster.devices // tp) % (cp * pp) or pp > most_ranks or seq % (cp * tp):
                continue
            dp = cluster.devices // tp // cp // pp
            dealings = _expert_ranks(choices, model, tp * cp * dp)
            for size in choices.micro_batch_sizes:
                if global_batch % (dp * size):
                    continue
                for schedule, chunks in _pipelines(choices, pp, global_batch // (dp * size), model.layers):
                    for ep, recompute in product(dealings, choices.recompute):
                        yield TrainingStep(
                            model=model,
                            seq=seq,
                            micro_batch_size=size,
                            microbatches=global_batch // (dp * size),
                            tp=tp,
                            dp=dp,
                            pp=pp,
                            cp=cp,
                            ep=ep,
                            expert_tp=None if model.experts is None else 1,
                            schedule=schedule,
                            stages_per_rank=chunks,
                            recompute=recompute,
                            sequence_parallel=tp > 1,
                            sharding="optimizer" if cp * dp > 1 else "none",
                            gradient_bytes=4,
                            overlap_gradients=_OVERLAP,
                        )


@lru_cache(maxsize=4096)
def balanced_blocks(layers: int, stages: int, first: float, last: float) -> tuple[int, ...]:
    """Blocks of each stage so that the slowest stage is as quick as can be.

    first, last: what embedding and head take, in units of a block.

    >>> balanced_blocks(10, 4, 0.1, 2.0)
    (3, 3, 3, 1)
    """
    loads = [(0.0, stage) for stage in range(stages)]
    loads[0] = (first, 0)
    loads[-1] = (loads[-1][0] + last, stages - 1)
    blocks = [0] * stages
    heapq.heapify(loads)
    for _ in range(layers):
        load, stage = heapq.heappop(loads)
        blocks[stage] += 1
        heapq.heappush(loads, (load + 1, stage))
    return tuple(blocks)


@lru_cache(maxsize=4096)
def balanced_runs(loads: tuple[float, ...], stages: int, first: float, last: float) -> tuple[int, ...]:
    """How many of the loads, in their order, each stage takes so that the largest sum is as small as can be.

    first, last: what the first and the last stage have besides.

    >>> balanced_runs((1.0, 1.0, 1.0, 4.0, 4.0), 3, 0.5, 0.0)
    (3, 1, 1)
    """
    low, high = 0.0, first + sum(loads) + last
    best = (len(loads), *[0] * (stages - 1))
    for _ in range(60):  # halves the range to a float's last bits
        middle = (low + high) / 2
        found = _runs(loads, stages, first, last, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _runs(loads: tuple[float, ...], stages: int, first: float, last: float, most: float) -> tuple[int, ...] | None:
    """Stages filled one after another up to `most`; None if not all fits."""
    filled = [0.0] * stages
    filled[0] += first
    filled[-1] += last
    if max(filled) > most:
        return None
    counts, stage = [0] * stages, 0
    for load in loads:
        while filled[stage] + load > most:
            stage += 1
            if stage == stages:
                return None
        counts[stage] += 1
        filled[stage] += load
    return tuple(counts)


def _expert_ranks(choices: Choices, model: Transformer, ranks: int) -> list[int]:
    """How many of a stage's ranks experts may be dealt over."""
    if model.experts is None:
        return [1]
    given = _powers(ranks) if choices.ep is None else choices.ep
    return [ep for ep in given if ranks % ep == 0 and model.experts.count % ep == 0]


def _pipelines(choices: Choices, pp: int, microbatches: int, layers: int) -> Iterator[tuple[str, int]]:
    """Schedules and stages per rank; one rank needs no schedule."""
    if pp == 1:
        yield "1f1b", 1
        return
    for schedule in choices.schedules:
        is_free = takes_stages_per_rank(schedule)
        for chunks in choices.stages_per_rank if is_free else (natural_stages_per_rank(schedule),):
            if chunks * pp > layers or 3 * chunks * pp * microbatches > _MOST_ACTIONS or microbatches < pp:
                continue
            # Megatron-LM and PyTorch take rounds of p microbatches in interleaved schedules.
            if (is_free and microbatches % pp) or unmet_requirement(schedule, pp, microbatches, chunks):
                continue
            yield schedule, chunks


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]
