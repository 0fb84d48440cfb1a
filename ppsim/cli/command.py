"""Command: the command lines of ppsim and ppexec, read into dataclasses whose fields are the flags."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ppsim.checks import check_fields, check_path
from ppsim.cli.colour import refuses_colour
from ppsim.cli.grouped_flags import grouped, naming_the_flag
from ppsim.errors import InputError

T = TypeVar("T")


def one_word(
    read: Callable[[str], Any], kind: type | tuple[type, ...], metavar: str, wanted: str
) -> PrimitiveConstructorSpec[Any]:
    """How tyro reads a flag of one word, optional or not. tyro's own way shows {None}|INT and reports errors twice."""

    def from_text(words: list[str]) -> Any:
        try:
            return read(words[0])
        except ValueError:
            raise InputError(f"must be {wanted}, got {_short(words[0])!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=from_text,
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [_UNSET if value is None else str(value)],
    )


def _default_hint(default: str) -> str:
    return "" if default == _UNSET else f"(default: {default})"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _path(text: str) -> Path:
    if not text:  # what an unset variable of the shell leaves; a Path would be the working directory
        raise ValueError(text)
    check_path("path", text)
    return Path(text)


_registry = ConstructorRegistry()


@_registry.primitive_rule
def _one_word_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Paths, text and optional numbers are read alike in every dataclass."""
    if info.type in (Path, Path | None):
        return one_word(_path, Path, "PATH", "a path that a file can have")
    if info.type == int | None:
        return _WHOLE
    if info.type == float | None:
        return _REAL
    return _NAME if info.type in (str, str | None) else None


_HELPS = ("-h", "--help", "--help-all")
_COMPLETION = "--tyro-print-completion"  # its name in tyro
_SHELLS = ("bash", "zsh", "fish")
_UNSET = "unset"
HINT = tyro.conf.arg(help_behavior_hint=_default_hint)

# Types of flags. Those that may be unset are None then, and their help says nothing of a default.
_WHOLE = one_word(int, int, "INT", "a whole number")
_REAL = one_word(float, (int, float), "FLOAT", "a number")
_NAME = one_word(str, str, "NAME", "a name")
OptionalWhole = Annotated[int | None, _WHOLE, HINT]
OptionalReal = Annotated[float | None, _REAL, HINT]
OptionalName = Annotated[str | None, _NAME, HINT]
OptionalFile = Annotated[Path | None, one_word(_path, Path, "FILE", "a path that a file can have"), HINT]
OptionalFolder = Annotated[Path | None, one_word(_path, Path, "DIR", "a path that a folder can have"), HINT]
Real = Annotated[float, _REAL, HINT]


def parse(
    command: type[T] | Mapping[str, type[T]],
    *,
    prog: str,
    description: str,
    examples: Mapping[str, str] = MappingProxyType({}),
    args: Sequence[str] | None = None,
) -> T:
    """Read the command line.

    Parameters
    ----------
    command : type, or mapping of name -> type
        A dataclass whose fields are the flags, or a subcommand for each name.
    prog, description : str
        For the help text.
    examples : mapping of str -> str, optional
        For each subcommand a command line that its help shows.
    args : sequence of str, optional
        The words after the program's name. By default those of `sys.argv`.

    Returns
    -------
    An object of `command`.

    Raises
    ------
    InputError
        If the words do not fit, with one message.
    SystemExit
        With code 0, once help or what a shell needs to complete words has been printed.

    Notes
    -----
    `--help` shows the flags that most uses need (see `ppsim.essential.Essential`), `--help-all` all of them, by groups.
    `--print-completion SHELL` prints a script for bash, zsh or fish.
    """
    words = list(sys.argv[1:] if args is None else args)
    asked = next((word for word in words if word in _HELPS), None)
    if asked is not None:
        words = [*(words[:1] if isinstance(command, Mapping) and words[0] in command else []), "--help"]
    elif words[:1] == ["--print-completion"]:
        if words[1:] not in [[shell] for shell in _SHELLS]:
            raise InputError(f"--print-completion takes the name of your shell: {', '.join(_SHELLS)}")
        words = [_COMPLETION, words[1]]
    only_essential = asked is not None and asked != "--help-all"
    if isinstance(command, Mapping):
        subcommands = (
            _subcommand(name, kind, examples.get(name), words, only_essential=only_essential)
            for name, kind in command.items()
        )
        # A union that is made here: its type is not known to a type checker.
        read: Any = functools.reduce(operator.or_, subcommands)
    else:
        read = grouped(command, only_essential=only_essential)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), _registry, _plain_help():
            found: T = tyro.cli(
                read, prog=prog, description=description, args=words, config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        said = _without_frame(complaint.getvalue())
        if isinstance(command, Mapping) and words[:1] and words[0] in command:  # tyro does not always name it
            said = said.replace(f"see {prog} --help", f"see {prog} {words[0]} --help")
        raise InputError(said) from None
    try:
        check_fields(found)
    except InputError as error:
        raise naming_the_flag(error, vars(found)) from None
    return found


@contextlib.contextmanager
def _plain_help() -> Iterator[None]:
    """A context in which tyro, which knows no NO_COLOR, prints no colours if the user wants none."""
    before = os.environ.get("TERM")
    if before is None or not refuses_colour():
        yield
        return
    os.environ["TERM"] = "dumb"
    try:
        yield
    finally:
        os.environ["TERM"] = before


def _subcommand(name: str, kind: type, example: str | None, words: Sequence[str], *, only_essential: bool) -> Any:
    """A subcommand. The one that the user named has its whole docstring and an example, others the first paragraph."""
    said = inspect.getdoc(kind) or ""
    if words[:1] != [name]:
        description = said.split("\n\n")[0]
    else:
        description = said if example is None else f"{said}\n\nExample: {example}"
    if words[:1] not in [[name], [_COMPLETION]]:  # its flags are not asked for, and take time to read
        return Annotated[kind, tyro.conf.subcommand(name, description=description)]
    read = grouped(kind, only_essential=only_essential)
    return Annotated[kind, tyro.conf.subcommand(name, description=description, constructor=read)]


def _without_frame(text: str) -> str:
    """tyro's complaint as one line: what is wrong, what was perhaps meant, and where help is.

    tyro draws a box of sections parted by rules. The second section may hold suggestions, the last says where help is.
    Where the output cannot show boxes, the first two lines are the title and a rule, which are skipped.
    """
    sections: list[list[str]] = [[]]
    lines = text.splitlines()
    for line in lines if "╭" in text else lines[2:]:
        content = line.strip("│ \t")
        if content.startswith(("╭", "╰")):
            continue
        if content and not content.strip("─-"):
            sections.append([])
        elif content:
            sections[-1].append(content)
    if not sections[0]:
        return text.strip()
    said = " ".join(sections[0]).rstrip(".")
    said = re.sub(r"^Error parsing (-\S+):", r"\1", said)
    said = re.sub(r"^Error parsing \S+: ", "", said)  # a dataclass refused its fields; its name means nothing here
    said = re.sub(r" \(applied to [^)]*\)|\s*Arguments are applied to .*", "", said)
    rest = [line for section in sections[1:] for line in section]
    meant = list(dict.fromkeys(line.split()[0].rstrip(",") for line in rest if line.startswith("--")))
    is_guess = any(line.startswith("Perhaps you meant") for line in rest)
    known = [" ".join(section) for section in sections[1:] if "".join(section[:1]).startswith("Available subcommands")]
    says_help = bool(rest and re.search(r"(\S+(?: \w+)*) --help$", rest[-1]))
    help_line = re.sub(r"^For full helptext, (run|see) ", "", rest[-1]) if says_help else ""
    parts = [said]
    if is_guess and meant:
        parts.append(f"perhaps you meant {' or '.join(meant)}")
    parts += known
    if help_line:
        parts.append(f"see {help_line}")
    return "; ".join(parts)


def welcome(intro: str, examples: Mapping[str, tuple[str, str]], *, prog: str, first: Sequence[str]) -> str:
    """The text that a program prints if it is called without arguments: what each command is for, and how to go on.

    Parameters
    ----------
    intro : str
        What the program is for.
    examples : mapping of str -> (str, str)
        For each command what one wants, and a command line that does it.
    prog : str
        The program's name.
    first : sequence of str
        Commands to begin with, whose whole lines are shown.
    """
    width = max(len(purpose) for purpose, _ in examples.values())
    lines = [f"{intro} Begin with:", ""]
    lines += [f"  {examples[name][0]:<{width}}  {examples[name][1]}" for name in first]
    lines.append("")
    lines += [f"  {each[0]:<{width}}  {prog} {name}" for name, each in examples.items() if name not in first]
    lines += [
        "",
        f"{prog} COMMAND --help says what a command mostly takes, with an example; --help-all says all that it takes.",
        f'In bash, eval "$({prog} --print-completion bash)" makes Tab complete commands and flags.',
    ]
    return "\n".join(lines)
