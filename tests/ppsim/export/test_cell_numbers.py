"""Pages of many actions: numbers appear where one has zoomed in, and go again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ppsim import StageCost, build_schedule, simulate
from ppsim.export.figure_file import save_figure
from ppsim.export.html_report import Report
from ppsim.plots.timeline_figure import timeline
from tests.support.browser import chromium

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("page")]


def numbers(page: Any, figure: str, view: list[float]) -> list[str]:
    """The numbers that are drawn once a part of the time axis is shown."""
    page.evaluate("([id, range]) => Plotly.relayout(id, { 'xaxis.range': range })", [figure, view])
    page.wait_for_timeout(100)
    return list(page.locator(f"#{figure} .heatmap-label").all_text_contents())


@pytest.mark.parametrize("as_report", [True, False])
def test_numbers_are_shown_where_they_have_room(as_report: bool, tmp_path: Path) -> None:
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    trace = simulate(build_schedule("1f1b", ranks=2, microbatches=1100), [cost] * 2, engine="compiled")
    figure, path = timeline({"1f1b": trace}), tmp_path / "page.html"
    if as_report:
        Report(title="Many").add("Timeline", figure=figure).save(path)
    else:
        save_figure(figure, path)
    name = "figure-1" if as_report else "figure"
    said: list[str] = []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector(f"#{name} .heatmaplayer image")
        whole = [0.0, trace.makespan_s]
        assert numbers(page, name, whole) == []
        assert numbers(page, name, [0.0, 8.5])[:5] == ["0", "1", "0", "2", "1"]
        assert numbers(page, name, whole) == []
    assert said == []
