"""Checks: arguments and fields held against their annotations, so that whatever does not fit is one sentence."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeGuard, TypeVar, Union, get_args, get_origin

import numpy as np
import numpy.typing as npt

from ppsim.errors import InputError

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Check = Callable[[str, Any], None]  # takes what the value is called, and the value; raises InputError
_ARRAY_LIKE = frozenset(get_args(npt.ArrayLike) or [npt.ArrayLike])  # a union; from NumPy 2.5 on the name of one
_LARGEST = 2**63  # numbers are kept in 64 bits


def checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that refuses arguments which do not fit their annotations.

    Parameters
    ----------
    function : callable
        Its annotations say what is checked: numbers (a bool is none), text, paths, choices, arrays, objects of a class,
        and sequences and mappings of these.

    Returns
    -------
    callable
        The same function; it raises InputError that names the argument, what it must be, and what it is.

    Examples
    --------
    >>> @checked
    ... def half(count: int) -> float:
    ...     return count / 2
    >>> half("4")
    Traceback (most recent call last):
    ppsim.errors.InputError: count must be a whole number, got '4'
    """
    parameters = inspect.signature(function).parameters.values()
    by_place = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    further = [each.name for each in parameters if each.kind == each.VAR_POSITIONAL]
    others = [each.name for each in parameters if each.kind == each.VAR_KEYWORD]

    @functools.cache
    def checks() -> tuple[dict[str, _Check], list[tuple[str, _Check]]]:
        """The checks of single arguments by name, and that of arguments beyond `by_place` with its name."""
        ignored = ("return", *others)
        annotations = {name: hint for name, hint in function.__annotations__.items() if name not in ignored}
        known = _checks(annotations, getattr(function, "__globals__", {}))
        of_further = [(name, known.pop(name)) for name in further if name in known]
        return known, of_further

    # `inspect.Signature.bind` takes 5 us, several of which a small simulation would notice. Whether the call has the
    # arguments that it needs, and no others, the function itself says.
    @functools.wraps(function)
    def with_checks(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        known, of_further = checks()
        for name, value in (*zip(by_place, args, strict=False), *kwargs.items()):
            if name in known:
                known[name](name, value)
        for name, check in of_further:
            for number, value in enumerate(args[len(by_place) :]):
                check(f"{name}[{number}]", value)
        return function(*args, **kwargs)

    return with_checks


def check_fields(value: Any) -> None:
    """Check the fields of a dataclass against their annotations. Raises InputError for the first that does not fit."""
    kind: Any = type(value)
    for name, check in _field_checks(kind).items():
        check(name, getattr(value, name))


def check_whole(name: str, value: Any, *, least: int = 1) -> None:
    """Raise InputError for what is no whole number, or below `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name} must be a whole number of {least} or more, got {shown(value)}")


def check_names(what: str, given: Any, known: Iterable[str]) -> None:
    """Check that `given` is a mapping whose keys are all known. Raises InputError that lists the known ones."""
    if not isinstance(given, Mapping):
        raise InputError(f"{what} must be a mapping, got {shown(given)}")
    known = list(known)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InputError(f"{what}: unknown field {shown(unknown[0])}; known are {', '.join(known)}")


def check_memory(what: str, size_bytes: float, remedy: str) -> None:
    """Refuse what this machine's memory cannot hold, before anything is allocated.

    Parameters
    ----------
    what : str
        What it is for.
    size_bytes : float
        The least that it takes.
    remedy : str
        What to give instead.

    Raises
    ------
    InputError
        With both sizes.
    """
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size_bytes > memory_bytes:
        raise InputError(
            f"{what} would take {size_bytes / 2**30:,.0f} GiB or more, and this machine has "
            f"{memory_bytes / 2**30:,.0f} GiB of memory: {remedy}"
        )


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether this is a number that a float holds: files may have text, NaN, or 400 digits in its place."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python does not print thousands of digits
        return "a number of hundreds of digits"
    try:
        text = repr(value).replace("\n", " ")
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


@functools.cache
def _field_checks(kind: Any) -> dict[str, _Check]:
    found: dict[str, _Check] = {}
    for each in reversed(kind.__mro__):  # each class in the names of its own module
        own = inspect.get_annotations(each)
        found.update(_checks(own, vars(inspect.getmodule(each)) if own else {}))
    return {each.name: found[each.name] for each in fields(kind) if each.name in found}


def _checks(annotations: Mapping[str, Any], names: dict[str, Any]) -> dict[str, _Check]:
    """The check of each annotation that says something which can be checked."""
    hints = typing.get_type_hints(types.SimpleNamespace(__annotations__=annotations), globalns=names)
    # A seed is never computed with: NumPy's own have 128 bits.
    found = {name: _any_whole if (name, hint) == ("seed", int) else _check_of(hint) for name, hint in hints.items()}
    return {name: check for name, check in found.items() if check is not None}


def _check_of(hint: Any) -> _Check | None:
    """What an annotation asks of a value; None where it asks nothing."""
    if {hint} == _ARRAY_LIKE:
        return _array
    hint = getattr(hint, "__value__", hint)  # of a `type` statement, as NumPy 2.5 has for NDArray
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _any_of(arguments)
    if hint is Any:
        return None
    if hint in _OF_TYPE:
        return _OF_TYPE[hint]
    if origin is Literal:
        return functools.partial(_choice, arguments)
    if origin is np.ndarray:
        return functools.partial(_instance, np.ndarray, "an array")
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return functools.partial(_mapping, _check_of(arguments[0]), _check_of(arguments[1]))
    if origin is tuple and arguments[-1] is not ...:
        return functools.partial(_row, [_check_of(each) for each in arguments])
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return functools.partial(_items, origin, _check_of(arguments[0]))
    if origin is Callable:
        return _callable
    is_class = isinstance(hint, type) and hint is not object and not getattr(hint, "_is_protocol", False)
    return functools.partial(_instance, hint, f"a {hint.__name__}") if is_class else None


def _any_of(hints: Sequence[Any]) -> _Check | None:
    """Optional values, arrays and paths are unions; their messages need not say so."""
    left = [hint for hint in hints if hint is not type(None)]
    check: _Check | None
    if set(left) >= _ARRAY_LIKE:
        check = _array
    elif set(left) <= {str, Path, os.PathLike}:
        check = check_path if Path in left else check_text
    elif len(left) == 1:
        check = _check_of(left[0])
    else:
        checks = [each for each in map(_check_of, left) if each is not None]
        check = functools.partial(_first_fitting, checks) if len(checks) == len(left) else None
    if check is None or len(left) == len(hints):
        return check
    return functools.partial(_optional, check)


def _optional(check: _Check, name: str, value: Any) -> None:
    if value is not None:
        check(name, value)


def _first_fitting(checks: Sequence[_Check], name: str, value: Any) -> None:
    said = []
    for check in checks:
        try:
            return check(name, value)
        except InputError as error:
            said.append(error)
    wanted = [str(error).removeprefix(f"{name} must be ").split(", got ")[0] for error in said]
    raise InputError(f"{name} must be {' or '.join(dict.fromkeys(wanted))}, got {shown(value)}")


def _any_whole(name: str, value: Any) -> None:
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise InputError(f"{name} must be a whole number, got {shown(value)}")


def _whole(name: str, value: Any) -> None:
    _any_whole(name, value)
    if not -_LARGEST <= int(value) < _LARGEST:
        raise InputError(f"{name} must be a whole number below 2**63, got {shown(value)}")


def check_number(name: str, value: Any) -> None:
    """Check that a value is a number that a float holds; infinity is one, NaN and a bool are not."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise InputError(f"{name} must be a number, got {shown(value)}")
    try:
        is_number = not math.isnan(float(value))
    except OverflowError:
        raise InputError(f"{name} must be a number below 1e308, got {shown(value)}") from None
    if not is_number:
        raise InputError(f"{name} must be a number, got nan")


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} must be True or False, got {shown(value)}")


def check_text(name: str, value: Any) -> None:
    """Check that a value is text, and can be written to a file."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} must be text that UTF-8 can hold, got {shown(value)}") from None


def check_path(name: str, value: Any) -> None:
    """Check that a value is a path, and one that the system can be asked for."""
    if not isinstance(value, str | Path):
        raise InputError(f"{name} must be a path, text or a Path, got {shown(value)}")
    try:
        encoded = os.fsencode(value)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise InputError(f"{name} must be a path that a file can have, got {shown(str(value))}")


def _array(name: str, value: Any) -> None:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        array = np.array(None)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} must be a number or an array of numbers, got {shown(value)}")


def _callable(name: str, value: Any) -> None:
    if not callable(value):
        raise InputError(f"{name} must be a function, got {shown(value)}")


def _choice(choices: Sequence[Any], name: str, value: Any) -> None:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise InputError(f"{name} must be one of {', '.join(map(str, choices))}, got {shown(value)}")


def _instance(kind: type, wanted: str, name: str, value: Any) -> None:
    if not isinstance(value, kind):
        raise InputError(f"{name} must be {wanted}, got {shown(value)}")


def _items(kind: type, check: _Check | None, name: str, value: Any) -> None:
    """Sequences, and what can be gone through only once, which is not looked into."""
    is_sequence = isinstance(value, Sequence | np.ndarray | AbstractSet) and not isinstance(value, str | bytes)
    is_once = kind is Iterable and isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    if not (is_sequence or is_once) or (isinstance(value, np.ndarray) and value.ndim == 0):
        raise InputError(f"{name} must be a sequence, got {shown(value)}")
    if is_sequence and check is not None:
        for number, item in enumerate(value):
            check(f"{name}[{number}]", item)


def _row(checks: Sequence[_Check | None], name: str, value: Any) -> None:
    if not isinstance(value, tuple) or len(value) != len(checks):
        raise InputError(f"{name} must be a tuple of {len(checks)}, got {shown(value)}")
    for number, (check, item) in enumerate(zip(checks, value, strict=True)):
        if check is not None:
            check(f"{name}[{number}]", item)


def _mapping(of_key: _Check | None, of_value: _Check | None, name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"{name} must be a mapping, got {shown(value)}")
    for key, item in value.items():
        if of_key is not None:
            of_key(f"key {shown(key)} of {name}", key)
        if of_value is not None:
            of_value(f"{name}[{shown(key)}]", item)


_OF_TYPE: dict[Any, _Check] = {int: _whole, float: check_number, bool: _flag, str: check_text, Path: check_path}
