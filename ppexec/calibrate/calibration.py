"""Calibration: what running a schedule costs beside its computations, fitted from known runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ppsim import Conditions, Jitter, Link, Network, Program, StageCost, Trace
from ppsim.errors import InputError
from ppsim.simulation.timed_program import row_durations
from ppsim.trace.trace import known

# A message sent so long before has arrived: several times what one takes between processes of a machine.
_THERE_S = 300e-6
_PERCENTILES = (10, 50, 90, 99)

Seconds = npt.NDArray[np.float64]
Step = tuple[Trace, Sequence[StageCost]]
"""A measured step of timed compute, and the stated costs of its stages."""
_NONE = np.zeros(0)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What ranks spend between their actions and what messages take: means, and how they vary.

    Parameters
    ----------
    action_s : float
        Mean seconds before an action that takes no message.
    receive_s : mapping of int to float
        Message size in bytes to further mean seconds before an action that takes a message which has arrived.
    send_s : mapping of int to float
        Message size to mean seconds from the end of an action until the message that it sends starts.
    one_way_s : mapping of int to float
        Message size to mean seconds from the start of a message until a consumer that waits for it can start.
    late_s : array of shape (actions,)
        Seconds by which each timed action ended late.
    dispatch_factors : array
        Time spent before each action, over its mean.
    message_factors : array
        Time that each message took, over the mean of its size.
    independent_share : float
        From 0 to 1: the share of these deviations that each action and message has by itself. The rest makes all ranks
        late at the same time, so only its mean counts.
    step_std : float
        Relative standard deviation of whole steps that all of the above does not explain.
    sharing_efficiency : float
        Efficiency of cores that are shared by more ranks than there are cores (see `ppsim.simulation.sharing`).

    Notes
    -----
    Sizes between two measured ones are interpolated. The last three are fitted to whole steps (see `step_fit`), the
    others to single actions (see `fit`).
    """

    action_s: float = 0.0
    receive_s: Mapping[int, float] = field(default_factory=dict)
    send_s: Mapping[int, float] = field(default_factory=dict)
    one_way_s: Mapping[int, float] = field(default_factory=dict)
    late_s: Seconds = field(default_factory=lambda: _NONE)
    dispatch_factors: Seconds = field(default_factory=lambda: _NONE)
    message_factors: Seconds = field(default_factory=lambda: _NONE)
    independent_share: float = 1.0
    step_std: float = 0.0
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
        """How times vary, as `ppsim.monte_carlo` takes it.

        Parameters
        ----------
        timed : bool
            Whether what is predicted is timed compute. Only timed actions end late.
        """
        factors = {"dispatch": self.dispatch_factors, "message": self.message_factors}
        return Jitter(
            factors={name: self._independent(each) for name, each in factors.items() if len(each)},
            late_s=self._independent(self.late_s) if timed and len(self.late_s) else (),
            step=self.step_std,
        )

    def _independent(self, amounts: Seconds) -> Seconds:
        mean = float(amounts.mean())
        return mean + self.independent_share * (amounts - mean)

    def to_dict(self) -> dict[str, Any]:
        """The calibration as JSON values, with mean and percentiles of each array."""
        return {
            "action_s": self.action_s,
            **{
                name: {str(size): seconds for size, seconds in sorted(getattr(self, name).items())}
                for name in ("receive_s", "send_s", "one_way_s")
            },
            **{name: _described(getattr(self, name)) for name in ("late_s", "dispatch_factors", "message_factors")},
            "independent_share": self.independent_share,
            "step_std": self.step_std,
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
    """Fit a calibration to measured steps of timed compute.

    Parameters
    ----------
    steps : sequence of (Trace, stage costs)
        All messages of a step have one size. Different steps may have different sizes.

    Returns
    -------
    Calibration
        With the defaults of what is fitted to whole steps (see `step_fit`).

    Raises
    ------
    InputError
        For a schedule with overlapped pairs.

    Notes
    -----
    The time between two actions is action_s, plus send_s if the first sends a message, plus receive_s if the second
    takes a message that has arrived; least squares over all such times. So they are means, since a step takes the sum
    of its actions. Of the steps of one known run the slowest and the fastest quarter are left out, since other programs
    may have used the machine during them.
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
    """Group steps by known run: those with the same program and stages, in their order."""
    alike: dict[tuple[int, int], list[Step]] = {}
    for trace, stages in steps:
        alike.setdefault((id(trace.program), id(stages)), []).append((trace, stages))
    return list(alike.values())


def _middle(steps: Sequence[Step]) -> list[Step]:
    """The steps of each known run without the fastest and the slowest quarter."""
    kept = []
    for same in by_known_run(steps):
        same.sort(key=lambda step: step[0].makespan_s)
        kept += same[len(same) // 4 : len(same) - len(same) // 4]
    return kept


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What a step shows.

    gap_s: from the end of an action to the start of the next where no message was missing. sends, takes: whether the
    first of the two sends a message, and the second takes one, shape (gaps,). journey_s: from the end of an action to
    the start of one that waited for its message. late_s: how late each row ended. size_bytes: of each message.
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
        raise InputError(
            f"schedule {program.schedule.name!r} has overlapped pairs, between whose parts there is no gap: fit a "
            "calibration to a schedule without overlapped pairs, such as 1f1b"
        )
    first = np.zeros(len(program.stage), bool)
    first[program.rank_actions[:-1]] = True  # without pairs, rows are actions
    free_s = np.roll(trace.end_s, 1)
    sends, takes = np.roll(program.message_out >= 0, 1), program.message_in >= 0
    sent_s = np.full(len(takes), -np.inf)
    sent_s[takes] = known(trace.message_start_s)[program.message_in[takes]]
    was_there = ~first & (sent_s < free_s - _THERE_S)
    waited = takes & (first | (sent_s > free_s + _THERE_S))
    producer = program.messages.producer[program.message_in[waited]]
    return _Seen(
        size_bytes=int(known(trace.message_bytes)[0]) if len(program.messages) else 0,
        gap_s=(trace.start_s - free_s)[was_there],
        sends=sends[was_there],
        takes=takes[was_there],
        journey_s=trace.start_s[waited] - trace.end_s[producer],
        late_s=trace.end_s - trace.start_s - row_durations(program, stages),
    )


def _factors(amounts: Seconds, expected: npt.ArrayLike) -> Seconds:
    """Amounts over what was expected of each, scaled to mean 1; without those where nothing was expected."""
    expected = np.broadcast_to(expected, amounts.shape)
    factors = amounts[expected > 0] / expected[expected > 0]
    return factors / factors.mean() if len(factors) and factors.mean() > 0 else _NONE


def _at(table: Mapping[int, float], sizes: npt.NDArray[np.int64]) -> Seconds:
    if not table:
        return np.zeros(len(sizes))
    known = sorted(table)
    return np.interp(sizes, known, [table[size] for size in known])
