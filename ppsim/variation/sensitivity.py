"""Sensitivity: whose jitter costs how much of the mean step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ppsim.variation.jitter import Jitter
from ppsim.variation.sampler import Runner

if TYPE_CHECKING:
    import pandas

Seconds = npt.NDArray[np.float64]
Variation = tuple[str, Seconds, Seconds]  # a part; makespans without its jitter, and with its jitter alone


def sensitivity(runner: Runner, samples: int) -> pandas.DataFrame:
    """See `Ensemble.sensitivity`."""
    import pandas

    parts = _Parts(runner, samples)
    mean_s, calm_s = (float(parts.varied(jitter).mean()) for jitter in (runner.draws.jitter, Jitter()))
    found = [
        (part, mean_s - float(without.mean()), float(alone.mean()) - calm_s) for part, without, alone in parts.each()
    ]
    return pandas.DataFrame(found, columns=["part", "saved_s", "alone_s"]).set_index("part")


class _Parts:
    """A runner's samples under less jitter, from the same random numbers."""

    def __init__(self, runner: Runner, samples: int) -> None:
        self._runner, self._samples = runner, samples
        self._jitter, self._program = runner.draws.jitter, runner.draws.load.program

    def varied(
        self,
        jitter: Jitter,
        *,
        calm_ranks: frozenset[int] = frozenset(),
        calm_links: frozenset[int] = frozenset(),
    ) -> Seconds:
        draws = replace(self._runner.draws, jitter=jitter, calm_ranks=calm_ranks, calm_links=calm_links)
        return replace(self._runner, draws=draws).run(self._samples).makespan_s

    def each(self) -> Iterator[Variation]:
        yield from self._kinds()
        own = replace(self._jitter, step=0.0, message=0.0)
        if not own.is_calm:
            yield from self._ranks(own)
        if self._jitter.message:
            yield from self._links(Jitter(message=self._jitter.message))

    def _kinds(self) -> Iterator[Variation]:
        jitter = self._jitter
        alone = {
            "actions": Jitter(action=jitter.action, factors=jitter.factors),
            "ranks": Jitter(rank=jitter.rank),
            "step": Jitter(step=jitter.step),
            "messages": Jitter(message=jitter.message),
            "hiccups": Jitter(hiccup_probability=jitter.hiccup_probability, hiccup_s=jitter.hiccup_s),
        }
        without = {
            "actions": replace(jitter, action=0.0, factors={}),
            "ranks": replace(jitter, rank=0.0),
            "step": replace(jitter, step=0.0),
            "messages": replace(jitter, message=0.0),
            "hiccups": replace(jitter, hiccup_probability=0.0),
        }
        for kind, only in alone.items():
            if not only.is_calm:
                yield kind, self.varied(without[kind]), self.varied(only)

    def _ranks(self, own: Jitter) -> Iterator[Variation]:
        ranks = frozenset(range(self._program.ranks))
        for rank in sorted(ranks):
            without = self.varied(self._jitter, calm_ranks=frozenset([rank]))
            yield f"rank {rank}", without, self.varied(own, calm_ranks=ranks - {rank})

    def _links(self, only: Jitter) -> Iterator[Variation]:
        links = frozenset(range(len(self._program.links())))
        for link, (source, destination) in enumerate(self._program.links()):
            without = self.varied(self._jitter, calm_links=frozenset([link]))
            yield f"link {source}-{destination}", without, self.varied(only, calm_links=links - {link})
