"""The public names of both packages and their signatures, as text.

`python -m tests.support.public_api` writes them to tests/public_api.txt, after a change that is meant.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ppexec
import ppsim

FILE = Path(__file__).parents[1] / "public_api.txt"
WIDTH = 120


def describe() -> str:
    """Every name in `ppsim.__all__` and `ppexec.__all__`: functions, and classes with their public members."""
    lines: list[str] = []
    for package in (ppsim, ppexec):
        for name in package.__all__:
            value, full_name = getattr(package, name), f"{package.__name__}.{name}"
            lines += _class_lines(full_name, value) if inspect.isclass(value) else _call_lines(full_name, value)
    return "\n".join(lines) + "\n"


def _class_lines(name: str, value: type) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    yield f"class {name}({bases})" if bases else f"class {name}"
    fields: set[str] = set()  # are in the constructor's signature
    if issubclass(value, enum.Enum):
        yield f"    {', '.join(value.__members__)}"
    elif issubclass(value, tuple):
        names: tuple[str, ...] = value._fields  # type: ignore[attr-defined]
        yield f"    {', '.join(names)}"
        fields = set(names)
    elif not issubclass(value, BaseException):
        yield from _call_lines(f"    {value.__name__}", value)
        fields = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
    for member, definition in sorted(_members(value).items()):
        if member.startswith("_") or member in fields or isinstance(definition, value):
            continue
        if isinstance(definition, classmethod | staticmethod):
            yield from _call_lines(f"    {type(definition).__name__} {member}", getattr(value, member))
        elif inspect.isfunction(definition):
            yield from _call_lines(f"    {member}", definition)
        else:
            yield f"    {member}"


def _members(value: type) -> dict[str, object]:
    """Of a class, and of those above it that are in its package and have no public name."""
    package = value.__module__.split(".")[0]
    public = {getattr(each, name) for each in (ppsim, ppexec) for name in each.__all__}
    found: dict[str, object] = {}
    for each in reversed(value.__mro__):
        if each is value or (each.__module__.split(".")[0] == package and each not in public):
            found |= vars(each)
    return found


def _call_lines(name: str, function: Callable[..., Any]) -> Iterator[str]:
    """The call as written in the source, annotations without quotes; a line for each parameter if one is too short."""
    signature = inspect.signature(function)
    words: list[str] = []
    keyword_only = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            keyword_only = True
        elif parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        annotation = "" if parameter.annotation is parameter.empty else f": {_text(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        words.append(f"{star}{parameter.name}{annotation}{default}")
    returned = "" if signature.return_annotation is signature.empty else f" -> {_text(signature.return_annotation)}"
    line = f"{name}({', '.join(words)}){returned}"
    if len(line) <= WIDTH:
        yield line
        return
    indent = " " * (len(name) - len(name.lstrip()))
    yield f"{name}("
    yield from (f"{indent}    {word}," for word in words)
    yield f"{indent}){returned}"


def _text(annotation: object) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


if __name__ == "__main__":
    FILE.write_text(describe(), encoding="utf-8")
