"""Condition flags: a flag for each option of `Conditions`, made from that class.

A new option gets its flag without a change here, unless its default is None and its type is not in `_WORDS`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, get_type_hints

import tyro

from ppsim.cli.command import HINT, OptionalWhole, Real, one_word
from ppsim.cli.flags import numbers_by_name
from ppsim.cli.grouped_flags import naming_the_flag
from ppsim.conditions import Conditions
from ppsim.errors import InputError


def _numbers(kind: type[int] | type[float], example: str) -> tuple[Any, ...]:
    """What tyro needs to read a flag of several numbers in one word, as metadata of an annotation."""
    wanted = f"numbers with commas between them, as in {example}"
    return one_word(lambda text: tuple(kind(each) for each in text.split(",")), tuple, example, wanted), HINT


def _factors(text: str) -> dict[int, float]:
    named = numbers_by_name(text, wanted="")
    found = {int(rank): factor for rank, factor in named.items()}
    if len(found) < len(named):
        raise ValueError  # a rank is given twice, as in 2=1.5,02=3; `one_word` says what is wanted
    return found


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
    """A parameter for each option that one word can give.

    Arrays whose default is None, `Reduction`, `Collectives` and `HostLink` have none. Of an array whose default is a
    number, the flag takes one number.
    """
    hints, found = get_type_hints(Conditions), []
    for each in fields(Conditions):
        kind = hints[each.name]
        if isinstance(each.default, float):
            kind = Real
        elif each.default is None:
            kind = _WORDS.get(kind)
        if kind is not None:
            found.append(
                inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=kind)
            )
    return found


def _from_flags(**flags: Any) -> Conditions:
    try:
        return Conditions(**flags)
    except InputError as error:
        raise naming_the_flag(error, flags) from None


# tyro reads flags, their types and their help from this function as if it had been written by hand.
_from_flags.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
_from_flags.__annotations__ = {each.name: each.annotation for each in _parameters()}
# The help of each option is joined into one line: shell completion takes each further line for another word.
_from_flags.__doc__ = re.sub(
    r"(\n    \S.*)((?:\n    \S.*)+)",
    lambda found: found[1] + found[2].replace("\n   ", ""),
    inspect.cleandoc(Conditions.__doc__ or ""),
)


@dataclass(frozen=True, kw_only=True)
class ConditionFlags:
    """How a step is run. The defaults are those of `Conditions`."""

    conditions: Annotated[Conditions, tyro.conf.arg(constructor=_from_flags), tyro.conf.OmitArgPrefixes] = field(
        default_factory=Conditions
    )
