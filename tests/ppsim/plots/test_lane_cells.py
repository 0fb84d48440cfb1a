"""Many actions: each is a cell where it ran, in its colour, and grey wherever its rank was idle."""

from __future__ import annotations

import numpy as np
import pytest

from ppsim import Network, StageCost, build_schedule, simulate
from ppsim.plots import timeline_figure
from ppsim.plots.timeline_figure import timeline
from ppsim.trace.trace import Trace


def traced(name: str = "interleaved-1f1b", **how: int) -> Trace:
    schedule = build_schedule(name, **{"ranks": 4, "microbatches": 6, **how})
    cost = StageCost(forward_s=1, backward_input_s=1.1, backward_weight_s=0.9, output_bytes=1)
    return simulate(schedule, [cost] * schedule.stages, network=Network(latency_s=0.3), engine="compiled")


@pytest.mark.parametrize("name", ["1f1b", "interleaved-1f1b", "zb-v", "dualpipe-v"])
def test_cells_are_where_bars_would_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bar's edges, number and hover text, and on top of these nothing but idle time."""
    traces = {"one": traced(name), "other": traced(name, microbatches=4)}
    bars = timeline(traces)
    monkeypatch.setattr(timeline_figure, "_MOST_BARS", 0)
    cells = timeline(traces)
    expected = {
        (float(y), round(base, 9), round(base + length, 9), number.replace("\u2007", "").replace("\u2008", ""), said)
        for bar in bars.data
        if bar.base is not None
        for y, base, length, number, said in zip(bar.y, bar.base, bar.x, bar.text, bar.hovertext, strict=True)
    }
    found, idle_s = set(), 0.0
    lanes = [each for each in cells.data if each.type == "heatmap"]
    for lane in lanes:
        y = float(np.mean(lane.y))
        for begin, end, number, said in zip(lane.x, lane.x[1:], lane.text[0], lane.hovertext[0], strict=False):
            if number:
                found.add((y, round(begin, 9), round(end, 9), number, said))
            else:
                idle_s += end - begin
                assert "is idle for" in said
    assert {(y, begin, end, said) for y, begin, end, _, said in found} == {
        (y, begin, end, said) for y, begin, end, _, said in expected
    }
    assert idle_s == pytest.approx(sum(trace.bubble_s.sum() for trace in traces.values()))
    assert len(lanes) == 8


def test_each_kind_and_stage_has_its_colour_and_neighbours_differ() -> None:
    trace = traced(ranks=8, microbatches=160)
    figure = timeline({"many": trace})
    lane = next(each for each in figure.data if each.type == "heatmap")
    colours = [colour for _, colour in lane.colorscale][::2]
    program = trace.program
    rows = np.asarray(program.rows_of(0))
    shown = [colours[int(index)] for index, number in zip(lane.z[0], lane.text[0], strict=True) if number]
    of_cell = {}
    for row, colour in zip(rows, shown, strict=True):
        key = int(program.kind[row]), int(program.stage[row]), int(program.microbatch[row]) % 2
        assert of_cell.setdefault(key, colour) == colour
    assert len(set(of_cell.values())) == len(of_cell) == 8
    entries = [each.name for each in figure.data if each.type == "bar"]
    assert entries == ["F forward", "B backward", "bubble"]


def test_what_takes_no_time_has_no_cell() -> None:
    schedule = build_schedule("zb-h1", ranks=2, microbatches=1500)
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=0)
    figure = timeline({"no W": simulate(schedule, [cost] * 2, engine="compiled")})
    for lane in (each for each in figure.data if each.type == "heatmap"):
        assert (np.diff(lane.x) > 0).all()
        assert not any("W" in said.split("</b>")[0] for said in lane.hovertext[0])
