"""Advise: what a measured step loses, and which schedules would lose less."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ppsim.advice.candidate import Candidate, candidate, candidates
from ppsim.checks import checked
from ppsim.errors import InputError
from ppsim.explain.attribution import PARTS, Attribution, attribute
from ppsim.export.text_table import text_table
from ppsim.runs.run import Run
from ppsim.runs.run_costs import RunCosts, costs_of
from ppsim.schedule.action import Kind
from ppsim.trace.trace import Trace

if TYPE_CHECKING:
    import pandas

_MEANING = {
    "warm_up": "the pipeline fills",
    "drain": "the pipeline empties",
    "imbalance": "stages take unequally long, or the order does not suit them",
    "messages": "messages are under way",
    "streams": "messages wait for their send or receive to be posted, or for others on a communicator",
    "collectives": "parameters are being gathered",
    "copies": "activations come back from host memory",
    "device": "the rank's own time between actions",
    "straggler": "actions took longer than usual",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Advice:
    """What a measured step loses, and which schedules would lose less.

    Parameters
    ----------
    run : Run
        What was measured.
    costs : RunCosts
        The costs of stages that the run shows.
    current : Candidate
        The run's own schedule, predicted as the others are.
    candidates : tuple of Candidate
        Other schedules: those that fit the memory limit first, the shortest predicted step first.
    left_out : dict of str to str
        Schedules that were not considered, and why.
    memory_limit_bytes : float or None
        The most that a rank may hold; None for no limit.
    """

    run: Run
    costs: RunCosts = field(repr=False)
    current: Candidate
    candidates: tuple[Candidate, ...]
    left_out: dict[str, str]
    memory_limit_bytes: float | None

    @property
    def measured(self) -> Trace:
        """The step of the median makespan."""
        return self.run.median

    @cached_property
    def attribution(self) -> Attribution:
        """Where the measured step's time went."""
        return attribute(self.measured)

    @property
    def best(self) -> Candidate | None:
        """The candidate that fits with the shortest step. None if none is shorter than the run's own schedule."""
        fitting = [each for each in self.candidates if each.fits is not False]
        return fitting[0] if fitting and fitting[0].step_s < self.current.step_s else None

    def sentences(self) -> list[str]:
        """What the measured step loses, a paragraph each; first how long it takes and how much of that is bubble."""
        trace = self.measured
        found = [
            f"The step takes {trace.makespan_s:.4g} s (the median of {len(self.run.traces)} steps; undisturbed ones "
            f"vary by {self.costs.step_spread:.2%}). Ranks compute {1 - trace.bubble_fraction:.1%} of the time; "
            f"{trace.bubble_fraction:.1%} is bubble."
        ]
        compute_s = trace.compute_s
        slowest = int(np.argmax(compute_s))
        over = float(compute_s[slowest] / compute_s.mean() - 1)
        if over > 0.01:
            found.append(
                f"Rank {slowest} computes longest, {over:.1%} more than the mean: a cut of layers that balances ranks "
                "would shorten every schedule's step."
            )
        extra_s = self.costs.durations.last_backward_s
        # Said if it is more than a hundredth of what a microbatch adds to the step.
        if (extra_s > 0.01 * trace.makespan_s / self.run.schedule.microbatches).any():
            stage = int(np.argmax(extra_s))
            found.append(
                f"The last backward of stage {stage} takes {extra_s[stage] * 1e3:.3g} ms more than that stage's others."
            )
        if self.run.unknown:
            found.append(f"Not recorded: {'; '.join(self.run.unknown)}.")
        return found

    def lost(self) -> list[dict[str, str]]:
        """The parts of the bubble as shares of all ranks' time, the largest first, with their meaning."""
        parts = self.attribution.fractions
        return [
            {"part": name.replace("_", "-"), "share": f"{parts[name]:.1%}", "meaning": _MEANING[name]}
            for name in sorted(PARTS, key=lambda each: -parts[each])
            if parts[name] >= 0.0005  # less would show as 0.0%
        ]

    def explain(self) -> str:
        """What the measured step loses, as text."""
        first, *others = self.sentences()
        parts = [f"  {row['share']:>6}  {row['part']}: {row['meaning']}" for row in self.lost()]
        return "\n".join([first, *parts, *others])

    def how_to_load(self, path: str = "schedule.csv", chosen: Candidate | None = None) -> str:
        """How to load a candidate's schedule file into frameworks. By default the best one's, else the run's own."""
        chosen = chosen or self.best or self.current
        stages = f"{chosen.schedule.stages} stages, {chosen.stages_per_rank} on each rank"
        lines = [
            f"To load {path} ({chosen.name}; {stages}; {chosen.schedule.microbatches} microbatches):",
            f'  torchtitan  [parallelism] pipeline_parallel_schedule_csv = "{path}" and',
            '              pipeline_parallel_schedule = "PipelineScheduleMulti"',
            "  PyTorch     _PipelineScheduleRuntime(stages, microbatches, loss_fn)._load_csv(path, "
            'format="compute_only")',
            "  Megatron and Primus take no file: choose the schedule by name, where they have it.",
        ]
        if (chosen.schedule.program.kind == Kind.W).any():
            lines.append("  PyTorch's runtime computes the whole backward of stage 0 in W, later than predicted.")
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """The table: the run's own schedule, then the candidates."""
        found = []
        for each in (self.current, *self.candidates):
            is_current = each is self.current
            found.append(
                {
                    "schedule": f"{each.name} (this run's)" if is_current else each.name,
                    "stages": str(each.schedule.stages),
                    "step (s)": f"{each.step_s:.4g}",
                    "range (s)": f"{each.range_s[0]:.4g} to {each.range_s[1]:.4g}",
                    "against now": f"{each.step_s / self.current.step_s - 1:+.1%}",
                    "bubble": f"{each.trace.bubble_fraction:.1%}",
                    "memory (GiB)": "not known"
                    if each.memory_bytes is None
                    else f"{each.memory_bytes.max() / 2**30:.1f}",
                    "fits": {None: None, True: "yes", False: "no"}[each.fits],
                }
            )
        return found

    def notes(self) -> list[str]:
        """What is uncertain of predictions, each with the schedules that it concerns."""
        found: dict[str, list[str]] = {}
        for each in (self.current, *self.candidates):
            for note in each.uncertain:
                found.setdefault(note, []).append(each.name)
        return [f"{note} ({'; '.join(names)})" for note, names in found.items()]

    def to_frame(self) -> pandas.DataFrame:
        """A row for each schedule: name, stages_per_rank, step_s, least_s, most_s, memory_bytes (the largest), fits."""
        import pandas

        return pandas.DataFrame(
            [
                {
                    "name": each.name,
                    "stages_per_rank": each.stages_per_rank,
                    "step_s": each.step_s,
                    "least_s": each.range_s[0],
                    "most_s": each.range_s[1],
                    "memory_bytes": math.nan if each.memory_bytes is None else int(each.memory_bytes.max()),
                    "fits": each.fits,
                }
                for each in (self.current, *self.candidates)
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "source": self.run.source,
            "steps": len(self.run.traces),
            "measured_s": self.measured.makespan_s,
            "bubble_fraction": self.measured.bubble_fraction,
            "bubble_parts": self.attribution.fractions,
            "step_spread": self.costs.step_spread,
            "memory_limit_bytes": self.memory_limit_bytes,
            "current": self.current.to_dict(),
            "candidates": [each.to_dict() for each in self.candidates],
            "left_out": self.left_out,
            "best": None if self.best is None else self.best.name,
        }

    def __str__(self) -> str:
        lines = [str(self.run.schedule), "", self.explain(), "", text_table(self.rows())]
        if self.notes():
            lines += ["", "Uncertain:", *(f"  {note}" for note in self.notes())]
        if self.left_out:
            lines += ["", "Left out:", *(f"  {name}: {why}" for name, why in self.left_out.items())]
        if self.best is None:
            lines += ["", "No schedule that fits is predicted to be faster than this run's own."]
        else:
            gain = 1 - self.best.step_s / self.current.step_s
            lines += ["", f"Best that fits: {self.best.name}, {gain:.1%} shorter. {_caution(self.best, self.current)}"]
        return "\n".join(lines)


@checked
def advise(run: Run, *, memory_limit_bytes: float | None = None, with_search: bool = True) -> Advice:
    """Say what a measured step loses, and which schedules of the same job would lose less.

    Parameters
    ----------
    run : Run
        Measured steps, as `read_run` gives them.
    memory_limit_bytes : float, optional
        The most that a rank may hold in all. By default there is no limit.
    with_search : bool
        Whether to search for orders beyond the named schedules: some seconds more.

    Returns
    -------
    Advice

    Raises
    ------
    InputError
        For a limit that is no number above 0, or if there is a limit and the run does not tell what ranks hold; for a
        step of 0 s.

    Notes
    -----
    Each schedule's step is predicted from the run's costs (`costs_of`), with the time that ranks take from one action
    to the next as it was measured. Each prediction lists what the run cannot tell of it (`Candidate.uncertain`). If the
    run never split a backward, the prediction has a range: how the step depends on the share of W.

    Examples
    --------
    >>> import ppsim
    >>> cost = ppsim.StageCost(forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0, activation_bytes=1)
    >>> step = ppsim.simulate(ppsim.build_schedule("1f1b", ranks=2, microbatches=4), [cost] * 2)
    >>> advice = ppsim.advise(ppsim.Run(traces=[step], steps=[0]), with_search=False)
    >>> advice.best.step_s < advice.current.step_s
    True
    """
    if memory_limit_bytes is not None and not (math.isfinite(memory_limit_bytes) and memory_limit_bytes > 0):
        raise InputError(f"memory_limit_bytes must be a finite number > 0, got {memory_limit_bytes!r}")
    if not run.median.makespan_s > 0:
        raise InputError("the measured step takes 0 s, so nothing can be shortened: give a run with durations")
    costs = costs_of(run)
    if memory_limit_bytes is not None and not costs.knows_activations:
        raise InputError(
            "the run does not tell what a microbatch holds, so nothing can be said of a memory limit: record each "
            "rank's peak memory, or leave memory_limit_bytes out"
        )
    found, left_out = candidates(costs, memory_limit_bytes=memory_limit_bytes, with_search=with_search)
    # The run's own order is `current`.
    others = [each for each in found if each.schedule.orders != run.schedule.orders]
    return Advice(
        run=run,
        costs=costs,
        current=candidate(costs, run.schedule.name, run.schedule, memory_limit_bytes=memory_limit_bytes),
        candidates=tuple(sorted(others, key=lambda each: (each.fits is False, each.step_s))),
        left_out=left_out,
        memory_limit_bytes=memory_limit_bytes,
    )


def _caution(best: Candidate, current: Candidate) -> str:
    if best.range_s[1] < current.range_s[0]:
        return "Its whole range is below that of the run's own schedule."
    return "Its range overlaps that of the run's own schedule, so it may not be faster: measure before you rely on it."
