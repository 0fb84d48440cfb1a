"""Run costs: what a measured run says of its stages, and of the same job on another schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ppsim.checks import checked
from ppsim.conditions import Conditions
from ppsim.costs.stage_cost import StageCost
from ppsim.errors import InputError
from ppsim.runs.durations import Durations, edge_rows
from ppsim.runs.handover import Handover, sending_actions, sending_kinds
from ppsim.runs.memory_fit import MemoryFit
from ppsim.runs.run import Run
from ppsim.schedule.action import Kind
from ppsim.schedule.schedule import Schedule
from ppsim.simulation.simulate import simulate
from ppsim.simulation.timed_program import row_durations
from ppsim.trace.trace import Trace

Seconds = npt.NDArray[np.float64]

DISTURBED = 0.05
"""A step that differs from the median one by a larger share counts as disturbed."""


class RunCosts(list[StageCost]):
    """The costs of a run's stages, in order, and what else the run says.

    Parameters
    ----------
    stages : sequence of StageCost
        Medians over steps and microbatches.
    run : Run
        What was measured.
    durations : Durations
        The seconds behind them: spread, first forwards, last backwards.
    handover : Handover
        What passes between actions.
    memory : MemoryFit or None
        What ranks hold; None if the run does not say.

    Examples
    --------
    >>> import ppsim
    >>> cost = ppsim.StageCost(forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0)
    >>> trace = ppsim.simulate(ppsim.build_schedule("1f1b", ranks=2, microbatches=4), [cost] * 2)
    >>> costs = ppsim.costs_of(ppsim.Run(traces=[trace], steps=[0]))
    >>> costs[1].forward_s, costs[1].full_backward_s
    (1.0, 2.0)
    >>> costs.predict(ppsim.build_schedule("afab", ranks=2, microbatches=4)).makespan_s
    15.0
    """

    def __init__(
        self,
        stages: list[StageCost],
        *,
        run: Run,
        durations: Durations,
        handover: Handover,
        memory: MemoryFit | None,
    ) -> None:
        super().__init__(stages)
        self.run, self.durations, self.handover, self.memory = run, durations, handover, memory

    @property
    def spread(self) -> list[dict[str, float]]:
        """For each stage, by how much its actions deviate from their median, as standard deviations in seconds."""
        return [
            {kind.name: float(each[kind]) for kind in (Kind.F, Kind.B, Kind.I, Kind.W) if np.isfinite(each[kind])}
            for each in self.durations.spread_s
        ]

    @property
    def by_microbatch(self) -> list[list[StageCost]]:
        """The costs of each stage for each of the run's microbatches, medians over steps, as `simulate` takes them.

        For jobs whose microbatches differ, in length for example. What a microbatch does not tell by itself, such as
        the parts of an overlapped pair, is as usual on its stage.
        """
        program = self.run.schedule.program
        taken_s = np.median([trace.end_s - trace.start_s for trace in self.run.traces], axis=0)
        is_alone = np.repeat(np.diff(program.action_start) == 1, np.diff(program.action_start))
        table = np.full((len(Kind), self.run.schedule.stages, self.run.schedule.microbatches), np.nan)
        rows = np.flatnonzero(is_alone)
        table[program.kind[rows], program.stage[rows], program.microbatch[rows]] = taken_s[rows]
        return [
            [_of_microbatch(cost, {kind: float(each[kind]) for kind in Kind if np.isfinite(each[kind])}) for each in of]
            for cost, of in zip(self, table.transpose(1, 2, 0), strict=True)
        ]

    @property
    def step_spread(self) -> float:
        """The standard deviation of undisturbed steps, as a share of the median step."""
        lengths_s = np.array([trace.makespan_s for trace in self.run.traces])
        usual_s = float(np.median(lengths_s))
        calm_s = lengths_s[np.abs(lengths_s - usual_s) <= DISTURBED * usual_s]
        return float(calm_s.std() / usual_s) if usual_s > 0 and len(calm_s) > 1 else 0.0

    @property
    def is_backward_split(self) -> bool:
        """Whether the run measured I and W, so that what they take is known."""
        return bool(np.isfinite(self.durations.usual_s[:, [Kind.I, Kind.W]]).any())

    @checked
    def stages_for(self, schedule: Schedule) -> list[StageCost]:
        """The same job's costs on the stages of another schedule.

        Parameters
        ----------
        schedule : Schedule
            Of as many ranks. With other stages than the run's the model is cut anew.

        Returns
        -------
        list of StageCost, shape (stages,)

        Raises
        ------
        InputError
            For another number of ranks, or if the run's ranks held several stages and the schedule has other ones.

        Notes
        -----
        A stage of a run with one stage on each rank becomes v equal ones, of layers that take what its rank took. What
        the first and the last stage take beyond the median of the others is the embedding's and the head's, and stays
        with the first and the last stage.
        """
        if schedule.ranks != self.run.ranks:
            raise InputError(
                f"the run has {self.run.ranks} ranks and the schedule {schedule.ranks}: what a rank's layers cost on "
                "another number of ranks is not known; give a schedule of as many"
            )
        if schedule.copies > 1:
            raise InputError(
                f"{schedule.name} has {schedule.copies} copies of the model and the run has one: give a schedule in "
                "one direction"
            )
        if schedule.placement == self.run.schedule.placement:
            return list(self)
        if self.run.schedule.stages != self.run.ranks or schedule.stages % schedule.ranks:
            raise InputError(
                f"the run has stages on ranks {list(self.run.schedule.placement)} and the schedule on "
                f"{list(schedule.placement)}: give a schedule with the run's stages, or a run with one stage on each "
                "rank, which can be cut anew"
            )
        return _cut_anew(list(self), schedule)

    @checked
    def durations_for(self, schedule: Schedule) -> Seconds:
        """What each row of a schedule's program takes, shape (rows,); its first forwards and last backwards apart."""
        program = schedule.program
        found = row_durations(program, self.stages_for(schedule), overlap=self.durations.overlap)
        first, last = edge_rows(program)
        share = self.run.schedule.stages / schedule.stages
        for stage, row in enumerate(first.tolist()):
            old = self._old_stage(schedule, stage)
            if row >= 0:
                found[row] += share * self.durations.first_forward_s[old]
        for rank in range(schedule.ranks):
            held = [stage for stage in schedule.stages_of(rank) if last[stage] >= 0]
            if held and schedule.placement == self.run.schedule.placement:
                for stage in held:
                    found[last[stage]] += self.durations.last_backward_s[stage]
            elif held:  # what ends a step on a rank comes once
                found[max(last[stage] for stage in held)] += self.durations.last_backward_s[rank]
        return found

    @checked
    def conditions_for(self, schedule: Schedule, *, durations_s: npt.ArrayLike | None = None) -> Conditions:
        """How a schedule's step is run: each row's duration, and the handover after each action."""
        program = schedule.program
        after_s = self._after_s(schedule)
        final = np.zeros(program.actions, bool)  # after a rank's last action nothing is waited for
        final[program.rank_actions[1:][np.diff(program.rank_actions) > 0] - 1] = True
        sends = sending_actions(program)
        return Conditions(
            durations_s=self.durations_for(schedule) if durations_s is None else durations_s,
            send_s=np.where(final & ~sends, 0.0, after_s),
        )

    @checked
    def predict(self, schedule: Schedule | None = None, *, durations_s: npt.ArrayLike | None = None) -> Trace:
        """Predict a step of the same job.

        Parameters
        ----------
        schedule : Schedule, optional
            By default the run's own.
        durations_s : array of shape (rows,), optional
            What each row takes, in place of what is usual.

        Returns
        -------
        Trace
            With `other_bytes` where the run's memory is known. Without it, its activations are unknown.
        """
        schedule = self.run.schedule if schedule is None else schedule
        trace = simulate(
            schedule,
            self.stages_for(schedule),
            network=self.handover.network(schedule.program.links()),
            engine="compiled",
            conditions=self.conditions_for(schedule, durations_s=durations_s),
        )
        changes: dict[str, Any] = {"parameter_bytes": None, "gradient_bytes": None}
        if all(cost.output_bytes == 0 for cost in self):
            changes["message_bytes"] = None
        if self.memory is not None:
            changes["other_bytes"] = self.memory.other_bytes
        if not self.knows_activations:
            changes |= {"activation_bytes": None}
        return replace(trace, **changes)

    @checked
    def with_weight_share(self, share: float) -> RunCosts:
        """The same costs with a backward of which W takes that share and I the rest. Raises InputError for no share."""
        if not 0 <= share <= 1:
            raise InputError(f"share must be from 0 to 1, got {share!r}")
        stages = [
            replace(
                cost,
                backward_input_s=(1 - share) * cost.full_backward_s,
                backward_weight_s=share * cost.full_backward_s,
                backward_s=cost.full_backward_s,
            )
            for cost in self
        ]
        return RunCosts(stages, run=self.run, durations=self.durations, handover=self.handover, memory=self.memory)

    @checked
    def with_handover(self, schedule: Schedule) -> list[StageCost]:
        """The costs of a schedule's stages, each action longer by what its rank is then kept for by handing over."""
        usual_s = float(np.median(self._after_s(schedule)))
        return [
            replace(
                cost,
                forward_s=cost.forward_s + usual_s,
                backward_input_s=cost.backward_input_s + usual_s,
                backward_s=cost.full_backward_s + usual_s,
            )
            for cost in self.stages_for(schedule)
        ]

    @property
    def knows_activations(self) -> bool:
        """Whether the run says what a microbatch holds."""
        return any(cost.activation_bytes for cost in self)

    def _old_stage(self, schedule: Schedule, stage: int) -> int:
        """The run's stage that says what is usual for a schedule's stage: the same, or that of its rank."""
        same = schedule.placement == self.run.schedule.placement
        return stage if same else int(self.run.schedule.placement.index(schedule.placement[stage]))

    def _after_s(self, schedule: Schedule) -> Seconds:
        """After each action: as in the run where its stage and kind ran there, else as others that send, or do not."""
        old, program = self.run.schedule.program, schedule.program
        sends = sending_kinds(old, self.handover.after_s.shape)
        measured = np.zeros(sends.shape, bool)
        measured[old.stage, old.kind] = True
        usual = {
            each: float(np.median(values)) if len(values := self.handover.after_s[measured & (sends == each)]) else 0.0
            for each in (False, True)
        }
        after_s = np.where(sending_actions(program), usual[True], usual[False])
        if schedule.placement == self.run.schedule.placement:
            last = program.action_start[1:] - 1
            stage, kind = program.stage[last], program.kind[last]
            after_s = np.where(measured[stage, kind], self.handover.after_s[stage, kind], after_s)
        return after_s


@checked
def costs_of(run: Run) -> RunCosts:
    """What a measured run says of its stages' costs.

    Parameters
    ----------
    run : Run
        Measured steps. The more, the less a disturbed one counts.

    Returns
    -------
    RunCosts
        A list of StageCost, one for each stage: medians over steps and microbatches. It has the spread, and predicts
        steps of other schedules. Where the run measured whole backwards only, I and W are half of B each.

    Notes
    -----
    Memory is known from activations where the traces have them, else from a line through the most that each rank held
    (`MemoryFit`). Bytes that are not known are 0.
    """
    durations, memory = Durations.of(run), MemoryFit.of(run)
    held = _activations(run, memory)
    stages = []
    for stage, (usual, (whole, kept, until_again)) in enumerate(zip(durations.usual_s, held, strict=True)):
        seconds = {Kind(kind): float(each) for kind, each in enumerate(usual) if np.isfinite(each)}
        backward_s = seconds.get(Kind.B)
        input_s, weight_s = seconds.get(Kind.I), seconds.get(Kind.W)
        if input_s is None or weight_s is None:
            input_s = weight_s = (backward_s or 0.0) / 2
        stages.append(
            StageCost(
                forward_s=seconds.get(Kind.F, 0.0),
                backward_input_s=input_s,
                backward_weight_s=weight_s,
                backward_s=backward_s,
                activation_bytes=whole,
                weight_activation_bytes=kept,
                output_bytes=_output_bytes(run, stage),
                recompute_s=seconds.get(Kind.R),
                recompute_bytes=until_again,
            )
        )
    return RunCosts(stages, run=run, durations=durations, handover=Handover.of(run), memory=memory)


def _of_microbatch(cost: StageCost, seconds: dict[Kind, float]) -> StageCost:
    """A stage's cost with what a microbatch took there; a whole backward is parted as usual on the stage."""
    changes: dict[str, Any] = {"forward_s": seconds.get(Kind.F, cost.forward_s)}
    if Kind.I in seconds and Kind.W in seconds:
        changes |= {"backward_input_s": seconds[Kind.I], "backward_weight_s": seconds[Kind.W]}
    elif Kind.B in seconds:
        whole_s = cost.backward_input_s + cost.backward_weight_s
        share = cost.backward_input_s / whole_s if whole_s > 0 else 0.5
        taken_s = seconds[Kind.B]
        parts_s = {"backward_input_s": share * taken_s, "backward_weight_s": (1 - share) * taken_s}
        changes |= {**parts_s, "backward_s": taken_s}
    return replace(cost, **changes)


def _activations(run: Run, memory: MemoryFit | None) -> list[tuple[int, int, int | None]]:
    """What a microbatch holds on each stage from F on, from I on, and from F to R, which is None if no R ran.

    From I on it is all of it, the most it can be, if no W ran.
    """
    program, stages = run.schedule.program, run.schedule.stages
    levels = run.traces[0].activation_bytes
    if levels is not None and run.schedule.offload is None:
        change = np.diff(levels, prepend=0)
        first = program.action_start[program.rank_actions[:-1][np.diff(program.rank_actions) > 0]]
        change[first] = levels[first]  # the row before is another rank's
        found = []
        for stage in range(stages):
            forward = (program.stage == stage) & (program.kind == Kind.F)
            taken, until_again = change[forward & ~program.is_recomputed], change[forward & program.is_recomputed]
            if not len(taken):  # what R adds to what was kept
                taken = until_again + change[(program.stage == stage) & (program.kind == Kind.R)]
            given = -change[(program.stage == stage) & (program.kind == Kind.W)]
            whole = _typical(taken, 0)
            least = _typical(until_again, 0) if len(until_again) else None
            found.append((whole, _typical(given, whole), least))
        return found
    per_microbatch = memory.activation_bytes if memory is not None else None
    per_stage = round((per_microbatch or 0) * run.ranks / stages)
    return [(per_stage, per_stage, None)] * stages


def _typical(sizes: npt.NDArray[np.int64], otherwise: int) -> int:
    """The median size, at least 0; another number where there is none."""
    return max(int(np.median(sizes)), 0) if len(sizes) else otherwise


def _output_bytes(run: Run, stage: int) -> int:
    sizes, program = run.traces[0].message_bytes, run.schedule.program
    producer = program.messages.producer
    sent = (program.stage[producer] == stage) & (program.kind[producer] == Kind.F)
    return int(np.median(sizes[sent])) if sizes is not None and sent.any() else 0


_SECONDS = ("forward_s", "backward_input_s", "backward_weight_s", "full_backward_s")


def _cut_anew(stages: list[StageCost], schedule: Schedule) -> list[StageCost]:
    """Each rank's stage as equal parts, with the embedding's and the head's share apart."""
    ranks, parts = len(stages), schedule.stages // schedule.ranks
    seconds = np.array([[getattr(cost, name) for name in _SECONDS] for cost in stages])
    usual = np.median(seconds[1:-1], axis=0) if ranks > 2 else seconds.min(axis=0)
    ends = np.maximum(seconds[[0, -1]] - usual, 0.0)
    inner = seconds.copy()
    inner[0] -= ends[0]
    inner[-1] -= ends[1]
    found = []
    for stage, rank in enumerate(schedule.placement):
        taken = inner[rank] / parts
        taken = taken + (ends[0] if stage == 0 else 0.0) + (ends[1] if stage == schedule.stages - 1 else 0.0)
        cost = stages[rank]
        found.append(
            StageCost(
                **dict(zip(("forward_s", "backward_input_s", "backward_weight_s"), taken[:3].tolist(), strict=True)),
                backward_s=None if cost.backward_s is None else float(taken[3]),
                activation_bytes=round(cost.activation_bytes / parts),
                weight_activation_bytes=round(cost.weight_activation_bytes / parts),
                output_bytes=max(each.output_bytes for each in stages),
            )
        )
    return found
