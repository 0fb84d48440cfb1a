import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ppsim import Network, Reduction, Schedule, StageCost, Trace, build_schedule, simulate
from ppsim.plots.attribution_figure import attribution
from ppsim.plots.bubble_figure import bubbles
from ppsim.plots.memory_figure import memory
from ppsim.plots.memory_parts_figure import memory_parts
from ppsim.plots.style import KIND_COLOURS, KIND_NAMES, ink_on, lighter
from ppsim.plots.timeline_figure import timeline
from ppsim.plots.units import bytes_text, bytes_unit, time_unit
from ppsim.simulation.memory_columns import with_columns

MIB = 1 << 20
COST = StageCost(
    forward_s=0.010,
    backward_input_s=0.012,
    backward_weight_s=0.008,
    activation_bytes=24 * MIB,
    weight_activation_bytes=8 * MIB,
    output_bytes=4 * MIB,
)
NETWORK = Network(latency_s=0.002, bytes_per_s=4e9)
PAIRS = [
    ["0F0", "0F1", "(0F2;0B0)OVERLAP_F_B", "0B1", "0B2"],
    ["1F0", "(1F1;1B0)OVERLAP_F_B", "(1F2;1B1)OVERLAP_F_B", "1B2"],
]
CHUNKS = [
    ["0F0", "0F1", "2F0", "2F1", "2I0", "2W0", "2I1", "2W1", "0I0", "0I1", "0W0", "0W1"],
    ["1F0", "1F1", "3F0", "3F1", "3I0", "3I1", "3W0", "3W1", "1I0", "1I1", "1W0", "1W1"],
]


def afab(ranks: int = 4, microbatches: int = 8) -> Trace:
    schedule = build_schedule("afab", ranks=ranks, microbatches=microbatches)
    return simulate(schedule, [COST] * ranks, network=NETWORK)


def with_replicas(*, bytes_per_s: float = 1e9) -> Trace:
    cost = dataclasses.replace(COST, parameter_bytes=10**8)
    schedule = build_schedule("interleaved-1f1b", ranks=2, microbatches=4)
    return simulate(schedule, [cost] * 4, reduction=Reduction(replicas=2, bytes_per_s=bytes_per_s))


def of(orders: list[list[str]]) -> Trace:
    schedule = Schedule.of(orders)
    return simulate(schedule, [COST] * schedule.stages, network=NETWORK)


def measured(trace: Trace, *, factor: float = 1.1, offset_s: float = 17.0) -> Trace:
    """A stand-in for a run: slower, and on a clock that does not start at 0."""
    times = ("start_s", "end_s", "message_start_s", "message_left_s", "message_arrival_s")
    return dataclasses.replace(
        trace, clock="measured", **{name: getattr(trace, name) * factor + offset_s for name in times}
    )


def kind_bars(figure) -> list:
    return [trace for trace in figure.data if trace.type == "bar" and trace.name in KIND_NAMES.values()]


def numbers(bars) -> list[int]:
    return [int(text) for bar in bars for text in bar.text]


class TestTimeline:
    def test_bar_widths_add_up_to_the_compute_time(self):
        predicted = afab()
        run = measured(predicted)
        bars = kind_bars(timeline({"predicted": predicted, "measured": run}))
        widths_s = np.concatenate([bar.x for bar in bars]) / 1e3  # the axis is in ms
        assert widths_s.sum() == pytest.approx(predicted.compute_s.sum() + run.compute_s.sum())

    def test_each_lane_has_its_ranks_compute_time_and_rank_0_is_on_top(self):
        trace = afab()
        figure = timeline({"predicted": trace})
        bars = kind_bars(figure)
        lanes = figure.layout.yaxis.tickvals
        assert list(figure.layout.yaxis.ticktext) == ["rank 0", "rank 1", "rank 2", "rank 3"]
        assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
        assert list(lanes) == sorted(lanes)
        for rank, lane in enumerate(lanes):
            lane_s = sum(bar.x[np.isclose(bar.y, lane)].sum() for bar in bars) / 1e3
            assert lane_s == pytest.approx(trace.compute_s[rank])

    def test_a_bar_object_per_kind_in_its_colour(self):
        bars = kind_bars(timeline({"predicted": afab(), "measured": measured(afab())}))
        assert [bar.name for bar in bars] == ["F forward", "B backward"]
        assert [bar.marker.color for bar in bars] == list(KIND_COLOURS.values())[:2]
        assert all(bar.orientation == "h" and bar.base is not None for bar in bars)

    def test_every_microbatch_of_every_rank_is_there(self):
        bars = kind_bars(timeline({"predicted": afab(ranks=4, microbatches=12)}))
        for bar in bars:
            assert sorted(numbers([bar])) == sorted(list(range(12)) * 4)

    def test_numbers_of_one_figure_are_equally_wide(self):
        bars = kind_bars(timeline({"predicted": afab(microbatches=12)}))
        texts = {int(text): text for text in bars[0].text}
        assert texts[10] == "10"
        assert texts[9] == "\u20059\u2005"

    def test_every_trace_starts_at_0_on_one_axis(self):
        trace = afab()
        bars = kind_bars(timeline({"predicted": trace, "measured": measured(trace)}))
        assert min(bar.base.min() for bar in bars) == 0
        ends = np.concatenate([bar.base + bar.x for bar in bars])
        assert ends.max() == pytest.approx(1.1 * trace.makespan_s * 1e3)

    def test_axis_names_its_unit(self):
        trace = afab()
        scaled = dataclasses.replace(trace, start_s=trace.start_s * 1e-4, end_s=trace.end_s * 1e-4)
        assert "[ms]" in timeline({"t": trace}).layout.xaxis.title.text
        assert "[µs]" in timeline({"t": scaled}).layout.xaxis.title.text

    def test_an_overlapped_pair_is_its_two_parts(self):
        trace = of(PAIRS)
        bars = {bar.name: bar for bar in kind_bars(timeline({"pairs": trace}))}
        assert sorted(numbers([bars["F forward"]])) == [0, 0, 1, 1, 2, 2]
        assert sorted(numbers([bars["B backward"]])) == [0, 0, 1, 1, 2, 2]
        total_s = sum(bar.x.sum() for bar in bars.values()) / 1e3
        assert total_s == pytest.approx(trace.compute_s.sum())
        assert sum("overlapped pair" in hover for bar in bars.values() for hover in bar.hovertext) == 6

    def test_later_stages_of_a_rank_are_lighter_and_each_kind_is_in_the_legend_once(self):
        bars = kind_bars(timeline({"chunks": of(CHUNKS)}))
        assert [bar.name[0] for bar in bars] == ["F", "F", "I", "I", "W", "W"]
        assert [bar.showlegend for bar in bars] == [True, False] * 3
        assert bars[0].marker.color != bars[1].marker.color
        assert all(hover.startswith(("<b>2", "<b>3")) for hover in bars[1].hovertext)

    def test_hover_tells_action_times_and_bytes(self):
        bars = kind_bars(timeline({"predicted": afab()}))
        hover = next(text for text in bars[0].hovertext if text.startswith("<b>1F0</b>"))
        assert "on rank 1" in hover
        assert "starts 13.05 ms, takes 10 ms" in hover  # 10 + 4 MiB / 4 GB/s + 2
        assert "holds 24 MiB" in hover
        assert "received 4 MiB from rank 0" in hover
        assert "sends 4 MiB to rank 2" in hover

    def test_messages_are_drawn_on_request(self):
        trace = afab()
        assert all(data.name != "message" for data in timeline({"t": trace}).data)
        (line,) = (data for data in timeline({"t": trace}, messages=True).data if data.name == "message")
        points = np.stack([line.x, line.y], axis=1).reshape(-1, 3, 2)
        assert len(points) == len(trace.program.messages)
        np.testing.assert_allclose(points[:, 0, 0], trace.message_start_s * 1e3)
        np.testing.assert_allclose(points[:, 1, 0], trace.message_arrival_s * 1e3)
        assert np.isnan(points[:, 2]).all()

    def test_many_traces_make_a_tall_figure_of_few_objects(self):
        few = timeline({"a": afab()})
        many = timeline({f"schedule {index}": afab(ranks=8, microbatches=16) for index in range(12)})
        assert many.layout.height > 4 * few.layout.height
        assert len(many.data) == 3
        assert sum(len(bar.x) for bar in kind_bars(many)) == 12 * 8 * 16 * 2
        assert len(many.layout.annotations) == 12

    def test_names_are_escaped(self):
        figure = timeline({"a<b>": afab()})
        assert "a&lt;b&gt;" in figure.layout.annotations[0].text

    def test_a_step_without_length(self):
        free = StageCost(forward_s=0, backward_input_s=0, backward_weight_s=0)
        trace = simulate(build_schedule("afab", ranks=2, microbatches=2), [free] * 2)
        for draw in (
            timeline,
            memory,
            memory_parts,
            bubbles,
        ):
            assert draw({"free": trace}).data


class TestMemory:
    def test_lines_start_empty_reach_the_peak_and_end_empty(self):
        trace = afab()
        figure = memory({"predicted": trace})
        lines = [data for data in figure.data if data.mode == "lines"]
        dots = [data for data in figure.data if data.mode == "markers"]
        assert len(lines) == len(dots) == 4
        for rank, (line, dot) in enumerate(zip(lines, dots, strict=True)):
            assert line.line.shape == "hv"
            assert (line.y[0], line.y[-1]) == (0, 0)
            assert max(line.y) == dot.y[0] == trace.peak_activation_bytes[rank] / MIB == 8 * 24
            assert line.x[-1] == pytest.approx(trace.makespan_s * 1e3)
            assert (np.diff(line.x) >= 0).all()
        assert "[MiB]" in figure.layout.yaxis.title.text

    def test_predicted_is_dashed_over_measured_solid(self):
        trace = afab(ranks=2)
        figure = memory({"predicted": trace, "measured": measured(trace)})
        lines = [data for data in figure.data if data.mode == "lines"]
        assert [line.name for line in lines] == ["measured", "predicted"] * 2
        assert [line.line.dash for line in lines] == ["solid", "4px,3px"] * 2
        assert [line.showlegend for line in lines] == [True, True, False, False]

    def test_simulated_traces_alone_are_solid_until_colours_repeat(self):
        trace = afab(ranks=2)
        figure = memory({f"schedule {index}": trace for index in range(9)})
        lines = [data for data in figure.data if data.mode == "lines" and data.showlegend]
        assert [line.line.dash for line in lines] == ["solid"] * 8 + ["dot"]
        assert lines[8].line.color == lines[0].line.color

    def test_panel_titles_give_the_peaks(self):
        figure = memory({"predicted": afab(ranks=2), "measured": measured(afab(ranks=2))})
        assert [note.text[:13] for note in figure.layout.annotations] == ["<b>rank 0</b>", "<b>rank 1</b>"]
        assert figure.layout.annotations[0].text.count(">192<") == 2

    def test_a_pair_holds_both_its_microbatches_while_it_runs(self):
        trace = of(PAIRS)
        line = next(data for data in memory({"pairs": trace}).data if data.mode == "lines")
        start_ms, end_ms = trace.start_s[2] * 1e3, trace.end_s[3] * 1e3  # rows 2 and 3 are rank 0's pair: +24, then -24
        assert line.y[np.isclose(line.x, start_ms)].tolist() == [72]
        assert line.y[np.isclose(line.x, end_ms)].tolist() == [48]

    def test_traces_of_different_sizes(self):
        figure = memory({"small": afab(ranks=2), "large": afab(ranks=3)})
        assert len([data for data in figure.data if data.mode == "lines"]) == 5


class TestMemoryParts:
    def test_stacks_add_up_to_the_most_that_a_rank_holds(self):
        predicted = with_columns(afab(), receive_window=2, optimizer="adamw")
        run = dataclasses.replace(measured(afab()), gradient_bytes=None)
        figure = memory_parts({"predicted": predicted, "measured": run})
        places = list(zip(*figure.data[0].x, strict=True))
        assert places[:3] == [("rank 0", "predicted"), ("rank 0", "measured"), ("rank 1", "predicted")]
        for at, (rank, name) in enumerate(places):
            trace = {"predicted": predicted, "measured": run}[name]
            stacked = sum(bar.y[at] or 0 for bar in figure.data)
            assert stacked == pytest.approx(trace.memory.total_bytes[int(rank[5:])] / MIB)
        assert "[MiB]" in figure.layout.yaxis.title.text

    def test_traces_of_different_sizes(self):
        figure = memory_parts({"small": afab(ranks=2), "large": afab(ranks=3)})
        assert len(figure.data[0].x[0]) == 5


class TestBubbles:
    def test_bars_are_the_traces_bubbles(self):
        predicted = afab()
        run = measured(predicted, factor=1.3)
        figure = bubbles({"predicted": predicted, "measured": run})
        assert [bar.name for bar in figure.data] == ["predicted", "measured"]
        for bar, trace in zip(figure.data, (predicted, run), strict=True):
            np.testing.assert_allclose(bar.y[:-1], trace.bubble_s / trace.makespan_s)
            assert bar.y[-1] == pytest.approx(trace.bubble_fraction)
            assert bar.x[-1] == "<b>all ranks</b>"
            assert bar.text[-1] == f"{trace.bubble_fraction:.1%}"

    def test_groups_keep_their_sequence_when_the_first_trace_is_smaller(self):
        figure = bubbles({"small": afab(ranks=2), "large": afab(ranks=3)})
        assert figure.layout.xaxis.categoryarray == ("rank 0", "rank 1", "rank 2", "<b>all ranks</b>")

    def test_many_bars_go_without_text(self):
        figure = bubbles({f"schedule {index}": afab(ranks=8) for index in range(12)})
        assert all(bar.text is None for bar in figure.data)


@pytest.mark.parametrize("draw", [timeline, memory, memory_parts, bubbles])
def test_no_trace_is_an_error_that_shows_what_to_give(draw):
    with pytest.raises(ValueError, match="give at least one by name"):
        draw({})


@pytest.mark.parametrize("draw", [timeline, memory, memory_parts, bubbles])
def test_same_traces_same_figure_with_the_title(draw):
    first, second = (draw({"predicted": afab(), "measured": measured(afab())}, title="A title") for _ in range(2))
    assert first.to_json() == second.to_json()
    assert first.layout.title.text == "A title"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (1.5, "1.5 s"), (0.0321, "32.1 ms"), (2e-6, "2 µs"), (5e-8, "0.05 µs")]
)
def test_time_units(seconds, text):
    assert time_unit(seconds).text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (192 * MIB, "192 MiB"), (3 << 50, "3072 TiB")]
)
def test_byte_units(size, text):
    assert bytes_text(size) == text
    assert bytes_unit(size).name == text.split()[1]


def test_shades():
    assert lighter("#0072b2", 0) == "#0072b2"
    assert lighter("#0072b2", 1) == "#ffffff"
    assert (ink_on("#0072b2"), ink_on("#e69f00")) == ("#ffffff", "#000000")


class TestAttribution:
    def test_bars_of_a_rank_are_as_high_as_its_bubble(self):
        predicted = afab()
        traces = {"predicted": predicted, "measured": measured(predicted)}
        figure = attribution(traces)
        heights: dict[tuple[str, str], float] = {}
        for bar in figure.data:
            for group, name, share in zip(*bar.x, bar.y, strict=True):
                heights[group, name] = heights.get((group, name), 0.0) + share
        assert len(heights) == 2 * (4 + 1)
        for name, trace in traces.items():
            for rank in range(4):
                assert heights[f"rank {rank}", name] == pytest.approx(trace.bubble_s[rank] / trace.makespan_s)
            assert heights["<b>all ranks</b>", name] == pytest.approx(trace.bubble_fraction)

    def test_one_trace_needs_no_names_below_its_bars(self):
        figure = attribution({"predicted": afab()})
        assert list(figure.data[0].x) == ["rank 0", "rank 1", "rank 2", "rank 3", "<b>all ranks</b>"]

    def test_each_part_has_its_colour(self):
        figure = attribution({"predicted": afab()})
        assert len({bar.marker.color for bar in figure.data}) == 9


class TestCriticalPath:
    def test_the_line_runs_from_the_steps_start_to_its_end_without_a_gap(self):
        trace = afab()
        figure = timeline({"predicted": trace}, critical_path=True)
        (line,) = [each for each in figure.data if each.name == "critical path"]
        begins, ends = line.x[0::3], line.x[1::3]
        assert begins[0] == 0
        assert ends[-1] == pytest.approx(trace.makespan_s * 1e3)
        assert list(begins[1:]) == list(ends[:-1])
        assert list(line.y[0::3][1:]) == pytest.approx(list(line.y[1::3][:-1]))

    def test_it_is_drawn_on_demand(self):
        assert not [each for each in timeline({"predicted": afab()}).data if each.name == "critical path"]

    def test_waits_with_everything_there_are_dotted(self):
        trace = of([["0F0", "0B0"]])
        late = np.array([0.0, 0.01])
        run = dataclasses.replace(trace, start_s=trace.start_s + late, end_s=trace.end_s + late)
        figure = timeline({"measured": run}, critical_path=True)
        assert [each.line.dash for each in figure.data if each.type == "scatter"] == ["solid", "dot"]


@pytest.mark.parametrize("figure", [attribution, memory_parts])
def test_names_below_bars_do_not_overlap(figure) -> None:
    """Two names of 8 ranks ran into each other."""
    trace = simulate(build_schedule("1f1b", ranks=8, microbatches=8), [COST] * 8)
    few = figure({"one": afab(), "two": afab()}).layout
    many = figure({"measured": trace, "zb-v, predicted": trace}).layout
    more = figure({f"step {number}": trace for number in range(9)}).layout
    assert few.xaxis.tickangle == 0
    assert many.xaxis.tickangle == -90
    assert many.height - few.height == many.margin.b - few.margin.b > 0  # bars are as high as before
    assert more.xaxis.showticklabels is False


@pytest.mark.parametrize("figure", [attribution, memory_parts])
def test_dividers_between_ranks_suit_a_light_page_and_a_dark_one(figure: Callable[..., Any]) -> None:
    """They were drawn in plotly's own black, which no rule of the report's style sheet reaches."""
    schedule = build_schedule("1f1b", ranks=2, microbatches=3)
    trace = simulate(
        schedule, [StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=8)] * 2
    )
    drawn = figure({"predicted": trace, "measured": trace})
    assert len(drawn.data[0].x) == 2  # ranks above, traces below
    assert drawn.layout.xaxis.dividercolor == drawn.layout.yaxis.gridcolor


class TestReductions:
    def test_strips_lie_on_their_ranks_lane_from_begin_to_end(self):
        trace = with_replicas()
        figure = timeline({"predicted": trace, "measured": measured_with_reductions(trace)})
        (strip,) = [each for each in figure.data if each.name == "reduction over replicas"]
        unit = time_unit(trace.step_s * 1.1)
        lengths = np.concatenate([trace.reduce_end_s - trace.reduce_start_s] * 2) * np.repeat([1, 1.1], 4)
        assert np.allclose(strip.x, lengths * unit.scale)
        assert np.allclose(strip.base[:4], trace.reduce_start_s * unit.scale)
        assert np.allclose(strip.base[4:], trace.reduce_start_s * 1.1 * unit.scale)
        lanes = dict(zip(figure.layout.yaxis.ticktext, figure.layout.yaxis.tickvals, strict=False))
        assert list(lanes) == ["rank 0", "rank 1"]
        tick = figure.layout.yaxis.tickvals
        expected = [tick[block * 2 + rank] for block in (0, 1) for rank in trace.schedule.placement]
        assert all(abs(y - lane) < 0.5 - strip.width / 2 for y, lane in zip(strip.y, expected, strict=True))
        assert "100.0 MB" in strip.hovertext[0] or "MiB" in strip.hovertext[0]

    def test_the_axis_reaches_to_the_last_reductions_end(self):
        trace = with_replicas(bytes_per_s=1e8)
        figure = timeline({"predicted": trace})
        unit = time_unit(trace.step_s)
        assert trace.step_s > 2 * trace.makespan_s
        assert f", {unit.text(trace.step_s)} with reductions" in figure.layout.annotations[0].text
        assert figure.layout.xaxis.range[1] >= trace.step_s * unit.scale

    def test_there_are_none_without_replicas(self):
        assert "reduction over replicas" not in [each.name for each in timeline({"a": afab()}).data]


def measured_with_reductions(trace: Trace) -> Trace:
    run = measured(trace)
    times = {name: getattr(trace, name) * 1.1 + 17.0 for name in ("reduce_start_s", "reduce_end_s")}
    return dataclasses.replace(run, **times)
