"""Durations: what each stage's actions took over the steps of a run, and how much that varies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppsim.runs.run import Run
from ppsim.schedule.action import COMPUTE_KINDS, Kind
from ppsim.schedule.program import Program

Seconds = npt.NDArray[np.float64]

_TO_STD = 1.4826  # of the median absolute deviation: a normal distribution's standard deviation
_TELLS = 0.02  # of what an action usually takes: what a first or last one must exceed it by to have a cost of its own


@dataclass(frozen=True, kw_only=True, eq=False)
class Durations:
    """What actions take. A kind that no action of a stage has is NaN.

    Parameters
    ----------
    usual_s : array of shape (stages, kinds)
        The mean over a step's microbatches, and of these means the median over steps: the mean since what is longer
        than usual makes the step longer, the median since some steps are disturbed. Of actions that are not half of an
        overlapped pair, and not a step's first F or last backward, if there are others.
    spread_s : array of shape (stages, kinds)
        How an action deviates from it: the median absolute deviation, as a standard deviation.
    first_forward_s, last_backward_s : arrays of shape (stages,)
        By how much the first F, and the last B or W, of a step usually take longer than others of their stage and kind;
        0 where that does not tell.
    overlap : float
        What an overlapped pair takes, as a share of the sum of its parts alone; 1 where that is not known.
    """

    usual_s: Seconds
    spread_s: Seconds
    first_forward_s: Seconds
    last_backward_s: Seconds
    overlap: float

    @classmethod
    def of(cls, run: Run) -> Durations:
        """The durations of a run. A step that was disturbed moves a median little."""
        program = run.schedule.program
        lengths_s = np.stack([trace.end_s - trace.start_s for trace in run.traces])
        is_alone = np.diff(program.action_start)[program.row_action] == 1
        stages = run.schedule.stages
        usual_s, spread_s = np.full((2, stages, len(Kind)), np.nan)
        first, last = edge_rows(program)
        is_edge = np.isin(np.arange(len(program.stage)), [first, last])
        for stage in range(stages):
            for kind in COMPUTE_KINDS:
                rows = (program.stage == stage) & (program.kind == kind)
                chosen = next((each for each in (rows & is_alone & ~is_edge, rows & is_alone) if each.any()), rows)
                if chosen.any():
                    usual_s[stage, kind] = np.median(lengths_s[:, chosen].mean(axis=1))
                    deviation_s = np.abs(lengths_s[:, chosen] - usual_s[stage, kind])
                    spread_s[stage, kind] = _TO_STD * np.median(deviation_s)
        row_usual_s = usual_s[program.stage, program.kind]
        overlap = _overlap(program, lengths_s, row_usual_s, is_alone)
        alone = np.zeros(usual_s.shape, bool)
        alone[program.stage[is_alone], program.kind[is_alone]] = True
        usual_s[~alone] /= overlap  # what ran in pairs alone took the pair's share
        return cls(
            usual_s=usual_s,
            spread_s=spread_s,
            first_forward_s=_excess_s(lengths_s, row_usual_s, first, is_alone),
            last_backward_s=_excess_s(lengths_s, row_usual_s, last, is_alone),
            overlap=overlap,
        )


def edge_rows(program: Program) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    """Each stage's first F, and its last B or W, which completes its gradients, shape (stages,) each; -1 for none."""
    first = np.full(program.schedule.stages, -1)
    rows = np.flatnonzero(program.kind == Kind.F)[::-1]
    first[program.stage[rows]] = rows  # of several the last to be written stays: the first F
    return first, program.last_gradient_row


def _excess_s(
    lengths_s: Seconds, usual_s: Seconds, rows: npt.NDArray[np.integer], is_alone: npt.NDArray[np.bool_]
) -> Seconds:
    found = np.zeros(len(rows))
    for stage, row in enumerate(rows.tolist()):
        if row >= 0 and is_alone[row]:
            excess_s = float(np.median(lengths_s[:, row])) - usual_s[row]
            found[stage] = excess_s if excess_s > _TELLS * usual_s[row] else 0.0
    return found


def _overlap(program: Program, lengths_s: Seconds, usual_s: Seconds, is_alone: npt.NDArray[np.bool_]) -> float:
    """Known where every stage and kind of a pair ran alone too."""
    groups = program.stage * len(Kind) + program.kind
    known = ~is_alone & np.isin(groups, groups[is_alone])
    return float(np.median(lengths_s[:, known].sum(axis=1)) / usual_s[known].sum()) if known.any() else 1.0
