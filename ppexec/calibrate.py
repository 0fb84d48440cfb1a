"""Calibrate: what running a schedule costs beside its computations, measured apart from what is to be predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ppexec.config import RunConfig
from ppexec.pool import WorkerPool
from ppexec.session import Session
from ppsim import Link, Network, Program, StageCost, Trace
from ppsim.check import smallest_receive_window
from ppsim.simulate import row_durations

_STEPS = 6
_ACTION_S = 0.003
_THERE_S = 200e-6  # a message handed over so long before is there

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a rank spends between its actions, and what messages take, all in seconds.

    action_s: between an action's end and the next one's start where no message comes or goes. send_s: more after an
    action that sends a message, by its size; receive_s: more before one that takes a message that is there.
    one_way_s: size -> from the producer's end to the start of a consumer that had waited for it, waking up and taking
    it included, but for the consumer's own dispatch. late_s: how late a timed action ends. A size between two measured
    ones is interpolated.
    """

    action_s: float
    late_s: float
    send_s: Mapping[int, float] = field(default_factory=dict)
    receive_s: Mapping[int, float] = field(default_factory=dict)
    one_way_s: Mapping[int, float] = field(default_factory=dict)

    def dispatch_s(self, program: Program, message_bytes: npt.NDArray[np.int64], *, timed: bool) -> Seconds:
        """Seconds before each action of a program, shape (actions,); `ppsim.simulate` takes them."""
        first = program.rank_actions[:-1]
        spent_s = np.full(program.actions, self.action_s + (self.late_s if timed else 0.0))
        sent_s = np.zeros(program.actions)
        for column, table, total_s in (
            (program.message_in, self.receive_s, spent_s),
            (program.message_out, self.send_s, sent_s),
        ):
            rows = np.flatnonzero(column >= 0)
            np.add.at(total_s, program.row_action[rows], _at(table, message_bytes[column[rows]]))
        after_send_s = np.roll(sent_s, 1)
        after_send_s[first[first < program.actions]] = 0.0
        return spent_s + after_send_s

    def network(self, program: Program, message_bytes: npt.NDArray[np.int64]) -> Network:
        """The links of a program at their own message sizes; all of it is latency."""
        messages = program.messages
        pairs = zip(messages.source.tolist(), messages.destination.tolist(), strict=True)
        sizes = dict(zip(pairs, message_bytes.tolist(), strict=True))
        return Network(
            links={
                pair: Link(latency_s=float(_at(self.one_way_s, np.array([size]))[0])) for pair, size in sizes.items()
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "action_s": self.action_s,
            "late_s": self.late_s,
            **{
                name: {str(size): seconds for size, seconds in sorted(getattr(self, name).items())}
                for name in ("send_s", "receive_s", "one_way_s")
            },
        }


def calibrate(
    config: RunConfig,
    message_bytes: Sequence[int],
    *,
    pool: WorkerPool | None = None,
    action_s: float = _ACTION_S,
    steps: int = _STEPS,
) -> Calibration:
    """Run 1F1B with timed compute on as many ranks as `config` has, once for each message size, and see what it costs.

    Whatever the schedule that is predicted later, it is this one that is measured here. action_s: what a forward takes
    (a backward twice as much); about as long as what is predicted, since ranks that outnumber the cores disturb one
    another the more, the shorter their actions are.
    """
    sizes = (sorted(set(message_bytes)) if config.ranks > 1 else []) or [0]
    found = [_measured(config, size, pool=pool, action_s=action_s, steps=steps) for size in sizes]
    parts = {
        name: {size: getattr(one, name)[size] for size, one in zip(sizes, found, strict=True)}
        for name in ("send_s", "receive_s", "one_way_s")
    }
    return Calibration(
        action_s=float(np.median([one.action_s for one in found])),
        late_s=float(np.median([one.late_s for one in found])),
        **parts,
    )


def _measured(
    config: RunConfig, size_bytes: int, *, pool: WorkerPool | None, action_s: float, steps: int
) -> Calibration:
    plain = replace(
        config.plain(),
        schedule="1f1b",
        from_csv=None,
        stages_per_rank=None,
        microbatches=max(2 * config.ranks, 8),
        global_batch_size=0,
        layers=config.ranks,
        partition="even",
        costs=None,
        compute="real",  # given costs are waited for all the same
        forward_only=False,
        recompute=False,
        receive_window=0,
    )
    if config.receive_window:
        needed = smallest_receive_window(plain.pipeline.program)
        plain = replace(plain, receive_window=max(config.receive_window, needed))
    stages = [
        StageCost(
            forward_s=action_s,
            backward_input_s=action_s,
            backward_weight_s=action_s,
            activation_bytes=0,
            weight_activation_bytes=0,
            output_bytes=size_bytes,
        )
    ] * config.ranks
    with Session(plain, pool=pool, costs=stages) as session:
        session.measure(1)
        traces = session.measure(steps)
    return fit(traces, stages)


def fit(traces: Sequence[Trace], stages: Sequence[StageCost]) -> Calibration:
    """What measured steps of timed compute say; all messages of one size. Raises ValueError for pairs.

    Each figure is a step's mean, since a step takes the sum of its actions, and the median over steps.
    """
    program = traces[0].program
    if program.has_pairs:
        raise ValueError("a calibration is fitted from a schedule without overlapped pairs: take 1f1b")
    per_step = [_fit_step(trace, stages) for trace in traces]
    action_s, send_s, receive_s, one_way_s, late_s = (_median(list(values)) for values in zip(*per_step, strict=True))
    size = int(traces[0].message_bytes[0]) if len(program.messages) else 0
    known = [0.0 if np.isnan(value) else max(value, 0.0) for value in (send_s, receive_s, one_way_s)]
    return Calibration(
        action_s=0.0 if np.isnan(action_s) else max(action_s, 0.0),
        late_s=max(late_s, 0.0),
        send_s={size: known[0]},
        receive_s={size: known[1]},
        one_way_s={size: known[2]},
    )


def _fit_step(trace: Trace, stages: Sequence[StageCost]) -> tuple[float, float, float, float, float]:
    """action_s, send_s, receive_s, one_way_s, late_s of one step."""
    program = trace.program
    first = np.zeros(len(program.stage), bool)
    first[program.action_start[program.rank_actions[:-1]]] = True
    gap_s = trace.start_s - np.roll(trace.end_s, 1)
    free_s = np.roll(trace.end_s, 1)
    sends = np.roll(program.message_out >= 0, 1)
    takes = program.message_in >= 0
    sent_s = np.full(len(gap_s), -np.inf)
    sent_s[takes] = trace.message_start_s[program.message_in[takes]]
    was_there = ~first & (sent_s < free_s - _THERE_S)
    gaps = {
        (after, before): _mean(gap_s[was_there & (sends == after) & (takes == before)])
        for after in (False, True)
        for before in (False, True)
    }
    action_s = gaps[False, False]
    send_s = gaps[True, False] - action_s
    receive_s = gaps[False, True] - action_s
    if np.isnan(receive_s):
        receive_s = gaps[True, True] - action_s - send_s
    waited = takes & (first | (sent_s > free_s + _THERE_S))
    producer = program.messages.producer[program.message_in[waited]]
    after_send = np.where(sends[waited] & ~first[waited], send_s, 0.0)
    journey_s = trace.start_s[waited] - trace.end_s[producer] - np.nan_to_num(after_send)
    one_way_s = _mean(journey_s) - action_s - np.nan_to_num(receive_s)
    late_s = _mean(trace.end_s - trace.start_s - row_durations(program, stages))
    return action_s, send_s, receive_s, one_way_s - max(late_s, 0.0), late_s


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.median(known)) if known else float("nan")


def _mean(values: Seconds) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _at(table: Mapping[int, float], sizes: npt.NDArray[np.int64]) -> Seconds:
    if not table:
        return np.zeros(len(sizes))
    known = sorted(table)
    return np.interp(sizes, known, [table[size] for size in known])
