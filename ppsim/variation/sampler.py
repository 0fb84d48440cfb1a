"""Sampler: run many samples of a step, block by block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from ppsim.simulation.engines.by_name import run_engine
from ppsim.simulation.engines.times import BatchTimes
from ppsim.variation.sample_times import BlockTimes, SampleTimes


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Runs samples in blocks, with "compiled" several blocks at once on threads.

    A block is a number of samples that are drawn together, see `SampleTimes`.

    Parameters
    ----------
    times : SampleTimes
        The random times of each sample.
    engine : "compiled" or "simpy"
        What runs them. Only "compiled" uses more than one thread.
    threads : int or None
        None: every core that this process may use.
    """

    times: SampleTimes
    engine: str
    threads: int | None = None

    def run(
        self, samples: int, *, watched: npt.NDArray[np.integer] | None = None, with_starts: bool = False
    ) -> BatchTimes:
        """Run samples 0 to `samples` - 1.

        Parameters
        ----------
        samples : int
            How many.
        watched : array of row numbers, optional
            Rows of the program whose ends are kept.
        with_starts : bool
            Whether the start of every row is kept.

        Returns
        -------
        BatchTimes
        """
        rows = np.zeros(0, np.int64) if watched is None else watched
        blocks = list(self._blocks(samples))
        threads = self.threads or _usable_cores()
        run_block = self._run_compiled if self.engine == "compiled" else self._run_one_by_one
        # The property is cached: found here, it is not found by every thread.
        self.times.timed.program.execution_order  # noqa: B018

        def work(block: tuple[int, int]) -> BatchTimes:
            index, count = block
            with np.errstate(over="ignore"):  # infinite times are refused by the caller, see `check_finite`
                drawn = BlockTimes(*(each[:count] for each in self.times.block(index)))
                return run_block(drawn, rows, with_starts)

        if len(blocks) == 1 or threads == 1 or self.engine != "compiled":
            parts = [work(block) for block in blocks]
        else:
            with ThreadPoolExecutor(threads) as pool:
                parts = list(pool.map(work, blocks))
        names = [each.name for each in fields(BatchTimes)]
        return BatchTimes(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def _blocks(self, samples: int) -> Iterator[tuple[int, int]]:
        """The index of each block, and how many of its samples are wanted."""
        size = self.times.block_size
        for block, first in enumerate(range(0, samples, size)):
            yield block, min(size, samples - first)

    def _run_compiled(self, drawn: BlockTimes, watched: npt.NDArray[np.integer], with_starts: bool) -> BatchTimes:
        # Imported here because numba takes a second to import.
        from ppsim.simulation.engines.batched_engine import run_batched

        return run_batched(self.times.timed, *drawn, watched=watched, with_starts=with_starts)

    def _run_one_by_one(self, drawn: BlockTimes, watched: npt.NDArray[np.integer], with_starts: bool) -> BatchTimes:
        timed, count = self.times.timed, len(drawn.duration_s)
        program = timed.program
        busy = np.flatnonzero(np.diff(program.rank_actions))  # ranks with actions
        first_row = program.action_start[program.rank_actions]
        first_start_s, last_end_s, compute_s = np.zeros((3, count, program.ranks))
        starts_s, watched_ends_s, reduced_s = [], [], []
        for index in range(count):
            times = run_engine(self.engine, drawn.of_sample(timed, index))
            first_start_s[index] = last_end_s[index] = times.start_s.min()
            first_start_s[index, busy] = times.start_s[first_row[busy]]
            last_end_s[index, busy] = times.end_s[first_row[busy + 1] - 1]
            compute_s[index] = np.bincount(program.rank, times.end_s - times.start_s, program.ranks)
            watched_ends_s.append(times.end_s[watched])
            starts_s.append(times.start_s)
            reduced_s.append(times.reduced_s)
        return BatchTimes(
            first_start_s=first_start_s,
            last_end_s=last_end_s,
            compute_s=compute_s,
            watched_end_s=np.array(watched_ends_s),
            start_s=np.array(starts_s) if with_starts else np.empty((0, len(program.stage))),
            reduced_s=np.array(reduced_s),
        )


def _usable_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
