"""Text: what a byte-level language model reads, in windows drawn by seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import ppsim
from ppexec.models.seeds import derive
from ppsim.errors import InputError


def load_text(path: Path | None) -> torch.Tensor:
    """The bytes of a text, uint8 of shape (bytes,).

    Parameters
    ----------
    path : Path or None
        The file. None takes this toolkit's own Python sources, in the order of their paths.

    Raises
    ------
    InputError
        If the file cannot be read.
    """
    if path is None:
        roots = [Path(__file__).parents[1], Path(ppsim.__file__).parent]
        sources = [file for root in roots for file in sorted(root.rglob("*.py"), key=lambda f: f.as_posix())]
        text = b"".join(file.read_bytes() for file in sources)
    else:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read the text {path}: {error.strerror or error}") from None
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())


def window(text: torch.Tensor, seq: int, *, seed: int, sample: int) -> torch.Tensor:
    """The bytes of one global sample, int64 of shape (seq + 1,), from a position given by (seed, sample) alone.

    Raises
    ------
    InputError
        If the text has fewer bytes.

    Examples
    --------
    >>> text = torch.arange(10, dtype=torch.uint8)
    >>> window(text, 3, seed=0, sample=7).tolist()
    [1, 2, 3, 4]
    """
    if len(text) <= seq:
        raise InputError(f"a text of {len(text)} bytes has no window of seq + 1 = {seq + 1}: take a longer text")
    start = derive(seed, "window", sample) % (len(text) - seq)
    return text[start : start + seq + 1].long()
