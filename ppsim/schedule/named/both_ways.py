"""Both directions: two copies of the model, laid over the ranks the opposite way, and microbatches from both ends.

With p ranks, an even number, rank r holds stage r of the first copy and stage p - 1 - r of the second. The stages of
the second copy are numbered p to 2p - 1, so rank r holds stages r and 2p - 1 - r of the schedule.
"""

from __future__ import annotations

import numpy as np

from ppsim.schedule.named.v_shape import dualpipe_steps
from ppsim.schedule.order import Order, backwards, forwards, in_slots


def dualpipe(rank: int, ranks: int, microbatches: int) -> Order:
    """DualPipe: a forward in one direction overlaps a backward in the other (DeepSeek-AI, DeepSeek-V3, 2024, figure 5).

    A B takes two columns. From `0F3` on (column 8) each forward and the B after it are one overlapped pair; a B without
    a forward right before it runs alone.
    ```
    rank 0  0F0 0F1 0F2 7F4 7I4 7W4 7F5 0F3 7B5 7B5   . 7F6 0B0 0B0 7B6 7B6   . 7F7 0B1 0B1 7B7 7B7 0I2 0W2 0I3 0W3
    rank 1      1F0 6F4 1F1 6F5 1F2 6B4 6B4 6F6 1B0 1B0 1F3 6B5 6B5 6F7 1B1 1B1 6B6 6B6 1B2 1B2   . 6I7 1I3 6W7 1W3
    rank 2      5F4 2F0 5F5 2F1 5F6 2B0 2B0 2F2 5B4 5B4 5F7 2B1 2B1 2F3 5B5 5B5 2B2 2B2 5B6 5B6   . 2I3 5I7 2W3 5W7
    rank 3  4F4 4F5 4F6 3F0 3I0 3W0 3F1 4F7 3B1 3B1   . 3F2 4B4 4B4 3B2 3B2   . 3F3 4B5 4B5 3B3 3B3 4I6 4W6 4I7 4W7
    ```
    The first half of the microbatches enters at rank 0, the second half at the last rank. The rank at distance d from
    its nearer end of the pipeline runs the eight steps of rank d in DualPipeV on p / 2 ranks (`dualpipe_v`). The copy
    that starts at that end takes the way down of the V, the other copy the way up. At its peak every rank holds p + 1
    activations: the authors' PP + 1. With fewer than 2p microbatches, which the authors refuse, the order is that of 2p
    with the missing ones left out.
    """
    own, other = rank, 2 * ranks - 1 - rank
    if rank >= ranks // 2:
        own, other = other, own
    half = microbatches // 2  # their number is even, see `build_schedule`
    order = dualpipe_steps(min(rank, ranks - 1 - rank), ranks // 2, half, down=own, up=other)
    return Order(order.stage, order.kind, order.microbatch + half * (order.stage >= ranks), order.joined)


def chimera(rank: int, ranks: int, microbatches: int) -> Order:
    """Chimera: two 1F1B pipelines in opposite directions, each in the other's gaps (Li and Hoefler, SC 2021, figure 3).

    ```
    rank 0  0F0 0F1   . 7F2 7B2 7B2 7F3 7B3 7B3   . 0B0 0B0   .   . 0B1 0B1
    rank 1      1F0 6F2 1F1 6F3   . 6B2 6B2 1B0 1B0 6B3 6B3 1B1 1B1
    rank 2      5F2 2F0 5F3 2F1   . 2B0 2B0 5B2 5B2 2B1 2B1 5B3 5B3
    rank 3  4F2 4F3   . 3F0 3B0 3B0 3F1 3B1 3B1   . 4B2 4B2   .   . 4B3 4B3
    ```
    A B takes two columns here, and one slot in what follows, as F does. Microbatches come in units of p, half of them
    from each end. On each rank, the forwards of one direction and the backwards of the other have slots of the same
    parity, since p is even, and in a unit these forwards all come before these backwards. So nothing collides.
    Further units follow without a gap (direct concatenation, section 3.3). The last unit may be smaller: it is split as
    evenly as can be.
    Where F and B take equally long a rank idles p - 2 slots in all. At its peak rank r holds
    p / 2 + 1 + min(r, p - 1 - r) activations.
    """
    every = np.arange(microbatches)
    unit, place = np.divmod(every, ranks)
    size = np.minimum(microbatches - unit * ranks, ranks)  # of the microbatch's unit
    from_rank_0 = (size + 1) // 2  # how many of the microbatch's unit start there
    runs = []
    for is_second_copy, stage_of_copy in ((False, rank), (True, ranks - 1 - rank)):
        passing = every[(place >= from_rank_0) == is_second_copy]
        turn = (place - from_rank_0 if is_second_copy else place)[passing]
        # In a unit, stage s of a copy runs the F of turn t in slot 2t + s and the B in slot 2t + 2p - 1 - s.
        slot = 2 * (ranks * unit[passing] + turn)
        stage = stage_of_copy + ranks * is_second_copy
        runs.append((forwards(stage, passing), slot + stage_of_copy))
        runs.append((backwards(stage, passing), slot + 2 * ranks - 1 - stage_of_copy))
    return in_slots(*runs)
