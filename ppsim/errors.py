"""What can be wrong with what a user brings, and what can go wrong in a run."""


class InputError(ValueError):
    """Something a user brought cannot be used; the message says what, where, the value and the remedy.

    Every error of a user's input is one of these, and a command ends with exit code 2 for it. Any other ValueError that
    leaves this project is a fault of ours.

    Attributes
    ----------
    details : str
        What to show below the message, such as the frames of the user's own code; empty if there is nothing.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class ScheduleError(InputError):
    """A schedule that is incomplete, out of order or cannot end; the message says what, where and the remedy.

    Attributes
    ----------
    place : (int, int), or None
        Row and column of the file, counted from 1, where one cell is to blame.
    """

    def __init__(self, message: str, details: str = "", *, place: tuple[int, int] | None = None) -> None:
        super().__init__(message, details)
        self.place = place


class CostError(InputError):
    """A cost, or a file of costs, that has no meaning; the message names the field, its value and the remedy."""


class RunError(RuntimeError):
    """A run that began and could not end; the message says where it stood and why. A command ends with exit code 1.

    Attributes
    ----------
    details : str
        What to show below the message, such as the frames of the user's own code; empty if there is nothing.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details
