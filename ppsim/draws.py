"""Draws: the random factors of a jitter, the same for a seed and a sample whoever asks, and in whatever blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from ppsim.action import Kind
from ppsim.engines.load import Load
from ppsim.jitter import Jitter, log_deviation

Seconds = npt.NDArray[np.float64]


class _Stream(IntEnum):
    """What is drawn apart, so that one kind of jitter changes nothing of what another draws."""

    ACTION = 0
    RANK = 1
    STEP = 2
    MESSAGE = 3
    HICCUP = 4


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Durations and message times of samples of a load.

    Sample i draws from Philox (Salmon et al., SC 2011) keyed by the seed, with counters that hold i and what is drawn:
    so it depends on no other sample. calm_ranks, calm_links: ranks and links (by number) that keep their times, a
    step's common factor apart; what the others draw does not change.
    """

    load: Load
    jitter: Jitter
    seed: int
    calm_ranks: frozenset[int] = field(default_factory=frozenset)
    calm_links: frozenset[int] = field(default_factory=frozenset)

    def block(self, first: int, count: int) -> tuple[Seconds, Seconds, Seconds]:
        """Samples `first` to `first + count`: duration_s (count, rows), occupied_s and latency_s (count, messages).

        The latter two have the shape (1, messages) where messages do not vary.
        """
        generators = _Generators(self.seed, first, count)
        return self._durations(generators, count), *self._message_times(generators, count)

    def sample(self, index: int) -> Load:
        """The load as sample `index` has it."""
        duration_s, occupied_s, latency_s = self.block(index, 1)
        return replace(self.load, duration_s=duration_s[0], occupied_s=occupied_s[0], latency_s=latency_s[0])

    def _durations(self, generators: _Generators, count: int) -> Seconds:
        jitter, program = self.jitter, self.load.program
        rank = program.rank[program.action_start[:-1]]
        calm = np.isin(rank, list(self.calm_ranks)) if self.calm_ranks else None
        factors = self._action_factors(generators, count)
        if jitter.rank:
            of_rank = np.empty((count, program.ranks))
            for out, generator in zip(of_rank, generators.of(_Stream.RANK), strict=True):
                generator.standard_normal(out=out)
            by_rank = _log_normal(of_rank, jitter.rank)[:, rank]
            factors = by_rank if factors is None else np.multiply(factors, by_rank, out=factors)
        if calm is not None and factors is not None:
            factors[:, calm] = 1.0
        if jitter.step:
            of_step = np.array([generator.standard_normal() for generator in generators.of(_Stream.STEP)])[:, None]
            of_step = _log_normal(of_step, jitter.step)
            factors = of_step if factors is None else np.multiply(factors, of_step, out=factors)
        if factors is None:
            durations_s = np.repeat(self.load.duration_s[None], count, axis=0)
        elif program.has_pairs and factors.shape[1] > 1:
            durations_s = factors[:, program.row_action] * self.load.duration_s
        else:
            durations_s = factors * self.load.duration_s
        if jitter.has_hiccups:
            last_row = program.action_start[1:] - 1
            for durations, generator in zip(durations_s, generators.of(_Stream.HICCUP), strict=True):
                struck = np.flatnonzero(generator.random(program.actions) < jitter.hiccup_probability)
                pauses_s = generator.exponential(jitter.hiccup_s, len(struck))
                if calm is not None:
                    pauses_s[calm[struck]] = 0.0
                durations[last_row[struck]] += pauses_s
        return durations_s

    def _action_factors(self, generators: _Generators, count: int) -> Seconds | None:
        """The factor of each action alone, shape (count, actions); None if all are 1."""
        jitter, program = self.jitter, self.load.program
        measured = {int(Kind[name]): drawn for name, drawn in jitter.factors.items()}
        if not (jitter.action or measured):
            return None
        drawn = np.empty((count, program.actions))
        if not measured:
            for out, generator in zip(drawn, generators.of(_Stream.ACTION), strict=True):
                generator.standard_normal(out=out)
            return _log_normal(drawn, jitter.action)
        kind = program.kind[program.action_start[:-1]]
        of_kind = [(measured.get(each), np.flatnonzero(kind == each)) for each in np.unique(kind).tolist()]
        for out, generator in zip(drawn, generators.of(_Stream.ACTION), strict=True):
            for choices, actions in of_kind:
                if choices is None:
                    out[actions] = _log_normal(generator.standard_normal(len(actions)), jitter.action)
                else:
                    out[actions] = choices[generator.integers(len(choices), size=len(actions))]
        return drawn

    def _message_times(self, generators: _Generators, count: int) -> tuple[Seconds, Seconds]:
        load = self.load
        if not self.jitter.message:
            return load.occupied_s[None], load.latency_s[None]
        factors = np.empty((count, len(load.occupied_s)))
        for out, generator in zip(factors, generators.of(_Stream.MESSAGE), strict=True):
            generator.standard_normal(out=out)
        factors = _log_normal(factors, self.jitter.message)
        if self.calm_links:
            factors[:, np.isin(load.program.messages.link, list(self.calm_links))] = 1.0
        return factors * load.occupied_s, factors * load.latency_s


def _log_normal(normals: Seconds, relative_std: float) -> Seconds:
    """Standard normals, overwritten by log-normal factors of mean 1."""
    deviation = log_deviation(relative_std)
    np.multiply(normals, deviation, out=normals)
    np.subtract(normals, deviation**2 / 2, out=normals)
    return np.exp(normals, out=normals)


class _Generators:
    """A generator set to the beginning of each sample's stream. Setting one is ten times faster than making one."""

    def __init__(self, seed: int, first: int, count: int) -> None:
        self._bits = np.random.Philox(key=np.random.SeedSequence(seed).generate_state(2, np.uint64))
        self._begin = self._bits.state
        self._generator = np.random.Generator(self._bits)
        self._samples = range(first, first + count)

    def of(self, stream: _Stream) -> Iterator[np.random.Generator]:
        """Sample after sample; each is to be used before the next is taken."""
        for sample in self._samples:
            self._begin["state"]["counter"][2:] = stream, sample
            self._bits.state = self._begin
            yield self._generator
