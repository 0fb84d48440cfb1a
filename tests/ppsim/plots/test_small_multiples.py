"""Small multiples: every action of every step is drawn where it ran, on one scale."""

from __future__ import annotations

import numpy as np
import pytest

import ppsim
from ppsim import InputError
from ppsim.plots.small_multiples_figure import small_multiples
from ppsim.plots.style import KIND_NAMES
from ppsim.plots.units import time_unit

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
        # The text has the length, where a template's x would be the bar's end.
        unit = time_unit(max(each.makespan_s for each in given.values()))
        rows = range(len(trace.start_s))
        assert sorted(text for each in bars for text in each.hovertext) == sorted(
            f"{trace.program.action_of(row)}, {unit.text(trace.end_s[row] - trace.start_s[row])}" for row in rows
        )


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
