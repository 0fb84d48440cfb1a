"""Sample times: random durations of rows and messages, one set for each sample of a step.

A row is one F, B, I or W of the program. An action is what a rank starts at once: a row, or the two rows of an
overlapped pair. The same seed gives sample k the same times in every call.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Kind
from ppsim.simulation.timed_program import TimedProgram
from ppsim.variation.jitter import Jitter
from ppsim.variation.log_normal import log_deviation

Seconds = npt.NDArray[np.float64]
_BLOCK_ROWS = 2**16  # half a megabyte of durations, which stays in a core's cache


class _Stream(IntEnum):
    """Streams of random numbers. Each kind of jitter has its own, so that none changes what another draws."""

    ACTION = 0
    RANK = 1
    STEP = 2
    MESSAGE = 3
    HICCUP = 4
    DISPATCH = 5
    LATE = 6


class BlockTimes(NamedTuple):
    """The times of a block of n samples.

    Parameters
    ----------
    duration_s : array of shape (n, rows)
        How long each row takes.
    dispatch_s : array of shape (n, actions) or (1, actions)
        How long each action's dispatching takes.
    occupied_s, latency_s : arrays of shape (n, messages) or (1, messages)
        How long each message keeps its link, and how long it travels afterwards.

    Notes
    -----
    Where nothing varies an array has length 1 on the first axis, for all samples.
    """

    duration_s: Seconds
    dispatch_s: Seconds
    occupied_s: Seconds
    latency_s: Seconds

    def of_sample(self, timed: TimedProgram, index: int) -> TimedProgram:
        """The timed program with the times of the sample at this place of the block."""
        duration_s, dispatch_s, occupied_s, latency_s = (each[min(index, len(each) - 1)] for each in self)
        return replace(timed, duration_s=duration_s, dispatch_s=dispatch_s, occupied_s=occupied_s, latency_s=latency_s)


@dataclass(frozen=True, kw_only=True)
class SampleTimes:
    """Random times of rows and messages, sample by sample.

    Parameters
    ----------
    timed : TimedProgram
        The mean times.
    jitter : Jitter
        How times vary.
    seed : int
        Seed of the random numbers.
    calm_ranks, calm_links : frozenset of int
        Ranks and links (by number) that do not vary by themselves: they keep their means, times the factor of the whole
        step. Other ranks and links draw the same times as without them.

    Notes
    -----
    Samples are drawn in blocks. The size of a block depends on the program alone. Block k draws from Philox (Salmon et
    al., SC 2011) keyed by the seed, with counters that hold k and the kind of jitter. So a sample depends neither on
    other blocks, nor on how many samples are drawn, nor on threads.
    """

    timed: TimedProgram
    jitter: Jitter
    seed: int
    calm_ranks: frozenset[int] = field(default_factory=frozenset)
    calm_links: frozenset[int] = field(default_factory=frozenset)

    @property
    def block_size(self) -> int:
        """Samples in a block: as many as have _BLOCK_ROWS rows, and at least one."""
        return max(_BLOCK_ROWS // len(self.timed.duration_s), 1)

    def block(self, index: int) -> BlockTimes:
        """Draw a block of `block_size` samples."""
        return BlockTimes(self._durations(index), self._dispatches(index), *self._message_times(index))

    def sample(self, index: int) -> TimedProgram:
        """The timed program as one sample has it."""
        block, place = divmod(index, self.block_size)
        return self.block(block).of_sample(self.timed, place)

    def _generator(self, stream: _Stream, block: int) -> np.random.Generator:
        key = np.random.SeedSequence(self.seed).generate_state(2, np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, stream, block]))

    def _normal_factors(self, stream: _Stream, block: int, width: int, relative_std: float) -> Seconds:
        """Log-normal factors of mean 1, shape (block_size, width)."""
        return _log_normal(self._generator(stream, block).standard_normal((self.block_size, width)), relative_std)

    def _picked(self, measured: Seconds, stream: _Stream, block: int, width: int) -> Seconds:
        """Measured values drawn with replacement, all equally likely, shape (block_size, width)."""
        return measured[self._generator(stream, block).integers(len(measured), size=(self.block_size, width))]

    def _is_calm(self) -> npt.NDArray[np.bool_] | None:
        """Whether each action runs on a calm rank, shape (actions,). None without calm ranks."""
        program = self.timed.program
        rank = program.rank[program.action_start[:-1]]
        return np.isin(rank, list(self.calm_ranks)) if self.calm_ranks else None

    def _durations(self, block: int) -> Seconds:
        """Means times the factors of action, rank and step. Hiccups and lateness are added to an action's last row."""
        jitter, program = self.jitter, self.timed.program
        is_calm = self._is_calm()
        factors = self._action_factors(block)
        if jitter.rank:
            of_rank = self._normal_factors(_Stream.RANK, block, program.ranks, jitter.rank)
            by_rank = of_rank[:, program.rank[program.action_start[:-1]]]
            factors = by_rank if factors is None else np.multiply(factors, by_rank, out=factors)
        if is_calm is not None and factors is not None:
            factors[:, is_calm] = 1.0
        if jitter.step:
            of_step = self._normal_factors(_Stream.STEP, block, 1, jitter.step)
            factors = of_step if factors is None else np.multiply(factors, of_step, out=factors)
        if factors is None:
            durations_s = np.repeat(self.timed.duration_s[None], self.block_size, axis=0)
        elif program.has_pairs and factors.shape[1] > 1:
            durations_s = factors[:, program.row_action] * self.timed.duration_s
        else:
            durations_s = factors * self.timed.duration_s
        self._add_hiccups(durations_s, block, is_calm)
        late_s = np.asarray(jitter.late_s)
        if late_s.any():
            drawn_s = self._picked(late_s, _Stream.LATE, block, program.actions)
            if is_calm is not None:
                drawn_s[:, is_calm] = 0.0
            durations_s[:, program.action_start[1:] - 1] += drawn_s
        return durations_s

    def _add_hiccups(self, durations_s: Seconds, block: int, is_calm: npt.NDArray[np.bool_] | None) -> None:
        jitter, program = self.jitter, self.timed.program
        if not jitter.has_hiccups:
            return
        generator = self._generator(_Stream.HICCUP, block)
        is_struck = generator.random((self.block_size, program.actions)) < jitter.hiccup_probability
        sample, action = np.nonzero(is_struck)
        pauses_s = generator.exponential(jitter.hiccup_s, len(sample))
        if is_calm is not None:
            pauses_s[is_calm[action]] = 0.0
        durations_s[sample, program.action_start[1:][action] - 1] += pauses_s

    def _action_factors(self, block: int) -> Seconds | None:
        """The factor of each action by itself, shape (block_size, actions). None if all are 1."""
        jitter, program = self.jitter, self.timed.program
        measured = {int(Kind[name]): drawn for name, drawn in jitter.factors.items() if name in Kind.__members__}
        if not measured:
            return (
                self._normal_factors(_Stream.ACTION, block, program.actions, jitter.action) if jitter.action else None
            )
        generator = self._generator(_Stream.ACTION, block)
        kind = program.kind[program.action_start[:-1]]
        drawn = np.empty((self.block_size, program.actions))
        for each in np.unique(kind).tolist():
            actions = np.flatnonzero(kind == each)
            of_kind = (self.block_size, len(actions))
            if each in measured:
                drawn[:, actions] = measured[each][generator.integers(len(measured[each]), size=of_kind)]
            else:
                drawn[:, actions] = _log_normal(generator.standard_normal(of_kind), jitter.action)
        return drawn

    def _dispatches(self, block: int) -> Seconds:
        timed, measured = self.timed, self.jitter.factors.get("dispatch")
        if measured is None:
            return timed.dispatch_s[None]
        factors = self._picked(measured, _Stream.DISPATCH, block, len(timed.dispatch_s))
        if (is_calm := self._is_calm()) is not None:
            factors[:, is_calm] = 1.0
        return factors * timed.dispatch_s

    def _message_times(self, block: int) -> tuple[Seconds, Seconds]:
        timed, measured = self.timed, self.jitter.factors.get("message")
        count = len(timed.occupied_s)
        if measured is not None:
            factors = self._picked(measured, _Stream.MESSAGE, block, count)
        elif self.jitter.message:
            factors = self._normal_factors(_Stream.MESSAGE, block, count, self.jitter.message)
        else:
            return timed.occupied_s[None], timed.latency_s[None]
        if self.calm_links:
            factors[:, np.isin(timed.program.messages.link, list(self.calm_links))] = 1.0
        return factors * timed.occupied_s, factors * timed.latency_s


def _log_normal(normals: Seconds, relative_std: float) -> Seconds:
    """Standard normals, overwritten by log-normal factors of mean 1."""
    deviation = log_deviation(relative_std)
    np.multiply(normals, deviation, out=normals)
    np.subtract(normals, deviation**2 / 2, out=normals)
    return np.exp(normals, out=normals)
