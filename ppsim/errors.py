"""Errors: input that cannot be used, and runs that fail."""


class InputError(ValueError):
    """A user's input cannot be used. The message says what, where, the value and the remedy.

    Every error in a user's input is one of these, and a command ends with exit code 2 for it. Any other ValueError is a
    fault of this project.

    Attributes
    ----------
    details : str
        What to show below the message, such as the frames of the user's own code; empty if there is nothing.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class ScheduleError(InputError):
    """A schedule is incomplete, out of order or cannot end. The message says what, where and the remedy.

    Attributes
    ----------
    place : (int, int), or None
        Row and column of the file, counted from 1, where one cell is to blame.
    """

    def __init__(self, message: str, details: str = "", *, place: tuple[int, int] | None = None) -> None:
        super().__init__(message, details)
        self.place = place


class CostError(InputError):
    """A cost, or a file of costs, has no meaning. The message names the field, its value and the remedy."""


class RunError(RuntimeError):
    """A run began and could not end. The message says where it stood and why. A command ends with exit code 1.

    Attributes
    ----------
    details : str
        What to show below the message, such as the frames of the user's own code; empty if there is nothing.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details
