"""SVG timeline: steps as small pictures that need no script, for cells of a notebook and for pages of text."""

from __future__ import annotations

import html
from collections.abc import Mapping

import numpy as np

from ppsim.errors import InputError
from ppsim.palette import KIND_COLOURS, KIND_NAMES
from ppsim.schedule.action import Kind
from ppsim.trace.trace import Trace

MOST_ROWS = 4000  # beyond, a cell would be slow and the picture a blur
_WIDTH, _LABEL, _LANE, _BAR = 860, 52, 20, 16
_LETTER = 6.2  # pixels of a digit
_ON_DARK = (Kind.F, Kind.W)  # kinds whose colour is dark enough for white digits
_MARGIN, _TITLE, _LEGEND = 14, 26, 24
_INK, _PAPER, _QUIET = "#1f2933", "#ffffff", "#66707d"


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
    lanes = _lanes(trace, 0, trace.makespan_s)
    return "".join([_opening(_WIDTH, _LANE * trace.ranks, str(trace.schedule)), *lanes, "</svg>"])


def svg_timelines(traces: Mapping[str, Trace], *, description: str = "") -> str:
    """Draw steps one above the other on one time axis, as a picture that stands by itself.

    Parameters
    ----------
    traces : mapping of str to Trace
        By title. Together at most `MOST_ROWS` computations.
    description : str
        What made the picture. It is kept in the file and not drawn.

    Returns
    -------
    str
        An SVG document with a white ground, so that it is legible on dark pages too. Above each step stands its
        title; below all, the colours.

    Raises
    ------
    InputError
        If there is no step, or more than `MOST_ROWS` computations.
    """
    rows = sum(len(trace.start_s) for trace in traces.values())
    if not traces or rows > MOST_ROWS:
        raise InputError(f"the picture has {rows} computations: give steps with 1 to {MOST_ROWS} in all")
    longest_s = max(trace.makespan_s for trace in traces.values())
    parts, y = [], 0
    for title, trace in traces.items():
        parts.append(f'<text y="{y + 14}" font-size="14" font-weight="600" fill="{_INK}">{html.escape(title)}</text>')
        parts += _lanes(trace, y + _TITLE, longest_s)
        y += _TITLE + _LANE * trace.ranks + _MARGIN
    parts += _legend(traces, y)
    width, height = _WIDTH + 2 * _MARGIN, y + _LEGEND + _MARGIN
    return "\n".join(
        [
            _opening(width, height, " above ".join(traces)),
            f"<desc>{html.escape(description)}</desc>" if description else "",
            f'<rect width="{width}" height="{height}" rx="6" fill="{_PAPER}"/>',
            f'<g transform="translate({_MARGIN} {_MARGIN})">',
            *parts,
            "</g>",
            "</svg>\n",
        ]
    )


def _opening(width: int, height: int, label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'style="max-width:100%;height:auto" font-family="system-ui,sans-serif" font-size="10" role="img" '
        f'aria-label="{html.escape(label)}">'
    )


def _lanes(trace: Trace, top: int, longest_s: float) -> list[str]:
    """A lane for each rank from `top` on; the width stands for `longest_s`."""
    program, zero_s = trace.program, float(trace.start_s.min())
    scale = (_WIDTH - _LABEL) / longest_s if longest_s > 0 else 0.0
    length = round(trace.makespan_s * scale, 2)
    parts = []
    for rank in range(trace.ranks):
        y = top + rank * _LANE
        parts.append(f'<text x="0" y="{y + 12}" fill="#808a97" font-size="11">rank {rank}</text>')
        parts.append(
            f'<rect x="{_LABEL}" y="{y}" width="{length:g}" height="{_BAR}" fill="#808080" fill-opacity="0.15"/>'
        )
    letters_px = _LETTER * len(str(trace.schedule.microbatches - 1)) + 4  # one width, so that 9 and 10 show alike
    starts, lengths = (trace.start_s - zero_s) * scale + _LABEL, (trace.end_s - trace.start_s) * scale
    columns = (program.rank, program.kind, program.microbatch, np.round(starts, 2), np.round(lengths, 2))
    for rank, number, microbatch, x, width in zip(*(each.tolist() for each in columns), strict=True):
        kind, y = Kind(number), top + rank * _LANE
        gap = 1 if width > 4 else 0
        parts.append(
            f'<rect x="{x}" y="{y}" width="{max(width - gap, 0.3):.2f}" height="{_BAR}" fill="{KIND_COLOURS[kind]}"/>'
        )
        if width > letters_px:
            ink = "#fff" if kind in _ON_DARK else "#000"
            middle = f'x="{x + width / 2:.2f}" y="{y + 11.5}" text-anchor="middle" fill="{ink}"'
            parts.append(f"<text {middle}>{microbatch}</text>")
    return parts


def _legend(traces: Mapping[str, Trace], top: int) -> list[str]:
    """The colours of the kinds that are drawn, and of idle time."""
    drawn = {int(kind) for trace in traces.values() for kind in trace.program.kind}
    entries = [(KIND_COLOURS[kind], 1.0, KIND_NAMES[kind]) for kind in Kind if kind in drawn]
    parts, x = [], float(_LABEL)
    for colour, opacity, name in [*entries, ("#808080", 0.15, "idle")]:
        parts.append(f'<rect x="{x:g}" y="{top}" width="12" height="12" fill="{colour}" fill-opacity="{opacity:g}"/>')
        parts.append(f'<text x="{x + 17:g}" y="{top + 10.5}" font-size="12" fill="{_QUIET}">{name}</text>')
        x += 17 + _LETTER * len(name) + 22
    return parts
