"""V-Half and V-Min: a half and a third of 1F1B's activations (Qi et al., Controllable Memory, 2024).

Qi et al., Pipeline Parallelism with Controllable Memory, lay out the passes of one microbatch over the ranks (the
building block), repeat the block for every microbatch, and remove the gaps. How long the block holds an activation
decides how much memory the schedule takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Kind
from ppsim.schedule.order import Order

Integers = npt.NDArray[np.integer]

PASSES = 6  # F, I and W of two stages: the slots that one microbatch takes on a rank


def v_half(ranks: int, microbatches: int) -> Sequence[Order]:
    """V-Half: half of 1F1B's activations, half of its bubble (Qi et al., Controllable Memory, 2024, figures 3 and 4).

    Its block on three ranks, a slot for each pass (small letters: the stage on the way up), and the schedule:

    ```
    rank 0  F             f i               I
    rank 1      F       f       i         I
    rank 2          F f             i   I

    rank 0  0F0 0F1   .   .   . 5F0 5I0 5W0   . 5F1 5I1 0I0 5W1 0W0   . 0I1 0W1
    rank 1      1F0   .   . 4F0 1F1   . 4I0 4F1 4W0 1I0 4I1 1W0 4W1 1I1 1W1
    rank 2          2F0 3F0   .   . 2F1 3F1 3I0 2I0 3W0 2W0 3I1 2I1 3W1 2W1
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
    return _repeat(block, microbatches, limit=2 * ((ranks + 2) // 2))


def v_min(ranks: int, microbatches: int) -> Sequence[Order]:
    """V-Min: a third of 1F1B's activations, about two thirds of its bubble (Qi et al., 2024, figures 3 and 4).

    Its block on three ranks, a slot for each pass (small letters: the stage on the way up), and the schedule:

    ```
    rank 0  F         f     i         I
    rank 1    F     f         i     I
    rank 2      F f             i I

    rank 0  0F0   .   .   .   . 5F0 0F1 5I0 5W0   .   . 5F1   . 0I0 5I1 0W0 5W1   .   . 0I1 0W1
    rank 1      1F0   .   . 4F0   .   . 1F1 4I0 4W0 4F1   . 1I0 1W0   . 4I1 4W1   . 1I1 1W1
    rank 2          2F0 3F0   .   .   .   . 2F1 3F1 3I0 2I0 3W0 2W0   .   . 3I1 2I1 3W1 2W1
    ```
    A microbatch goes down and up without a wait. No rank holds more than floor((p + 4) / 3) times the activations of
    its two stages. Meant for F = I = W; with other times the ranks wait for each other at every microbatch.
    """
    rank = np.arange(ranks)
    # As in `v_half`: for p a multiple of 3 the forward down and the backward up would fall together.
    wait = 2 if ranks % 3 == 0 else 0
    up = 2 * ranks + wait
    block = np.stack([rank, 2 * ranks - 1 - rank, up + rank, up + 2 * ranks - 1 - rank])
    return _repeat(block, microbatches, limit=2 * ((ranks + 4) // 3))


def _repeat(block: Integers, microbatches: int, *, limit: int) -> list[Order]:
    """Repeat a block every six slots, and run each pass as early as memory and its inputs allow.

    Parameters
    ----------
    block : array of shape (4, p)
        The slots of forward down, forward up, backward up and backward down on each rank. W take the slots between.
    microbatches : int
        How often the block is repeated, m.
    limit : int
        The most activations of a stage that a rank may hold, from F to W; at least the peak of the repeated block.

    Returns
    -------
    list of p orders

    Notes
    -----
    All passes take one slot; forwards and backwards each keep the block's sequence. In each slot, a rank runs its next
    forward or its next backward if its input is there (a forward also needs room in memory). If both can run, the one
    that the block has earlier runs; if neither can, the oldest W.

    In the stable phase, from rank 0's first backward down to its last forward down, no pass runs before its own slot,
    so that every round is the block. Before and after it passes run early: the paper's reordering of warm-up and
    cool-down.

    The loop ends. When every W that can run has run, the pass that is earliest in the block among those left has its
    input, and if it is a forward it has room, because it has room in the block.
    """
    ranks = block.shape[1]
    forward = _Passes(block[0], block[1], microbatches)
    backward = _Passes(block[3], block[2], microbatches)
    # What has run: row s + 1 of `forwarded` and row s of `backwarded` are stage s. The row before stage 0 and the row
    # after the last stage are always set: there a forward or a backward needs no input.
    forwarded = np.zeros((2 * ranks + 1, microbatches), bool)
    backwarded = np.zeros((2 * ranks + 1, microbatches), bool)
    forwarded[0] = backwarded[-1] = True
    forwards, backwards, weights = (np.zeros(ranks, np.int64) for _ in range(3))
    slots: list[npt.NDArray[np.int8]] = []
    total = 2 * microbatches
    stable, cool_down = block[3, 0], PASSES * (microbatches - 1)

    def in_time(slot: Integers) -> npt.NDArray[np.bool_]:
        # Whether a pass of this slot may run now.
        runs: npt.NDArray[np.bool_] = (slot <= len(slots)) | (slot < stable) | (slot > cool_down)
        return runs

    while (weights < total).any():
        stage_f, microbatch_f, slot_f = forward.at(forwards)
        stage_b, microbatch_b, slot_b = backward.at(backwards)
        can_forward = (forwards < total) & (forwards - weights < limit) & in_time(slot_f)
        can_forward &= forwarded[stage_f, microbatch_f]
        can_backward = (backwards < total) & in_time(slot_b)
        can_backward &= forwarded[stage_b + 1, microbatch_b] & backwarded[stage_b + 1, microbatch_b]
        runs_forward = can_forward & ~(can_backward & (slot_b < slot_f))
        runs_backward = can_backward & ~runs_forward
        runs_weight = ~can_forward & ~can_backward & (weights < backwards)
        slots.append(
            np.select([runs_forward, runs_backward, runs_weight], [Kind.F, Kind.I, Kind.W], -1).astype(np.int8)
        )
        forwarded[(stage_f + 1)[runs_forward], microbatch_f[runs_forward]] = True
        backwarded[stage_b[runs_backward], microbatch_b[runs_backward]] = True
        forwards += runs_forward
        backwards += runs_backward
        weights += runs_weight
    drawn = np.stack(slots, axis=1)
    return [_order(drawn[rank], forward, backward, rank) for rank in range(ranks)]


class _Passes:
    """The forwards, or the backwards, of every rank in the sequence of the repeated block."""

    def __init__(self, down: Integers, up: Integers, microbatches: int) -> None:
        ranks = len(down)
        slot = np.stack([down, up], axis=1)[:, :, None] + PASSES * np.arange(microbatches)
        slot = slot.reshape(ranks, -1).astype(np.int32)
        sequence = np.argsort(slot, axis=1, kind="stable")
        stages = np.stack([np.arange(ranks), 2 * ranks - 1 - np.arange(ranks)], axis=1).astype(np.int32)
        self.rank = np.arange(ranks)
        self.slot = np.take_along_axis(slot, sequence, axis=1)
        self.stage = np.take_along_axis(stages, sequence // microbatches, axis=1)
        self.microbatch = (sequence % microbatches).astype(np.int32)

    def at(self, index: Integers) -> tuple[Integers, Integers, Integers]:
        """Stage, microbatch and slot of each rank's pass number `index`; of its last one where there are no more."""
        at = self.rank, np.minimum(index, self.slot.shape[1] - 1)
        return self.stage[at], self.microbatch[at], self.slot[at]


def _order(drawn: npt.NDArray[np.int8], forward: _Passes, backward: _Passes, rank: int) -> Order:
    """The order of one rank from the kinds in its slots: the passes of each kind in their sequence, W in that of I."""
    kind = drawn[drawn >= 0]
    stage, microbatch = np.empty((2, len(kind)), np.int64)
    for of_kind, passes in ((Kind.F, forward), (Kind.I, backward), (Kind.W, backward)):
        stage[kind == of_kind] = passes.stage[rank]
        microbatch[kind == of_kind] = passes.microbatch[rank]
    return Order(stage, kind, microbatch)
