"""Machine fit: the constants of a machine that best explain measured steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ppsim.checks import checked
from ppsim.errors import InputError
from ppsim.estimate.machine import CONSTANTS, Machine
from ppsim.planning.measured_steps import MeasuredStep
from ppsim.planning.step_table import StepTable, predict_steps

Numbers = npt.NDArray[np.float64]
# Of a step's logarithm, as a run is expected to stray: how measurements weigh against the start. Steps of one run
# differ by 1 to 3 %, and some runs are disturbed and take longer by a tenth or more: hence a t distribution's tails.
_ERROR = 0.02
_BLIND_ERROR = 0.03  # likewise of a step whose layers have no factors, which the constants miss a little too
_FREEDOM = 2.0
_SHAPE_STEPS = 3  # fewer say as much of the chance of a run as of the shape
_SHAPE_SPREAD = 0.08  # of the logarithm of a layer shape's factor, as the constants miss layers on A100
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
def fit_machine(measured: Sequence[MeasuredStep], start: Machine, *, by_shape: bool = True) -> MachineFit:
    """Fit a machine's constants to measured steps.

    Parameters
    ----------
    measured : sequence of MeasuredStep
        What was measured, of any models and sizes.
    start : Machine
        The machine's rates, and constants as they are expected to be. A constant that the steps say nothing of keeps
        its value.
    by_shape : bool
        Whether layers of a shape that three steps or more have get factors of their own, `Machine.layer_factors`.

    Returns
    -------
    MachineFit

    Raises
    ------
    InputError
        If there are no steps.

    Notes
    -----
    The logarithms of predicted over measured times are taken to have Student's t distribution, whose tails leave room
    for runs that something disturbed (Lange, Little and Taylor, Robust Statistical Modeling Using the t Distribution,
    1989). The logarithms of the constants are taken to be normal around the start, with `CONSTANTS[...].spread`. The
    most probable constants are found by the Levenberg-Marquardt method (Marquardt, 1963) on squares that are weighted
    anew in each round. The spread is that of the quadratic form around them.

    Constants do not say all about a layer: libraries choose kernels by shape, and hosts were quick or slow when they
    were measured. What layers of one shape have in common beyond the constants is a random effect of that shape
    (Laird and Ware, Random-Effects Models for Longitudinal Data, 1982): a factor, normal around 1 in its logarithm, of
    embedding and head, and one of blocks. It helps steps of that shape on other numbers of devices; steps of a shape
    that was not measured have the constants alone.
    """
    if not measured:
        raise InputError("no measured steps: give a file with a row for each")
    problem = _Problem(measured, start, by_shape=by_shape)
    values, form = _minimum(problem)
    deviation = np.sqrt(np.diag(np.linalg.inv(form)))
    fitted = replace(problem.machine(values), spread=dict(zip(CONSTANTS, deviation.tolist(), strict=False)))
    predicted_s = problem.table.seconds(fitted).step
    return MachineFit(machine=fitted, predicted_s=predicted_s, measured_s=problem.measured_s)


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


class _Problem:
    """What a fit minimizes: logarithms of constants, then of the factors of embedding and head, then of blocks."""

    def __init__(self, measured: Sequence[MeasuredStep], start: Machine, *, by_shape: bool) -> None:
        self._start = start
        self.table = StepTable([each.step for each in measured])
        self.measured_s = np.array([each.seconds for each in measured])
        shapes = [each.step.layer_shapes if by_shape else () for each in measured]
        counts = Counter(name for pair in shapes for name in pair)
        self._names = [name for name, count in counts.items() if count >= _SHAPE_STEPS]
        numbers = {name: number for number, name in enumerate(self._names, start=len(CONSTANTS))}
        # The columns of each step's own factors, shape (2, steps), or (0, 0); -1 where it has none.
        owned = [[numbers.get(name, -1) for name in part] for part in zip(*shapes, strict=True)]
        self._owned = np.array(owned, np.int64)
        has_factors = (self._owned >= 0).all(axis=0) if by_shape else np.zeros(len(measured), bool)
        self._error = np.where(has_factors, _ERROR, _BLIND_ERROR)
        free = len(self._names)
        known = list(CONSTANTS.values())
        self.begin = np.concatenate([np.log([getattr(start, name) for name in CONSTANTS]), np.zeros(free)])
        self.low = np.concatenate([np.log([each.low for each in known]), np.full(free, -np.inf)])
        self.high = np.concatenate([np.log([each.high for each in known]), np.full(free, np.inf)])
        self._spread = np.concatenate([[each.spread for each in known], np.full(free, _SHAPE_SPREAD)])

    def machine(self, values: Numbers) -> Machine:
        """The machine of these logarithms."""
        given = np.exp(values).tolist()
        # An end of a range may come back from its logarithm a rounding beyond it.
        constants = {
            name: min(max(value, each.low), each.high)
            for (name, each), value in zip(CONSTANTS.items(), given, strict=False)
        }
        factors = dict(zip(self._names, given[len(CONSTANTS) :], strict=True))
        return replace(self._start, **constants, spread={}, layer_factors=factors)

    def strays(self, values: Numbers) -> Numbers:
        """How far values are from where they begin, in units of what they are expected to stray."""
        return np.asarray((values - self.begin) / self._spread)

    def errors(self, values: Numbers) -> Numbers:
        """Logarithms of predicted over measured times, in units of what runs are expected to stray."""
        return np.asarray(np.log(self.table.seconds(self.machine(values)).step / self.measured_s) / self._error)

    def quadratic(self, values: Numbers, errors: Numbers) -> tuple[Numbers, Numbers]:
        """Half the loss's slope, and the form whose minimum is the next step's."""
        jacobian, weights = self._derivatives(values, errors), _weights(errors)
        slope = jacobian.T @ (weights * errors) + self.strays(values) / self._spread
        return slope, (jacobian.T * weights) @ jacobian + np.diag(self._spread**-2)

    def _derivatives(self, values: Numbers, errors: Numbers) -> Numbers:
        """A step's time depends on its own factors alone: one nudge says all factors of a kind."""
        jacobian = np.zeros((len(errors), len(values)))
        for index in range(len(CONSTANTS)):
            nudge = -_NUDGE if values[index] + _NUDGE > self.high[index] else _NUDGE
            jacobian[:, index] = (self._nudged(values, index, nudge) - errors) / nudge
        for owned in self._owned:
            there = (self._nudged(values, np.unique(owned[owned >= 0]), _NUDGE) - errors) / _NUDGE
            jacobian[owned >= 0, owned[owned >= 0]] = there[owned >= 0]
        return jacobian

    def _nudged(self, values: Numbers, columns: int | npt.NDArray[np.int64], nudge: float) -> Numbers:
        there = values.copy()
        there[columns] += nudge
        return self.errors(there)


def _loss(errors: Numbers) -> float:
    """Of Student's t distribution, less what does not depend on the errors."""
    return float((_FREEDOM + 1) * np.log1p(errors**2 / _FREEDOM).sum())


def _weights(errors: Numbers) -> Numbers:
    """Squares with these weights have the loss's slope."""
    return np.asarray((_FREEDOM + 1) / (_FREEDOM + errors**2))


def _minimum(problem: _Problem) -> tuple[Numbers, Numbers]:
    """Values within bounds that minimize the loss, and its quadratic form there."""
    low, high = problem.low, problem.high
    values, damping = np.clip(problem.begin, low, high), 1e-2
    errors, strays = problem.errors(values), problem.strays(values)
    cost = _loss(errors) + float(strays @ strays)
    slope, form = problem.quadratic(values, errors)
    for _ in range(_ROUNDS):
        is_free = ~(((values <= low) & (slope > 0)) | ((values >= high) & (slope < 0)))
        free = np.flatnonzero(is_free)
        before = cost
        while damping < 1e8:
            move = np.zeros_like(values)
            inner = form[np.ix_(free, free)]
            move[free] = -np.linalg.solve(inner + damping * np.diag(np.diag(inner)), slope[free])
            there = np.clip(values + move, low, high)
            errors, strays = problem.errors(there), problem.strays(there)
            found = _loss(errors) + float(strays @ strays)
            if found < cost:
                values, cost, damping = there, found, max(damping / 5, 1e-9)
                slope, form = problem.quadratic(values, errors)
                break
            damping *= 4
        if before - cost < 1e-5 * before:
            break
    return values, form
