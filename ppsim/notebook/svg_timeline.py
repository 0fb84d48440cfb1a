"""SVG timeline: a step as a small picture that needs no script, for cells of a notebook."""

from __future__ import annotations

import html

import numpy as np

from ppsim.palette import KIND_COLOURS
from ppsim.schedule.action import Kind
from ppsim.trace.trace import Trace

MOST_ROWS = 4000  # beyond, a cell would be slow and the picture a blur
_WIDTH, _LABEL, _LANE, _BAR = 860, 52, 20, 16
_LETTER = 6.2  # pixels of a digit
_ON_DARK = (Kind.F, Kind.W)  # kinds whose colour is dark enough for white digits


def svg_timeline(trace: Trace) -> str:
    """Draw who computed what, when: a lane for each rank, a bar for each action, with the microbatch where it fits.

    Parameters
    ----------
    trace : Trace
        A step of at most `MOST_ROWS` computations.

    Returns
    -------
    str
        An `svg` element. Grey is idle time.
    """
    program, zero_s = trace.program, float(trace.start_s.min())
    scale = (_WIDTH - _LABEL) / trace.makespan_s if trace.makespan_s > 0 else 0.0
    height = _LANE * trace.ranks
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'style="max-width:100%;height:auto" font-family="system-ui,sans-serif" font-size="10" role="img" '
        f'aria-label="{html.escape(str(trace.schedule))}">'
    ]
    for rank in range(trace.ranks):
        y = rank * _LANE
        parts.append(f'<text x="0" y="{y + 12}" fill="#808a97" font-size="11">rank {rank}</text>')
        parts.append(
            f'<rect x="{_LABEL}" y="{y}" width="{_WIDTH - _LABEL}" height="{_BAR}" fill="#808080" fill-opacity="0.15"/>'
        )
    letters_px = _LETTER * len(str(trace.schedule.microbatches - 1)) + 4  # one width, so that 9 and 10 show alike
    starts, lengths = (trace.start_s - zero_s) * scale + _LABEL, (trace.end_s - trace.start_s) * scale
    columns = (program.rank, program.kind, program.microbatch, np.round(starts, 2), np.round(lengths, 2))
    for rank, number, microbatch, x, width in zip(*(each.tolist() for each in columns), strict=True):
        kind, y = Kind(number), rank * _LANE
        gap = 1 if width > 4 else 0
        parts.append(
            f'<rect x="{x}" y="{y}" width="{max(width - gap, 0.3):.2f}" height="{_BAR}" fill="{KIND_COLOURS[kind]}"/>'
        )
        if width > letters_px:
            ink = "#fff" if kind in _ON_DARK else "#000"
            middle = f'x="{x + width / 2:.2f}" y="{y + 11.5}" text-anchor="middle" fill="{ink}"'
            parts.append(f"<text {middle}>{microbatch}</text>")
    parts.append("</svg>")
    return "".join(parts)
