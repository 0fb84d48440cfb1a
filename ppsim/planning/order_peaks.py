"""Order peaks: the most that each rank of a program holds at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ppsim.kernel_cache import kernel
from ppsim.schedule.action import Kind
from ppsim.schedule.program_tables import Integers

Bytes = npt.NDArray[np.float64]
_F, _B, _I, _W = (int(kind) for kind in (Kind.F, Kind.B, Kind.I, Kind.W))


@kernel
def order_peaks(kind: Integers, stage: Integers, first_row: Integers, held: Bytes, kept: Bytes) -> Bytes:
    """Follow each rank's order.

    kind, stage: of each row, rank after rank. first_row: of each rank, and the end; shape (p + 1,). held: bytes of a
    microbatch on a stage from F to B, or to I; kept: from I to W.
    """
    peaks = np.zeros(len(first_row) - 1)
    for rank in range(len(peaks)):
        now = 0.0
        for row in range(first_row[rank], first_row[rank + 1]):
            if kind[row] == _F:
                now += held[stage[row]]
            elif kind[row] == _B:
                now -= held[stage[row]]
            elif kind[row] == _I:
                now += kept[stage[row]] - held[stage[row]]
            elif kind[row] == _W:
                now -= kept[stage[row]]
            peaks[rank] = max(peaks[rank], now)
    return peaks
