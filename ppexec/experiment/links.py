"""Links: what messages between ranks cost, probed by size, and the network fitted to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ppexec.config.config import RunConfig
from ppexec.measure.ping import PingSample
from ppexec.session import Session
from ppexec.workers.pool import WorkerPool
from ppsim import Link, Network, StageCost
from ppsim.network.link_fit import fit_link


def probe_links(
    ranks: int,
    sizes: Iterable[int],
    *,
    rounds: int,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> tuple[list[PingSample], dict[str, Any]]:
    """Send messages of several sizes between every two ranks, one link at a time.

    Parameters
    ----------
    ranks : int
        Every ordered pair of them is a link.
    sizes : iterable of int
        Bytes of a message.
    rounds : int
        Measured messages of each kind and size.
    progress : callable
        Goes through the sizes; a progress bar.

    Returns
    -------
    samples : list of PingSample
    environment : dict
        Where they were taken; JSON values.
    """
    # The run only brings workers and a group; its stages are never run.
    config = RunConfig(ranks=ranks, microbatches=ranks, layers=ranks, hidden=8, seq=2, compute="timed")
    cost = StageCost(forward_s=0.0, backward_input_s=0.0, backward_weight_s=0.0)
    with WorkerPool() as pool, Session(config, pool=pool, costs=[cost] * ranks) as session:
        samples = [
            sample for size in progress(sorted(set(sizes))) for sample in session.probe_sizes([size], rounds=rounds)
        ]
        return samples, session.environment()


def fit_network(samples: Sequence[PingSample], *, most_pieces: int) -> Network:
    """Fit each link to its own samples; all other pairs get what fits all samples."""

    def fit(chosen: Sequence[PingSample]) -> Link:
        return fit_link(
            [sample.size_bytes for sample in chosen],
            [sample.asleep.median_s for sample in chosen],
            [sample.occupied_s for sample in chosen],
            most_pieces=most_pieces,
        )

    pairs = sorted({(sample.source, sample.destination) for sample in samples})
    own = {pair: fit([sample for sample in samples if (sample.source, sample.destination) == pair]) for pair in pairs}
    return Network.of(fit(samples), own)


def sample_row(sample: PingSample, network: Network) -> dict[str, Any]:
    """One link and size as JSON values: what was measured, and what the fitted link says."""
    link, size = network.link(sample.source, sample.destination), sample.size_bytes
    return {
        "source": sample.source,
        "destination": sample.destination,
        "size_bytes": size,
        "asleep_s": asdict(sample.asleep),
        "awake_s": asdict(sample.awake),
        "late_s": asdict(sample.late),
        "burst_s": {count: burst.median_s for count, burst in sample.bursts.items()},
        "occupied_s": sample.occupied_s,
        "send_s": asdict(sample.send),
        "post_s": asdict(sample.post),
        "fit_one_way_s": link.one_way_s(size),
        "fit_occupied_s": link.occupied_s(size),
        "fit_over_measured": link.one_way_s(size) / sample.asleep.median_s,
    }


def link_entry(link: Link) -> list[dict[str, Any]]:
    """The pieces of a link as JSON values; no bandwidth is None."""
    return [
        {**asdict(piece), "bytes_per_s": piece.bytes_per_s if np.isfinite(piece.bytes_per_s) else None}
        for piece in link.pieces
    ]
