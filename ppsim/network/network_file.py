"""Network files: links as JSON, validated field by field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppsim.errors import CostError
from ppsim.network.link import Link, LinkPiece

if TYPE_CHECKING:
    from ppsim.network.network import Network

VERSION = 1
_DOCUMENT = ("version", "default", "links", "environment", "samples")
_PIECE = ("latency_s", "gap_s", "bytes_per_s")
_SHAPE = '{"version": 1, "default": {"latency_s": 1e-4}, "links": [{"source": 0, "destination": 1, "latency_s": 1e-5}]}'


def load_network(path: str | Path) -> Network:
    """Read a network; see `save_network` for the format.

    Raises CostError that names file, link, field, value and remedy; OSError if the file cannot be read.
    """
    from ppsim.network.network import Network

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
    return Network.of(default, links)


def save_network(
    network: Network,
    path: str | Path,
    *,
    environment: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write a network as JSON: `version`, `default` (the link of all pairs not named), `links` (each with `source` and
    `destination`), `environment` (where they were measured), and `samples` if given (what they were fitted from).

    A link has the fields of ppsim.Link; left out they are 0, or no limit for bytes_per_s, and `larger` is a list of the
    pieces for larger messages, each with `from_bytes`.
    """
    document: dict[str, Any] = {
        "version": VERSION,
        "default": _link_entry(network.default),
        "links": [
            {"source": int(source), "destination": int(destination), **_link_entry(link)}
            for (source, destination), link in sorted(network.links.items())
        ],
        "environment": dict(environment or {}),
    }
    if samples is not None:
        document["samples"] = [dict(sample) for sample in samples]
    Path(path).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _link_entry(link: Link) -> dict[str, Any]:
    first, *larger = link.pieces
    entry: dict[str, Any] = _piece_entry(first)
    if larger:
        entry["larger"] = [{"from_bytes": int(piece.from_bytes), **_piece_entry(piece)} for piece in larger]
    return entry


def _piece_entry(piece: LinkPiece) -> dict[str, float]:
    """Seconds and bytes per second; no limit, which JSON cannot spell, is left out."""
    values = {name: float(getattr(piece, name)) for name in _PIECE}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise CostError(f"{path} is not text: give a network as JSON") from None
    except (ValueError, RecursionError) as error:
        raise CostError(f"{path} is not JSON: {error}") from None
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
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
