"""Seeds: every random stream of a run, derived from one number by what it is for, never by who computes it.

A full parameter depends on (seed, layer, parameter name) alone and a shard is its slice; dropout on (seed, step, global
sample, layer), sliced over tp; the order of the data on (seed, step), split over dp. So the same run starts, masks and
reads alike on every mesh, schedule and placement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


def derive(seed: int, *key: int | str) -> int:
    """A number of 63 bits that depends on the seed and the key alone (SHA-256; Python's hash() changes by process)."""
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def parameter_seed(seed: int, *, layer: int, name: str) -> int:
    """The seed of one full parameter tensor; `name` is its name inside its layer, e.g. "fc1.weight"."""
    return derive(seed, "parameter", layer, name)


def dropout_seed(seed: int, *, step: int, sample: int, layer: int, site: str = "") -> int:
    """The seed of one sample's dropout in one layer; `sample` counts over the whole global batch.

    site: which of the layer's dropouts, where it has several.
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
    """Which elements stay: bool, shape (len(samples), *shape) with the last dimension cut to this tp rank's slice.

    drop: probability that an element is dropped, 0 <= drop < 1. shape: one full sample's. site: which of the layer's
    dropouts. Raises ValueError if the last dimension does not divide by tp.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be a probability, 0 <= drop < 1, got {drop}")
    if shape[-1] % tp:
        raise ValueError(f"the last dimension {shape[-1]} does not divide over tp={tp}: take a divisor of it")
    width = shape[-1] // tp
    rows = []
    for sample in samples:
        key = dropout_seed(seed, step=step, sample=sample, layer=layer, site=site)
        stream = np.random.Generator(np.random.Philox(key))
        rows.append(stream.random(shape) >= drop)
    full = torch.from_numpy(np.stack(rows))
    return full[..., tp_rank * width : (tp_rank + 1) * width].contiguous()


def microbatch_order(
    seed: int, *, step: int, microbatches: int, dp: int = 1, dp_rank: int = 0
) -> npt.NDArray[np.int64]:
    """The global indices of the microbatches that a replica reads in a step, shape (microbatches,), in its order.

    microbatches: m, per replica. Step t reads the indices t * dp * m to (t + 1) * dp * m, shuffled by (seed, step); the
    replicas take consecutive runs of that order, so the global batch of a step is the same for dp * m in any split.
    """
    total = microbatches * dp
    order = np.random.Generator(np.random.Philox(derive(seed, "order", step))).permutation(total)
    return step * total + order[dp_rank * microbatches : (dp_rank + 1) * microbatches]


def sample_generator(seed: int, *, sample: int) -> torch.Generator:
    """The generator of one made-up sample's values."""
    return torch.Generator().manual_seed(derive(seed, "sample", sample))
