"""Palette: the colours of kinds, of traces and of what a rank waits for, in every figure and page."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ppsim.schedule.action import Kind

# Okabe and Ito's colours, told apart under every common colour blindness: one for each kind, in every figure.
KIND_COLOURS: Mapping[Kind, str] = MappingProxyType(
    {Kind.F: "#0072b2", Kind.B: "#e69f00", Kind.I: "#cc79a7", Kind.W: "#009e73", Kind.R: "#56b4e9"}
)
KIND_NAMES: Mapping[Kind, str] = MappingProxyType(
    {
        Kind.F: "F forward",
        Kind.B: "B backward",
        Kind.I: "I backward for inputs",
        Kind.W: "W backward for weights",
        Kind.R: "R recomputed forward",
    }
)
# For whole traces: other colours than the kinds', so that nobody takes a trace for a kind. Readable on white and black.
SERIES_COLOURS = ("#bb3d86", "#44aa99", "#ccaa33", "#6677cc", "#cc6644", "#66aa33", "#3399cc", "#999999")

# What a rank waits for: other colours again. Fill and drain are the schedule's own, hence the quiet ones.
PART_COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "warm_up": "#88aacc",
        "drain": "#5577aa",
        "imbalance": "#ddbb44",
        "messages": "#44aa88",
        "streams": "#aa7733",
        "collectives": "#9977cc",
        "copies": "#bb6699",
        "device": "#999999",
        "straggler": "#cc4455",
    }
)

CRITICAL = "#d62728"  # readable on white and black, and on every kind's colour
GATHERING = "#5b7f3a"  # of sharded parameters; likewise
OFFLOADING, LOADING = "#8c564b", "#c49c94"  # of activations, to host memory and back
REDUCTION = "#7a4f9e"  # of gradients over replicas; no kind's, no part's and no series' colour
