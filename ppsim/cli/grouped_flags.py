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
# A field that is True by default has a flag that turns it off, as in --no-check.
_ON_HINT: dict[str, Any] = {"help_behavior_hint": "(done unless this is given)"}


def grouped(command: type, *, only_essential: bool) -> Callable[..., Any]:
    """Build the function from which tyro reads a command's flags: it has one parameter for each group.

    Parameters
    ----------
    command : type
        A dataclass. It and each of its base classes form a group of the fields that they introduce, named after the
        class. A field is essential if it is marked `Essential`, is positional or has no default. If the command marks
        none of its own fields, all of these are essential.
    only_essential : bool
        Leave the other flags out. The function then serves for printing a short help only.

    Returns
    -------
    callable
        Called by tyro, it makes an object of the command.
    """
    essential, names = essential_fields(command), {each.name for each in fields(command)}
    members = _members(command, essential if only_essential else names)
    parameters = []
    if essential < names:  # some flags are not essential, so there is more to show
        text = f"show all {len(names)} flags, by groups, and exit"
        parameters.append(_parameter("help_all", Annotated[bool, tyro.conf.arg(help=text, **_NO_HINT)], False))
    for declaring_class, flags in members.items():
        ((flag, hint, default), *rest) = flags
        if not rest and any(map(is_dataclass, get_args(hint)[:1])):  # a field that is a group of flags itself
            parameters.append(_parameter(flag, hint, default.default_factory()))
            continue
        name = _group_name(declaring_class)
        about = "" if declaring_class is command else inspect.cleandoc(declaring_class.__doc__ or "")
        group = make_dataclass(name, flags, kw_only=True, namespace={"__doc__": about.split("\n\n")[0]})
        parameters.append(
            _parameter(declaring_class.__name__, Annotated[group, tyro.conf.arg(name=name), tyro.conf.OmitArgPrefixes])
        )

    def make(*, help_all: bool = False, **given: Any) -> Any:
        flat: dict[str, Any] = {}
        for name, value in given.items():  # a field of the command, or a group with fields of it
            flat |= {name: value} if name in names else vars(value)
        return command(**flat)

    # tyro reads parameters, their types and their help from this function as if it had been written by hand.
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    make.__annotations__ = {each.name: each.annotation for each in parameters}
    make.__doc__ = command.__doc__
    return make


def naming_the_flag(error: InputError, names: Container[str]) -> InputError:
    """The error with the field at its start written as a flag: `slow_ranks[2] ...` becomes `--slow-ranks[2] ...`.

    It is returned as it is if it does not start with one of these names.
    """
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
    # The mark that tyro puts on positional fields.
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
    """The docstring under each field in the source, on one line."""
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
