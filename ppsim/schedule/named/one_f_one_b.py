"""One forward, one backward."""

from __future__ import annotations

import numpy as np

from ppsim.schedule.order import Order, backwards, forwards, in_slots


def one_f_one_b(rank: int, ranks: int, microbatches: int) -> Order:
    """1F1B, also called PipeDream-Flush (Narayanan et al., SC 2021, section 2.2.1, figure 4 top; DAPPLE, 2021).

    A B takes two columns here and below; a dot is idle.
    ```
    rank 0  F0 F1 F2  .  .  .  . B0 B0 F3 B1 B1  . B2 B2  . B3 B3
    rank 1     F0 F1  .  . B0 B0 F2 B1 B1 F3 B2 B2  . B3 B3
    rank 2        F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3
    ```
    A rank first runs one forward more than the rank after it, then a forward and a backward in turn. At its peak rank r
    holds min(m, p - r) activations. With m < p there are fewer forwards to run first, and nothing else changes.
    """
    return _one_in_turn(rank, microbatches, ranks - 1 - rank)


def eager_one_f_one_b(rank: int, ranks: int, microbatches: int) -> Order:
    """1F1B with twice as many forwards ahead, so that messages have time (Zhuang et al., MLSys 2023, eager-1F1B).

    ```
    rank 0  F0 F1 F2 F3  .  .  . B0 B0  . B1 B1  . B2 B2  . B3 B3
    rank 1     F0 F1 F2  . B0 B0 F3 B1 B1  . B2 B2  . B3 B3
    rank 2        F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3
    ```
    With free messages the step is as long as that of `one_f_one_b`. As long as a message takes c <= (F + B) / 2, the
    step is (m + p - 1)(F + B) + 2 (p - 1) c: no rank waits for a message in the steady state. At its peak rank r holds
    min(m, 2 (p - r) - 1) activations.
    """
    return _one_in_turn(rank, microbatches, 2 * (ranks - 1 - rank))


def _one_in_turn(rank: int, microbatches: int, ahead: int) -> Order:
    """So many forwards ahead, then a forward and a backward in turn."""
    every = np.arange(microbatches)
    return in_slots((forwards(rank, every), every - ahead), (backwards(rank, every), every))
