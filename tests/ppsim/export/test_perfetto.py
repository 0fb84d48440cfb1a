import dataclasses
import gzip
import json
import re
from collections import defaultdict

import numpy as np
import pytest

from ppsim import Network, OverlappedPair, Reduction, Schedule, StageCost, Trace, build_schedule, simulate
from ppsim.export.perfetto import perfetto_json, save_perfetto

COST = StageCost(
    forward_s=0.010, backward_input_s=0.012, backward_weight_s=0.008, activation_bytes=1000, output_bytes=4_000_000
)
PAIRS = [
    ["0F0", "0F1", "(0F2;0B0)OVERLAP_F_B", "0B1", "0B2"],
    ["1F0", "(1F1;1B0)OVERLAP_F_B", "(1F2;1B1)OVERLAP_F_B", "1B2"],
]
# Fast stages, slow network: many messages of a link are in flight at once.
FAST = dataclasses.replace(COST, forward_s=1e-4, backward_input_s=1.3e-4, backward_weight_s=1e-4)


def afab(*, cost: StageCost = COST, latency_s: float = 0.002, bytes_per_s: float = 4e9) -> Trace:
    schedule = build_schedule("afab", ranks=3, microbatches=6)
    return simulate(schedule, [cost] * 3, network=Network(latency_s=latency_s, bytes_per_s=bytes_per_s))


TRACES = {
    "plain": afab(),
    "in flight": afab(cost=FAST, latency_s=0.004, bytes_per_s=1e11),
    "free network": simulate(build_schedule("afab", ranks=3, microbatches=6), [COST] * 3),
    "one rank": simulate(build_schedule("afab", ranks=1, microbatches=2), [COST]),
    "replicas": simulate(
        build_schedule("interleaved-1f1b", ranks=2, microbatches=4),
        [dataclasses.replace(COST, parameter_bytes=10**8)] * 4,
        reduction=Reduction(replicas=2, bytes_per_s=1e9),
    ),
    "pairs": simulate(Schedule.of(PAIRS), [COST] * 2, overlap=0.7, network=Network(latency_s=1 / 3 * 1e-3)),
}


def events_of(traces: dict[str, Trace], phase: str | None = None) -> list[dict]:
    events = json.loads(perfetto_json(traces))["traceEvents"]
    return [event for event in events if phase is None or event["ph"] == phase]


def labels(events: list[dict], what: str) -> dict[tuple[int, int], str]:
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == what}


def span_ns(event: dict) -> tuple[int, int]:
    """Begin and end as the viewer has them: whole nanoseconds."""
    begin, length = event["ts"] * 1000, event["dur"] * 1000
    assert begin == pytest.approx(round(begin), abs=1e-3)
    assert length == pytest.approx(round(length), abs=1e-3)
    return round(begin), round(begin) + round(length)


@pytest.mark.parametrize("name", TRACES)
def test_events_on_a_track_nest_or_are_apart(name):
    tracks = defaultdict(list)
    for event in events_of({name: TRACES[name]}, "X"):
        tracks[event["pid"], event["tid"]].append(span_ns(event))
    for spans in tracks.values():
        open_until: list[int] = []
        for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            assert end >= begin >= 0
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert not open_until or end <= open_until[-1]
            open_until.append(end)


@pytest.mark.parametrize("name", TRACES)
def test_every_action_and_both_ends_of_every_message_are_there(name):
    trace = TRACES[name]
    program = trace.program
    beside = ("pair", "reduction")
    names = [event["name"] for event in events_of({name: trace}, "X") if event["cat"] not in beside]
    actions = [action for rank in range(trace.ranks) for action in program.order_with_messages(rank)]
    expected = [
        str(part) for action in actions for part in (action if isinstance(action, OverlappedPair) else [action])
    ]
    assert sorted(names) == sorted(expected)


def test_compute_slices_have_the_traces_times_in_microseconds():
    trace = TRACES["plain"]
    events = {event["name"]: event for event in events_of({"predicted": trace}, "X")}
    for row in range(len(trace.start_s)):
        event = events[str(trace.program.action_of(row))]
        assert event["ts"] == pytest.approx(trace.start_s[row] * 1e6, abs=1e-3)
        assert event["dur"] == pytest.approx((trace.end_s[row] - trace.start_s[row]) * 1e6, abs=2e-3)
        assert event["args"]["activation_bytes"] == trace.activation_bytes[row]


def test_a_process_per_trace_and_rank_and_tracks_apart():
    trace = TRACES["plain"]
    events = events_of({"predicted": trace, "measured": trace})
    processes = labels(events, "process_name")
    assert [name for _, name in sorted(processes.items())] == [
        f"{clock} rank {rank}" for clock in ("predicted", "measured") for rank in range(3)
    ]
    assert min(pid for pid, _ in processes) == 1
    tracks = labels(events, "thread_name")
    assert len({tid for _, tid in tracks}) == len(tracks)
    middle = {name for (pid, _), name in tracks.items() if pid == 2}
    assert middle >= {"compute", "send to rank 0", "send to rank 2", "receive from rank 0", "receive from rank 2"}
    assert {(event["pid"], event["tid"]) for event in events if event["ph"] == "X"} <= set(tracks)


def test_messages_in_flight_together_get_tracks_of_their_own():
    tracks = labels(events_of({"t": TRACES["in flight"]}), "thread_name")
    assert "receive from rank 0 (2)" in tracks.values()
    assert "receive from rank 0 (2)" not in labels(events_of({"t": TRACES["free network"]}), "thread_name").values()
    assert "send to rank 1 (2)" not in tracks.values()  # the model's link sends one after another


def test_measured_sends_may_cross_too():
    trace = TRACES["plain"]
    late = dataclasses.replace(trace, message_left_s=trace.message_left_s + 0.015)
    assert "send to rank 1 (2)" in labels(events_of({"t": late}), "thread_name").values()


def test_a_receive_seen_before_its_send_does_not_end_before_it_begins():
    trace = TRACES["plain"]
    skewed = dataclasses.replace(trace, message_arrival_s=trace.message_start_s - 1e-6)
    assert all(event["dur"] >= 0 for event in events_of({"t": skewed}, "X"))


@pytest.mark.parametrize("name", TRACES)
def test_flows_pair_up_and_lie_inside_the_slices_they_join(name):
    trace = TRACES[name]
    program = trace.program
    events = events_of({name: trace, "again": trace})
    slices = [event for event in events if event["ph"] == "X" and event["cat"] == "compute"]
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == 2 * len(program.messages)
    assert len([event for event in events if event["ph"] in "sf"]) == 4 * len(program.messages)

    def joined(flow: dict) -> str:
        moment = round(flow["ts"] * 1000)
        (found,) = (
            event["name"]
            for event in slices
            if (event["pid"], event["tid"]) == (flow["pid"], flow["tid"])
            and span_ns(event)[0] <= moment < span_ns(event)[1]
        )
        return found

    for message in range(len(program.messages)):
        flow = message + 1  # flows are numbered from 1, in the message table's sequence
        assert joined(starts[flow]) == str(program.action_of(int(program.messages.producer[message])))
        assert joined(ends[flow]) == str(program.action_of(int(program.messages.consumer[message])))
        assert ends[flow]["bp"] == "e"


def test_the_counter_reaches_the_peak_and_ends_at_0():
    trace = TRACES["plain"]
    for rank in range(3):
        counters = [event for event in events_of({"t": trace}, "C") if event["pid"] == rank + 1]
        levels = [event["args"]["bytes"] for event in counters]
        assert (levels[0], counters[0]["ts"], levels[-1]) == (0, 0, 0)
        assert max(levels) == trace.peak_activation_bytes[rank]
        assert [event["ts"] for event in counters] == sorted(event["ts"] for event in counters)


def test_an_overlapped_pair_is_an_event_around_its_parts():
    events = [event for event in events_of({"t": TRACES["pairs"]}, "X") if event["pid"] == 1 and event["tid"] == 1]
    (pair,) = (event for event in events if event["cat"] == "pair")
    assert pair["name"] == "(0F2;0B0)OVERLAP_F_B"
    parts = [event for event in events if event["name"] in ("0F2", "0B0")]
    assert [event["cat"] for event in parts] == ["compute"] * 2
    assert span_ns(pair) == (span_ns(parts[0])[0], span_ns(parts[1])[1])
    assert events.index(pair) < events.index(parts[0])


def test_each_trace_starts_at_0():
    trace = TRACES["plain"]
    shift = {
        name: getattr(trace, name) + 1000.25
        for name in ("start_s", "end_s", "message_start_s", "message_left_s", "message_arrival_s")
    }
    assert min(event["ts"] for event in events_of({"t": dataclasses.replace(trace, **shift)}, "X")) == 0


def test_head_is_what_holistic_trace_analysis_looks_for():
    text = perfetto_json({"predicted": TRACES["plain"]})
    assert text.startswith('{"distributedInfo": {')
    match = re.search(r'"rank":\s+(\d+)', text)
    assert match
    assert match.group(1) == "0"
    assert json.loads(text)["distributedInfo"]["world_size"] == 3


def test_json_survives_a_round_trip_and_odd_names():
    name = 'a "quoted" <name> \u2028 µ'
    text = perfetto_json({name: TRACES["plain"]})
    assert json.loads(json.dumps(json.loads(text))) == json.loads(text)
    assert f"{name} rank 0" in labels(json.loads(text)["traceEvents"], "process_name").values()


def test_files_are_the_text_and_reproducible(tmp_path):
    traces = {"predicted": TRACES["plain"]}
    plain, packed, again = tmp_path / "t.json", tmp_path / "t.json.gz", tmp_path / "again.json.gz"
    for path in (plain, packed, again):
        save_perfetto(traces, path)
    text = perfetto_json(traces)
    assert plain.read_text(encoding="utf-8") == text
    assert gzip.decompress(packed.read_bytes()).decode() == text
    assert packed.read_bytes() == again.read_bytes()


def test_no_trace_is_an_error():
    with pytest.raises(ValueError, match="no trace to export"):
        perfetto_json({})


def test_lanes_are_as_few_as_can_be():
    from ppsim.export.perfetto import _lanes

    begin, end = np.array([0, 1, 2, 5, 5]), np.array([4, 5, 6, 5, 9])
    assert _lanes(begin, end) == [0, 1, 2, 0, 0]


def test_reductions_have_a_track_of_their_own_and_a_second_where_two_cross():
    plain = TRACES["replicas"]
    crossing = dataclasses.replace(plain, reduce_end_s=plain.reduce_end_s + 0.15)
    for trace in (plain, crossing):
        events = events_of({"run": trace})
        tracks = labels(events, "thread_name")
        found = {event["args"]["stage"]: event for event in events if event.get("cat") == "reduction"}
        assert sorted(found) == [0, 1, 2, 3]
        for stage, event in found.items():
            assert event["name"] == f"{stage}REDUCE_GRAD"
            assert event["args"]["bytes"] == 10**8
            assert event["pid"] == 1 + stage % 2
            assert tracks[event["pid"], event["tid"]].startswith("reduce gradients")
            begin, end = span_ns(event)
            assert begin == round(trace.reduce_start_s[stage] * 1e9)
            assert end == round(trace.reduce_end_s[stage] * 1e9)
    assert {name for name in tracks.values() if "reduce" in name} == {"reduce gradients", "reduce gradients (2)"}
    assert "reduce" not in str(events_of({"run": TRACES["plain"]}))
