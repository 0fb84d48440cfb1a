"""What can be wrong with what a user brings."""


class ScheduleError(ValueError):
    """A schedule that is incomplete, out of order or cannot end; the message says what, where and the remedy."""


class CostError(ValueError):
    """A cost, or a file of costs, that has no meaning; the message names the field, its value and the remedy."""
