"""A trace may know no more than when computations ran: everything that is computed from one says so and goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
from hypothesis import given

from ppsim import (
    InputError,
    Network,
    StageCost,
    Trace,
    attribute,
    build_schedule,
    compare,
    critical_path,
    simulate,
)
from ppsim.cli.tables import results_of, table_of
from ppsim.explain.memory_difference import first_difference
from ppsim.export.perfetto import perfetto_json
from ppsim.export.trace_files import write_trace
from ppsim.plots.attribution_figure import attribution
from ppsim.plots.memory_figure import memory
from ppsim.plots.memory_parts_figure import memory_parts
from ppsim.plots.timeline_figure import timeline
from ppsim.simulation.memory_columns import with_columns
from tests.support import traces
from tests.support.commandline import refused, run, run_json

COST = StageCost(
    forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0, activation_bytes=10, output_bytes=8, parameter_bytes=4
)
KNOWN = simulate(build_schedule("1f1b", ranks=3, microbatches=5), [COST] * 3, network=Network(latency_s=0.25))


def bare(trace: Trace, **columns: object) -> Trace:
    """The same computations, as a log of their times shows them."""
    return Trace(program=trace.program, clock="measured", start_s=trace.start_s, end_s=trace.end_s, **columns)


BARE = bare(KNOWN)


def test_times_are_those_of_the_known_trace() -> None:
    assert BARE.unknown == ("activation bytes", "message times", "message bytes")
    assert (BARE.makespan_s, BARE.bubble_fraction) == (KNOWN.makespan_s, KNOWN.bubble_fraction)
    assert KNOWN.unknown == ()


def test_what_is_not_known_is_none() -> None:
    assert BARE.peak_activation_bytes is None
    assert BARE.send_buffer_bytes is None
    assert BARE.memory.total_bytes is None
    assert BARE.memory.to_dict() == {}
    assert BARE.held_at_peak() == {}


def test_a_measured_total_stands_alone() -> None:
    total = np.array([30, 20, 10])
    trace = bare(KNOWN, total_peak_bytes=total)
    assert trace.memory.to_dict() == {"total_bytes": [30, 20, 10]}
    assert {name: each.tolist() for name, each in trace.held_at_peak().items()} == {"other_bytes": [30, 20, 10]}


def test_what_is_held_besides_is_part_of_the_total() -> None:
    trace = replace(KNOWN, other_bytes=np.array([100, 200, 300]))
    assert (trace.memory.total_bytes - KNOWN.memory.total_bytes).tolist() == [100, 200, 300]


def test_some_times_of_messages_are_refused() -> None:
    with pytest.raises(InputError, match="some are known and some are not"):
        bare(KNOWN, message_start_s=KNOWN.message_start_s)


def test_the_table_leaves_sizes_empty_and_messages_out() -> None:
    frame = BARE.to_frame()
    assert set(frame["kind"]) == {"F", "B"}
    assert frame["size_bytes"].isna().all()
    some = bare(KNOWN, activation_bytes=KNOWN.activation_bytes, **_times(KNOWN)).to_frame()
    assert some["size_bytes"].dtype == pandas.Int64Dtype()
    is_message = some["kind"].str.contains("_")
    assert some["size_bytes"].isna().tolist() == is_message.tolist()
    assert KNOWN.to_frame()["size_bytes"].dtype == np.int64


def _times(trace: Trace) -> dict[str, object]:
    return {name: getattr(trace, name) for name in ("message_start_s", "message_left_s", "message_arrival_s")}


@pytest.mark.parametrize("columns", [{}, _times(KNOWN), {"total_peak_bytes": np.array([1, 2, 3])}])
def test_a_file_keeps_what_is_unknown(tmp_path: Path, columns: dict) -> None:
    bare(KNOWN, **columns).save(tmp_path / "step.trace")
    read = Trace.load(tmp_path / "step.trace")
    for name in ("activation_bytes", "message_bytes", "message_start_s", "total_peak_bytes", "other_bytes"):
        assert (getattr(read, name) is None) == (name not in columns)
    assert read.memory.to_dict() == bare(KNOWN, **columns).memory.to_dict()


@given(traces.measured())
def test_a_bubble_is_split_without_messages(trace: Trace) -> None:
    """The parts add up as ever, and the critical path is as long as the step."""
    traces.check_sums(bare(trace))


def test_messages_are_inferred_from_their_receivers() -> None:
    """A simulated step's messages are found again where their receiver waited; who did not wait had them in time."""
    inferred, known = attribute(BARE), attribute(KNOWN)
    assert inferred.messages_s == pytest.approx(known.messages_s)
    assert inferred.device_s == pytest.approx(np.zeros(3), abs=1e-12)
    assert "messages were not recorded" in str(inferred)
    assert "messages were not recorded" not in str(known)
    assert inferred.to_dict()["messages_known"] is False
    assert critical_path(BARE).length_s == KNOWN.makespan_s


def test_a_comparison_says_what_it_lacks() -> None:
    slower = simulate(KNOWN.schedule, [COST] * 3, network=Network(latency_s=0.5))
    found = compare(KNOWN, bare(slower))
    assert found.parts_s["messages"] == pytest.approx(slower.makespan_s - KNOWN.makespan_s)
    assert found.memory == ()
    assert "Activation bytes are not known: measured." in found.explain()
    assert "Messages were not recorded: measured." in found.explain()
    json.dumps(found.to_dict())
    assert "equal after every action" in compare(KNOWN, KNOWN).explain()


def test_memory_is_compared_as_far_as_it_is_known() -> None:
    assert first_difference(KNOWN, BARE) is None


def test_figures_are_drawn() -> None:
    named = {"known": KNOWN, "bare": BARE}
    timeline(named, messages=True, critical_path=True)
    timeline({"bare": BARE}, messages=True)
    attribution(named)
    figure = memory(named)
    assert "not known" in figure.layout.annotations[0].text
    assert {each.name for each in figure.data} == {"known", "known: peak"}
    memory({"bare": BARE})
    memory_parts(named)
    memory_parts({"bare": BARE})


def test_events_are_written_without_what_is_unknown() -> None:
    events = json.loads(perfetto_json({"bare": BARE}))["traceEvents"]
    assert {event.get("cat") for event in events if event["ph"] == "X"} == {"compute"}
    assert not [event for event in events if event["ph"] == "C"]
    some = json.loads(perfetto_json({"some": bare(KNOWN, **_times(KNOWN))}))["traceEvents"]
    messages = [event for event in some if event.get("cat") == "message" and event["ph"] == "X"]
    assert len(messages) == 2 * len(KNOWN.program.messages)
    assert not [event for event in messages if "bytes" in event["args"]]


def test_columns_that_need_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="does not know its messages' bytes"):
        with_columns(BARE, receive_window=1)


def test_the_command_line_reads_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bare.trace"
    write_trace(BARE, path)
    write_trace(BARE, tmp_path / "bare.csv")
    KNOWN.save(tmp_path / "known.trace")
    assert run_json(capsys, "attribute", str(path))["messages_known"] is False
    code, out, _ = run(capsys, "compare", str(tmp_path / "known.trace"), str(path))
    assert code == 0
    assert "not recorded" in out
    assert results_of(BARE)["peak_activation_bytes"] is None
    assert "not known        activation bytes, message times, message bytes" in table_of(BARE)
    assert "not a saved trace" in refused(capsys, "attribute", str(tmp_path / "bare.csv"))
