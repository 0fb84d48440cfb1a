"""Schedules of several stages per rank, laid around the ranks in a loop: stage s on rank s mod p."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ppsim.schedule.order import (
    Order,
    backward_inputs,
    backward_weights,
    backwards,
    concatenate,
    forwards,
    in_slots,
    overlap,
)

Integers = npt.NDArray[np.int64]


def interleaved_1f1b(rank: int, ranks: int, microbatches: int, stages_per_rank: int, group: int | None = None) -> Order:
    """Interleaved 1F1B, depth first (Narayanan et al., SC 2021, section 2.2.2, figure 4 bottom).

    Two ranks with two stages each:
    ```
    rank 0  0F0 0F1 2F0 2F1 0F2   . 2B0 2B0 0F3 2B1 2B1 2F2 0B0 0B0 2F3 0B1 0B1   . 2B2 2B2   . 2B3 2B3 0B2 0B2 0B3 0B3
    rank 1      1F0 1F1 3F0 3B0 3B0 3F1 3B1 3B1 1F2 1B0 1B0 1F3 1B1 1B1 3F2 3B2 3B2 3F3 3B3 3B3 1B2 1B2 1B3 1B3
    ```
    Microbatches come in rounds of p or a few more. A round passes through the rank's first stage, then through its
    second, and so on; the backwards take the stages in reverse. A rank runs (v - 1) * round + 2 (p - 1 - rank) forwards
    ahead of its backwards. The bubble is v times smaller than that of 1F1B.

    The paper requires m to be a multiple of p. As in PyTorch there are m // p rounds, at least one. PyTorch refuses
    rounds of different size; here the first ones are larger by one. With a `group` rounds have that many microbatches,
    and the last one what is left, as with Megatron-LM's --microbatch-group-size-per-virtual-pipeline-stage: larger
    rounds keep more activations, and give messages more time.
    """
    chunk, microbatch, round_size = _depth_first(ranks, microbatches, stages_per_rank, group)
    slot = np.arange(len(chunk))
    ahead = (stages_per_rank - 1) * round_size + 2 * (ranks - 1 - rank)
    forward_stage, backward_stage = _stages(chunk, rank, ranks, stages_per_rank)
    return in_slots((forwards(forward_stage, microbatch), slot - ahead), (backwards(backward_stage, microbatch), slot))


def interleaved_overlap(
    rank: int, ranks: int, microbatches: int, stages_per_rank: int, group: int | None = None
) -> Order:
    """Interleaved 1F1B whose steady state is overlapped pairs, as Megatron-LM's combined 1F1B.

    Two ranks with two stages each; `2F2 2B1 2B1` is one overlapped pair, and so are the forwards before and after it:
    ```
    rank 0  0F0 0F1 2F0 2F1 0F2   .   . 0F3 2B0 2B0 2F2 2B1 2B1 2F3 0B0 0B0 0B1 0B1   . 2B2 2B2 2B3 2B3 0B2 0B2 0B3 0B3
    rank 1      1F0 1F1 3F0 3F1 3B0 3B0 1F2 3B1 3B1 1F3 1B0 1B0 3F2 1B1 1B1 3F3 3B2 3B2 3B3 3B3 1B2 1B2 1B3 1B3
    ```
    A forward and a backward of different microbatches need nothing of each other, so that the communication of one,
    such as a mixture of experts' dispatch, runs under the compute of the other. For that every rank runs one forward
    more ahead than in `interleaved_1f1b`. With one stage per rank a rank runs 2 (p - 1 - rank) + 1 ahead, twice as many
    as 1F1B: a pair takes F and B together, so a gradient comes back that much later. `group` as in `interleaved_1f1b`.
    """
    chunk, microbatch, round_size = _depth_first(ranks, microbatches, stages_per_rank, group)
    total = len(chunk)
    ahead = min((stages_per_rank - 1) * round_size + 2 * (ranks - 1 - rank) + 1, total)
    forward_stage, backward_stage = _stages(chunk, rank, ranks, stages_per_rank)
    forward, backward = forwards(forward_stage, microbatch), backwards(backward_stage, microbatch)
    return concatenate(
        [
            forward.take(range(ahead)),
            overlap(forward.take(range(ahead, total)), backward.take(range(total - ahead))),
            backward.take(range(total - ahead, total)),
        ]
    )


def interleaved_zb(rank: int, ranks: int, microbatches: int, stages_per_rank: int, group: int | None = None) -> Order:
    """Interleaved 1F1B with split backwards: ZB-H1 (Qi et al., ICLR 2024, figure 2) on several stages per rank.

    ```
    rank 0  0F0 0F1 2F0 2F1   . 2I0 2W0 0F2 2I1 2W1 0F3 0I0 0W0 2F2 0I1 0W1 2F3 2I2 2W2 2I3 2W3 0I2 0W2 0I3 0W3
    rank 1      1F0 1F1 3F0 3I0 3F1 3I1 3W0 1F2 1I0 3W1 1F3 1I1 1W0 3F2 3I2 1W1 3F3 3I3 3W2 1I2 3W3 1I3 1W2 1W3
    ```
    Gradients for the input go back at once, so a rank runs only (v - 1) * round + (p - 1 - rank) forwards ahead. Rank r
    runs each W r backwards later, so that all ranks have equally many microbatches under way. Rounds are those of
    `interleaved_1f1b`. The order is that of PyTorch's InterleavedZeroBubble.
    """
    chunk, microbatch, round_size = _depth_first(ranks, microbatches, stages_per_rank, group)
    slot = np.arange(len(chunk))
    ahead = (stages_per_rank - 1) * round_size + ranks - 1 - rank
    forward_stage, backward_stage = _stages(chunk, rank, ranks, stages_per_rank)
    return in_slots(
        (forwards(forward_stage, microbatch), slot - ahead),
        (backward_inputs(backward_stage, microbatch), slot),
        (backward_weights(backward_stage, microbatch), slot + rank),
    )


def looped_bfs(rank: int, ranks: int, microbatches: int, stages_per_rank: int) -> Order:
    """Breadth first: all microbatches through a rank's first stage, then all through its second.

    Source: Lamy-Poirier, Breadth-First Pipeline Parallelism, MLSys 2023.

    ```
    rank 0  0F0 0F1 0F2 2F0 2F1 2F2   .   .   . 2B2 2B2 2B1 2B1 2B0 2B0 0B2 0B2 0B1 0B1 0B0 0B0
    rank 1      1F0 1F1 1F2 3F0 3F1 3F2 3B2 3B2 3B1 3B1 3B0 3B0 1B2 1B2 1B1 1B1 1B0 1B0
    ```
    Backwards take stages and microbatches in reverse, as in PyTorch. At its peak a rank holds v m activations of one
    stage. With one stage per rank this is AFAB whose backwards take the last microbatch first.
    """
    every = np.arange(microbatches)
    stages = [chunk * ranks + rank for chunk in range(stages_per_rank)]
    return concatenate(
        [forwards(stage, every) for stage in stages] + [backwards(stage, every[::-1]) for stage in reversed(stages)]
    )


@lru_cache(maxsize=4)
def _depth_first(
    ranks: int, microbatches: int, stages_per_rank: int, group: int | None
) -> tuple[Integers, Integers, int]:
    """The chunk and microbatch of each forward, shape (v m,), and the size of the first round, which is the largest."""
    every = np.arange(microbatches)
    if group is None:
        rounds = np.array_split(every, max(1, microbatches // ranks))
    else:
        rounds = np.split(every, np.arange(group, microbatches, group))
    chunk = np.concatenate([np.repeat(np.arange(stages_per_rank), len(members)) for members in rounds])
    microbatch = np.concatenate([np.tile(members, stages_per_rank) for members in rounds])
    return chunk, microbatch, len(rounds[0])


def _stages(chunk: Integers, rank: int, ranks: int, stages_per_rank: int) -> tuple[Integers, Integers]:
    """The stage of each forward, and of each backward: the chunks of a round in reverse."""
    return chunk * ranks + rank, (stages_per_rank - 1 - chunk) * ranks + rank
