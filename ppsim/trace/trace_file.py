"""Trace files: a zip of arrays with a JSON header that holds the schema's version."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ppsim.errors import InputError
from ppsim.files import read_bytes, replacing

Array = npt.NDArray[Any]

MOST_BYTES = 2**34  # of a trace file, and of what it holds: some hundred million actions
SCHEMA_VERSION = 3  # 1 held the conditions among the details; 2 had all columns of activations and messages


def write_file(path: str | Path, header: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write a header and named arrays.

    Parameters
    ----------
    path : path
        The file.
    header : mapping
        JSON values. The schema's version is added.
    arrays : mapping from a name to an array
        Of numbers or booleans.
    """
    encoded = np.frombuffer(json.dumps({"schema": SCHEMA_VERSION, **header}).encode(), np.uint8)
    with replacing(path) as beside, beside.open("wb") as file:
        # allow_pickle stands here because NumPy's annotations would take the arrays for it.
        np.savez_compressed(file, allow_pickle=False, header=encoded, **arrays)


def read_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read the header, with the schema's version under "schema", and the arrays.

    Raises
    ------
    InputError
        If the file is of another kind, or of a schema that this version does not read.
    OSError
        If the file cannot be read.
    """
    data = read_bytes(path, MOST_BYTES)
    # A file of another kind or a damaged one fails in a dozen ways (zlib.error, struct.error, TypeError, ...), so
    # everything that is raised here means the same.
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            if sum(each.file_size for each in archive.zip.infolist()) > MOST_BYTES:  # a little zip may hold a lot
                raise InputError(f"it holds more than {MOST_BYTES} bytes")
            arrays = {name: archive[name] for name in archive.files}
        header = dict(json.loads(arrays.pop("header").tobytes()))
    except Exception:
        raise InputError(f"{path} is not a saved trace: write one with Trace.save") from None
    if header.get("schema") not in range(1, SCHEMA_VERSION + 1):
        raise InputError(
            f"{path} has trace schema {header.get('schema')!r}, this version reads 1 to {SCHEMA_VERSION}: "
            "load it with the version that wrote it"
        )
    return header, arrays
