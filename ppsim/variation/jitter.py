"""Jitter: how the times of actions and messages vary from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ppsim.checks import check_fields, checked
from ppsim.errors import InputError
from ppsim.schedule.action import COMPUTE_KINDS, Kind
from ppsim.trace.trace import Trace
from ppsim.variation.jitter_fit import fit_jitter
from ppsim.variation.log_normal import MOST_RELATIVE

Factors = npt.NDArray[np.float64]
_SPREADS = ("action", "rank", "step", "message")

# What can vary by itself: fields, and kinds of measured factors.
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "actions": (("action",), tuple(kind.name for kind in COMPUTE_KINDS)),
    "ranks": (("rank",), ()),
    "step": (("step",), ()),
    "messages": (("message",), ("message",)),
    "hiccups": (("hiccup_probability", "hiccup_s"), ()),
    "dispatch": ((), ("dispatch",)),
    "late": (("late_s",), ()),
}
_DRAWN = [name for _, drawn in PARTS.values() for name in drawn]


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Costs as distributions: what an action takes is its mean cost times random factors of mean 1.

    Parameters
    ----------
    action, rank, step : float
        Relative standard deviations of independent log-normal factors: one for every action, one for every rank and
        step, one for every step.
    message : float
        Relative standard deviation of a log-normal factor on all that a message takes: its time on the link and its
        latency.
    hiccup_probability, hiccup_s : float
        With this probability an action is prolonged by a pause of exponential length with this mean, in seconds.
        Hiccups add to the mean.
    factors : mapping from kind to array
        Measured factors, each as likely as any other. Those of F, B, I, W and R take the place of `action`, which holds
        for kinds that are missing. "dispatch" is of what is spent before each action. "message" takes the place
        of `message`. Best made with `from_samples` or `from_traces`.
    late_s : sequence of floats
        Measured seconds, one of which prolongs each action. They add to the mean.

    Raises
    ------
    InputError
        For numbers that cannot be.

    Notes
    -----
    An overlapped pair is one action. Its factor is drawn as for its first part.
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
        check_fields(self)
        for name in _SPREADS:
            value = getattr(self, name)
            if not (_is_amount(value) and value <= MOST_RELATIVE):
                raise InputError(
                    f"{name} must be a relative standard deviation from 0 to {MOST_RELATIVE:g}, got {value!r}"
                )
        if not (_is_amount(self.hiccup_probability) and self.hiccup_probability <= 1):
            raise InputError(f"hiccup_probability must be from 0 to 1, got {self.hiccup_probability!r}")
        if not _is_amount(self.hiccup_s):
            raise InputError(f"hiccup_s must be seconds, finite and >= 0, got {self.hiccup_s!r}")
        object.__setattr__(self, "late_s", _checked_seconds(self.late_s))
        checked = {str(getattr(kind, "name", kind)): _checked(kind, drawn) for kind, drawn in self.factors.items()}
        object.__setattr__(self, "factors", MappingProxyType(checked))

    @classmethod
    @checked
    def from_samples(cls, samples: Mapping[str, npt.ArrayLike], **others: float) -> Jitter:
        """Draw the factors of actions from measured durations of single actions.

        Parameters
        ----------
        samples : mapping from kind to durations
            `{"F": [...], "B": [...]}`, in any unit: they are divided by their mean.
        **others
            Other fields, which the samples do not know.

        Returns
        -------
        Jitter

        Raises
        ------
        InputError
            For a kind that is not computed, or samples that are no durations.

        Examples
        --------
        >>> Jitter.from_samples({"F": [1.0, 3.0]}).factors["F"].tolist()
        [0.5, 1.5]
        """
        factors = {}
        for kind, durations in samples.items():
            amounts = _checked(kind, durations)
            mean = float(amounts.mean())
            if mean <= 0:
                raise InputError(f"the samples of {kind} are all 0: give durations of an action that takes time")
            factors[kind] = amounts / mean
        return cls(factors=factors, **others)

    @classmethod
    @checked
    def from_traces(cls, traces: Sequence[Trace]) -> Jitter:
        """Fit the jitter that made these traces, two or more steps of one program; see `variation.jitter_fit`."""
        return cls(**fit_jitter(traces)._asdict())

    @checked
    def only(self, *parts: str) -> Jitter:
        """The jitter of these parts alone.

        Parameters
        ----------
        *parts : str
            Keys of `PARTS`: "actions", "ranks", "step", "messages", "hiccups", "dispatch", "late".

        Returns
        -------
        Jitter
        """
        names = [name for part in parts for name in PARTS[part][0]]
        drawn = [kind for part in parts for kind in PARTS[part][1]]
        return Jitter(
            **{name: getattr(self, name) for name in names},
            factors={kind: factors for kind, factors in self.factors.items() if kind in drawn},
        )

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
        """What varies, as JSON values. Of measured factors it says how many there are, and their deviation."""
        names = (*_SPREADS, *(("hiccup_probability", "hiccup_s") if self.has_hiccups else ()))
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name)}
        if self.factors:
            given["factors"] = {
                kind: {"count": len(drawn), "relative_std": float(drawn.std())} for kind, drawn in self.factors.items()
            }
        if np.any(late_s := np.asarray(self.late_s)):
            given["late_s"] = {"count": len(late_s), "mean": float(late_s.mean())}
        return given


def _is_amount(value: object) -> bool:
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0  # type: ignore[arg-type, operator]


def _checked(kind: str | Kind, amounts: npt.ArrayLike) -> Factors:
    name = getattr(kind, "name", kind)
    if name not in _DRAWN:
        raise InputError(f"unknown kind {name!r}: jitter has the kinds {', '.join(_DRAWN)}")
    checked = np.array(amounts, np.float64)
    if checked.ndim != 1 or not len(checked):
        raise InputError(f"the samples of {name} have shape {checked.shape}: give a list of one or more")
    if not (np.isfinite(checked).all() and (checked >= 0).all()):
        raise InputError(f"the samples of {name} must be finite and >= 0")
    return checked


def _checked_seconds(late_s: npt.ArrayLike) -> Factors:
    checked = np.array(late_s, np.float64)
    if checked.ndim != 1 or not (np.isfinite(checked).all() and (checked >= 0).all()):
        raise InputError(f"late_s must be a list of seconds, finite and >= 0, got {late_s!r}")
    return checked
