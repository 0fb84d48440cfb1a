"""Grouped flags: a command's fields as flags in named groups, all of them or the essential ones."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Container, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, get_args, get_type_hints

import tyro

from ppsim.errors import InputError
from ppsim.essential import EssentialMark

_SUFFIXES = re.compile(r"(Flags|Command|Config)$")
_NO_HINT: dict[str, Any] = {"help_behavior_hint": ""}
_ON_HINT: dict[str, Any] = {"help_behavior_hint": "(done unless this is given)"}


def grouped(command: type, *, only_essential: bool) -> Callable[..., Any]:
    """What tyro reads a command's flags off: a function with a parameter for each group.

    Parameters
    ----------
    command : type
        A dataclass. The fields that a class declares first are a group, named after it. Essential are those marked
        `Essential`, those without a default, positional ones, and all that the command itself declares if it marks
        none of them.
    only_essential : bool
        Leave the other flags out, for a short help. Nothing can be parsed then.

    Returns
    -------
    callable
        Called by tyro, it makes an object of the command.
    """
    essential, names = essential_fields(command), {each.name for each in fields(command)}
    members = _members(command, essential if only_essential else names)
    parameters = []
    if essential < names:
        text = f"show all {len(names)} flags, by groups, and exit"
        parameters.append(_parameter("help_all", Annotated[bool, tyro.conf.arg(help=text, **_NO_HINT)], False))
    for home, flags in members.items():
        name, about = _group_name(home), "" if home is command else inspect.cleandoc(home.__doc__ or "")
        ((flag, hint, default), *rest) = flags
        if not rest and is_dataclass(get_args(hint)[0]):  # a value that brings flags of its own, in a box of its own
            parameters.append(_parameter(flag, hint, default.default_factory()))
            continue
        box = make_dataclass(name, flags, kw_only=True, namespace={"__doc__": about.split("\n\n")[0]})
        parameters.append(
            _parameter(home.__name__, Annotated[box, tyro.conf.arg(name=name), tyro.conf.OmitArgPrefixes])
        )

    def make(*, help_all: bool = False, **given: Any) -> Any:
        flat: dict[str, Any] = {}
        for name, value in given.items():
            flat |= {name: value} if name in names else vars(value)
        return command(**flat)

    # tyro reads parameters, their types and their help off this function as if it had been written by hand.
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    make.__annotations__ = {each.name: each.annotation for each in parameters}
    make.__doc__ = command.__doc__
    return make


def of_flag(error: InputError, names: Container[str]) -> InputError:
    """The error as it is said of a flag, where it begins with the name of one of these fields."""
    name, _, said = str(error).partition(" ")
    if name.split("[")[0] not in names:
        return error
    return InputError(f"--{name.replace('_', '-')} {said}", error.details)


def _members(command: type, kept: set[str]) -> dict[type, list[tuple[str, Any, Any]]]:
    """Name, type and default of the fields that are kept, by the class that declares them."""
    hints, helped = get_type_hints(command, include_extras=True), _field_help(command)
    found: dict[type, list[tuple[str, Any, Any]]] = {}
    for each in fields(command):
        if each.name in kept:
            about: dict[str, Any] = {"help": helped[each.name]} if each.name in helped else {}
            if each.default is None or each.default is False:
                about |= _NO_HINT
            elif each.default is True:
                about |= _ON_HINT
            hint = Annotated[hints[each.name], tyro.conf.arg(**about)] if about else hints[each.name]
            found.setdefault(_home(command, each.name), []).append((each.name, hint, _default(each)))
    return found


def _parameter(name: str, hint: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def essential_fields(command: type) -> set[str]:
    """The names of a command's fields that its short help shows; see `grouped`."""
    hints = get_type_hints(command, include_extras=True)
    marks = {each.name: getattr(hints[each.name], "__metadata__", ()) for each in fields(command)}
    marked = {name for name, found in marks.items() if any(isinstance(mark, EssentialMark) for mark in found)}
    own = set(inspect.get_annotations(command)) & set(marks)
    needed = {each.name for each in fields(command) if _is_needed(each, marks[each.name])}
    return marked | needed | (set() if own & marked else own)


def _is_needed(each: Field[Any], marks: Sequence[Any]) -> bool:
    is_positional = tyro.conf.Positional[int].__metadata__[0] in marks  # type: ignore[attr-defined]
    return is_positional or (each.default is MISSING and each.default_factory is MISSING)


def _default(each: Field[Any]) -> Any:
    if each.default_factory is not MISSING:
        return field(default_factory=each.default_factory)
    return field() if each.default is MISSING else field(default=each.default)


def _home(command: type, name: str) -> type:
    """The class that declares a field first, whatever its subclasses make of it."""
    return next(each for each in reversed(command.__mro__) if name in inspect.get_annotations(each))


def _group_name(home: type) -> str:
    """ScheduleFlags -> schedule; ErrorModelConfig -> error_model."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", _SUFFIXES.sub("", home.__name__)).lower()


def _field_help(command: type) -> dict[str, str]:
    """What stands under each field in the source, on one line."""
    found: dict[str, str] = {}
    for each in reversed(command.__mro__):
        if not is_dataclass(each):
            continue
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(each)))
        for named, text in itertools.pairwise(tree.body[0].body):
            match named, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                    found[name] = " ".join(said.split())
    return found
