"""Sensitivity: whose jitter costs how much of the mean step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from ppsim.variation.jitter import PARTS, Jitter
from ppsim.variation.sampler import Sampler

if TYPE_CHECKING:
    import pandas


class _Part(NamedTuple):
    """One kind of jitter, one rank or one link. Means of the makespan without its jitter, and with its jitter alone."""

    name: str
    without_s: float
    alone_s: float


def sensitivity(sampler: Sampler, samples: int) -> pandas.DataFrame:
    """What the jitter of each part costs; see `Ensemble.sensitivity`."""
    import pandas

    runs = _Runs(sampler, samples)
    mean_s, calm_s = runs.mean_s(sampler.times.jitter), runs.mean_s(Jitter())
    found = [(part.name, mean_s - part.without_s, part.alone_s - calm_s) for part in runs.parts()]
    return pandas.DataFrame(found, columns=["part", "saved_s", "alone_s"]).set_index("part")


@dataclass(frozen=True)
class _Runs:
    """Runs of a sampler with less jitter, from the same random numbers."""

    sampler: Sampler
    samples: int

    def mean_s(
        self, jitter: Jitter, *, calm_ranks: frozenset[int] = frozenset(), calm_links: frozenset[int] = frozenset()
    ) -> float:
        times = replace(self.sampler.times, jitter=jitter, calm_ranks=calm_ranks, calm_links=calm_links)
        return float(replace(self.sampler, times=times).run(self.samples).makespan_s.mean())

    def parts(self) -> Iterator[_Part]:
        """Kinds of jitter that vary, then ranks and links if something of theirs varies."""
        jitter, program = self.sampler.times.jitter, self.sampler.times.timed.program
        for part in PARTS:
            alone = jitter.only(part)
            if not alone.is_calm:
                without = jitter.only(*(other for other in PARTS if other != part))
                yield _Part(part, self.mean_s(without), self.mean_s(alone))
        of_ranks = jitter.only(*(part for part in PARTS if part not in ("step", "messages")))
        if not of_ranks.is_calm:
            ranks = frozenset(range(program.ranks))
            for rank in sorted(ranks):
                without_s = self.mean_s(jitter, calm_ranks=frozenset([rank]))
                yield _Part(f"rank {rank}", without_s, self.mean_s(of_ranks, calm_ranks=ranks - {rank}))
        of_links = jitter.only("messages")
        if not of_links.is_calm:
            links = frozenset(range(len(program.links())))
            for link, (source, destination) in enumerate(program.links()):
                without_s = self.mean_s(jitter, calm_links=frozenset([link]))
                yield _Part(f"link {source}-{destination}", without_s, self.mean_s(of_links, calm_links=links - {link}))
