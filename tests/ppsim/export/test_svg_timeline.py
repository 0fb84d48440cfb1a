"""Small pictures: each bar stands where its trace has it."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from ppsim import InputError, StageCost, build_schedule, simulate
from ppsim.export.svg_timeline import svg_timeline, svg_timelines
from ppsim.palette import KIND_COLOURS
from ppsim.schedule.action import Kind

SVG = "{http://www.w3.org/2000/svg}"
COST = StageCost(forward_s=0.01, backward_input_s=0.01, backward_weight_s=0.01)
TRACE = simulate(build_schedule("1f1b", ranks=4, microbatches=8), [COST] * 4)
SPLIT = simulate(build_schedule("zb-h1", ranks=4, microbatches=8), [COST] * 4)


def _bars(svg: str) -> list[dict[str, str]]:
    """The bars of actions, without the grey ones behind them, the ground and the legend."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}rect")
    return [each.attrib for each in found if each.get("height") == "16" and "fill-opacity" not in each.attrib]


def test_the_small_picture_has_each_bar_where_the_trace_has_it() -> None:
    bars = _bars(svg_timeline(TRACE))
    left = np.array([float(each["x"]) for each in bars])
    scale = (860 - 52) / TRACE.makespan_s
    assert left == pytest.approx(52 + TRACE.start_s * scale, abs=0.01)
    assert [int(each["y"]) // 20 for each in bars] == TRACE.program.rank.tolist()


def test_steps_above_one_another_share_an_axis() -> None:
    svg = svg_timelines({"whole <1>": TRACE, "split": SPLIT}, description="made & kept")
    bars, scale = _bars(svg), (860 - 52) / max(TRACE.makespan_s, SPLIT.makespan_s)
    assert TRACE.makespan_s != SPLIT.makespan_s
    both = np.concatenate([TRACE.start_s, SPLIT.start_s])
    assert [float(each["x"]) for each in bars] == pytest.approx(52 + both * scale, abs=0.01)
    assert [each["fill"] for each in bars] == [
        KIND_COLOURS[Kind(kind)] for trace in (TRACE, SPLIT) for kind in trace.program.kind.tolist()
    ]
    lowest = max(float(each["y"]) for each in bars[: len(TRACE.start_s)])
    assert min(float(each["y"]) for each in bars[len(TRACE.start_s) :]) > lowest + 16
    picture = ElementTree.fromstring(svg)
    assert picture.findtext(f"{SVG}desc") == "made & kept"
    texts = [each.text for each in picture.iter(f"{SVG}text")]
    assert [text for text in texts if text in ("whole <1>", "split")] == ["whole <1>", "split"]
    assert {"F forward", "B backward", "I backward for inputs", "W backward for weights", "idle"} <= set(texts)


def test_the_legend_names_what_is_drawn_alone() -> None:
    texts = [each.text for each in ElementTree.fromstring(svg_timelines({"step": TRACE})).iter(f"{SVG}text")]
    assert "B backward" in texts
    assert "W backward for weights" not in texts


def test_no_step_and_a_blur_are_refused() -> None:
    with pytest.raises(InputError, match="0 computations"):
        svg_timelines({})
    many = simulate(build_schedule("1f1b", ranks=4, microbatches=500), [COST] * 4)
    with pytest.raises(InputError, match="8000 computations"):
        svg_timelines({"a": many, "b": many})
