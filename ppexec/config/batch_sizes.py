"""Batch sizes: a global batch, its microbatches and their samples, each from the others."""

from __future__ import annotations

from ppexec.config.divisors import largest_divisor
from ppsim.errors import InputError


def batch_sizes(
    *, global_batch_size: int, microbatches: int, micro_batch_size: int, usual_size: int, dp: int
) -> tuple[int, int]:
    """Settle how many microbatches a replica has, and the samples of the largest.

    Parameters
    ----------
    global_batch_size : int
        Samples of a step over all replicas; 0 if it is to follow from the others.
    microbatches : int
        Of a replica; 0 if they are to follow.
    micro_batch_size : int
        Samples of a microbatch; 0 if they are to follow.
    usual_size : int
        Samples of a microbatch if nothing says how many.
    dp : int
        Number of replicas.

    Returns
    -------
    microbatches : int
        0 if nothing says how many.
    micro_batch_size : int

    Raises
    ------
    InputError
        For numbers that do not agree, with the nearest that do.

    Examples
    --------
    >>> batch_sizes(global_batch_size=8, microbatches=3, micro_batch_size=0, usual_size=2, dp=1)
    (3, 3)
    >>> batch_sizes(global_batch_size=8, microbatches=0, micro_batch_size=0, usual_size=2, dp=2)
    (2, 2)
    """
    if not global_batch_size:
        return microbatches, micro_batch_size or usual_size
    if microbatches:
        return microbatches, _largest_share(global_batch_size, microbatches, micro_batch_size, dp)
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


def _largest_share(global_batch_size: int, microbatches: int, micro_batch_size: int, dp: int) -> int:
    """The samples of the largest microbatch, where the global batch is divided as evenly as possible."""
    parts = microbatches * dp
    if global_batch_size < parts:
        replicas = f" in each of {dp} replicas" if dp > 1 else ""
        raise InputError(
            f"global_batch_size {global_batch_size} leaves nothing for some of {microbatches} microbatches{replicas}: "
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
