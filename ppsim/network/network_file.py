"""Network files: links as JSON, validated field by field.

A file is an object with `version`, `default` (the link of all pairs that are not named) and `links` (each with `source`
and `destination`); and for people `environment` (where they were measured) and `samples` (what they were fitted from).
A link has the fields of `ppsim.Link`. A field that is left out is 0, or no limit for bytes_per_s. `larger` is a list of
the pieces for larger messages, each with `from_bytes`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppsim.errors import CostError
from ppsim.files import read_json, write_text
from ppsim.network.link import Link, LinkPiece

VERSION = 1
_DOCUMENT = ("version", "default", "links", "environment", "samples")
_PIECE = ("latency_s", "gap_s", "bytes_per_s")
_SHAPE = '{"version": 1, "default": {"latency_s": 1e-4}, "links": [{"source": 0, "destination": 1, "latency_s": 1e-5}]}'


def read_links(path: str | Path) -> tuple[Link, dict[tuple[int, int], Link]]:
    """Read the link of all pairs, and the links of the pairs that have another one.

    Parameters
    ----------
    path : str or Path
        A network file.

    Returns
    -------
    Link, dict from (source, destination) to Link

    Raises
    ------
    CostError
        Names file, link, field and value, and what to give instead.
    OSError
        If the file cannot be read.
    """
    path = Path(path)
    document = _document(path)
    default = _link(f"{path}, default link", document.get("default", {}))
    links: dict[tuple[int, int], Link] = {}
    entries = document.get("links", [])
    if not isinstance(entries, list):
        raise CostError(f"{path}: links must be a list of objects, got {_short(entries)}")
    for number, entry in enumerate(entries):
        where = f"{path}, link {number}"
        if not isinstance(entry, dict):
            raise CostError(f"{where} must be an object, got {_short(entry)}")
        pair = (_rank(where, entry, "source"), _rank(where, entry, "destination"))
        where = f"{path}, link {pair[0]} to {pair[1]}"
        if pair[0] == pair[1]:
            raise CostError(f"{where}: destination is the source: a rank needs no link to itself, take it out")
        if pair in links:
            raise CostError(f"{where} is there twice: keep one")
        links[pair] = _link(where, {name: entry[name] for name in entry if name not in ("source", "destination")})
    return default, links


def write_links(
    path: str | Path,
    default: Link,
    links: Mapping[tuple[int, int], Link],
    *,
    environment: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write a network file that `read_links` reads.

    Parameters
    ----------
    path : str or Path
        Where to write.
    default : Link
        The link of every pair that `links` does not have.
    links : mapping from (source, destination) to Link
        The other links.
    environment : mapping, or None
        Where the links were measured; JSON values.
    samples : sequence of mappings, or None
        What the links were fitted from; JSON values.
    """
    document: dict[str, Any] = {
        "version": VERSION,
        "default": _link_entry(default),
        "links": [
            {"source": int(source), "destination": int(destination), **_link_entry(link)}
            for (source, destination), link in sorted(links.items())
        ],
        "environment": dict(environment or {}),
    }
    if samples is not None:
        document["samples"] = [dict(sample) for sample in samples]
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _link_entry(link: Link) -> dict[str, Any]:
    """A link as JSON spells it."""
    first, *larger = link.pieces
    entry: dict[str, Any] = _piece_entry(first)
    if larger:
        entry["larger"] = [{"from_bytes": int(piece.from_bytes), **_piece_entry(piece)} for piece in larger]
    return entry


def _piece_entry(piece: LinkPiece) -> dict[str, float]:
    """Seconds and bytes per second. JSON cannot spell infinity, so no limit is left out."""
    values = {name: float(getattr(piece, name)) for name in _PIECE}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _document(path: Path) -> dict[str, Any]:
    """The object in the file, once its version and its field names are known to be right."""
    document = read_json(path, CostError)
    if not isinstance(document, dict):
        raise CostError(f"{path} must be an object, as {_SHAPE}")
    if document.get("version") != VERSION or isinstance(document["version"], bool):
        found = _short(document["version"]) if "version" in document else "none"
        raise CostError(f"{path}: version must be {VERSION}, got {found}: give a network file, as {_SHAPE}")
    unknown = [name for name in document if name not in _DOCUMENT]
    if unknown:
        raise CostError(f"{path}: unknown field {unknown[0]!r}; known are {', '.join(_DOCUMENT)}")
    return document


def _link(where: str, entry: Any) -> Link:
    """The link that an entry spells; `where` begins every message."""
    if not isinstance(entry, dict):
        raise CostError(f"{where} must be an object, got {_short(entry)}")
    larger = entry.get("larger", [])
    if not isinstance(larger, list):
        raise CostError(f"{where}: larger must be a list of objects, got {_short(larger)}")
    first = _piece(where, {name: entry[name] for name in entry if name != "larger"}, _PIECE)
    pieces = [first]
    for number, more in enumerate(larger):
        place = f"{where}, larger {number}"
        if not isinstance(more, dict):
            raise CostError(f"{place} must be an object, got {_short(more)}")
        if "from_bytes" not in more:
            raise CostError(f"{place}: from_bytes is missing: give the size from which this piece holds")
        pieces.append(_piece(place, more, ("from_bytes", *_PIECE)))
    try:
        return Link.of(*pieces)
    except ValueError as error:
        raise CostError(f"{where}: {error}") from None


def _piece(where: str, entry: dict[str, Any], known: Sequence[str]) -> LinkPiece:
    unknown = [name for name in entry if name not in known]
    if unknown:
        raise CostError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(known)}")
    try:
        return LinkPiece(**entry)
    except ValueError as error:
        raise CostError(f"{where}: {error}") from None


def _rank(where: str, entry: dict[str, Any], name: str) -> int:
    if name not in entry:
        raise CostError(f"{where}: {name} is missing: give a rank, 0 or more")
    value = entry[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CostError(f"{where}: {name} must be a rank, 0 or more, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    """The value for a message, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
