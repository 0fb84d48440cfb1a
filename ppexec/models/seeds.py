"""Seeds: every random stream of a run, derived from one number by its purpose, never by the rank that draws it.

A full parameter depends on (seed, layer, parameter name) alone, and a shard is its slice. Dropout depends on (seed,
step, global sample, layer) and is sliced over tp. The order of the data depends on (seed, step) and is split over dp.
So a run has the same start, masks and data on every mesh, schedule and placement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ppsim.errors import InputError

HELD_OUT = 2**40
"""Where the indices of an evaluation's microbatches begin if the model has no held-out data: beyond any training's."""


def derive(seed: int, *key: int | str) -> int:
    """A number of 63 bits that depends on the seed and the key alone.

    Notes
    -----
    From SHA-256, since Python's hash() differs from process to process.

    Examples
    --------
    >>> derive(0, "sample", 3) == derive(0, "sample", 3)
    True
    >>> derive(0, "sample", 3) == derive(0, "sample", "3")
    False
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def parameter_seed(seed: int, *, layer: int, name: str) -> int:
    """The seed of one full parameter tensor, by its name inside its layer, such as "fc1.weight"."""
    return derive(seed, "parameter", layer, name)


def dropout_seed(seed: int, *, step: int, sample: int, layer: int, site: str = "") -> int:
    """The seed of one sample's dropout in one layer.

    Parameters
    ----------
    seed, step, layer : int
        The run's seed, the step, and the layer's position in the chain.
    sample : int
        Global index of the sample.
    site : str
        Which of the layer's dropouts, where it has several.
    """
    return derive(seed, "dropout", step, sample, layer, *([site] if site else []))


def dropout_mask(
    seed: int,
    *,
    step: int,
    samples: Sequence[int],
    layer: int,
    shape: tuple[int, ...],
    drop: float,
    site: str = "",
    tp: int = 1,
    tp_rank: int = 0,
) -> torch.Tensor:
    """The elements that stay, as a tensor of bool.

    Parameters
    ----------
    seed, step, layer, site
        As for `dropout_seed`.
    samples : sequence of int
        Global indices.
    shape : tuple of int
        Of one full sample.
    drop : float
        Probability that an element is dropped, 0 <= drop < 1.
    tp, tp_rank : int
        Number of slices of the last dimension, and which of them is wanted.

    Returns
    -------
    Tensor of shape (samples, *shape)
        The last dimension is divided by tp.

    Raises
    ------
    InputError
        For another probability, or a last dimension that does not divide by tp.
    """
    if not 0 <= drop < 1:
        raise InputError(f"drop must be a probability, 0 <= drop < 1, got {drop}")
    if shape[-1] % tp:
        raise InputError(f"the last dimension {shape[-1]} does not divide over tp={tp}: take a divisor of it")
    width = shape[-1] // tp
    rows = []
    for sample in samples:
        key = dropout_seed(seed, step=step, sample=sample, layer=layer, site=site)
        stream = np.random.Generator(np.random.Philox(key))
        rows.append(stream.random(shape) >= drop)
    full = torch.from_numpy(np.stack(rows))
    return full[..., tp_rank * width : (tp_rank + 1) * width].contiguous()


def microbatch_order(
    seed: int,
    *,
    step: int,
    microbatches: int | Sequence[int],
    dp_rank: int = 0,
    rounds: int = 1,
    round_number: int = 0,
) -> npt.NDArray[np.int64]:
    """The global indices of the microbatches that a replica reads in a round of a step, in its order.

    Parameters
    ----------
    seed, step : int
        What the order depends on.
    microbatches : int, or sequence of int, shape (dp,)
        m of each replica, per round; one number for a single replica.
    dp_rank : int
        Which replica reads.
    rounds, round_number : int
        r, the rounds of the schedule in a step whose gradients are accumulated, and which of them it is.

    Returns
    -------
    array of shape (m,)

    Notes
    -----
    With M the sum of m over the replicas, step t reads the indices from t r M to (t + 1) r M, in random order. Each
    replica takes its part of that order, and each round its part of that. So the global batch depends on r M alone, not
    on how it is split into replicas and rounds. A replica reads the same sequence for every r with the same r m.

    Examples
    --------
    >>> whole = microbatch_order(0, step=0, microbatches=5)
    >>> parts = [microbatch_order(0, step=0, microbatches=[3, 2], dp_rank=rank) for rank in range(2)]
    >>> bool((np.concatenate(parts) == whole).all())
    True
    """
    by_replica = np.atleast_1d(microbatches)
    total = rounds * int(by_replica.sum())
    own = int(by_replica[dp_rank])
    begin = rounds * int(by_replica[:dp_rank].sum()) + round_number * own
    order = np.random.Generator(np.random.Philox(derive(seed, "order", step))).permutation(total)
    return step * total + order[begin : begin + own]


def sample_generator(seed: int, *, sample: int) -> torch.Generator:
    """The generator of the values of one random sample, by its global index."""
    return torch.Generator().manual_seed(derive(seed, "sample", sample))
