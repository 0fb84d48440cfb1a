"""Accuracy figures: what is where, and which error is whose."""

from __future__ import annotations

import numpy as np
import pytest

from ppsim.plots.accuracy_figure import accuracy, errors

PAIRS = {"timed": [(0.11, 0.1), (0.2, 0.25)], "real": [(1.0, 1.0)]}


def test_points_are_measured_to_the_right_and_predicted_upwards() -> None:
    equal, timed, real = accuracy(PAIRS, labels={"timed": ["one", "two"]}).data
    assert (list(timed.x), list(timed.y)) == ([100.0, 250.0], [110.0, 200.0])
    assert list(timed.text) == ["one, +10.00%", "two, -20.00%"]
    assert list(real.text) == ["real, +0.00%"]
    assert list(equal.x) == list(equal.y) == pytest.approx([90.0, 1100.0])


def test_the_band_holds_nine_of_ten_points() -> None:
    measured = np.linspace(0.1, 1, 40)
    predicted = measured * (1 + np.linspace(-0.1, 0.2, 40))
    band, _, points = accuracy({"all": np.stack([predicted, measured], axis=1)}).data
    assert band.name == "90% of errors: -8.5% to +18.5%"
    x, y = np.asarray(band.x), np.asarray(band.y)
    low, high = y[0] / x[0], y[2] / x[2]
    ratios = np.asarray(points.y) / np.asarray(points.x)
    assert ((low <= ratios) & (ratios <= high)).mean() == 0.9
    assert (y[1] / x[1], y[3] / x[3]) == pytest.approx((low, high))


def test_errors_are_relative_to_what_was_measured_and_add_up() -> None:
    """From -20 % on it is half of both, from +10 % on all."""
    timed, real = errors(PAIRS).data
    assert list(timed.x) == pytest.approx([-0.2, 0.1, 0.1])
    assert (list(timed.y), timed.line.shape) == ([0, 0.5, 1], "vh")
    assert (list(real.x), list(real.y)) == ([0.0, 0.0], [0, 1])
