"""Zero bubble with one stage per rank: backwards split into I (for the input) and W (for the weights)."""

from __future__ import annotations

import numpy as np

from ppsim.schedule.order import Order, backward_inputs, backward_weights, forwards, in_slots


def zb_h1(rank: int, ranks: int, microbatches: int) -> Order:
    """ZB-H1: 1F1B's memory, a smaller bubble (Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, figure 2).

    ```
    rank 0  F0 F1 F2  .  . I0 W0 F3 I1 W1 F4 I2 W2 I3 W3 I4 W4
    rank 1     F0 F1  . I0 F2 I1 W0 F3 I2 W1 F4 I3 W2 I4 W3 W4
    rank 2        F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 F4 I4 W2 W3 W4
    ```
    Rank r runs p - 1 - r forwards ahead, as in 1F1B, and each W r backwards later than its I. So every rank has p
    microbatches between F and W: of p - r it holds all activations, of r what W still needs. The bubble is
    (p - 1)(F + I - W), a third of 1F1B's where F = I = W.
    """
    return _split_1f1b(rank, microbatches, ahead=ranks - 1 - rank, lag=rank)


def zb_h2(rank: int, ranks: int, microbatches: int) -> Order:
    """ZB-H2: no bubble within a rank, for twice 1F1B's memory (Qi et al., ICLR 2024, figure 3).

    ```
    rank 0  F0 F1 F2 F3 F4 I0 W0 F5 I1 W1 I2 W2 I3 W3 I4 W4 I5 W5
    rank 1     F0 F1 F2 I0 F3 I1 F4 I2 W0 F5 I3 W1 I4 W2 I5 W3 W4 W5
    rank 2        F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 W0 F5 I5 W1 W2 W3 W4 W5
    ```
    Twice as many forwards run ahead as in ZB-H1, which fills the wait for the first backward. W run twice as late, so
    that the ranks end one after another as they began. With F = I = W and m >= 2p - 1 a rank is never idle between its
    first start and its last end. Every rank has 2p - 1 microbatches between F and W. Steps that follow each other gain
    by it only if the optimizer need not wait for all ranks (the paper's post-validation, section 4).
    """
    return _split_1f1b(rank, microbatches, ahead=2 * (ranks - 1 - rank), lag=2 * rank)


def _split_1f1b(rank: int, microbatches: int, *, ahead: int, lag: int) -> Order:
    """F, I and W of each microbatch in one slot, the F `ahead` slots earlier and the W `lag` slots later."""
    every = np.arange(microbatches)
    return in_slots(
        (forwards(rank, every), every - ahead),
        (backward_inputs(rank, every), every),
        (backward_weights(rank, every), every + lag),
    )
