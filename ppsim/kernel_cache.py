"""Kernel cache: compile functions with numba, and keep the machine code for as long as no kernel's source changes.

numba's own cache looks at the file of the compiled function alone. Kernels call one another across files, so that a
changed callee would go unnoticed: the caller's old machine code, which holds the old callee, would still be used. Here
the machine code lies in a folder named after a hash of all sources that hold kernels.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numba

_CONFIG: Any = numba.config
_ROOT = Path(__file__).parent
_Function = TypeVar("_Function", bound=Callable[..., Any])
_WITHOUT_COUNTING: dict[str, Any] = {"_nrt": False}  # an option that numba's annotations leave out


def kernel(function: _Function, *, inline: Literal["never", "always"] = "never") -> _Function:
    """Compile a function on its first call, or load what was compiled before for the same sources.

    Parameters
    ----------
    function : function
        Of arrays and numbers. It runs without the Python lock, and may call other kernels.
    inline : str
        numba's option: "always" puts the function's code into its callers.

    Returns
    -------
    function
        The compiled function.

    Notes
    -----
    numba takes the folder from its configuration when a function is decorated, so the folder is set for that long only.
    """
    before = _CONFIG.CACHE_DIR
    _CONFIG.CACHE_DIR = str(_folder(before))
    try:
        compiled: Any = numba.njit(cache=True, nogil=True, inline=inline)(function)
        return cast(_Function, compiled)
    finally:
        _CONFIG.CACHE_DIR = before


def kernel_part(function: _Function) -> _Function:
    """Compile a part of a kernel: a function that becomes part of its callers' code and makes no arrays.

    Parameters
    ----------
    function : function
        Called by kernels only. It may change the arrays that it is given, but create none.

    Returns
    -------
    function
        The compiled function.

    Notes
    -----
    numba counts the references to every array of a tuple whenever the tuple is passed on. In a kernel that hands tuples
    of many arrays to small functions this took nine tenths of the time. A function that makes no arrays needs no
    counting, so it is switched off here, as numba does in its own string functions.
    """
    compiled: _Function = numba.njit(nogil=True, forceinline=True, **_WITHOUT_COUNTING)(function)
    return compiled


def hash_of_sources(root: Path) -> str:
    """A hash of all Python files under `root` that name this module: those that hold kernels."""
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        source = path.read_bytes()
        if b"kernel_cache" in source:
            found.update(f"{path.relative_to(root)} {len(source)}\n".encode() + source)
    return found.hexdigest()[:16]


@functools.cache
def _folder(wanted: str) -> Path:
    """Where machine code goes: NUMBA_CACHE_DIR, or beside the package, or in the user's cache; one folder per hash."""
    name = f"kernels-{hash_of_sources(_ROOT)}"
    beside = _ROOT / "__pycache__"
    if wanted:
        return Path(wanted) / name
    if os.access(beside if beside.exists() else _ROOT, os.W_OK):
        return beside / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppsim" / name
