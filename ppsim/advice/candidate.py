"""Candidate: a schedule that a measured job could run, with what is predicted of its step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ppsim.errors import InputError
from ppsim.order_search.search import search
from ppsim.runs.run_costs import RunCosts
from ppsim.schedule.action import Kind
from ppsim.schedule.named.registry import build_schedule, schedule_copies, schedule_names, takes_stages_per_rank
from ppsim.schedule.placement import loop_placement, v_placement
from ppsim.schedule.schedule import Schedule
from ppsim.trace.trace import Trace

# The least that W is tried to take of a whole backward; `costs_of` takes a half, as of a linear layer. Attention's
# score products have no W: stages of GPTs were measured at 0.34 to 0.40 (Qi et al., Zero Bubble, ICLR 2024, table 5).
# Chosen below these; a job whose layers have few weights can be lower still.
_LEAST_WEIGHT_SHARE = 0.3


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A schedule, and what is predicted of its step.

    Parameters
    ----------
    name : str
        The schedule's.
    trace : Trace
        The predicted step.
    range_s : tuple of two floats
        The step for the least and the most favourable of what is not known.
    memory_bytes : array of shape (p,), or None
        The most that each rank holds; None where the run does not tell.
    fits : bool or None
        Whether that is under the limit; None without a limit.
    uncertain : tuple of str
        What the prediction takes for granted.
    """

    name: str
    trace: Trace = field(repr=False)
    range_s: tuple[float, float]
    memory_bytes: npt.NDArray[np.int64] | None
    fits: bool | None
    uncertain: tuple[str, ...]

    @property
    def schedule(self) -> Schedule:
        """The schedule."""
        return self.trace.schedule

    @property
    def step_s(self) -> float:
        """The predicted step, in seconds."""
        return self.trace.makespan_s

    @property
    def stages_per_rank(self) -> int:
        """v."""
        return self.schedule.stages // self.schedule.ranks

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "stages_per_rank": self.stages_per_rank,
            "step_s": self.step_s,
            "range_s": list(self.range_s),
            "bubble_fraction": self.trace.bubble_fraction,
            "memory_bytes": None if self.memory_bytes is None else self.memory_bytes.tolist(),
            "fits": self.fits,
            "uncertain": list(self.uncertain),
        }


def candidates(
    costs: RunCosts, *, memory_limit_bytes: float | None, with_search: bool
) -> tuple[list[Candidate], dict[str, str]]:
    """Every named schedule and what the search finds, and why some are not among them.

    Raises
    ------
    InputError
        If there is a limit and the run does not tell what ranks hold.
    """
    left_out: dict[str, str] = {}
    found = []
    schedules = [*_named(costs, left_out), *(_searched(costs, memory_limit_bytes, left_out) if with_search else [])]
    for name, schedule in schedules:
        try:
            found.append(candidate(costs, name, schedule, memory_limit_bytes=memory_limit_bytes))
        except InputError as error:
            left_out[name] = str(error)
    return found, left_out


def candidate(costs: RunCosts, name: str, schedule: Schedule, *, memory_limit_bytes: float | None) -> Candidate:
    """What is predicted of a schedule. Raises InputError if the run says nothing of its stages."""
    trace = costs.predict(schedule)
    lengths_s = [trace.makespan_s]
    program = schedule.program
    uncertain = []
    if (program.kind == Kind.W).any() and not costs.is_backward_split:
        lengths_s.append(costs.with_weight_share(_LEAST_WEIGHT_SHARE).predict(schedule).makespan_s)
        uncertain.append(
            f"the run never splits a backward: W is taken to be 50% of B, the range is from {_LEAST_WEIGHT_SHARE:.0%}, "
            "and to hold all that B holds, the most it can be"
        )
    if schedule.placement != costs.run.schedule.placement:
        uncertain.append(f"{schedule.stages} stages instead of {costs.run.schedule.stages}: layers cut evenly")
    if program.has_pairs and costs.durations.overlap == 1.0:
        uncertain.append("overlapped pairs are taken to last as long as their parts")
    if costs.memory is not None and not costs.knows_activations:
        uncertain.append("the run does not tell what a microbatch holds: memory is not known")
    if costs.memory is None and costs.knows_activations:
        uncertain.append("the run tells activations and no other memory: memory and limit are of activations alone")
    memory = trace.memory.total_bytes if costs.memory is not None else trace.peak_activation_bytes
    memory = memory if costs.knows_activations or schedule.orders == costs.run.schedule.orders else None
    fits = None
    if memory_limit_bytes is not None and memory is not None:
        fits = bool((memory <= memory_limit_bytes).all())
    spread = costs.step_spread
    return Candidate(
        name=name,
        trace=trace,
        range_s=(min(lengths_s) * (1 - spread), max(lengths_s) * (1 + spread)),
        memory_bytes=memory,
        fits=fits,
        uncertain=tuple(uncertain),
    )


def _named(costs: RunCosts, left_out: dict[str, str]) -> Iterator[tuple[str, Schedule]]:
    """Each named schedule with as many stages per rank as the run has; with its natural number where it has one alone,
    or where the run can be cut anew."""
    run = costs.run
    own = run.schedule.stages // run.ranks
    for name in schedule_names():
        if schedule_copies(name) > 1:
            left_out[name] = f"{name} holds {schedule_copies(name)} copies of the model, and the run holds one"
            continue
        wanted = own if own > 1 and takes_stages_per_rank(name) else None
        try:
            yield (
                name,
                build_schedule(name, ranks=run.ranks, microbatches=run.schedule.microbatches, stages_per_rank=wanted),
            )
        except InputError as error:
            left_out[name] = str(error)


def _searched(
    costs: RunCosts, memory_limit_bytes: float | None, left_out: dict[str, str]
) -> Iterator[tuple[str, Schedule]]:
    """The search's orders, with one stage on each rank and with two in a V, of stages that take their handover too."""
    run = costs.run
    ranks, microbatches = run.ranks, run.schedule.microbatches
    own = run.schedule.stages // ranks
    for placement, stages_per_rank in (("loop", 1), ("v", 2)) if own == 1 else (("loop", own), ("v", own)):
        name = f"searched, {stages_per_rank} stage{'s' if stages_per_rank > 1 else ''} per rank"
        placed = loop_placement(ranks, stages_per_rank) if placement == "loop" else v_placement(ranks, stages_per_rank)
        if own > 1 and placed != run.schedule.placement:
            continue
        try:
            model = run.schedule
            if placed != model.placement:
                model = build_schedule("zb-v" if placement == "v" else "1f1b", ranks=ranks, microbatches=microbatches)
            found = search(
                costs.with_handover(model),
                ranks=ranks,
                microbatches=microbatches,
                network=costs.handover.network(model.program.links()),
                memory_limit_bytes=_activation_limit(costs, memory_limit_bytes),
                stages_per_rank=stages_per_rank,
                placement=placement,
            )
        except InputError as error:
            left_out[name] = str(error)
            continue
        yield name, found.schedule


def _activation_limit(costs: RunCosts, memory_limit_bytes: float | None) -> list[float] | None:
    """What is left for activations on each rank."""
    if memory_limit_bytes is None or not costs.knows_activations:
        return None
    besides = [0] * costs.run.ranks if costs.memory is None else costs.memory.other_bytes.tolist()
    left = [memory_limit_bytes - each for each in besides]
    if min(left) < 0:
        rank = left.index(min(left))
        raise InputError(
            f"rank {rank} holds {besides[rank]:,} bytes besides activations, which is more than the limit of "
            f"{memory_limit_bytes:,.0f}: give a larger limit"
        )
    return left
