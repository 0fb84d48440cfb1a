"""Planner: which way to spread and schedule a training step is fastest within memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ppsim.checks import check_whole, checked
from ppsim.errors import InputError
from ppsim.estimate.layer_times import LayerTable
from ppsim.estimate.machine import Machine
from ppsim.estimate.transformer import Transformer
from ppsim.estimate.work import Execution
from ppsim.planning.candidates import Choices, Cluster, balanced_blocks, balanced_runs, candidates
from ppsim.planning.plans import Plan, Plans
from ppsim.planning.step_memory import MEMORY_KINDS, StepMemory, least_memory, step_memory
from ppsim.planning.step_table import StepSeconds, StepTable
from ppsim.planning.training_step import TrainingStep, measured_factors, works_of

_ROUND = 64  # plans that are simulated before bounds are looked at again
_PARTS = {
    "compute": "computation",
    "tensor": "tensor- and context-parallel communication",
    "experts": "communication of experts",
    "bubble": "bubble",
    "gradients": "gradients' sum over replicas",
    "optimizer": "optimizer",
    "tied": "sum of the tied table",
}


@checked
def plan(
    model: Transformer,
    cluster: Cluster,
    *,
    global_batch: int,
    seq: int,
    choices: Choices | None = None,
    memory_limit_bytes: int | None = None,
    keep: int = 20,
) -> Plans:
    """Rank the ways to run one training step of a model on a cluster.

    Parameters
    ----------
    model : Transformer
        The model's shapes.
    cluster : Cluster
        The devices. All of them are used.
    global_batch : int
        Samples of a step.
    seq : int
        Tokens of a sample.
    choices : Choices, optional
        What may be chosen from.
    memory_limit_bytes : int, optional
        Of a device; by default all that it has.
    keep : int
        How many of the fastest must be predicted exactly. Others are ruled out by a bound where it is slower than
        these.

    Returns
    -------
    Plans
        The ranked, and for every loser the reason.

    Raises
    ------
    InputError
        If no way divides the devices and the batch, or none fits; the message says what comes nearest.

    Notes
    -----
    Times are those of `predict_steps`, memory that of `step_memory`. Gradients are summed in float32, the optimizer's
    state is cut over the replicas, and half of the last backward hides the sum. Blocks are cut evenly, and also so that
    embedding and head count as what they take.

    Examples
    --------
    >>> import ppsim
    >>> gpt = ppsim.Transformer.gpt(layers=24, hidden=2048, heads=16, vocabulary=51_200, positions=2048)
    >>> cluster = ppsim.Cluster(machine=ppsim.named_machine("a100"), devices=8)
    >>> plans = ppsim.plan(gpt, cluster, global_batch=64, seq=2048)
    >>> plans.best.step.devices, plans.best.fits
    (8, True)
    """
    machine = cluster.machine
    limit = machine.memory_bytes if memory_limit_bytes is None else memory_limit_bytes
    for name, value in (("global_batch", global_batch), ("seq", seq), ("keep", keep), ("memory_limit_bytes", limit)):
        check_whole(name, value)
    steps = list(candidates(model, cluster, seq=seq, global_batch=global_batch, choices=choices or Choices()))
    if not steps:
        raise InputError(
            f"no choice of tp, pp and micro batch divides {cluster.devices} devices, {global_batch} samples and "
            f"{model.layers} blocks: take another global_batch or number of devices, or more choices"
        )
    steps = _with_balanced(steps, machine)
    table = StepTable(steps)
    bounds = table.bounds_s(machine)
    memories = [least_memory(step) for step in steps]
    is_hopeless = np.array([memory.total.max() > limit for memory in memories])
    is_exact = np.zeros(len(steps), bool)
    found = _Found(table, machine)
    order = [int(row) for row in np.argsort(bounds, kind="stable") if not is_hopeless[row]]
    for first in range(0, len(order), _ROUND):
        if found.is_enough(keep, bounds[order[first]]):
            break
        rows = order[first : first + _ROUND]
        for row in rows:
            memories[row], is_exact[row] = step_memory(steps[row]), True
        found.add([row for row in rows if memories[row].total.max() <= limit])
    if not found.rows:
        nearest = min(range(len(steps)), key=lambda row: float(memories[row].total.max()))
        raise InputError(
            f"none of {len(steps)} plans fits {limit / 1e9:.1f} GB: the smallest ({steps[nearest].words}) "
            f"{_excess(memories[nearest], limit, is_exact[nearest])}; take more devices, or larger ones"
        )
    peak_s = _model_flops(model, seq) * global_batch / (cluster.devices * machine.flops_per_s)
    ranked = sorted(
        (_predicted(steps[row], found, row, memories[row], peak_s) for row in found.rows),
        key=lambda each: each.step_s,
    )
    best = replace(ranked[0], reason="the fastest that fits")
    slower = [replace(each, reason=_why_slower(each, best)) for each in ranked[1:]]
    known = set(found.rows)
    rest = [
        _lost(steps[row], float(bounds[row]), memories[row], bool(is_exact[row]), limit, best, peak_s)
        for row in sorted(range(len(steps)), key=lambda row: (bool(is_hopeless[row]), float(bounds[row])))
        if row not in known
    ]
    return Plans(ranked=(best, *slower), losers=(*slower, *rest))


class _Found:
    """Plans that were simulated."""

    def __init__(self, table: StepTable, machine: Machine) -> None:
        self._table, self._machine = table, machine
        self.rows: list[int] = []
        self.parts: dict[int, dict[str, float]] = {}

    def add(self, rows: list[int]) -> None:
        """Simulate steps of the table."""
        if rows:
            seconds = self._table.seconds(self._machine, rows)
            self.rows += rows
            self.parts |= {row: _parts(seconds, row) for row in rows}

    def is_enough(self, keep: int, bound_s: float) -> bool:
        """Whether `keep` plans are faster than a bound of all that are left."""
        if len(self.rows) < keep:
            return False
        return sorted(sum(parts.values()) for parts in self.parts.values())[keep - 1] < bound_s


def _predicted(step: TrainingStep, found: _Found, row: int, memory: StepMemory, peak_s: float) -> Plan:
    parts = found.parts[row]
    seconds = sum(parts.values())
    return Plan(
        step=step,
        step_s=seconds,
        is_bound=False,
        parts_s=parts,
        memory_bytes=_worst(memory),
        utilisation=peak_s / seconds,
        fits=True,
        reason="",
    )


def _lost(
    step: TrainingStep, bound_s: float, memory: StepMemory, is_exact: bool, limit: int, best: Plan, peak_s: float
) -> Plan:
    """A plan that does not fit, or that a bound ruled out."""
    is_large = bool(memory.total.max() > limit)
    share = bound_s / best.step_s - 1
    slow = f"at least {share:.1%} slower: no order of its work takes less than {bound_s:.4g} s"
    return Plan(
        step=step,
        step_s=bound_s,
        is_bound=True,
        parts_s={},
        memory_bytes=_worst(memory),
        utilisation=peak_s / bound_s,
        fits=False if is_large else None,
        reason=_excess(memory, limit, is_exact) if is_large else slow,
    )


def _with_balanced(steps: Sequence[TrainingStep], machine: Machine) -> list[TrainingStep]:
    """The steps, and after each the one whose blocks make up for embedding and head, where that differs."""
    distinct = {step.layer_key: step for step in steps}
    works = [(work, step.execution) for step in distinct.values() for work in step.layer_works.layers]
    seconds = LayerTable(works).seconds(machine, measured_factors(list(distinct), machine))
    taken = iter((seconds.forward + seconds.backward).tolist())
    loads = {key: [next(taken) for _ in step.layer_works.layers] for key, step in distinct.items()}
    found = []
    for step in steps:
        found.append(step)
        if step.stages > 1:
            first, *blocks_s, last = loads[step.layer_key]
            blocks = _balanced(step.model, tuple(blocks_s), step.stages, first, last)
            if blocks != step.stage_blocks:
                found.append(replace(step, blocks=blocks))
    return found


def _balanced(
    model: Transformer, blocks_s: tuple[float, ...], stages: int, first_s: float, last_s: float
) -> tuple[int, ...]:
    """Blocks of each stage so that the slowest stage is as quick as can be, by the seconds of each kind of block."""
    if len(blocks_s) == 1:
        return balanced_blocks(model.layers, stages, first_s / blocks_s[0], last_s / blocks_s[0])
    by_kind = {id(kind): seconds for kind, seconds in zip(model.kinds, blocks_s, strict=True)}
    return balanced_runs(tuple(by_kind[id(block)] for block in model.blocks), stages, first_s, last_s)


def _model_flops(model: Transformer, seq: int) -> float:
    """FLOPs of the model for one sample: forward thrice, nothing computed again."""
    embedding, blocks, head = works_of(model, Execution(micro_batch_size=1, seq=seq))
    flops = {id(kind): work.forward_flops for kind, work in zip(model.kinds, blocks, strict=True)}
    return 3.0 * (embedding.forward_flops + sum(flops[id(block)] for block in model.blocks) + head.forward_flops)


def _parts(seconds: StepSeconds, row: int) -> dict[str, float]:
    """Parts of one step, which add up to it."""
    whole, tensor, experts = (float(each[row]) for each in (seconds.step, seconds.tensor, seconds.experts))
    parts = {
        "compute": float(seconds.busy[row]) - tensor - experts,
        "tensor": tensor,
        "experts": experts,
        "gradients": float(seconds.gradients[row]),
        "optimizer": float(seconds.optimizer[row]),
        "tied": float(seconds.tied[row]),
    }
    return {name: parts.get(name, whole - sum(parts.values())) for name in _PARTS}


def _worst(memory: StepMemory) -> dict[str, int]:
    rank = int(memory.total.argmax())
    return {name: int(getattr(memory, name)[rank]) for name in MEMORY_KINDS}


def _excess(memory: StepMemory, limit: int, is_exact: bool) -> str:
    kinds = _worst(memory)
    total = sum(kinds.values())
    largest = max(kinds, key=lambda name: kinds[name])
    return (
        f"needs {'' if is_exact else 'at least '}{total / 1e9:.1f} GB on rank {int(memory.total.argmax())}, "
        f"{(total - limit) / 1e9:.3g} GB more than {limit / 1e9:.1f} GB; most of it {largest}, "
        f"{kinds[largest] / 1e9:.1f} GB"
    )


def _why_slower(plan: Plan, best: Plan) -> str:
    more = {name: plan.parts_s[name] - best.parts_s[name] for name in _PARTS}
    worst = max(more, key=lambda name: more[name])
    return f"{plan.step_s / best.step_s - 1:.1%} slower: {more[worst]:.3g} s more {_PARTS[worst]}"
