"""Sentences: a comparison in words and in a table of text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ppsim.explain.attribution import PARTS
from ppsim.explain.step_graph import INFERRED
from ppsim.trace.trace import Trace

if TYPE_CHECKING:
    from ppsim.explain.comparison import Comparison

_SHOWN = 5
_PART_NAMES = {"compute": "computations", "messages": "messages", "device": "device or dispatch"}


def step_names(first: Trace, second: Trace) -> tuple[str, str]:
    """What two compared steps are called: "predicted" and "measured" if that is what they are."""
    is_usual = first.clock == "simulated" and second.clock != "simulated"
    return ("predicted", "measured") if is_usual else ("first", "second")


def explanation(found: Comparison) -> str:
    """The comparison in plain sentences."""
    first, second = found.names
    program = found.predicted.trace.program
    predicted_s, measured_s = found.predicted.trace.makespan_s, found.measured.trace.makespan_s
    tells = abs(found.difference_s) >= found.dust_s > 0
    if not tells:
        lines = [f"Both steps take {_time(predicted_s)}."]
    else:
        word = "longer" if found.difference_s > 0 else "shorter"
        share = f" ({found.difference_s / predicted_s:+.2%})" if predicted_s > 0 else ""
        lines = [
            f"The {second} step takes {_time(measured_s)}, {_time(abs(found.difference_s))} {word} than the "
            f"{first} {_time(predicted_s)}{share}."
        ]
    named = [each for each in found.telling if each.part != "residual"][:_SHOWN]
    if named and tells:
        parts = {part: seconds for part, seconds in found.parts_s.items() if part != "residual"}
        sums = ", ".join(
            f"{_PART_NAMES[part]} {_signed(0.0 if abs(seconds) < found.dust_s else seconds)}"
            for part, seconds in parts.items()
        )
        lines.append(f"On the critical path: {sums}.")
        lines.append("Most of it: " + "; ".join(f"{each.name} {_signed(each.seconds)}" for each in named) + ".")
    longest = [row for row in found.largest_rows(3) if abs(found.row_s[row]) >= found.dust_s]
    if longest and tells:
        told = [
            f"{program.action_of(row)} ({_time(length_s(found.predicted.trace, row))} {first}, "
            f"{_time(length_s(found.measured.trace, row))} {second}, {_signed(float(found.row_s[row]))} of the step)"
            for row in longest
        ]
        lines.append(f"Actions that explain most: {'; '.join(told)}.")
    moved = {name: math.fsum(seconds) / program.ranks for name, seconds in found.bubbles_s.items()}
    most = sorted((name for name in PARTS if abs(moved[name]) >= found.dust_s), key=lambda name: -abs(moved[name]))[:3]
    if most and tells:
        told = [f"{name.replace('_', '-')} {_signed(moved[name])}" for name in most]
        lines.append(f"Bubbles, on average over the ranks: {', '.join(told)}.")
    for each in found.memory:
        lines.append(
            f"Activation bytes on rank {each.rank} differ from {each.action} on: {each.predicted_bytes:,} "
            f"{first}, {each.measured_bytes:,} {second}."
        )
    traces = {first: found.predicted.trace, second: found.measured.trace}
    unknown = [name for name, trace in traces.items() if trace.activation_bytes is None]
    if unknown:
        lines.append(f"Activation bytes are not known: {' and '.join(unknown)}.")
    elif not found.memory:
        lines.append("Activation bytes are equal after every action.")
    unseen = [name for name, trace in traces.items() if trace.message_times_s is None]
    if unseen:
        lines.append(f"Messages were not recorded: {' and '.join(unseen)}. {INFERRED}")
    return "\n".join(lines)


def table(found: Comparison) -> str:
    """Contributions by size, and each rank's bubble by part: the second step's minus the first's."""
    first, second = found.names
    total = f"{second} - {first}"
    width = max(len(total), *(len(each.name) for each in found.telling), 0)
    step_s = found.predicted.trace.makespan_s
    lines = [f"{'what':<{width}}  {'seconds':>13}  {'of the step':>11}"]
    for each in found.telling:
        share = each.seconds / step_s if step_s > 0 else 0.0
        lines.append(f"{each.name:<{width}}  {each.seconds:>+13.6g}  {share:>+11.2%}")
    share = found.difference_s / step_s if step_s > 0 else 0.0
    lines.append(f"{total:<{width}}  {found.difference_s:>+13.6g}  {share:>+11.2%}")
    lines += ["", "rank" + "".join(f"  {name.replace('_', '-') + ' (s)':>15}" for name in PARTS)]
    for rank, row in enumerate(zip(*(found.bubbles_s[name].tolist() for name in PARTS), strict=True)):
        lines.append(f"{rank:>4}" + "".join(f"  {seconds:>+15.6g}" for seconds in row))
    return "\n".join(lines)


def length_s(trace: Trace, row: int) -> float:
    """Seconds of a row."""
    return float(trace.end_s[row] - trace.start_s[row])


def _time(seconds: float) -> str:
    size = float(f"{abs(seconds):.4g}")
    scale, unit = (1.0, "s") if size >= 1 or size == 0 else (1e3, "ms") if size >= 1e-3 else (1e6, "µs")
    return f"{seconds * scale:.4g} {unit}"


def _signed(seconds: float) -> str:
    return f"{'+' if seconds >= 0 else '-'}{_time(abs(seconds))}"
