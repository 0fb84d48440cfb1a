"""Link: what a message takes from one rank to another, by its size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ppsim.checks import check_fields, check_number, checked, shown
from ppsim.errors import InputError

_ROUNDING = 1e-9  # relative; where two pieces meet, rounding alone must not make the larger message the cheaper


@dataclass(frozen=True, kw_only=True)
class LinkPiece:
    """What messages of `from_bytes` and more take.

    A message occupies the link for gap_s + bytes / bytes_per_s and arrives latency_s after that.

    Parameters
    ----------
    from_bytes : int
        The smallest message for which this holds.
    latency_s : float
        From when a message has left the link until it is there.
    gap_s : float
        What every message occupies the link for, whatever its size.
    bytes_per_s : float
        Bandwidth; infinite by default.

    Raises
    ------
    InputError
        For seconds that are negative or not finite, a bandwidth not > 0, or `from_bytes` that is no whole number.

    Notes
    -----
    `gap_s` is the g of LogP (Culler et al., PPoPP 1993); 1 / `bytes_per_s` is the G of LogGP (Alexandrov et al., SPAA
    1995).
    """

    from_bytes: int = 0
    latency_s: float = 0.0
    gap_s: float = 0.0
    bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        for name in ("latency_s", "gap_s"):
            value = getattr(self, name)
            if not (_is_number(value) and math.isfinite(value) and value >= 0):
                raise InputError(f"{name} must be seconds, finite and >= 0, got {shown(value)}")
        if not (_is_number(self.bytes_per_s) and self.bytes_per_s > 0):
            raise InputError(f"bytes_per_s must be > 0 (leave it out for no limit), got {shown(self.bytes_per_s)}")
        if not (isinstance(self.from_bytes, int | np.integer) and not isinstance(self.from_bytes, bool)):
            raise InputError(f"from_bytes must be a whole number of bytes, got {shown(self.from_bytes)}")
        if not 0 <= self.from_bytes < 2**63:
            raise InputError(f"from_bytes must be 0 or more and below 2**63, got {shown(self.from_bytes)}")

    def occupied_s(self, size_bytes: float) -> float:
        """Seconds for which a message of that size occupies the link."""
        return self.gap_s + size_bytes / self.bytes_per_s

    def one_way_s(self, size_bytes: float) -> float:
        """Seconds from the start of a transfer to its arrival."""
        return self.occupied_s(size_bytes) + self.latency_s

    def slowed(self, factor: float) -> LinkPiece:
        """The piece in which everything takes `factor` times as long."""
        return replace(
            self,
            latency_s=self.latency_s * factor,
            gap_s=self.gap_s * factor,
            bytes_per_s=self.bytes_per_s / factor,
        )


@dataclass(frozen=True, kw_only=True)
class Link:
    """A directed link. A transfer occupies it for gap_s + bytes / bytes_per_s and arrives latency_s after that.

    Parameters
    ----------
    latency_s, gap_s, bytes_per_s : float
        As in `LinkPiece`, for messages from 0 bytes on.
    larger : sequence of LinkPiece
        What larger messages take instead, each piece from its `from_bytes` on, ascending. Measured links have such
        steps where a library changes its protocol.

    Raises
    ------
    InputError
        If the pieces do not ascend, or a message would arrive sooner than a smaller one.

    Examples
    --------
    >>> link = Link(latency_s=1e-4, larger=[LinkPiece(from_bytes=1000, latency_s=1e-4, gap_s=1e-4)])
    >>> link.one_way_s(999), link.one_way_s(1000)
    (0.0001, 0.0002)
    """

    latency_s: float = 0.0
    gap_s: float = 0.0
    bytes_per_s: float = math.inf
    larger: tuple[LinkPiece, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "larger", tuple(self.larger))
        for smaller, piece in pairwise(self.pieces):
            size = piece.from_bytes
            if size <= smaller.from_bytes:
                raise InputError(
                    f"pieces must ascend in from_bytes, from 1 on, got {size} after {smaller.from_bytes}: sort them"
                )
            before_s, here_s = smaller.one_way_s(size - 1), piece.one_way_s(size)
            if before_s > here_s * (1 + _ROUNDING):
                raise InputError(
                    f"a message of {size} bytes would take {here_s!r} s and one of {size - 1} bytes {before_s!r} s: "
                    "give pieces in which no message is cheaper than a smaller one"
                )

    @classmethod
    @checked
    def of(cls, *pieces: LinkPiece) -> Link:
        """The link of these pieces, the first from 0 bytes on. Raises InputError as `Link(...)` does."""
        if not pieces or pieces[0].from_bytes != 0:
            raise InputError(f"the first piece must have from_bytes 0, got {pieces[:1]!r}: add such a piece")
        first = pieces[0]
        return cls(
            latency_s=first.latency_s, gap_s=first.gap_s, bytes_per_s=first.bytes_per_s, larger=tuple(pieces[1:])
        )

    @property
    def pieces(self) -> tuple[LinkPiece, ...]:
        """All pieces by size, beginning with the one from 0 bytes on."""
        first = LinkPiece(latency_s=self.latency_s, gap_s=self.gap_s, bytes_per_s=self.bytes_per_s)
        return (first, *self.larger)

    @checked
    def piece(self, size_bytes: float) -> LinkPiece:
        """The piece that holds for a message of that size."""
        if size_bytes < 0:
            raise InputError(f"size_bytes must be 0 or more, got {size_bytes!r}")
        return next(piece for piece in reversed(self.pieces) if piece.from_bytes <= size_bytes)

    @checked
    def occupied_s(self, size_bytes: float) -> float:
        """Seconds for which a message of that size occupies the link."""
        return self.piece(size_bytes).occupied_s(size_bytes)

    @checked
    def one_way_s(self, size_bytes: float) -> float:
        """Seconds from the start of a transfer to its arrival."""
        return self.piece(size_bytes).one_way_s(size_bytes)

    def transfer_times(
        self, size_bytes: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """`occupied_s` and the latency of many messages at once.

        Parameters
        ----------
        size_bytes : array of shape (messages,)

        Returns
        -------
        two arrays of shape (messages,), in seconds
            How long each message occupies the link, and how much later it arrives: the same floats as one by one.
        """
        pieces = self.pieces
        which = np.searchsorted([piece.from_bytes for piece in pieces], size_bytes, side="right") - 1
        latency_s, gap_s, bytes_per_s = np.array([(p.latency_s, p.gap_s, p.bytes_per_s) for p in pieces], float).T
        with np.errstate(over="ignore"):  # whoever adds the times up says what is too large
            return gap_s[which] + size_bytes / bytes_per_s[which], latency_s[which]

    @checked
    def slowed(self, factor: float) -> Link:
        """The link on which every message takes `factor` times as long. Raises InputError for no finite factor > 0."""
        if not (_is_number(factor) and math.isfinite(factor) and factor > 0):
            raise InputError(f"a link is slowed by a finite factor > 0 (3.0: three times as long), got {factor!r}")
        return Link.of(*(piece.slowed(factor) for piece in self.pieces))


def _is_number(value: object) -> bool:
    try:
        check_number("", value)
    except InputError:
        return False
    return True
