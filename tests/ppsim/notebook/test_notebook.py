"""Notebook: figures, tables and HTML of values, held against the values themselves."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest

import ppsim
from ppsim import InputError, ScheduleError, StageCost, build_schedule, schedule_names, simulate
from ppsim.export.svg_timeline import svg_timeline
from ppsim.plots.timeline_figure import timeline

COST = StageCost(
    forward_s=0.01, backward_input_s=0.01, backward_weight_s=0.01, activation_bytes=2**20, weight_activation_bytes=2**19
)
TRACE = simulate(build_schedule("1f1b", ranks=4, microbatches=8), [COST] * 4)
NAME = "<script>alert(1)</script>"


def _bars(svg: str) -> list[dict[str, str]]:
    """The bars of actions, without the grey ones behind them."""
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect")
    return [each.attrib for each in found if "fill-opacity" not in each.attrib]


def test_plot_draws_the_timeline() -> None:
    assert TRACE.plot() == timeline({"1f1b": TRACE})
    assert TRACE.plot(messages=True, critical_path=True) == timeline({"1f1b": TRACE}, messages=True, critical_path=True)
    with pytest.raises(InputError, match="messages must be True or False"):
        TRACE.plot(messages="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", schedule_names())
def test_schedules_are_drawn_with_unit_costs(name: str) -> None:
    schedule = build_schedule(name, ranks=4, microbatches=8)
    bars = [trace for trace in schedule.plot().data if trace.type == "bar" and trace.name != "bubble"]
    drawn = sum(len(trace.x) for trace in bars)
    assert drawn == len(schedule.program.stage)
    assert len(_bars(svg_timeline(simulate(schedule, [COST] * schedule.stages)))) == drawn
    assert f"bubble {100 * (1 - sum(sum(t.x) for t in bars) / (4 * max(max(t.base + t.x) for t in bars))):.1f}%" in (
        schedule._repr_html_()
    )


def test_a_schedule_that_cannot_run_says_why() -> None:
    wrong = ppsim.Schedule.of([["0B0", "0F0"]])
    assert "0B0 comes before 0F0" in wrong._repr_html_()
    with pytest.raises(ScheduleError):
        wrong.plot()


def test_schedules_are_compared_on_one_model() -> None:
    names = ["1f1b", "interleaved-1f1b", "zb-v"]
    schedules = [build_schedule(name, ranks=4, microbatches=8) for name in names]
    found = ppsim.compare_schedules([*schedules, TRACE], rank_cost=COST)
    assert list(found.traces) == [*names, "1f1b (2)"]
    frame = found.to_frame()
    assert frame.loc["1f1b", "makespan_s"] == frame.loc["1f1b (2)", "makespan_s"] == TRACE.makespan_s
    assert frame["relative_makespan"].min() == 1
    # The same work on every rank, however many stages it is cut into.
    for name in names:
        assert found.traces[name].compute_s == pytest.approx(TRACE.compute_s)
    titles = [each.text for each in found.plot().layout.annotations]
    assert [re.sub("<.*?>", "", title).split("   ")[0] for title in titles] == [*names, "1f1b (2)"]
    assert found.plot_memory().data
    html = found._repr_html_()
    assert html.count("<tr>") == 5
    assert f"{100 * TRACE.bubble_fraction:.1f}%" in html
    with pytest.raises(InputError, match="no schedule to compare"):
        ppsim.compare_schedules([])


def test_search_results_and_runs_show_themselves() -> None:
    found = ppsim.search([COST] * 2, ranks=2, microbatches=3)
    html = found._repr_html_()
    assert "No order is below" in html
    assert "<svg" in html
    run = ppsim.Run(traces=[TRACE, TRACE], steps=[3, 7], source=NAME)
    html = run._repr_html_()
    assert html.count("<tr>") == 3
    assert "<script" not in html


def test_what_is_not_known_is_a_dash() -> None:
    bare = replace(TRACE, activation_bytes=None)
    assert "–" in bare._repr_html_()
    assert ppsim.compare_schedules([bare]).to_frame()["peak_activation_bytes"].isna().all()


def test_names_are_text() -> None:
    trace = replace(TRACE, clock=NAME)
    schedule = replace(build_schedule("1f1b", ranks=2, microbatches=2), name=NAME)
    for html in (trace._repr_html_(), schedule._repr_html_(), ppsim.compare_schedules([schedule])._repr_html_()):
        assert "<script" not in html


def test_large_schedules_are_shown_without_a_picture() -> None:
    large = build_schedule("1f1b", ranks=64, microbatches=256)
    html = large._repr_html_()
    assert "<svg" not in html
    assert len(html) < 1000


def test_figures_are_imported_when_the_first_is_drawn() -> None:
    code = "import sys, ppsim; print('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
