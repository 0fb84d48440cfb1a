"""Step predictions: how far predicted training steps are from measured ones that were not fitted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ppsim import Machine, MeasuredStep, TrainingStep, fit_machine
from ppsim.errors import InputError
from ppsim.planning.machine_fit import prediction_errors
from ppsim.planning.measured_steps import drawn_order

Errors = npt.NDArray[np.float64]
GROUPINGS = ("tp", "pp", "micro_batch_size", "devices")
_RANKED = 4  # measured ways that a group must have, so that the first three are not all of them


def held_back_errors(measured: Sequence[MeasuredStep], start: Machine, *, seed: int, by_shape: bool = True) -> Errors:
    """Each half of the steps predicted by what was fitted to the other half, shape (steps,); `by_shape` as there."""
    if len(measured) < 2:
        raise InputError(f"{len(measured)} measured steps cannot be halved: give 2 or more")
    drawn = drawn_order(len(measured), seed)
    halves = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    found = np.empty(len(measured))
    for fitted, asked in (halves, halves[::-1]):
        machine = fit_machine([measured[index] for index in fitted], start, by_shape=by_shape).machine
        found[asked] = prediction_errors([measured[index] for index in asked], machine)
    return found


def error_rows(measured: Sequence[MeasuredStep], found: Errors) -> list[dict[str, Any]]:
    """Errors by group: steps, the mean of their sizes and of themselves."""
    rows = []
    for name in GROUPINGS:
        values = np.array([getattr(each.step, name) for each in measured])
        for value in np.unique(values).tolist():
            chosen = found[values == value]
            row = {"group": name, "value": value, "steps": len(chosen)}
            rows.append(row | {"mean_error": float(np.abs(chosen).mean()), "mean_signed_error": float(chosen.mean())})
    return rows


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What predictions say of which way is fastest.

    groups: of measured ways to do the same. hits: groups whose fastest is among the predicted first three. lost: how
    much longer the predicted first takes than the fastest, the mean over groups.
    """

    groups: int
    hits: int
    lost: float


def ranking(
    measured: Sequence[MeasuredStep], found: Errors, *, same: Callable[[TrainingStep], Any], per_sample: bool
) -> Ranking:
    """Compare the ways within each group of `same` that has four or more, by the step's time or that of a sample."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, each in enumerate(measured):
        groups[same(each.step)].append(index)
    hits, lost = 0, []
    for members in groups.values():
        if len(members) < _RANKED:
            continue
        samples = np.array([measured[index].step.global_batch if per_sample else 1 for index in members])
        taken = np.array([measured[index].seconds for index in members]) / samples
        said = taken * (1 + found[members])
        hits += int(taken.argmin() in np.argsort(said, kind="stable")[:3])
        lost.append(float(taken[said.argmin()] / taken.min() - 1))
    return Ranking(groups=len(lost), hits=hits, lost=float(np.mean(lost)) if lost else 0.0)


def same_work(step: TrainingStep) -> tuple[Any, ...]:
    """Steps of one model on as many devices, with one global batch."""
    return (*same_devices(step), step.global_batch)


def same_devices(step: TrainingStep) -> tuple[Any, ...]:
    """Steps of one model on as many devices."""
    return step.model, step.devices
