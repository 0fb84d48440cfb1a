"""Two stages per rank in a V: rank r holds stage r, on the way down, and stage 2p - 1 - r, on the way up."""

from __future__ import annotations

import numpy as np

from ppsim.schedule.order import (
    Order,
    backward_inputs,
    backward_weights,
    backwards,
    first_microbatches,
    forwards,
    interleave,
    overlap,
)


def zb_v(rank: int, ranks: int, microbatches: int) -> Order:
    """ZB-V: 1F1B's memory and, with F = I = W, no bubble within a rank (Qi et al., ICLR 2024, section 6).

    ```
    rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0I0 0W0 3F2 3I2 3W2 0I1 0W1 3F3 3I3 3W3 0I2 0W2 0I3 0W3
    rank 1      1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 2W2 1I2 2I3 1I3 1W2 2W3 1W3
    ```
    Rank r runs 2 (p - r) - 1 forwards down, then forwards up and down in turn until the first backward can come; then F
    I W down and F I W up in turn. At the end some W wait, so that the I follow each other without a gap. With fewer
    than 2p - 1 microbatches it is the order of 2p - 1 without those that are missing. The order is that of PyTorch's
    ZBVZeroBubble, and V-ZB in Qi et al., Pipeline Parallelism with Controllable Memory, 2024, figure 4.
    """
    p, r = ranks, rank
    m = max(microbatches, 2 * p - 1)
    down, up = r, 2 * p - 1 - r
    left = p - r  # ranks from here to the turn of the V, this one included
    n = m - p - left + 1  # rounds of the main step

    # 1, 2, 3: forwards down; up and down; forwards up with their backwards
    order = forwards(down, range(2 * left - 1))
    order += interleave(forwards(up, range(r)), forwards(down, range(2 * left - 1, p + left - 1)))
    order += interleave(forwards(up, range(r, p)), *_split(up, range(left)))
    # 4: the main step, F I W f i w
    order += interleave(
        forwards(down, range(m - n, m)),
        *_split(down, range(n)),
        forwards(up, range(p, p + n)),
        *_split(up, range(left, left + n)),
    )
    # 5: the same without forwards down
    order += interleave(
        *_split(down, range(n, m - p)),
        forwards(up, range(p + n, m)),
        *_split(up, range(left + n, m - r)),
    )
    # 6, 7, 8: I i; I W; the W that are left
    order += interleave(backward_inputs(down, range(m - p, m - left)), backward_inputs(up, range(m - r, m)))
    order += interleave(backward_inputs(down, range(m - left, m)), backward_weights(down, range(m - p, m - r)))
    order += backward_weights(up, range(m - r, m)) + backward_weights(down, range(m - r, m))
    return first_microbatches(order, microbatches)


def dualpipe_v(rank: int, ranks: int, microbatches: int) -> Order:
    """DualPipeV: a forward on one way of the V overlaps a backward on the other (DeepSeek-AI, DualPipe, 2025).

    `0F3 3B1 3B1` is one overlapped pair, and so are the forwards after it with their B:
    ```
    rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3B1   . 3F2 0B0 0B0 3B2 3B2   . 3F3 0B1 0B1 3B3 3B3 0I2 0W2 0I3 0W3
    rank 1      1F0 2F0 1F1 2F1 1F2 2B0 2B0 2F2 1B0 1B0 1F3 2B1 2B1 2F3 1B1 1B1 2B2 2B2 1B2 1B2   . 2I3 1I3 2W3 1W3
    ```
    The last p backwards of a rank are split, so that gradients
    for the input go on at once. At its peak every rank holds 2p + 1 activations of one stage: the authors' PP + 1, with
    PP stages on p ranks. The order is that of PyTorch's DualPipeV. With fewer than 2p microbatches, which the authors
    and PyTorch refuse, it is the order of 2p without those that are missing.
    """
    return dualpipe_steps(rank, ranks, microbatches, down=rank, up=2 * ranks - 1 - rank)


def dualpipe_steps(rank: int, ranks: int, microbatches: int, *, down: int, up: int) -> Order:
    """The eight steps of DualPipe and DualPipeV on one rank, whose stages are `down` and `up`; see `dualpipe_v`.

    The comments number the steps as the authors do. Microbatches count from 0 on both stages.
    """
    p, r = ranks, rank
    m = max(microbatches, 2 * p)
    after = p - 1 - r  # ranks from here to the turn of the V, this one not included
    n = m - 2 * p + r + 1  # rounds of the main step
    alone = 1 if after == 0 else 0  # at the turn the first pair is not overlapped: its backward is urgent

    # 1, 2, 3: forwards down; down and up; split backwards up with forwards up
    order = forwards(down, range(2 * after))
    order += interleave(forwards(down, range(2 * after, 2 * after + r + 1)), forwards(up, range(r + 1)))
    order += interleave(*_split(up, range(after)), forwards(up, range(r + 1, p)))
    # 4: the main step, <F b> <f B>
    ahead = interleave(forwards(down, range(m - n, m)), forwards(up, range(p, p + n)))
    back = interleave(backwards(up, range(after, after + n)), backwards(down, range(n)))
    order += interleave(_part(ahead, 0, alone), _part(back, 0, alone))
    order += overlap(_part(ahead, alone, 2 * n), _part(back, alone, 2 * n))
    # 5: b <f B>
    order += _then_overlap(
        backwards(up, range(after + n, 2 * after + n)),
        forwards(up, range(p + n, m)),
        backwards(down, range(n, n + after)),
    )
    # 6: b B, of which the later half is split
    both = interleave(backwards(up, range(m - r - 1, m)), backwards(down, range(m - p, m - after)))
    half = _part(both, r + 1, 2 * r + 2)
    order += _part(both, 0, r + 1) + backward_inputs(half.stage, half.microbatch)
    # 7, 8: the oldest W with the last I; the W that are left
    pending = backward_weights(half.stage, half.microbatch) + backward_weights(down, range(m - after, m))
    order += interleave(_part(pending, 0, after), backward_inputs(down, range(m - after, m)))
    order += _part(pending, after, p)
    return first_microbatches(order, microbatches)


def _then_overlap(first: Order, forward: Order, backward: Order) -> Order:
    """In turn one action of `first`, and one pair of `forward` and `backward`."""
    parts = interleave(first, forward, backward)
    return Order(parts.stage, parts.kind, parts.microbatch, np.arange(len(parts.stage)) % 3 == 1)


def _split(stage: int, microbatches: range) -> tuple[Order, Order]:
    """The I and the W of these microbatches."""
    return backward_inputs(stage, microbatches), backward_weights(stage, microbatches)


def _part(order: Order, first: int, last: int) -> Order:
    """The actions first to last - 1."""
    return order.take(range(first, last))
