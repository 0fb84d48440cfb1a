"""Order peaks: the most that each rank of a program holds at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ppsim.kernel_cache import kernel
from ppsim.schedule.program_tables import Integers
from ppsim.simulation.order_peak import order_peak

Bytes = npt.NDArray[np.float64]


@kernel
def order_peaks(kind: Integers, stage: Integers, first_row: Integers, held: Bytes, kept: Bytes) -> Bytes:
    """Follow each rank's order.

    kind, stage: of each row, rank after rank. first_row: of each rank, and the end; shape (p + 1,). held: bytes of a
    microbatch on a stage from F to B, or to I; kept: from I to W.
    """
    peaks = np.zeros(len(first_row) - 1)
    for rank in range(len(peaks)):
        peaks[rank] = order_peak(kind, stage, first_row[rank], first_row[rank + 1], held, kept)
    return peaks
