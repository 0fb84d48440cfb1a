"""Key: one spelling for equal configurations, as JSON, and a name for the function that is swept."""

from __future__ import annotations

import enum
import hashlib
import inspect
import json
import math
import numbers
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from ppsim.errors import InputError


def canonical_json(value: Any) -> str:
    """The one spelling of a value that is part of a configuration.

    Raises
    ------
    InputError
        For a value that has none. The message names the remedy.

    Notes
    -----
    None, booleans, numbers and text are spelled as in JSON, lists and tuples alike as arrays, mappings with their keys
    sorted. What JSON lacks is an object whose first key begins with "$":

    - `{"$float": "inf"}` and `{"$path": "a/b"}`
    - `{"$enum": "module.Class.NAME"}`
    - `{"$type": "module.Class", "fields": {...}}` for a dataclass, with the fields that count in a comparison
    - `{"$mapping": [[key, value], ...]}` where keys are no text or begin with "$"

    1, 1.0 and True are three configurations, since a function can tell them apart. NumPy's numbers are Python's.

    Examples
    --------
    >>> print(canonical_json({"scale": float("inf"), "ranks": (2, 4)}))
    {"ranks":[2,4],"scale":{"$float":"inf"}}
    """
    try:
        return _spelled(_plain(value))
    except RecursionError:
        raise InputError("a configuration is nested too deeply, or holds itself: give plain values") from None


def _spelled(plain: Any) -> str:
    try:
        return json.dumps(plain, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except ValueError as error:  # whole numbers of thousands of digits
        raise InputError(f"a configuration has no canonical form: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return {"$enum": f"{_type_name(type(value))}.{value.name}"}
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return _plain_mapping(value)
    if isinstance(value, PurePath):
        return {"$path": str(value)}
    if is_dataclass(value) and not isinstance(value, type):
        compared = {field.name: _plain(getattr(value, field.name)) for field in fields(value) if field.compare}
        return {"$type": _type_name(type(value)), "fields": compared}
    remedy = "give its .tolist()" if isinstance(value, np.ndarray) else "give numbers, text, lists or a dataclass"
    raise InputError(
        f"a configuration holds {value!r:.100}, a {type(value).__name__}, which has no canonical form: {remedy}, "
        "and build the rest in the function"
    )


def _plain_mapping(value: Mapping[Any, Any]) -> dict[str, Any]:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: _plain(item) for key, item in value.items()}
    pairs = [[_plain(key), _plain(item)] for key, item in value.items()]
    return {"$mapping": sorted(pairs, key=lambda pair: _spelled(pair[0]))}


def readable(plain: Any) -> Any:
    """A value read back from canonical JSON: floats and paths as they were, dataclasses as mappings of their fields."""
    if isinstance(plain, list):
        return [readable(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if "$float" in plain:
        return float(plain["$float"])
    if "$path" in plain:
        return Path(plain["$path"])
    if "$enum" in plain:
        return plain["$enum"].rpartition(".")[2]
    if "$type" in plain:
        return readable(plain["fields"])
    if "$mapping" in plain:
        return {_hashable(readable(key)): readable(item) for key, item in plain["$mapping"]}
    return {name: readable(item) for name, item in plain.items()}


def _hashable(key: Any) -> Any:
    if isinstance(key, list):
        return tuple(_hashable(item) for item in key)
    return canonical_json(key) if isinstance(key, dict) else key


def digest(function_name: str, configuration: str) -> bytes:
    """The key of a result, 32 bytes: from the function's name and the configuration's canonical JSON."""
    return hashlib.sha256(f"{function_name}\n{configuration}".encode()).digest()


def function_name(function: Callable[..., Any], *, why: str | None) -> str:
    """What the function is called in keys: "module.name". Of a script the file's name counts.

    Parameters
    ----------
    function : callable
        What is swept.
    why : str or None
        What needs a function that can be found by that name. None where nothing does; then any callable will do.

    Raises
    ------
    InputError
        For a lambda, a function inside a function, a partial or a method of an object where `why` is given, and for
        what cannot be called.
    """
    if not callable(function):
        raise InputError(f"a sweep needs a function, got {function!r:.100}")
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    module_name = getattr(function, "__module__", None) or "builtins"
    module = sys.modules.get(module_name)
    if why is not None and _look_up(module, name) is not function:
        raise InputError(
            f"{why} needs a function that can be imported by its name, and {module_name}.{name} is not: define it with "
            "`def` at the top level of a module, and give bound arguments as an axis of one value, grid={'a': [1], ...}"
        )
    if module_name == "__main__":
        spec, path = getattr(module, "__spec__", None), getattr(module, "__file__", None)
        module_name = spec.name if spec is not None else Path(path).stem if path else module_name
    return f"{module_name}.{name}"


def _look_up(module: Any, name: str) -> Any:
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def check_arguments(function: Callable[..., Any], names: frozenset[str]) -> None:
    """Raise InputError where the function cannot be called with arguments of these names."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions do not say
        return
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError as error:
        shown = ", ".join(sorted(names)) or "no arguments"
        raise InputError(
            f"{getattr(function, '__name__', function)}{signature} cannot be called with {shown}: {error}"
        ) from None


def _type_name(kind: type) -> str:
    module = kind.__module__
    if module == "__main__":
        path = getattr(sys.modules["__main__"], "__file__", None)
        module = Path(path).stem if path else module
    return f"{module}.{kind.__qualname__}"
