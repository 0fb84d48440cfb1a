"""Order peak: the most that a rank's order of actions holds at once, compiled."""

from __future__ import annotations

from typing import Any

from ppsim.kernel_cache import kernel_part
from ppsim.schedule.action import Kind

_F, _B, _I = (int(kind) for kind in (Kind.F, Kind.B, Kind.I))  # plain numbers, which compiled code compares


@kernel_part
def order_peak(kind: Any, stage: Any, first: int, end: int, held: Any, kept: Any) -> Any:
    """Add up what the rows from `first` up to `end` take and release, as `memory_levels.activation_levels` defines it.

    kind, stage: arrays of shape (rows,). held: bytes of a microbatch on each stage from F to B, or to I; kept: from I
    to W; arrays of shape (stages,), of whole numbers or of floats, and so is the result. An overlapped pair needs no
    care: its F comes first, and while both parts are under way both hold their bytes.
    """
    level, peak = 0, 0
    for row in range(first, end):
        s, k = stage[row], kind[row]
        if k == _F:
            level += held[s]
        elif k == _B:
            level -= held[s]
        elif k == _I:
            level += kept[s] - held[s]
        else:
            level -= kept[s]
        peak = max(peak, level)
    return peak
