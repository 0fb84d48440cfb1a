"""Cost files: layer costs as JSON or CSV, validated field by field."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ppsim.checks import checked
from ppsim.costs.stage_cost import LayerCost
from ppsim.errors import CostError
from ppsim.files import parse_json, read_text, write_text

_FIELDS = {field.name: field for field in fields(LayerCost)}
_REQUIRED = [name for name, field in _FIELDS.items() if field.default is MISSING]


@checked
def load_costs(path: str | Path) -> list[LayerCost]:
    """Read layer costs from a file.

    Parameters
    ----------
    path : str or Path
        A `.json` file, `{"layers": [{...}], "environment": {...}}`, or a `.csv` file with a header. Fields are those of
        LayerCost: seconds and bytes of one microbatch.

    Returns
    -------
    list of LayerCost

    Raises
    ------
    CostError
        If the file is not of this form; the message names file, layer, field and value.
    OSError
        If the file cannot be read.
    """
    path = Path(path)
    text = read_text(path, CostError)
    if path.suffix.lower() == ".csv":
        entries = _read_csv(path, text)
    elif path.suffix.lower() == ".json":
        entries = _read_json(path, parse_json(path, text, CostError))
    else:
        raise CostError(f"{path}: cost files end in .json or .csv")
    if not entries:
        raise CostError(f"{path} holds no layer: give at least one")
    return [_layer(path, number, entry) for number, entry in enumerate(entries)]


@checked
def save_costs(layers: Sequence[LayerCost], path: str | Path, *, environment: Mapping[str, Any] | None = None) -> None:
    """Write layer costs to a file.

    Parameters
    ----------
    layers : sequence of LayerCost
        The costs.
    path : str or Path
        A file that ends in `.json` or `.csv`.
    environment : mapping, optional
        Where they were measured. Written to JSON only.

    Raises
    ------
    CostError
        If the file has another ending.
    """
    path = Path(path)
    rows = [
        {name: _plain(name, getattr(layer, name)) for name in ["name", *(n for n in _FIELDS if n != "name")]}
        for layer in layers
    ]
    if path.suffix.lower() == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else list(_FIELDS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())
    elif path.suffix.lower() == ".json":
        document = {"layers": rows, "environment": dict(environment or {})}
        write_text(path, json.dumps(document, indent=1) + "\n")
    else:
        raise CostError(f"{path}: cost files end in .json or .csv")


def _plain(name: str, value: Any) -> Any:
    """Bytes as an int and seconds as a float: bytes may be held as 1e6, and both as NumPy numbers."""
    if name == "name" or value is None:
        return value
    return int(value) if name.endswith("_bytes") else float(value)


def _read_json(path: Path, document: Any) -> list[dict[str, Any]]:
    layers = document.get("layers") if isinstance(document, dict) else None
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        wanted = '{"layers": [{"forward_s": 0.1, ...}]}'
        raise CostError(f'{path} must be an object with a list "layers" of objects, as {wanted}')
    return layers


def _read_csv(path: Path, text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text))
    try:
        rows = list(reader)
    except csv.Error as error:
        raise CostError(f"{path} is not CSV: {error}") from None
    header = list(reader.fieldnames or [])
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise CostError(f"{path} has the column {twice!r} twice: keep one")
    entries: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise CostError(f"{path}, layer {number}: the row has not as many cells as the header, {len(header)}")
        entry: dict[str, Any] = {}
        for name, cell in row.items():
            if name not in _FIELDS or name == "name":
                entry[name] = cell
            elif cell.strip() or name in _REQUIRED:
                entry[name] = _number(path, number, name, cell)
        entries.append(entry)
    return entries


def _number(path: Path, layer: int, name: str, cell: str) -> float | int:
    try:
        return int(cell) if name.endswith("_bytes") else float(cell)
    except ValueError:
        wanted = "a whole number" if name.endswith("_bytes") else "a number"
        raise CostError(f"{path}, layer {layer}: {name} must be {wanted}, got {cell!r}") from None


def _layer(path: Path, number: int, entry: dict[str, Any]) -> LayerCost:
    unknown = [name for name in entry if name not in _FIELDS]
    if unknown:
        raise CostError(f"{path}, layer {number}: unknown field {unknown[0]!r}; known are {', '.join(_FIELDS)}")
    missing = [name for name in _REQUIRED if name not in entry]
    if missing:
        raise CostError(f"{path}, layer {number}: {missing[0]} is missing")
    if not isinstance(entry.get("name", ""), str):
        raise CostError(f"{path}, layer {number}: name must be text, got {entry['name']!r}")
    try:
        return LayerCost(**{"name": f"layer {number}", **entry})
    except CostError as error:
        raise CostError(f"{path}, layer {number}: {error}") from None
