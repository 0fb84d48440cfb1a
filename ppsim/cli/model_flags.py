"""Model flags: the options of `Conditions` as flags, read off the object, so that a new option needs no flag here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, get_type_hints

import tyro

from ppsim.cli.command import HINT, OptionalWhole, Real, one_word
from ppsim.cli.flags import numbers_by_name
from ppsim.cli.grouped_flags import of_flag
from ppsim.conditions import Conditions
from ppsim.errors import InputError


def _numbers(kind: type[int] | type[float], example: str) -> tuple[Any, ...]:
    """How a flag of several numbers in one word is read."""
    wanted = f"numbers with commas between them, as in {example}"
    return one_word(lambda text: tuple(kind(each) for each in text.split(",")), tuple, example, wanted), HINT


def _factors(text: str) -> dict[int, float]:
    return {int(rank): factor for rank, factor in numbers_by_name(text, text).items()}


# Flags of one word for options that may be unset, by the type of the option.
_WORDS: dict[Any, Any] = {
    int | None: OptionalWhole,
    Sequence[int] | None: Annotated[Sequence[int] | None, *_numbers(int, "0,0,1,1")],
    Sequence[float] | None: Annotated[Sequence[float] | None, *_numbers(float, "1,0.6")],
    Mapping[int, float] | None: Annotated[
        Mapping[int, float] | None,
        one_word(_factors, Mapping, "2=1.5,5=1.2", "ranks and factors, as in 2=1.5"),
        HINT,
        tyro.conf.arg(aliases=["--slow-rank"]),
    ],
}


def _parameters() -> list[inspect.Parameter]:
    """A parameter for each option that one word can give. An array or a `Reduction` has none."""
    hints, found = get_type_hints(Conditions), []
    for each in fields(Conditions):
        hint = hints[each.name]
        kind = Real if isinstance(each.default, float) else hint if each.default is not None else _WORDS.get(hint)
        if kind is not None:
            found.append(
                inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=kind)
            )
    return found


def _from_flags(**flags: Any) -> Conditions:
    try:
        return Conditions(**flags)
    except InputError as error:
        raise of_flag(error, flags) from None


# tyro reads flags, their types and their help off this function as if it had been written by hand.
_from_flags.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
_from_flags.__annotations__ = {each.name: each.annotation for each in _parameters()}
# Each option on one line: a line more would be a word more where a shell completes.
_from_flags.__doc__ = re.sub(
    r"(\n    \S.*)((?:\n    \S.*)+)",
    lambda found: found[1] + found[2].replace("\n   ", ""),
    inspect.cleandoc(Conditions.__doc__ or ""),
)


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """How a step is run; the defaults are the plain model."""

    conditions: Annotated[Conditions, tyro.conf.arg(constructor=_from_flags), tyro.conf.OmitArgPrefixes] = field(
        default_factory=Conditions
    )
