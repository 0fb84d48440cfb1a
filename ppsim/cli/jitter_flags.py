"""Jitter flags: what a command line says of how times vary."""

from __future__ import annotations

from dataclasses import dataclass

from ppsim.cli.command import OptionalReal, OptionalWhole
from ppsim.errors import InputError
from ppsim.schedule.program import Program
from ppsim.variation.jitter import Jitter

_MOST_SAMPLED = 10**11  # actions: an hour
_MOST_KEPT = 10**8  # samples times ranks: a few gigabytes
_FIELDS = {
    "jitter": "action",
    "rank_jitter": "rank",
    "step_jitter": "step",
    "message_jitter": "message",
    "hiccup_probability": "hiccup_probability",
    "hiccup_s": "hiccup_s",
}


@dataclass(frozen=True, kw_only=True)
class JitterFlags:
    """Costs as distributions, sampled; nothing varies unless asked for."""

    jitter: OptionalReal = None
    """Relative standard deviation of what an action takes, each drawn by itself (default: 0)."""
    rank_jitter: OptionalReal = None
    """Relative standard deviation of a factor on all that a rank computes in a step (default: 0)."""
    step_jitter: OptionalReal = None
    """Relative standard deviation of a factor on all that is computed in a step (default: 0)."""
    message_jitter: OptionalReal = None
    """Relative standard deviation of what a message takes (default: 0)."""
    hiccup_probability: OptionalReal = None
    """How likely an action is prolonged by a pause (default: 0)."""
    hiccup_s: OptionalReal = None
    """Mean length of such a pause, in seconds (default: 0)."""
    samples: OptionalWhole = None
    """Steps to draw, for percentiles of the step time (default: 1000 if anything varies)."""
    seed: OptionalWhole = None
    """What they are drawn from: the same seed, the same answer (default: 0)."""

    def load_jitter(self, program: Program) -> tuple[Jitter, int, int] | None:
        """Jitter, samples and seed; None if no flag asks for samples. Raises InputError for flags without meaning."""
        given = {flag: getattr(self, flag) for flag in _FIELDS if getattr(self, flag) is not None}
        for flag, value in given.items():
            try:
                Jitter(**{_FIELDS[flag]: value})
            except ValueError as error:
                said = str(error).removeprefix(_FIELDS[flag])
                raise InputError(f"--{flag.replace('_', '-')}{said}") from None
        for one, other in (("hiccup_probability", "hiccup_s"), ("hiccup_s", "hiccup_probability")):
            if one in given and other not in given:
                one, other = (name.replace("_", "-") for name in (one, other))
                raise InputError(f"--{one} is one half of what hiccups are: give --{other} with it")
        if self.samples is None and not given:
            if self.seed is not None:
                raise InputError("--seed is what samples are drawn from: give it with --jitter or --samples")
            return None
        samples = 1000 if self.samples is None else self.samples
        seed = 0 if self.seed is None else self.seed
        most = min(_MOST_SAMPLED // program.actions, _MOST_KEPT // program.ranks)
        if not 1 <= samples <= most:
            raise InputError(f"--samples must be from 1 to {most} for this schedule, got {samples}")
        if seed < 0:
            raise InputError(f"--seed must be 0 or more, got {seed}")
        return Jitter(**{_FIELDS[flag]: value for flag, value in given.items()}), samples, seed
