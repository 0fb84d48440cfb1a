"""V-Half and V-Min: a half and a third of 1F1B's activations (Qi et al., Controllable Memory, 2024).

Qi et al., Pipeline Parallelism with Controllable Memory, lay out the passes of one microbatch over the ranks (the
building block), repeat the block for every microbatch, and remove the gaps. How long the block holds an activation
decides how much memory the schedule takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ppsim.schedule.named.repeated_block import repeat_block
from ppsim.schedule.order import Order


def v_half(ranks: int, microbatches: int) -> Sequence[Order]:
    """V-Half: half of 1F1B's activations, half of its bubble (Qi et al., Controllable Memory, 2024, figures 3 and 4).

    Its block on three ranks, a slot for each pass (small letters: the stage on the way up), and the schedule:

    ```
    rank 0  F             f i               I
    rank 1      F       f       i         I
    rank 2          F f             i   I

    rank 0  0F0 0F1   .   .   . 5F0 5I0 5W0 5F1 5I1 5W1   . 0I0 0W0   .   .   . 0I1 0W1
    rank 1      1F0 1F1   . 4F0   . 4F1 4I0 4W0   .   . 1I0 4I1 4W1 1W0   . 1I1 1W1
    rank 2          2F0 3F0 2F1 3F1   .   . 3I0 3W0 2I0 2W0   . 3I1 3W1 2I1 2W1
    ```
    Activations take two slots per rank on their way down and one on their way up; so do gradients the other way round.
    At its peak a rank holds floor((p + 2) / 2) times the activations of its two stages. Where W + 2I >= 2F and W + 2F
    >= 2I, the bubble does not grow with the number of microbatches.
    """
    rank = np.arange(ranks)
    # The block repeats every six slots, so its passes on a rank must differ modulo six. For even p the forward up and
    # the backward down would fall together; the backwards then start three slots later.
    wait = 3 if ranks % 2 == 0 else 0
    up = 3 * ranks - 1 + wait
    block = np.stack([2 * rank, 3 * ranks - 2 - rank, up + 2 * rank, up + 3 * ranks - 1 - rank])
    return repeat_block(block, microbatches)


def v_min(ranks: int, microbatches: int) -> Sequence[Order]:
    """V-Min: a third of 1F1B's activations, about two thirds of its bubble (Qi et al., 2024, figures 3 and 4).

    Its block on three ranks, a slot for each pass (small letters: the stage on the way up), and the schedule:

    ```
    rank 0  F         f     i         I
    rank 1    F     f         i     I
    rank 2      F f             i I

    rank 0  0F0 0F1   .   .   . 5F0 5I0 5W0 5F1   .   . 0I0 5I1 5W1 0W0   .   . 0I1 0W1
    rank 1      1F0 1F1   . 4F0   . 4F1 4I0 4W0   . 1I0 1W0   . 4I1 4W1   . 1I1 1W1
    rank 2          2F0 3F0 2F1 3F1   .   . 3I0 2I0 3W0 2W0   .   . 3I1 2I1 3W1 2W1
    ```
    A microbatch goes down and up without a wait. No rank holds more than floor((p + 4) / 3) times the activations of
    its two stages. Meant for F = I = W; with other times the ranks wait for each other at every microbatch.
    """
    rank = np.arange(ranks)
    # As in `v_half`: for p a multiple of 3 the forward down and the backward up would fall together.
    wait = 2 if ranks % 3 == 0 else 0
    up = 2 * ranks + wait
    block = np.stack([rank, 2 * ranks - 1 - rank, up + rank, up + 2 * ranks - 1 - rank])
    return repeat_block(block, microbatches)
