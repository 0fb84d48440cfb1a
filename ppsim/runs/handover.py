"""Handover: what passes between actions: the time a rank needs after each, and how long messages travel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppsim.network.link import Link
from ppsim.network.network import Network
from ppsim.runs.run import Run
from ppsim.schedule.action import Kind
from ppsim.schedule.program import Program
from ppsim.trace.trace import Trace

Seconds = npt.NDArray[np.float64]

# Of the gaps after a stage's actions of a kind, this share at least must be free of waiting: fewer are so by chance.
_LEAST_FREE = 0.05


@dataclass(frozen=True, kw_only=True, eq=False)
class Handover:
    """What passes between actions.

    Parameters
    ----------
    after_s : array of shape (stages, kinds)
        Seconds from the end of an action of that stage and kind until its rank is free and its result leaves.
    latency_s : mapping from (source, destination) to float
        Seconds from when a result leaves until it is at the receiver.

    Notes
    -----
    `after_s` is measured where the input of the next action was there already, so that the rank waited for nothing
    else. Travel is measured where receivers were idle already. The clocks of a `Run` are aligned so that the fastest
    message takes as long one way as the other.
    """

    after_s: Seconds
    latency_s: dict[tuple[int, int], float]

    @classmethod
    def of(cls, run: Run) -> Handover:
        """The handover of a run."""
        program = run.schedule.program
        travel_s = _travel(run)
        before = np.array([row for row, _ in _pairs(program)], np.int64)
        seen_s = np.stack([_gaps_s(program, trace, travel_s) for trace in run.traces])
        group = program.stage[before] * len(Kind) + program.kind[before]
        found = np.full(run.schedule.stages * len(Kind), np.nan)
        for each in np.unique(group).tolist():
            values = seen_s[:, group == each]
            known = values[~np.isnan(values)]
            if len(known) > _LEAST_FREE * values.size:
                found[each] = _usual(values, ~np.isnan(values))
        after_s = _filled(program, np.maximum(found, 0.0).reshape(-1, len(Kind)))
        latency_s = {}
        messages = program.messages
        for number, link in enumerate(program.links()):
            chosen = messages.link == number
            sent = after_s[program.stage[messages.producer[chosen]], program.kind[messages.producer[chosen]]]
            latency_s[link] = max(travel_s.get(link, 0.0) - float(np.median(sent)), 0.0)
        return cls(after_s=after_s, latency_s=latency_s)

    def network(self, links: list[tuple[int, int]]) -> Network:
        """The links. Those that the run did not use have the median of those that it did."""
        usual_s = float(np.median(list(self.latency_s.values()))) if self.latency_s else 0.0
        return Network(
            latency_s=usual_s,
            links={link: Link(latency_s=self.latency_s[link]) for link in links if link in self.latency_s},
        )


def sending_actions(program: Program) -> npt.NDArray[np.bool_]:
    """Whether each action's result is sent, shape (actions,)."""
    sends = np.zeros(program.actions, bool)
    sends[program.row_action[program.messages.producer]] = True
    return sends


def sending_kinds(program: Program, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Whether results of each stage and kind are sent, shape (stages, kinds)."""
    sends = np.zeros(shape, bool)
    sends[program.stage[program.messages.producer], program.kind[program.messages.producer]] = True
    return sends


def _pairs(program: Program) -> Iterator[tuple[int, int]]:
    """The last row of each action and the first of the next on its rank."""
    for rank in range(program.ranks):
        for action in range(int(program.rank_actions[rank]), int(program.rank_actions[rank + 1]) - 1):
            yield int(program.action_start[action + 1]) - 1, int(program.action_start[action + 1])


def _free(program: Program, trace: Trace) -> Seconds:
    """For each row, the end of the action before its own on its rank; the step's start for the first action."""
    free_s = np.full(len(program.stage), trace.start_s.min())
    for before, after in _pairs(program):
        free_s[after : int(program.action_start[program.row_action[after] + 1])] = trace.end_s[before]
    return free_s


def _produced(program: Program, trace: Trace) -> Seconds:
    """When each message's producer had ended, shape (messages,)."""
    last = program.action_start[1:] - 1
    produced_s: Seconds = trace.end_s[last[program.row_action[program.messages.producer]]]
    return produced_s


def _travel(run: Run) -> dict[tuple[int, int], float]:
    """How long messages take on each link: usually, if they were waited for; the shortest time of all, if none was."""
    program = run.schedule.program
    messages = program.messages
    first = program.action_start[:-1][program.row_action[messages.consumer]]
    taken, waited = [], []
    for trace in run.traces:
        produced_s = _produced(program, trace)
        taken.append(trace.start_s[first] - produced_s)
        waited.append(produced_s > _free(program, trace)[messages.consumer])
    taken_s, is_waited = np.stack(taken), np.stack(waited)
    found = {}
    for number, link in enumerate(program.links()):
        of_link, seen = taken_s[:, messages.link == number], is_waited[:, messages.link == number]
        found[link] = max(_usual(of_link, seen) if seen.any() else float(of_link.min()), 0.0)
    return found


def _usual(values: Seconds, chosen: npt.NDArray[np.bool_]) -> float:
    """The mean over what was chosen in a step, and of these means the median over steps; as in `Durations`."""
    return float(np.median([step[kept].mean() for step, kept in zip(values, chosen, strict=True) if kept.any()]))


def _gaps_s(program: Program, trace: Trace, travel_s: dict[tuple[int, int], float]) -> Seconds:
    """The time between two actions of a rank, for each of `_pairs`; NaN where a message was waited for."""
    messages = program.messages
    usual_s = np.array([travel_s[link] for link in program.links()])[messages.link] if len(messages) else np.zeros(0)
    # A message counts as surely there only from twice its usual travel time after its producer's end.
    there_s = np.append(_produced(program, trace) + 2 * usual_s, -np.inf)
    gap_s = []
    for before, after in _pairs(program):
        until = int(program.action_start[program.row_action[after] + 1])
        needed = [int(each) for each in program.message_in[after:until]]
        is_ready = all(there_s[each] <= trace.end_s[before] for each in needed)  # -1, no message, is the last
        gap_s.append(trace.start_s[after] - trace.end_s[before] if is_ready else np.nan)
    return np.array(gap_s, np.float64)


def _filled(program: Program, after_s: Seconds) -> Seconds:
    """What was not measured is the median of what is most like it, 0 if nothing was measured.

    That is: other kinds of the same stage, else the same kind of other stages, else any kind of any stage, each only if
    its results are sent too, or also are not; else anything.
    """
    stages = len(after_s)
    sends = sending_kinds(program, after_s.shape)
    filled = after_s.copy()
    for stage in range(stages):
        for kind in range(after_s.shape[1]):
            if not np.isnan(after_s[stage, kind]):
                continue
            alike = after_s[sends == sends[stage, kind]]
            same = after_s[:, kind][sends[:, kind] == sends[stage, kind]]
            own = after_s[stage][sends[stage] == sends[stage, kind]]
            for values in (own, same, alike, after_s.reshape(-1)):
                known = values[~np.isnan(values)]
                if len(known):
                    filled[stage, kind] = np.median(known)
                    break
    return np.nan_to_num(filled)
