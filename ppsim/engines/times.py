"""Times: what an engine answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Times:
    """start_s, end_s: shape (rows,). message_*: shape (messages,): transfer begun, link free again, arrived."""

    start_s: Seconds
    end_s: Seconds
    message_start_s: Seconds
    message_left_s: Seconds
    message_arrival_s: Seconds
