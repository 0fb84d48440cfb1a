"""All forwards, then all backwards."""

from __future__ import annotations

from ppsim.schedule.order import Order, backwards, forwards, interleave


def afab(rank: int, ranks: int, microbatches: int) -> Order:
    """AFAB, all forward, all backward (Huang et al., GPipe, 2019, figure 2c).

    ```
    rank 0  F0 F1 F2 F3          .           .  B0 B0 B1 B1 B2 B2 B3 B3
    rank 1     F0 F1 F2 F3             B0 B0 B1 B1 B2 B2 B3 B3
    rank 2        F0 F1 F2 F3 B0 B0 B1 B1 B2 B2 B3 B3
    ```
    Backwards take the microbatches in the sequence of the forwards, as in PyTorch. At its peak every rank holds m
    activations.
    """
    every = range(microbatches)
    return forwards(rank, every) + backwards(rank, every)


def afab_eager(rank: int, ranks: int, microbatches: int) -> Order:
    """AFAB whose last rank runs each backward right after its forward.

    ```
    rank 0  F0 F1 F2 F3        .        B0 B0     .  B1 B1 ...
    rank 1     F0 F1 F2 F3     .  B0 B0    B1 B1 ...
    rank 2        F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3
    ```
    The other ranks run as in `afab`. With equal stages the step takes as long as AFAB's, and the last rank holds one
    activation instead of m.
    """
    if rank == ranks - 1:
        return interleave(forwards(rank, range(microbatches)), backwards(rank, range(microbatches)))
    return afab(rank, ranks, microbatches)
