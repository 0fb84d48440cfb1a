"""Machine fit: the constants of a machine that best explain measured steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ppsim.checks import checked
from ppsim.errors import InputError
from ppsim.estimate.machine import CONSTANTS, Machine
from ppsim.planning.measured_steps import MeasuredStep
from ppsim.planning.step_table import StepTable, predict_steps

Numbers = npt.NDArray[np.float64]
_ERROR = 0.06  # of a step's time, as the model is expected to have it: how measurements weigh against the start
_HUBER = 3.0  # errors beyond so many times that count in proportion, not squared (Huber, 1964)
_ROUNDS = 60
_NUDGE = 1e-4  # of a logarithm, for derivatives


@dataclass(frozen=True, kw_only=True)
class MachineFit:
    """A machine and how well it explains the steps it was fitted to.

    Parameters
    ----------
    machine : Machine
        With its `spread`.
    predicted_s, measured_s : arrays of shape (steps,)
        Of those steps.
    """

    machine: Machine
    predicted_s: Numbers
    measured_s: Numbers

    @property
    def error(self) -> Numbers:
        """Predicted over measured, less 1."""
        return self.predicted_s / self.measured_s - 1


@checked
def fit_machine(measured: Sequence[MeasuredStep], start: Machine) -> MachineFit:
    """Fit a machine's constants to measured steps.

    Parameters
    ----------
    measured : sequence of MeasuredStep
        What was measured, of any models and sizes.
    start : Machine
        The machine's rates, and constants as they are expected to be. A constant that the steps say nothing of keeps
        its value.

    Returns
    -------
    MachineFit

    Raises
    ------
    InputError
        If there are no steps.

    Notes
    -----
    The logarithms of the constants minimize Huber's loss of the logarithms of predicted over measured times, and their
    squared distances from the start in units of `CONSTANTS[...].spread`: the most probable constants if both errors are
    normal in the middle. The Levenberg-Marquardt method finds them (Marquardt, 1963). The spread is that of the
    quadratic form around them.
    """
    if not measured:
        raise InputError("no measured steps: give a file with a row for each")
    table = StepTable([each.step for each in measured])
    measured_s = np.array([each.seconds for each in measured])
    names = list(CONSTANTS)
    low, high = (np.log([getattr(CONSTANTS[name], end) for name in names]) for end in ("low", "high"))
    begin = np.log([getattr(start, name) for name in names])
    spread = np.array([CONSTANTS[name].spread for name in names])

    def machine(values: Numbers) -> Machine:
        # An end of a range may come back from its logarithm a rounding beyond it.
        constants = {
            name: min(max(value, CONSTANTS[name].low), CONSTANTS[name].high)
            for name, value in zip(names, np.exp(values).tolist(), strict=True)
        }
        return replace(start, **constants, spread={})

    def residuals(values: Numbers) -> Numbers:
        errors = np.log(table.seconds(machine(values)).step / measured_s) / _ERROR
        return np.concatenate([_huber(errors), (values - begin) / spread])

    values, jacobian = _least_squares(residuals, begin, low, high)
    covariance = np.linalg.inv(jacobian.T @ jacobian)
    deviation = np.sqrt(np.diag(covariance))
    fitted = replace(machine(values), spread=dict(zip(names, deviation.tolist(), strict=True)))
    return MachineFit(machine=fitted, predicted_s=table.seconds(fitted).step, measured_s=measured_s)


def prediction_errors(measured: Sequence[MeasuredStep], machine: Machine) -> Numbers:
    """Predicted over measured, less 1, shape (steps,)."""
    seconds = np.array([each.seconds for each in measured])
    return np.asarray(predict_steps([each.step for each in measured], machine).step / seconds - 1)


def error_summary(errors: Numbers) -> dict[str, float]:
    """Of errors as shares: how many, the mean, median and largest of their sizes, and their own mean."""
    size = np.abs(errors)
    return {
        "steps": len(errors),
        "mean_error": float(size.mean()),
        "mean_signed_error": float(errors.mean()),
        "median_error": float(np.median(size)),
        "worst_error": float(size.max()),
    }


def _huber(errors: Numbers) -> Numbers:
    """Residuals whose squares are Huber's loss."""
    size = np.abs(errors)
    far = np.maximum(size, _HUBER)
    return np.where(size <= _HUBER, errors, np.sign(errors) * np.sqrt(2 * _HUBER * far - _HUBER**2))


def _least_squares(
    residuals: Callable[[Numbers], Numbers], start: Numbers, low: Numbers, high: Numbers
) -> tuple[Numbers, Numbers]:
    """Values within bounds that minimize the sum of squares, and the derivatives there."""
    values, damping = np.clip(start, low, high), 1e-2
    found = residuals(values)
    jacobian = _derivatives(residuals, values, found, high)
    for _ in range(_ROUNDS):
        slope, form = jacobian.T @ found, jacobian.T @ jacobian
        is_free = ~(((values <= low) & (slope > 0)) | ((values >= high) & (slope < 0)))
        free = np.flatnonzero(is_free)
        before, better = float(found @ found), False
        while damping < 1e8:
            move = np.zeros_like(values)
            inner = form[np.ix_(free, free)]
            move[free] = -np.linalg.solve(inner + damping * np.diag(np.diag(inner)), slope[free])
            there = np.clip(values + move, low, high)
            errors = residuals(there)
            if float(errors @ errors) < before:
                values, found, better, damping = there, errors, True, max(damping / 5, 1e-9)
                break
            damping *= 4
        jacobian = _derivatives(residuals, values, found, high)
        if not better or before - float(found @ found) < 1e-6 * before:
            break
    return values, jacobian


def _derivatives(residuals: Callable[[Numbers], Numbers], values: Numbers, found: Numbers, high: Numbers) -> Numbers:
    columns = []
    for index in range(len(values)):
        nudge = -_NUDGE if values[index] + _NUDGE > high[index] else _NUDGE
        there = values.copy()
        there[index] += nudge
        columns.append((residuals(there) - found) / nudge)
    return np.column_stack(columns)
