"""Draws: the random factors of a jitter, the same for a seed and a sample whoever asks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Kind
from ppsim.simulation.timed_program import Load
from ppsim.variation.jitter import Jitter, log_deviation

Seconds = npt.NDArray[np.float64]
_BLOCK_ROWS = 2**16  # half a megabyte of durations, which stays in a core's cache


class _Stream(IntEnum):
    """What is drawn apart, so that one kind of jitter changes nothing of what another draws."""

    ACTION = 0
    RANK = 1
    STEP = 2
    MESSAGE = 3
    HICCUP = 4
    DISPATCH = 5
    LATE = 6


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Durations and message times of samples of a load.

    Samples are drawn in blocks, whose size follows from the program alone. Block k draws from Philox (Salmon et al., SC
    2011) keyed by the seed, with counters that hold k and what is drawn: so it depends on no other block, and on
    nobody's number of samples or threads. calm_ranks, calm_links: ranks and links (by number) that keep their times, a
    step's common factor apart; what the others draw does not change.
    """

    load: Load
    jitter: Jitter
    seed: int
    calm_ranks: frozenset[int] = field(default_factory=frozenset)
    calm_links: frozenset[int] = field(default_factory=frozenset)

    @property
    def block_size(self) -> int:
        """Samples in a block: as many as have _BLOCK_ROWS rows, and at least one."""
        return max(_BLOCK_ROWS // len(self.load.duration_s), 1)

    def block(self, index: int) -> tuple[Seconds, Seconds, Seconds, Seconds]:
        """A block's samples: duration_s (block_size, rows), dispatch_s (block_size, actions), occupied_s and latency_s
        (block_size, messages); one row for all samples of what does not vary, but durations.
        """
        return self._durations(index), self._dispatches(index), *self._message_times(index)

    def sample(self, index: int) -> Load:
        """The load as one sample has it."""
        block, place = divmod(index, self.block_size)
        times = [each[min(place, len(each) - 1)].copy() for each in self.block(block)]
        return replace(self.load, duration_s=times[0], dispatch_s=times[1], occupied_s=times[2], latency_s=times[3])

    def _generator(self, stream: _Stream, block: int) -> np.random.Generator:
        key = np.random.SeedSequence(self.seed).generate_state(2, np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, stream, block]))

    def _durations(self, block: int) -> Seconds:
        jitter, program = self.jitter, self.load.program
        count = self.block_size
        rank = program.rank[program.action_start[:-1]]
        calm = np.isin(rank, list(self.calm_ranks)) if self.calm_ranks else None
        factors = self._action_factors(block)
        if jitter.rank:
            of_rank = self._generator(_Stream.RANK, block).standard_normal((count, program.ranks))
            by_rank = _log_normal(of_rank, jitter.rank)[:, rank]
            factors = by_rank if factors is None else np.multiply(factors, by_rank, out=factors)
        if calm is not None and factors is not None:
            factors[:, calm] = 1.0
        if jitter.step:
            of_step = _log_normal(self._generator(_Stream.STEP, block).standard_normal((count, 1)), jitter.step)
            factors = of_step if factors is None else np.multiply(factors, of_step, out=factors)
        if factors is None:
            durations_s = np.repeat(self.load.duration_s[None], count, axis=0)
        elif program.has_pairs and factors.shape[1] > 1:
            durations_s = factors[:, program.row_action] * self.load.duration_s
        else:
            durations_s = factors * self.load.duration_s
        if jitter.has_hiccups:
            generator = self._generator(_Stream.HICCUP, block)
            sample, action = np.nonzero(generator.random((count, program.actions)) < jitter.hiccup_probability)
            pauses_s = generator.exponential(jitter.hiccup_s, len(sample))
            if calm is not None:
                pauses_s[calm[action]] = 0.0
            durations_s[sample, program.action_start[1:][action] - 1] += pauses_s
        late_s = np.asarray(jitter.late_s)
        if late_s.any():
            drawn_s = self._picked(late_s, _Stream.LATE, block, program.actions)
            if calm is not None:
                drawn_s[:, calm] = 0.0
            durations_s[:, program.action_start[1:] - 1] += drawn_s
        return durations_s

    def _picked(self, measured: Seconds, stream: _Stream, block: int, width: int) -> Seconds:
        """Measured amounts, all as likely, shape (block_size, width)."""
        return measured[self._generator(stream, block).integers(len(measured), size=(self.block_size, width))]

    def _dispatches(self, block: int) -> Seconds:
        load, measured = self.load, self.jitter.factors.get("dispatch")
        if measured is None:
            return load.dispatch_s[None]
        factors = self._picked(measured, _Stream.DISPATCH, block, len(load.dispatch_s))
        if self.calm_ranks:
            rank = load.program.rank[load.program.action_start[:-1]]
            factors[:, np.isin(rank, list(self.calm_ranks))] = 1.0
        return factors * load.dispatch_s

    def _action_factors(self, block: int) -> Seconds | None:
        """The factor of each action alone, shape (block_size, actions); None if all are 1."""
        jitter, program = self.jitter, self.load.program
        measured = {int(Kind[name]): drawn for name, drawn in jitter.factors.items() if name in Kind.__members__}
        if not (jitter.action or measured):
            return None
        generator, shape = self._generator(_Stream.ACTION, block), (self.block_size, program.actions)
        if not measured:
            return _log_normal(generator.standard_normal(shape), jitter.action)
        kind = program.kind[program.action_start[:-1]]
        drawn = np.empty(shape)
        for each in np.unique(kind).tolist():
            actions = np.flatnonzero(kind == each)
            of_kind = (shape[0], len(actions))
            if each in measured:
                drawn[:, actions] = measured[each][generator.integers(len(measured[each]), size=of_kind)]
            else:
                drawn[:, actions] = _log_normal(generator.standard_normal(of_kind), jitter.action)
        return drawn

    def _message_times(self, block: int) -> tuple[Seconds, Seconds]:
        load, measured = self.load, self.jitter.factors.get("message")
        count = len(load.occupied_s)
        if measured is not None:
            factors = self._picked(measured, _Stream.MESSAGE, block, count)
        elif self.jitter.message:
            normals = self._generator(_Stream.MESSAGE, block).standard_normal((self.block_size, count))
            factors = _log_normal(normals, self.jitter.message)
        else:
            return load.occupied_s[None], load.latency_s[None]
        if self.calm_links:
            factors[:, np.isin(load.program.messages.link, list(self.calm_links))] = 1.0
        return factors * load.occupied_s, factors * load.latency_s


def _log_normal(normals: Seconds, relative_std: float) -> Seconds:
    """Standard normals, overwritten by log-normal factors of mean 1."""
    deviation = log_deviation(relative_std)
    np.multiply(normals, deviation, out=normals)
    np.subtract(normals, deviation**2 / 2, out=normals)
    return np.exp(normals, out=normals)
