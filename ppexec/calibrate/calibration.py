"""Calibrate: what running a schedule costs beside its computations, as found in known runs beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ppsim import Conditions, Jitter, Link, Network, Program, StageCost, Trace
from ppsim.simulation.timed_program import row_durations

_THERE_S = 300e-6  # a message handed over so long before is there
_PERCENTILES = (10, 50, 90, 99)

Seconds = npt.NDArray[np.float64]
Step = tuple[Trace, Sequence[StageCost]]
"""A measured step, and what its stages were to take."""
_NONE = np.zeros(0)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a rank spends between its actions, and what messages take, all in seconds; means, and how they vary.

    action_s: before an action without a message. receive_s: more before one that takes a message that is there, by its
    size. send_s: after an action that sends one, by its size, until it sets off. one_way_s: size -> from there until a
    consumer that had waited for it can go on. A size between two measured ones is interpolated.

    late_s: how late timed actions end, one number for each. dispatch_factors, message_factors: what single ones took,
    of what is spent before actions and of one_way_s, over their mean. independence: how much of all these differs from
    its mean for each action and message by itself; what is left makes all late alike, so that its mean is all that
    counts. common: relative deviation of whole steps beside all that. sharing_efficiency: of ranks that outnumber the
    cores, see `ppsim.simulation.sharing`. The last three are found in whole steps (see `step_fit`).
    """

    action_s: float = 0.0
    receive_s: Mapping[int, float] = field(default_factory=dict)
    send_s: Mapping[int, float] = field(default_factory=dict)
    one_way_s: Mapping[int, float] = field(default_factory=dict)
    late_s: Seconds = field(default_factory=lambda: _NONE)
    dispatch_factors: Seconds = field(default_factory=lambda: _NONE)
    message_factors: Seconds = field(default_factory=lambda: _NONE)
    independence: float = 1.0
    common: float = 0.0
    sharing_efficiency: float = 1.0

    def options(self, program: Program, message_bytes: npt.NDArray[np.int64]) -> dict[str, Any]:
        """The arguments `network` and `conditions` of `ppsim.simulate` for a program.

        Parameters
        ----------
        program : Program
            What is predicted.
        message_bytes : array of shape (messages,)
            Size of each message.

        Returns
        -------
        dict
            All that a message takes on its way is latency.
        """
        dispatch_s, send_s = np.full(program.actions, self.action_s), np.zeros(program.actions)
        for column, table, total_s in (
            (program.message_in, self.receive_s, dispatch_s),
            (program.message_out, self.send_s, send_s),
        ):
            rows = np.flatnonzero(column >= 0)
            np.add.at(total_s, program.row_action[rows], _at(table, message_bytes[column[rows]]))
        messages = program.messages
        pairs = zip(messages.source.tolist(), messages.destination.tolist(), strict=True)
        sizes = dict(zip(pairs, message_bytes.tolist(), strict=True))
        links = {pair: Link(latency_s=float(_at(self.one_way_s, np.array([size]))[0])) for pair, size in sizes.items()}
        return {"network": Network(links=links), "conditions": Conditions(dispatch_s=dispatch_s, send_s=send_s)}

    def jitter(self, *, timed: bool) -> Jitter:
        """How it varies, from action to action and from message to message; lateness is of timed actions alone."""
        factors = {"dispatch": self.dispatch_factors, "message": self.message_factors}
        return Jitter(
            factors={name: self._independent(each) for name, each in factors.items() if len(each)},
            late_s=self._independent(self.late_s) if timed and len(self.late_s) else (),
            step=self.common,
        )

    def _independent(self, amounts: Seconds) -> Seconds:
        mean = float(amounts.mean())
        return mean + self.independence * (amounts - mean)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; of what varies the mean and some percentiles."""
        return {
            "action_s": self.action_s,
            **{
                name: {str(size): seconds for size, seconds in sorted(getattr(self, name).items())}
                for name in ("receive_s", "send_s", "one_way_s")
            },
            **{name: _described(getattr(self, name)) for name in ("late_s", "dispatch_factors", "message_factors")},
            "independence": self.independence,
            "common": self.common,
            "sharing_efficiency": self.sharing_efficiency,
        }


def _described(amounts: Seconds) -> dict[str, float]:
    if not len(amounts):
        return {"count": 0}
    percentiles = np.percentile(amounts, _PERCENTILES).tolist()
    return {
        "count": len(amounts),
        "mean": float(amounts.mean()),
        **{f"p{q}": value for q, value in zip(_PERCENTILES, percentiles, strict=True)},
    }


def fit(steps: Sequence[Step]) -> Calibration:
    """What measured steps of timed compute say, each with what its stages were to take. Raises ValueError for pairs.

    All messages of a step have one size; different steps may have different ones. What is spent between two actions is
    taken as action_s + send_s where the first sends + receive_s where the second takes a message that is there, by
    least squares over all of them; so these are means, as a step takes the sum of its actions. Of the steps of one
    schedule the slowest and the fastest quarter count nothing, since others may have used the machine in them.
    """
    seen = [_look(trace, stages) for trace, stages in _middle(steps)]
    sizes = sorted({one.size_bytes for one in seen})
    gap_s, sends, takes = (np.concatenate([getattr(one, name) for one in seen]) for name in ("gap_s", "sends", "takes"))
    size = np.repeat([one.size_bytes for one in seen], [len(one.gap_s) for one in seen])
    of_size = size[:, None] == np.array(sizes)
    terms = np.hstack([np.ones((len(gap_s), 1)), of_size & sends[:, None], of_size & takes[:, None]])
    action_s, *more_s = np.maximum(np.linalg.lstsq(terms, gap_s, rcond=None)[0], 0.0).tolist()
    send_s, receive_s = (dict(zip(sizes, part, strict=True)) for part in (more_s[: len(sizes)], more_s[len(sizes) :]))
    way_s = dict.fromkeys(sizes, _NONE)
    for one in seen:
        known_s = send_s[one.size_bytes] + action_s + receive_s[one.size_bytes]
        way_s[one.size_bytes] = np.concatenate([way_s[one.size_bytes], np.maximum(one.journey_s - known_s, 0.0)])
    dispatch_s = np.maximum(gap_s - np.array([send_s[each] for each in size.tolist()]) * sends, 0.0)
    expected_s = action_s + np.array([receive_s[each] for each in size.tolist()]) * takes
    return Calibration(
        action_s=action_s,
        receive_s=receive_s,
        send_s=send_s,
        one_way_s={each: float(found.mean()) if len(found) else 0.0 for each, found in way_s.items()},
        late_s=np.maximum(np.concatenate([one.late_s for one in seen]), 0.0),
        dispatch_factors=_factors(dispatch_s, expected_s),
        message_factors=np.concatenate(
            [_factors(found, found.mean()) for found in way_s.values() if len(found)] or [_NONE]
        ),
    )


def by_known_run(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps of each known run: those of one program and the same stages, in their order."""
    alike: dict[tuple[int, int], list[Step]] = {}
    for trace, stages in steps:
        alike.setdefault((id(trace.program), id(stages)), []).append((trace, stages))
    return list(alike.values())


def _middle(steps: Sequence[Step]) -> list[Step]:
    """Of the steps of each known run, by their length, all but the first and the last quarter."""
    kept = []
    for same in by_known_run(steps):
        same.sort(key=lambda step: step[0].makespan_s)
        kept += same[len(same) // 4 : len(same) - len(same) // 4]
    return kept


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What a step shows.

    gap_s: between the ends of actions and the starts of the next, where all was there; sends, takes: whether the first
    of the two sends a message and the second takes one, shape (gaps,). journey_s: from an action's end to the start of
    one that had waited for its message. late_s: how late each row ended. size_bytes: of its messages.
    """

    size_bytes: int
    gap_s: Seconds
    sends: npt.NDArray[np.bool_]
    takes: npt.NDArray[np.bool_]
    journey_s: Seconds
    late_s: Seconds


def _look(trace: Trace, stages: Sequence[StageCost]) -> _Seen:
    program = trace.program
    if program.has_pairs:
        raise ValueError("a calibration is fitted from a schedule without overlapped pairs: take 1f1b")
    first = np.zeros(len(program.stage), bool)
    first[program.rank_actions[:-1]] = True  # without pairs, rows are actions
    free_s = np.roll(trace.end_s, 1)
    sends, takes = np.roll(program.message_out >= 0, 1), program.message_in >= 0
    sent_s = np.full(len(takes), -np.inf)
    sent_s[takes] = trace.message_start_s[program.message_in[takes]]
    was_there = ~first & (sent_s < free_s - _THERE_S)
    waited = takes & (first | (sent_s > free_s + _THERE_S))
    producer = program.messages.producer[program.message_in[waited]]
    return _Seen(
        size_bytes=int(trace.message_bytes[0]) if len(trace.message_bytes) else 0,
        gap_s=(trace.start_s - free_s)[was_there],
        sends=sends[was_there],
        takes=takes[was_there],
        journey_s=trace.start_s[waited] - trace.end_s[producer],
        late_s=trace.end_s - trace.start_s - row_durations(program, stages),
    )


def _factors(amounts: Seconds, expected: npt.ArrayLike) -> Seconds:
    """Single amounts over what is expected of each, with mean 1; none where nothing is expected."""
    expected = np.broadcast_to(expected, amounts.shape)
    factors = amounts[expected > 0] / expected[expected > 0]
    return factors / factors.mean() if len(factors) and factors.mean() > 0 else _NONE


def _at(table: Mapping[int, float], sizes: npt.NDArray[np.int64]) -> Seconds:
    if not table:
        return np.zeros(len(sizes))
    known = sorted(table)
    return np.interp(sizes, known, [table[size] for size in known])
