"""Link fit: the link that best explains what messages of several sizes took."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ppsim.errors import InputError
from ppsim.network.link import Link, LinkPiece

_REWEIGHTINGS = 12  # iterations from least squares toward least absolute errors; later ones change nothing visible
_SMALLEST_ERROR = 0.002  # relative; below it errors count as none, so that exact data gets no piece too many
_PIECE_PARAMETERS = 4  # latency, gap, bandwidth, and where the piece begins
_MIN_SIZES_PER_PIECE = 2  # different sizes measured in each piece, at least
# Which of latency, gap and 1 / bandwidth are not 0. Among fits that are about equally good the first wins.
_SUPPORTS = [(0,), (2,), (1,), (0, 2), (0, 1), (1, 2), (0, 1, 2)]


def fit_link(
    size_bytes: Sequence[float] | npt.NDArray[Any],
    one_way_s: Sequence[float] | npt.NDArray[Any],
    occupied_s: Sequence[float] | npt.NDArray[Any],
    *,
    most_pieces: int = 4,
) -> Link:
    """Fit a link to measured messages.

    Parameters
    ----------
    size_bytes : array of shape (measurements,)
        The size of each message.
    one_way_s : array of shape (measurements,)
        Seconds from the start of a transfer to its arrival.
    occupied_s : array of shape (measurements,)
        Seconds for which the message occupies the link: what each further message of a burst adds. A single message
        cannot tell latency from occupation.
    most_pieces : int
        The most pieces that the link may have.

    Returns
    -------
    Link
        With the number of pieces, and the sizes where they begin, that fit best (see Notes).

    Raises
    ------
    InputError
        If lengths differ, there is no size, or a number is not finite, negative, or a time of 0.

    Notes
    -----
    In each piece, latency, gap and bandwidth minimize the sum of absolute errors relative to `one_way_s`, so that small
    messages count as much as large ones and a single outlier changes nothing. All ways to cut the sizes into pieces are
    tried, save those in which a larger message would be cheaper than a smaller one. A further piece must improve the
    Bayesian information criterion (Schwarz, 1978), for errors with Laplace's distribution. A piece begins where it
    meets the one before it, and at its first measured size if it does not.
    """
    sizes, one_way, occupied = (np.asarray(values, float) for values in (size_bytes, one_way_s, occupied_s))
    _check(sizes, one_way, occupied, most_pieces)
    order = np.argsort(sizes, kind="stable")
    sizes, one_way, occupied = sizes[order], one_way[order], occupied[order]
    count = len(sizes)

    @cache
    def fitted(begin: int, end: int) -> tuple[LinkPiece, float]:
        return _fit_piece(sizes[begin:end], one_way[begin:end], occupied[begin:end])

    def score(cuts: tuple[int, ...]) -> float:
        error = sum(fitted(begin, end)[1] for begin, end in pairwise(cuts)) / (2 * count)
        parameters = _PIECE_PARAMETERS * (len(cuts) - 1)
        return 4 * count * math.log(max(error, _SMALLEST_ERROR)) + parameters * math.log(2 * count)

    for cuts in sorted(_cuts(sizes, most_pieces), key=score):
        link = _join([fitted(begin, end)[0] for begin, end in pairwise(cuts)], cuts, sizes)
        if link is not None:
            return link
    raise AssertionError("one piece is always a link")  # pragma: no cover


def _check(sizes: npt.NDArray[Any], one_way: npt.NDArray[Any], occupied: npt.NDArray[Any], most_pieces: int) -> None:
    """Raise InputError for impossible measurements."""
    if not (sizes.ndim == 1 and sizes.shape == one_way.shape == occupied.shape and len(sizes) > 0):
        raise InputError(
            f"size_bytes, one_way_s and occupied_s must be lists of one length, 1 or more, got shapes {sizes.shape}, "
            f"{one_way.shape} and {occupied.shape}"
        )
    for name, values, least in (("size_bytes", sizes, 0), ("occupied_s", occupied, 0), ("one_way_s", one_way, 1e-15)):
        wrong = values[~(np.isfinite(values) & (values >= least))]
        if len(wrong):
            raise InputError(f"{name} must be finite and {'>= 0' if least == 0 else '> 0'}, got {wrong[0]!r}")
    if most_pieces < 1:
        raise InputError(f"most_pieces must be 1 or more, got {most_pieces}")


def _cuts(sizes: npt.NDArray[Any], most_pieces: int) -> Iterator[tuple[int, ...]]:
    """All ways to cut the sizes: where each piece begins, and the end. Each piece has two different sizes or more."""
    different = np.flatnonzero(np.diff(sizes, prepend=-1.0)).tolist()
    inner = different[_MIN_SIZES_PER_PIECE : len(different) - _MIN_SIZES_PER_PIECE + 1]
    for pieces in range(1, most_pieces + 1):
        for chosen in combinations(inner, pieces - 1):
            cuts = (0, *chosen, len(sizes))
            places = [different.index(cut) for cut in chosen]
            if all(b - a >= _MIN_SIZES_PER_PIECE for a, b in pairwise(places)):
                yield cuts


def _fit_piece(
    sizes: npt.NDArray[Any], one_way: npt.NDArray[Any], occupied: npt.NDArray[Any]
) -> tuple[LinkPiece, float]:
    """Fit one piece. Returns it and the sum of its absolute errors relative to `one_way`, two for each measurement."""
    scale = float(sizes.max()) or 1.0
    ones, zeros, share = np.ones(len(sizes)), np.zeros(len(sizes)), sizes / scale
    matrix = np.vstack([np.column_stack([ones, ones, share]), np.column_stack([zeros, ones, share])])
    relative = 1 / np.concatenate([one_way, one_way])
    matrix, wanted = matrix * relative[:, None], np.concatenate([one_way, occupied]) * relative
    best, least = np.zeros(3), math.inf
    for support in _SUPPORTS:
        values = _least_absolute(matrix[:, support], wanted)
        if values is None or (values < 0).any():
            continue
        full = np.zeros(3)
        full[list(support)] = values
        error = float(np.abs(matrix @ full - wanted).sum())
        if error < least - 0.1 * _SMALLEST_ERROR * len(wanted):
            best, least = full, error
    latency_s, gap_s, scaled = best.tolist()
    bytes_per_s = scale / scaled if scaled > 0 else math.inf
    return LinkPiece(latency_s=latency_s, gap_s=gap_s, bytes_per_s=bytes_per_s), least


def _least_absolute(matrix: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """Minimize the sum of |matrix @ values - wanted|. None where the matrix does not determine the values."""
    # Iteratively reweighted least squares: a row weighs the inverse of its error in the fit before.
    weights = np.ones(len(wanted))
    values: npt.NDArray[Any] | None = None
    for _ in range(_REWEIGHTINGS):
        root = np.sqrt(weights)
        values, _, rank, _ = np.linalg.lstsq(matrix * root[:, None], wanted * root, rcond=1e-10)
        if rank < matrix.shape[1]:
            return None
        weights = 1 / np.maximum(np.abs(matrix @ values - wanted), _SMALLEST_ERROR)
    return values


def _join(pieces: Sequence[LinkPiece], cuts: Sequence[int], sizes: npt.NDArray[Any]) -> Link | None:
    """Join the pieces to a link. None if some larger message would be cheaper than a smaller one."""
    joined = [pieces[0]]
    for piece, cut in zip(pieces[1:], cuts[1:-1], strict=True):
        begin = _first_size(joined[-1], piece, int(sizes[cut - 1]), int(sizes[cut]))
        if begin is None:
            return None
        joined.append(
            LinkPiece(from_bytes=begin, latency_s=piece.latency_s, gap_s=piece.gap_s, bytes_per_s=piece.bytes_per_s)
        )
    return Link.of(*joined)


def _first_size(smaller: LinkPiece, larger: LinkPiece, after: int, until: int) -> int | None:
    """Find the size in (after, until] at which the larger piece begins. None if a message would get cheaper at each."""

    def rise_s(size: int) -> float:
        # How much longer a message of this size takes by the larger piece than by the smaller.
        return larger.one_way_s(size) - smaller.one_way_s(size)

    low, high = rise_s(after + 1), rise_s(until)
    if low >= 0 and high >= 0:
        return until
    if low < 0 and high < 0:
        return None
    crossing = after + 1 + (until - after - 1) * low / (low - high)
    return math.ceil(crossing) if high >= 0 else math.floor(crossing)
