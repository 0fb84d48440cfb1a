"""Durations: what each rank's actions and each link's messages took, measured and predicted.

Beside a step time that is off they show where the difference comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppsim import Kind, Trace
from ppsim.trace.trace import known

Row = dict[str, Any]


def durations(predicted: Trace, measured: Sequence[Trace]) -> dict[str, list[Row]]:
    """Median milliseconds by kind of action and rank, and by link.

    Parameters
    ----------
    predicted : Trace
        One step.
    measured : sequence of Trace
        Steps of the same program.

    Returns
    -------
    dict
        "actions": a row for each kind (F, B, I, W) and rank that has some. "messages": a row for each link, whose
        messages last from when they are sent until they have arrived. Each row has "count" (in a step),
        "measured_ms" and "predicted_ms".

    Examples
    --------
    >>> from ppsim import StageCost, build_schedule, simulate
    >>> stage = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    >>> step = simulate(build_schedule("1f1b", ranks=1, microbatches=2), [stage])
    >>> durations(step, [step])["actions"][0]
    {'kind': 'F', 'rank': 0, 'count': 2, 'measured_ms': 1000.0, 'predicted_ms': 1000.0}
    """
    program, messages = predicted.program, predicted.program.messages
    return {
        "actions": [
            {"kind": Kind(each).name, "rank": number, **_medians(predicted, measured, chosen, _action_s)}
            for each in np.unique(program.kind).tolist()
            for number in range(program.ranks)
            if (chosen := (program.kind == each) & (program.rank == number)).any()
        ],
        "messages": [
            {
                "source": source,
                "destination": destination,
                **_medians(
                    predicted,
                    measured,
                    (messages.source == source) & (messages.destination == destination),
                    lambda trace: known(trace.message_arrival_s) - known(trace.message_start_s),
                ),
            }
            for source, destination in program.links()
        ],
    }


def _action_s(trace: Trace) -> np.ndarray:
    return trace.end_s - trace.start_s


def _medians(predicted: Trace, measured: Sequence[Trace], chosen: np.ndarray, seconds_of: Any) -> Row:
    """Of the chosen actions or messages, in milliseconds."""
    return {
        "count": int(chosen.sum()),
        "measured_ms": float(np.median(np.concatenate([seconds_of(trace)[chosen] for trace in measured]))) * 1e3,
        "predicted_ms": float(np.median(seconds_of(predicted)[chosen])) * 1e3,
    }
