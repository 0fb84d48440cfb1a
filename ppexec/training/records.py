"""Records: a pickle taken apart without running it."""

from __future__ import annotations

import pickletools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ppsim.checks import shown


class ForeignName(Exception):
    """A pickle names something that it was not expected to; the message is the name."""


@dataclass(eq=False)
class Record:
    """An object in a pickle, of which nothing has been made.

    Parameters
    ----------
    kind : str
        The name of its class, or of the function that would have made it.
    arguments : tuple
        What that would have been called with.
    state : object
        What its attributes would have been set to.
    """

    kind: str
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True)
class Name:
    """A name in a pickle that stands for itself, without a call."""

    name: str


_PLAIN: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_AS_READ = ("BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE")
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_records(data: bytes, names: Collection[tuple[str, str]]) -> Any:
    """What a pickle describes, with a record in the place of each object. Nothing is imported or called.

    Parameters
    ----------
    data : bytes
        A pickle of protocol 4 or 5. Opcodes that plain objects do not need are refused: some of them ask for memory of
        any size.
    names : collection of (str, str)
        Module and name of all classes and functions that it may name.

    Returns
    -------
    object
        Text, whole numbers, bools, None, tuples, lists, dicts, names and records.

    Raises
    ------
    ForeignName
        For a name that is not among `names`.
    Exception
        Of any kind for a pickle that is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memory: list[Any] = []

    def since_mark() -> list[Any]:
        begin = marks.pop()
        above = stack[begin:]
        del stack[begin:]
        return above

    value: Any
    for opcode, value, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                (found,) = stack
                return found
            case "MARK":
                marks.append(len(stack))
            case "MEMOIZE":
                memory.append(stack[-1])
            case "BINGET" | "LONG_BINGET":
                stack.append(memory[value])
            case name if name in _PLAIN:
                stack.append(_PLAIN[name])
            case name if name in _AS_READ:
                stack.append(value)
            case name if name in _TUPLES:
                begin = len(stack) - _TUPLES[name]
                stack[begin:] = [tuple(stack[begin:])]
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND" | "APPENDS" as name:
                items = since_mark() if name == "APPENDS" else [stack.pop()]
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS" as name:
                items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                for key, item in zip(items[::2], items[1::2], strict=True):
                    if not isinstance(key, str | Record):  # the hash of nested tuples may take for ever
                        raise ValueError(f"a {type(key).__name__} is a key")
                    stack[-1][key] = item
            case "STACK_GLOBAL":
                module, name = stack.pop(-2), stack.pop()
                if not (isinstance(module, str) and isinstance(name, str)):
                    raise ValueError("a name is no text")
                if (module, name) not in names:
                    raise ForeignName(shown(f"{module}.{name}"))
                stack.append(Name(name))
            case "NEWOBJ" | "REDUCE":
                arguments, kind = stack.pop(), stack.pop()
                if not (isinstance(arguments, tuple) and isinstance(kind, Name)):
                    raise ValueError("what is called has no name, or no arguments")
                stack.append(Record(kind.name, arguments))
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], Record):
                    raise ValueError(f"a {type(stack[-1]).__name__} has attributes")
                stack[-1].state = state
            case name:
                raise ValueError(f"it has {name}, which plain objects do not need")
    raise ValueError("it does not end")
