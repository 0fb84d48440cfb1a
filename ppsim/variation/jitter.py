"""Jitter: how the times of actions and messages vary from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Kind

if TYPE_CHECKING:
    from ppsim.trace.trace import Trace

Factors = npt.NDArray[np.float64]
_DRAWN = ("F", "B", "I", "W", "dispatch", "message")
MOST_RELATIVE = 100.0  # beyond, nearly all of the mean comes from factors that no sample has
_SPREADS = ("action", "rank", "step", "message")


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Costs as distributions: each cost is a mean, and what an action takes is that times random factors of mean 1.

    action, rank, step: relative standard deviations of independent log-normal factors, one drawn for every action, one
    for every rank and step, and one for every step. message: of a factor on all that a message takes, its time on the
    link and its latency. hiccup_probability, hiccup_s: every action is with this probability prolonged by a pause of
    exponential length with this mean, in seconds; hiccups add to the mean, as machines add them.
    factors: measured factors from which those of single actions are drawn instead, by kind (F, B, I, W), all as likely;
    `action` holds for kinds that it lacks. Likewise "dispatch", for what is spent before each action, and "message",
    which takes the place of the spread of that name. Best made with `from_samples` or `from_traces`.
    late_s: measured seconds, one of which prolongs each action, all as likely; they add to the mean, as hiccups do.
    An overlapped pair is one action, drawn as its first part. Raises ValueError for what is no such number.
    """

    action: float = 0.0
    rank: float = 0.0
    step: float = 0.0
    message: float = 0.0
    hiccup_probability: float = 0.0
    hiccup_s: float = 0.0
    factors: Mapping[str, Factors] = field(default_factory=dict)
    late_s: npt.ArrayLike = ()

    def __post_init__(self) -> None:
        for name in _SPREADS:
            value = getattr(self, name)
            if not (_is_amount(value) and value <= MOST_RELATIVE):
                raise ValueError(
                    f"{name} must be a relative standard deviation from 0 to {MOST_RELATIVE:g}, got {value!r}"
                )
        if not (_is_amount(self.hiccup_probability) and self.hiccup_probability <= 1):
            raise ValueError(f"hiccup_probability must be from 0 to 1, got {self.hiccup_probability!r}")
        if not _is_amount(self.hiccup_s):
            raise ValueError(f"hiccup_s must be seconds, finite and >= 0, got {self.hiccup_s!r}")
        object.__setattr__(self, "late_s", _checked_seconds(self.late_s))
        checked = {str(getattr(kind, "name", kind)): _checked(kind, drawn) for kind, drawn in self.factors.items()}
        object.__setattr__(self, "factors", MappingProxyType(checked))

    @classmethod
    def from_samples(cls, samples: Mapping[str, npt.ArrayLike], **others: float) -> Jitter:
        """Draw actions' factors from measured durations of one action each, by kind: `{"F": [...], "B": [...]}`.

        The durations may have any unit: they are divided by their mean. others: the other fields, which the samples do
        not know. Raises ValueError for a kind that is not computed, or samples that are no durations.
        """
        factors = {}
        for kind, durations in samples.items():
            amounts = _checked(kind, durations)
            mean = float(amounts.mean())
            if mean <= 0:
                raise ValueError(f"the samples of {kind} are all 0: give durations of an action that takes time")
            factors[kind] = amounts / mean
        return cls(factors=factors, **others)

    @classmethod
    def from_traces(cls, traces: Sequence[Trace]) -> Jitter:
        """The jitter that made these traces: two or more steps of one program; see `ppsim.variation.jitter_fit`."""
        from ppsim.variation.jitter_fit import jitter_of_traces

        return jitter_of_traces(traces)

    @property
    def is_calm(self) -> bool:
        """Whether nothing varies."""
        return not (
            any(getattr(self, name) for name in _SPREADS) or self.has_hiccups or self.factors or np.any(self.late_s)
        )

    @property
    def has_hiccups(self) -> bool:
        """Whether there can be any."""
        return self.hiccup_probability > 0 and self.hiccup_s > 0

    def to_dict(self) -> dict[str, Any]:
        """What varies, as JSON values; of measured factors how many there are and their relative deviation."""
        names = (*_SPREADS, *(("hiccup_probability", "hiccup_s") if self.has_hiccups else ()))
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name)}
        if self.factors:
            given["factors"] = {
                kind: {"count": len(drawn), "relative_std": float(drawn.std())} for kind, drawn in self.factors.items()
            }
        if np.any(late_s := np.asarray(self.late_s)):
            given["late_s"] = {"count": len(late_s), "mean": float(late_s.mean())}
        return given


def log_deviation(relative_std: float) -> float:
    """The standard deviation of the logarithm of a log-normal factor of mean 1: sqrt(ln(1 + c^2))."""
    return math.sqrt(math.log1p(relative_std**2))


def relative_deviation(log_variance: float) -> float:
    """The relative standard deviation of a log-normal factor of this log-variance; MOST_RELATIVE at most."""
    return math.sqrt(math.expm1(min(log_variance, math.log1p(MOST_RELATIVE**2))))


def _is_amount(value: object) -> bool:
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0  # type: ignore[arg-type, operator]


def _checked(kind: str | Kind, amounts: npt.ArrayLike) -> Factors:
    name = getattr(kind, "name", kind)
    if name not in _DRAWN:
        raise ValueError(f"unknown kind {name!r}: jitter has the kinds {', '.join(_DRAWN)}")
    checked = np.array(amounts, np.float64)
    if checked.ndim != 1 or not len(checked):
        raise ValueError(f"the samples of {name} have shape {checked.shape}: give a list of one or more")
    if not (np.isfinite(checked).all() and (checked >= 0).all()):
        raise ValueError(f"the samples of {name} must be finite and >= 0")
    return checked


def _checked_seconds(late_s: npt.ArrayLike) -> Factors:
    checked = np.array(late_s, np.float64)
    if checked.ndim != 1 or not (np.isfinite(checked).all() and (checked >= 0).all()):
        raise ValueError(f"late_s must be a list of seconds, finite and >= 0, got {late_s!r}")
    return checked
