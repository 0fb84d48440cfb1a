"""Runner: samples of a step, block by block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ppsim.simulation.engines.by_name import run_engine
from ppsim.simulation.engines.samples import Samples
from ppsim.variation.draws import Draws

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs samples, block by block, several blocks at once."""

    draws: Draws
    engine: str
    threads: int | None = None

    def run(
        self, samples: int, *, watched: npt.NDArray[np.integer] | None = None, with_starts: bool = False
    ) -> Samples:
        """The first `samples` samples; see `run_batched` for what is kept of them."""
        rows = np.zeros(0, np.int64) if watched is None else watched
        blocks = list(self._blocks(samples))
        threads = self.threads or _usable_cores()
        run_block = self._run_compiled if self.engine == "compiled" else self._run_one_by_one
        self.draws.load.program.execution_order  # noqa: B018  (found once, not by every thread)

        def work(block: tuple[int, int]) -> Samples:
            return run_block(*block, rows, with_starts)

        if len(blocks) == 1 or threads == 1 or self.engine != "compiled":
            parts = [work(block) for block in blocks]
        else:
            with ThreadPoolExecutor(threads) as pool:
                parts = list(pool.map(work, blocks))
        names = ("first_start_s", "last_end_s", "compute_s", "watched_end_s", "start_s")
        return Samples(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def _blocks(self, samples: int) -> Iterator[tuple[int, int]]:
        """Each block's number, and how many of its samples are wanted."""
        size = self.draws.block_size
        for block, first in enumerate(range(0, samples, size)):
            yield block, min(size, samples - first)

    def _draw(self, block: int, count: int) -> tuple[Seconds, Seconds, Seconds, Seconds]:
        with np.errstate(over="ignore"):  # whoever asked checks
            duration_s, dispatch_s, occupied_s, latency_s = self.draws.block(block)
        return duration_s[:count], dispatch_s[:count], occupied_s[:count], latency_s[:count]

    def _run_compiled(self, block: int, count: int, watched: npt.NDArray[np.integer], with_starts: bool) -> Samples:
        from ppsim.simulation.engines.batched_engine import run_batched

        return run_batched(self.draws.load, *self._draw(block, count), watched=watched, with_starts=with_starts)

    def _run_one_by_one(self, block: int, count: int, watched: npt.NDArray[np.integer], with_starts: bool) -> Samples:
        program = self.draws.load.program
        used = np.flatnonzero(np.diff(program.rank_actions))
        rows = program.action_start[program.rank_actions]
        first_start_s, last_end_s, compute_s = np.zeros((3, count, program.ranks))
        starts, watched_ends = [], []
        duration_s, *others = self._draw(block, count)
        for index in range(count):
            dispatch_s, occupied_s, latency_s = (each[min(index, len(each) - 1)] for each in others)
            load = replace(
                self.draws.load,
                duration_s=duration_s[index],
                dispatch_s=dispatch_s,
                occupied_s=occupied_s,
                latency_s=latency_s,
            )
            with np.errstate(over="ignore"):
                times = run_engine(self.engine, load)
            first_start_s[index] = last_end_s[index] = times.start_s.min()
            first_start_s[index, used] = times.start_s[rows[used]]
            last_end_s[index, used] = times.end_s[rows[used + 1] - 1]
            compute_s[index] = np.bincount(program.rank, times.end_s - times.start_s, program.ranks)
            watched_ends.append(times.end_s[watched])
            starts.append(times.start_s)
        return Samples(
            first_start_s=first_start_s,
            last_end_s=last_end_s,
            compute_s=compute_s,
            watched_end_s=np.array(watched_ends),
            start_s=np.array(starts) if with_starts else np.empty((0, len(program.stage))),
        )


def _usable_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
