"""Small multiples: every action of every step is drawn where it ran, on one scale."""

from __future__ import annotations

import numpy as np
import pytest

import ppsim
from ppsim import InputError
from ppsim.plots.small_multiples_figure import small_multiples
from ppsim.plots.style import KIND_NAMES

NAMES = ("1f1b", "zb-v", "afab", "dualpipe-v", "interleaved-1f1b")


def traces(ranks: int = 3, microbatches: int = 6) -> dict[str, ppsim.Trace]:
    schedules = [ppsim.build_schedule(name, ranks=ranks, microbatches=microbatches) for name in NAMES]
    return dict(ppsim.compare_schedules(schedules).traces)


@pytest.mark.parametrize("columns", [1, 2, 3, 7])
def test_every_action_is_a_bar_of_its_length_in_the_panel_of_its_step(columns: int) -> None:
    given = traces()
    figure = small_multiples(given, columns=columns)
    drawn = [each for each in figure.data if each.name in KIND_NAMES.values()]
    axes = list(dict.fromkeys(each.xaxis for each in figure.data))
    assert len(axes) == len(given)
    for axis, trace in zip(axes, given.values(), strict=True):
        bars = [each for each in drawn if each.xaxis == axis]
        ends = np.sort(np.concatenate([np.asarray(each.base, float) + np.asarray(each.x, float) for each in bars]))
        np.testing.assert_allclose(ends, np.sort(trace.end_s), rtol=1e-12)
        assert sorted(name for each in bars for name in each.hovertext) == sorted(
            str(action) for order in trace.schedule.orders for part in order for action in _parts(part)
        )


def _parts(action: object) -> tuple:
    return tuple(action) if isinstance(action, ppsim.OverlappedPair) else (action,)


def test_panels_have_one_scale_and_kinds_one_entry() -> None:
    figure = small_multiples(traces(), columns=2)
    ranges = {tuple(axis.range) for axis in figure.select_xaxes() if axis.range}
    assert len(ranges) == 1
    entries = [each.name for each in figure.data if each.showlegend]
    assert len(entries) == len(set(entries)) == 5  # F, B, I, W and bubble


def test_titles_are_text() -> None:
    (trace,) = list(traces().values())[:1]
    assert "&lt;b&gt;" in small_multiples({"<b>": trace}).layout.annotations[0].text


def test_nothing_to_draw_and_no_columns_are_refused() -> None:
    with pytest.raises(InputError, match="there is no trace to draw"):
        small_multiples({})
    with pytest.raises(InputError, match="columns must be 1 or more, got 0"):
        small_multiples(traces(), columns=0)
