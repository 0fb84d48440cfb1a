"""Model error: which part of a user's model raised an exception."""

from __future__ import annotations

from typing import NoReturn

from ppsim.errors import InputError


class ModelError(RuntimeError):
    """A part of the user's model raised. The message names the part, `__cause__` is what it raised."""


def reraise(error: Exception, part: str) -> NoReturn:
    """Raise what came out of a part of the model, such as "layer 3 (Linear)", as a ModelError.

    An InputError stays what it is, and a ModelError keeps the innermost part.
    """
    if isinstance(error, InputError | ModelError):
        raise error
    raise ModelError(part) from error
