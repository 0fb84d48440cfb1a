"""Critical line: a trace's critical path drawn into its timeline."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from ppsim.explain.attribution import critical_path
from ppsim.plots import style
from ppsim.plots.units import Unit
from ppsim.trace.trace import Trace

_BELOW = 0.3  # the middle of a lane, so that numbers in bars stay legible


def critical_lines(blocks: Sequence[tuple[Trace, float]], unit: Unit) -> list[go.Scatter]:
    """Lines for the critical path of each trace, whose rank r has the lane y = top + r.

    A solid line runs through computations and along messages: from the sender's lane, where a message is ready, to the
    receiver's, where it arrives. A dotted line marks an action that waits although its messages are there.
    """
    lines: dict[bool, tuple[list[float | None], list[float | None]]] = {False: ([], []), True: ([], [])}
    for trace, top in blocks:
        segments = critical_path(trace).segments
        for index, segment in enumerate(segments):
            begin = end = lane = top + segment.rank + _BELOW
            if segment.destination >= 0:
                # A message's segments follow each other: the line leaves with the first and arrives with the last.
                same = [part for part in segments[max(index - 2, 0) : index + 3] if part.message == segment.message]
                span = same[-1].end_s - same[0].start_s
                lanes = segment.destination - segment.rank
                begin += lanes * (segment.start_s - same[0].start_s) / span
                end = lane + lanes * (segment.end_s - same[0].start_s) / span
            x, y = lines[segment.is_wait]
            x += [segment.start_s * unit.scale, segment.end_s * unit.scale, None]
            y += [begin, end, None]
    return [
        go.Scatter(
            name="waits of free ranks on the critical path" if is_wait else "critical path",
            legendgroup="critical path",
            legendrank=2002 + is_wait,
            showlegend=not is_wait,
            x=x,
            y=y,
            mode="lines",
            line={"color": style.CRITICAL, "width": 2.5, "dash": "dot" if is_wait else "solid"},
            hoverinfo="skip",
        )
        for is_wait, (x, y) in lines.items()
        if x
    ]
