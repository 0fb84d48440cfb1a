"""Essential: the mark of a field whose flag a command's short help shows."""

from __future__ import annotations

from typing import Annotated, TypeVar

T = TypeVar("T")


class EssentialMark:
    """Stands in the annotation of a field that most uses of a command set."""


Essential = Annotated[T, EssentialMark()]
