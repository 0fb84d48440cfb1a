"""Theory: closed forms for equal stages, which the model is held to."""

from __future__ import annotations


def afab_makespan_s(
    *, ranks: int, microbatches: int, forward_s: float, backward_s: float, latency_s: float = 0.0
) -> float:
    """AFAB's step: (m + p - 1)(F + B) + 2 (p - 1) c, in seconds (Huang et al., GPipe, 2019, section 2.3).

    Equal stages; latency_s is c, the time of one message, which does not occupy its link. Holds for `afab-eager` with
    c = 0 as well.
    """
    return (microbatches + ranks - 1) * (forward_s + backward_s) + 2 * (ranks - 1) * latency_s


def afab_bubble_fraction(*, ranks: int, microbatches: int) -> float:
    """AFAB's and 1F1B's share of idle time without communication: (p - 1) / (m + p - 1)."""
    return (ranks - 1) / (microbatches + ranks - 1)


def microbatches_for_half_bubble(*, ranks: int, microbatches: int) -> int:
    """The m that halves `afab_bubble_fraction`: 2 m + p - 1. With one rank there is no bubble: m."""
    return microbatches if ranks == 1 else 2 * microbatches + ranks - 1


def afab_peak_activations(*, microbatches: int) -> int:
    """Microbatches held at once on every rank under AFAB: m."""
    return microbatches
