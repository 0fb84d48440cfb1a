"""Batch sizes: a global batch, its microbatches and their samples, each from the others."""

from __future__ import annotations

from collections.abc import Sequence

from ppexec.config.divisors import largest_divisor
from ppsim.errors import InputError


def counts_by_replica(text: str, *, dp: int, microbatches: int) -> tuple[int, ...]:
    """The microbatches of each replica, as the flag `replica_microbatches` says them.

    Parameters
    ----------
    text : str
        Whole numbers with commas between them.
    dp : int
        Number of replicas.
    microbatches : int
        What the flag `microbatches` says; 0 if nothing.

    Raises
    ------
    InputError
        For other text, another number of replicas, or flags that contradict.

    Examples
    --------
    >>> counts_by_replica("5,4", dp=2, microbatches=0)
    (5, 4)
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 and int(part) for part in parts):
        raise InputError(
            f"replica_microbatches must be whole numbers of 1 or more, one for each replica, such as 5,4, got {text!r}"
        )
    if len(parts) != dp:
        raise InputError(
            f"replica_microbatches {text} has {len(parts)} number(s), but dp is {dp}: give one for each replica, or "
            f"take dp {len(parts)}"
        )
    counts = tuple(map(int, parts))
    if microbatches not in (0, max(counts)):
        raise InputError(
            f"replica_microbatches {text} says how many microbatches each replica has, and microbatches is "
            f"{microbatches}: leave one of the two out"
        )
    return counts


def batch_sizes(
    *, global_batch_size: int, microbatches: Sequence[int], micro_batch_size: int, usual_size: int
) -> tuple[int, int]:
    """Settle how many microbatches a replica has at most, and the samples of the largest.

    Parameters
    ----------
    global_batch_size : int
        Samples of a step over all replicas; 0 if it is to follow from the others.
    microbatches : sequence of int, shape (dp,)
        Of each replica; zeros if they are to follow.
    micro_batch_size : int
        Samples of a microbatch; 0 if they are to follow.
    usual_size : int
        Samples of a microbatch if nothing says how many.

    Returns
    -------
    microbatches : int
        Of the replica with the most; 0 if nothing says how many.
    micro_batch_size : int

    Raises
    ------
    InputError
        For numbers that do not agree, with the nearest that do.

    Examples
    --------
    >>> batch_sizes(global_batch_size=8, microbatches=[3], micro_batch_size=0, usual_size=2)
    (3, 3)
    >>> batch_sizes(global_batch_size=8, microbatches=[0, 0], micro_batch_size=0, usual_size=2)
    (2, 2)
    """
    dp = len(microbatches)
    if not global_batch_size:
        return max(microbatches), micro_batch_size or usual_size
    if any(microbatches):
        return max(microbatches), _largest_share(global_batch_size, microbatches, micro_batch_size)
    size = micro_batch_size or usual_size
    per_round = size * dp
    over = global_batch_size % per_round
    if over:
        nearest = [each for each in (global_batch_size - over, global_batch_size - over + per_round) if each]
        own = global_batch_size // dp
        fitting = 1 if global_batch_size % dp else largest_divisor(own, most=size)
        replicas = f" x {dp} replicas" if dp > 1 else ""
        raise InputError(
            f"global_batch_size {global_batch_size} does not divide by micro_batch_size {size}{replicas}: take a "
            f"global batch of {' or '.join(map(str, nearest))}, a micro batch of {fitting}, or say how many "
            "microbatches instead"
        )
    return global_batch_size // per_round, size


def _largest_share(global_batch_size: int, microbatches: Sequence[int], micro_batch_size: int) -> int:
    """The samples of the largest microbatch, where the global batch is divided as evenly as possible."""
    parts = sum(microbatches)
    if global_batch_size < parts:
        replicas = f" in {len(microbatches)} replicas" if len(microbatches) > 1 else ""
        raise InputError(
            f"global_batch_size {global_batch_size} leaves nothing for some of {parts} microbatches{replicas}: "
            f"take a global batch of {parts} or more, or fewer microbatches"
        )
    largest = -(-global_batch_size // parts)
    if micro_batch_size not in (0, largest):
        raise InputError(
            f"global_batch_size {global_batch_size} over {parts} microbatches is at most {largest} samples for each, "
            f"but micro_batch_size is {micro_batch_size}: leave one of the three out"
        )
    return largest


def samples_of(microbatch: int, *, microbatches: int, samples: int) -> range:
    """The global indices of a microbatch's samples.

    Parameters
    ----------
    microbatch : int
        Its own global index, which goes on from step to step.
    microbatches : int
        How many share `samples`.
    samples : int
        They are divided as evenly as possible, the larger microbatches first.

    Examples
    --------
    >>> [samples_of(microbatch, microbatches=3, samples=8) for microbatch in range(4)]
    [range(0, 3), range(3, 6), range(6, 8), range(8, 11)]
    """
    batch, position = divmod(microbatch, microbatches)
    size, larger = divmod(samples, microbatches)
    start = batch * samples + position * size + min(position, larger)
    return range(start, start + size + (position < larger))
