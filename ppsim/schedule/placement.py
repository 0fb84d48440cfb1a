"""Placement: which rank holds each stage, by rule."""

from __future__ import annotations


def loop_placement(ranks: int, stages_per_rank: int = 1) -> tuple[int, ...]:
    """Stage s on rank s mod p.

    >>> loop_placement(3, 2)
    (0, 1, 2, 0, 1, 2)
    """
    return tuple(range(ranks)) * stages_per_rank


def v_placement(ranks: int, stages_per_rank: int = 2) -> tuple[int, ...]:
    """Stages back and forth over the ranks.

    >>> v_placement(4)
    (0, 1, 2, 3, 3, 2, 1, 0)
    """
    there = tuple(range(ranks))
    return tuple(rank for turn in range(stages_per_rank) for rank in (there if turn % 2 == 0 else there[::-1]))
