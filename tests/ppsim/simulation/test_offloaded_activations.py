"""O and L: checked where they stand, timed as a walk over the file times them, and every byte by hand."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import (
    Conditions,
    HostLink,
    InputError,
    Jitter,
    Kind,
    Network,
    Schedule,
    ScheduleError,
    StageCost,
    Trace,
    attribute,
    build_schedule,
    monte_carlo,
    schedule_names,
    simulate,
)
from ppsim.export.perfetto import perfetto_json
from ppsim.schedule.offload import Offload
from ppsim.schedule.review import review_csv
from tests.support.evaluator import cells
from tests.support.shared_devices import check_with_a_core_for_each
from tests.support.strategies import exact_seconds, offloads, schedules, stage_costs

COST = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=8, output_bytes=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0F0,0O0,0B0\n", "row 1, column 2: 0O0 takes away what nothing brings back: add 0L0"),
        ("0F0,0L0,0B0\n", "row 1, column 2: 0L0 needs 0O0: put that before it"),
        ("0F0,0L0,0O0,0B0\n", "row 1, column 2: 0L0 needs 0O0: put that before it"),
        ("0O0,0F0,0L0,0B0\n", "row 1, column 1: 0O0 comes before 0F0 has ended: put it after that"),
        ("0F0,0O0,0B0,0L0\n", "row 1, column 4: 0L0 comes after 0B0, which needs it: put it before"),
        ("0F0,0O0,0I0,0L0,0W0\n", "row 1, column 4: 0L0 comes after 0I0, which needs it: put it before"),
        ("0F0,0O0,0R0,0L0,0B0\n", "row 1, column 4: 0L0 comes after 0R0, which needs it: put it before"),
        ("0F0,0O0,0O0,0L0,0B0\n", "row 1, column 3: 0O0 occurs twice: keep one"),
        ("0F0,1O0,1L0,0B0\n1F0,1B0\n", "row 1, column 2: 1O0 is of what rank 0 does not compute: leave it out"),
        ("0F0,0O1,0L1,0B0\n", "row 1, column 2: 0O1 is of what rank 0 does not compute: leave it out"),
        ("0F0,0O,0L0,0B0\n", "row 1, column 2: '0O' is not an action: give its microbatch, as in 0O0"),
    ],
)
def test_a_copy_that_makes_no_sense_is_named_with_its_cell(text: str, said: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_csv(text)
    assert str(caught.value) == said
    assert review_csv(text).problems[0].message == said


@given(schedules().flatmap(offloads), st.sampled_from(["derived", "early", "late"]), st.booleans())
def test_what_is_written_is_read_and_kept(schedule: Schedule, place: str, is_sharded: bool) -> None:
    stated = (schedule.with_sharding(2) if is_sharded else schedule).with_communication(place)
    text = stated.to_csv(messages=True, offload=True)
    again = Schedule.from_csv(text)
    assert again.to_csv(messages=True, offload=True) == text
    assert again.orders == schedule.orders
    assert again.offload == schedule.offload
    assert Schedule.from_csv(schedule.to_csv(offload=True)).offload == schedule.offload
    assert not re.search(r"\d[OL]\d", stated.to_csv(messages=True) + schedule.to_csv())
    assert schedule.forward_only().offload is None
    again_computed = schedule.with_recompute()  # what stood before an action stands before its R
    wanted = [[cell for cell in row if not re.search(r"\dR\d", cell)] for row in cells(schedule.to_csv(offload=True))]
    found = [
        [cell for cell in row if not re.search(r"\dR\d", cell)] for row in cells(again_computed.to_csv(offload=True))
    ]
    assert found == wanted


@given(schedules().flatmap(offloads), st.data())
def test_both_engines_give_the_times_and_bytes_of_a_walk_over_the_file(schedule: Schedule, data: st.DataObject) -> None:
    costs, latency_s = data.draw(stage_costs(schedule.stages)), data.draw(exact_seconds(32))
    host_link = data.draw(
        st.none() | st.builds(HostLink, bytes_per_s=st.sampled_from([math.inf, 1.0, 8.0]), latency_s=exact_seconds(8))
    )
    options = {"network": Network(latency_s=latency_s), "host_link": host_link, "blocking": data.draw(st.booleans())}
    traces = [simulate(schedule, costs, engine=engine, **options) for engine in ("simpy", "compiled")]
    names = ("start_s", "end_s", "message_arrival_s", "activation_bytes", "gradient_bytes")
    if schedule.offload is not None:
        names = (*names, "copy_start_s", "copy_end_s", "copy_bytes", "host_bytes")
    for name in names:
        assert np.array_equal(getattr(traces[0], name), getattr(traces[1], name)), name
    _check_by_walking(traces[1], costs, host_link, latency_s)
    found = attribute(traces[1])
    parts = [math.fsum(part) for part in zip(*found.parts_s.values(), strict=True)]
    assert parts == pytest.approx(found.bubble_s.tolist(), abs=1e-9)
    assert all((part >= 0).all() for part in found.parts_s.values())
    if host_link is None:
        assert not found.copies_s.any()
    ensemble = monte_carlo(schedule, costs, jitter=Jitter(), samples=2, **options)
    assert ensemble.makespan_s.tolist() == [traces[0].makespan_s] * 2
    conditions = Conditions(host_link=host_link, blocking=options["blocking"])
    check_with_a_core_for_each(schedule, costs, options["network"], conditions)


_CELL = re.compile(r"(\d+)([FBIWROL])(\d+)")


def _check_by_walking(trace: Trace, costs: list[StageCost], host_link: HostLink | None, latency_s: float) -> None:
    """Walk over the cells of the file until nothing moves any more. Then count each rank's bytes event by event."""
    place, end, start = trace.schedule.placement, {}, {}
    left: dict[tuple, float] = {}  # when results leave: those of a pair at its end
    rows = [
        [[(int(s), kind, int(b)) for s, kind, b in _CELL.findall(cell)] for cell in row]
        for row in cells(trace.schedule.to_csv(offload=True))
    ]
    again = {(s, b) for row in rows for parts in row for s, kind, b in parts if kind == "R"}
    while True:
        before = dict(end)
        for row in rows:
            now, free = 0.0, {"O": 0.0, "L": 0.0}
            for parts in row:
                if not parts:
                    continue
                stage, kind, mb = parts[0]
                if kind in "OL":
                    began = max(now, free[kind], end[stage, "O", mb] if kind == "L" else 0.0)
                    free[kind] = began + _copied(costs[stage], (stage, mb) in again, host_link)[1]
                    now = free[kind] if trace.conditions.blocking else now
                    start[parts[0]], end[parts[0]], left[parts[0]] = began, free[kind], free[kind]
                    continue
                begin = now
                for each in parts:
                    begin = max(begin, *_needed(each, place, left, again, latency_s))
                for each in parts:
                    start[each] = begin
                    begin += costs[each[0]].alone_s[each[1]]
                    end[each] = begin
                left |= dict.fromkeys(parts, begin)
                now = begin
        if end == before:
            break
    program, table = trace.program, trace.program.offload
    for row, action in enumerate(map(program.action_of, range(len(trace.start_s)))):
        assert trace.end_s[row] == end[action.stage, action.kind.name, action.microbatch]
    for index, (stage, kind, mb) in enumerate(zip(table.stage, table.kind, table.microbatch, strict=True)):
        assert trace.copy_end_s[index] == end[int(stage), Kind(int(kind)).name, int(mb)]
    for rank, row in enumerate(rows):
        device, host = _levels_by_events(row, costs, again, start, end, host_link)
        held = list(program.rows_of(rank))
        assert trace.activation_bytes[held].tolist() == device
        if trace.host_bytes is not None:
            assert trace.host_bytes[held].tolist() == host


def _copied(cost: StageCost, is_recomputed: bool, host_link: HostLink | None) -> tuple[int, float]:
    """Bytes and seconds of a copy."""
    least = min(2 * cost.output_bytes, cost.activation_bytes) if cost.recompute_bytes is None else cost.recompute_bytes
    whole = cost.activation_bytes if cost.offload_bytes is None else min(cost.offload_bytes, cost.activation_bytes)
    size = least if is_recomputed else whole
    return size, 0.0 if host_link is None else host_link.latency_s + size / host_link.bytes_per_s


def _needed(part: tuple, place: tuple, end: dict, again: set, latency_s: float) -> list[float]:
    """When what a computation needs from other stages and from its copies is there."""
    stage, kind, mb = part
    near = stage + {"F": -1, "B": 1, "I": 1}.get(kind, len(place))
    found = [end[near, other, mb] for other in ("F" if kind == "F" else "BI") if (near, other, mb) in end]
    late = latency_s if 0 <= near < len(place) and place[near] != place[stage] else 0.0
    awaits = (stage, "L", mb) in end and (kind == "R" or (kind in "BI" and (stage, mb) not in again))
    return [0.0, *(each + late for each in found), *([end[stage, "L", mb]] if awaits else [])]


def _levels_by_events(
    row: list, costs: list[StageCost], again: set, start: dict, end: dict, host_link: HostLink | None
) -> tuple[list[int], list[int]]:
    """The most that device and host hold from each computation's effect to the next one's."""
    events = []  # moment, place in the order, device bytes, host bytes, is it a computation
    for at, parts in enumerate(row):
        for number, part in enumerate(parts):
            stage, kind, mb = part
            cost = costs[stage]
            size, _ = _copied(cost, (stage, mb) in again, host_link)
            least, _ = _copied(cost, True, host_link)
            if kind in "OL":
                leaves, comes = (end[part], start[part]) if kind == "O" else (start[part], end[part])
                sign = -1 if kind == "O" else 1
                events.append((leaves, at, number, sign * size, 0, False))
                events.append((comes, at, number, 0, -sign * size, False))
                continue
            change = {
                "F": least if (stage, mb) in again else cost.activation_bytes,
                "R": cost.activation_bytes - least,
                "B": -cost.activation_bytes,
                "I": cost.weight_activation_bytes - cost.activation_bytes,
                "W": -cost.weight_activation_bytes,
            }[kind]
            events.append((start[part] if kind in "FR" else end[part], at, number, change, 0, True))
    device, host, on_device, on_host = [], [], 0, 0
    for _, _, _, more, more_on_host, computes in sorted(events, key=lambda event: event[:3]):
        on_device, on_host = on_device + more, on_host + more_on_host
        if computes:
            device.append(on_device)
            host.append(on_host)
        elif device:
            device[-1], host[-1] = max(device[-1], on_device), max(host[-1], on_host)
    return device, host


def test_by_hand() -> None:
    """A copy takes 3 s. O0 runs from 1 to 4, L0 can start at 4 and ends at 7, so B0 waits for it."""
    schedule = Schedule.from_csv("0F0,0O0,0F1,0F2,0L0,0B0,0B1,0B2\n")
    trace = simulate(schedule, [COST], host_link=HostLink(bytes_per_s=4.0, latency_s=1.0))
    assert (trace.copy_start_s.tolist(), trace.copy_end_s.tolist()) == ([1, 4], [4, 7])
    assert trace.start_s.tolist() == [0, 1, 2, 7, 9, 11]
    # F2 starts at 2. O0 ends at 4, when L0 takes as much again: L0 waited for it.
    assert trace.activation_bytes.tolist() == [8, 16, 24, 16, 8, 0]
    assert trace.host_bytes.tolist() == [8, 8, 8, 0, 0, 0]  # O0 begins when F0 ends
    assert trace.memory.host_bytes.tolist() == [8]
    assert trace.memory.total_bytes.tolist() == [24]  # what is in host memory is no part of it
    found = attribute(trace)
    assert found.copies_s.tolist() == [4.0]
    assert found.bubble_s.tolist() == [4.0]
    assert found.critical_path.by_what_s["copies"] == 4.0
    assert found.critical_path.label(found.critical_path.segments[3]) == "wait for activations before 0B0 on rank 0"


@pytest.mark.parametrize("engine", ["simpy", "compiled"])
def test_a_rank_without_streams_copies_between_its_actions(engine: str) -> None:
    """By hand, a copy takes 3 s and a rank does nothing else meanwhile: F0 O0 F1 F2 L0 B0 B1 B2."""
    schedule = Schedule.from_csv("0F0,0O0,0F1,0F2,0L0,0B0,0B1,0B2\n")
    host_link = HostLink(bytes_per_s=4.0, latency_s=1.0)
    trace = simulate(schedule, [COST], host_link=host_link, blocking=True, engine=engine)
    assert (trace.copy_start_s.tolist(), trace.copy_end_s.tolist()) == ([1, 6], [4, 9])
    assert trace.start_s.tolist() == [0, 4, 5, 9, 11, 13]
    assert trace.activation_bytes.tolist() == [8, 8, 24, 16, 8, 0]
    found = attribute(trace)
    assert found.copies_s.tolist() == [6.0]  # both directions
    assert found.bubble_s.tolist() == [6.0]


def test_a_message_leaves_before_its_sender_copies() -> None:
    """Rank 0 hands 0F0 over and copies until 5; rank 1 computes from 1 on and waits for nothing."""
    schedule = Schedule.from_csv("0F0,0O0,0L0,0B0\n1F0,1B0\n")
    trace = simulate(schedule, [COST] * 2, host_link=HostLink(bytes_per_s=4.0), blocking=True)
    assert trace.message_start_s.tolist() == [1.0, 4.0]
    assert trace.start_s.tolist() == [0.0, 5.0, 1.0, 2.0]
    found = attribute(trace)
    assert found.copies_s.tolist() == [1.0, 0.0]  # until 4 it waits for the gradient
    assert found.drain_s.tolist() == [0.0, 3.0]


def test_ranks_that_share_a_core_copy_on_it() -> None:
    """By hand, O and L take 2 s: 0F0 0-1, 0O0 1-3, 1F0 3-4, 0L0 4-6 (asked for at 3), 1B0 6-8, 0B0 8-10."""
    schedule = Schedule.from_csv("0F0,0O0,0L0,0B0\n1F0,1B0\n")
    options = {"host_link": HostLink(bytes_per_s=4.0), "cores": 1}
    trace = simulate(schedule, [COST] * 2, blocking=True, **options)
    assert (trace.copy_start_s.tolist(), trace.copy_end_s.tolist()) == ([1.0, 4.0], [3.0, 6.0])
    assert trace.start_s.tolist() == [0.0, 8.0, 3.0, 6.0]
    beside = simulate(schedule, [COST] * 2, **options)  # streams of their own need no core
    assert beside.start_s.tolist() == [0.0, 5.0, 1.0, 2.0]


@given(schedules().flatmap(offloads), st.sampled_from(["turns", "fair"]), st.data())
def test_one_core_does_all_that_ranks_compute_and_copy(schedule: Schedule, sharing: str, data: st.DataObject) -> None:
    """A core is busy for the sum of all work, however ranks share it; in turns, with one thing at a time."""
    costs = data.draw(stage_costs(schedule.stages))
    host_link = HostLink(bytes_per_s=8.0, latency_s=0.25)
    options = {"network": Network(latency_s=0.5), "host_link": host_link, "blocking": True}
    shared = simulate(schedule, costs, devices=[0] * schedule.ranks, sharing=sharing, **options)
    alone = simulate(schedule, costs, **options)
    works_s = float((alone.end_s - alone.start_s).sum())
    spans = list(zip(shared.start_s, shared.end_s, strict=True))
    if shared.copy_start_s is not None:
        works_s += float((alone.copy_end_s - alone.copy_start_s).sum())
        spans += zip(shared.copy_start_s, shared.copy_end_s, strict=True)
    busy_s = until_s = together_s = 0.0
    for begin, end in sorted(spans):
        together_s += max(min(end, until_s) - begin, 0.0)
        busy_s += max(end - max(begin, until_s), 0.0)
        until_s = max(until_s, end)
    assert busy_s == pytest.approx(works_s)
    assert sharing == "fair" or together_s == 0.0


def test_both_directions_run_at_once_and_each_one_after_another() -> None:
    schedule = Schedule.from_csv("0F0,0O0,0F1,0O1,0F2,0L0,0L1,0B0,0B1,0B2\n")
    trace = simulate(schedule, [COST], host_link=HostLink(bytes_per_s=4.0))
    # O0 1-3, O1 3-5, L0 from 3 (F2 ends at 3), L1 from 5 when both O1 and L0 have ended.
    assert (trace.copy_start_s.tolist(), trace.copy_end_s.tolist()) == ([1, 3, 3, 5], [3, 5, 5, 7])


def test_a_stage_that_waits_for_one_that_loads_waits_for_the_copy() -> None:
    """Rank 0's last backward is late because rank 1 had to load: a knock-on, which its drain does not hide."""
    schedule = Schedule.from_csv("0F0,0F1,0B1,0B0\n1F0,1O0,1F1,1B1,1L0,1B0\n")
    fast, slow = (
        attribute(simulate(schedule, [COST] * 2, host_link=HostLink(bytes_per_s=rate))) for rate in (math.inf, 2.0)
    )
    assert not fast.copies_s.any()
    assert slow.copies_s.tolist() == [5.0, 5.0]  # O0 runs from 2 to 6, and L0, which could from 5, to 10
    assert slow.copies_knock_on_s.tolist() == [2.0, 0.0]  # while B0 computes, from 10 to 12
    assert slow.trace.makespan_s == fast.trace.makespan_s + 5.0


@pytest.mark.parametrize("name", ["1f1b", "interleaved-1f1b", "afab", "zb-h1"])
@pytest.mark.parametrize("ranks", [4, 8])
def test_half_the_activations_are_offloaded_at_no_cost_where_copies_fit_under_compute(name: str, ranks: int) -> None:
    """The claim of PipeOffload (Wan et al., 2025): at least half, at negligible cost.

    A copy of a microbatch takes as long as its F, so that it fits under one.
    """
    plain = build_schedule(name, ranks=ranks, microbatches=2 * ranks)
    moved = plain.with_offload(share=0.5)
    host_link = HostLink(bytes_per_s=COST.activation_bytes / COST.forward_s)
    before, after = (
        simulate(schedule, [COST] * schedule.stages, engine="compiled", host_link=host_link)
        for schedule in (plain, moved)
    )
    assert after.makespan_s == before.makespan_s
    assert not attribute(after).copies_s.any()
    largest = [int(trace.peak_activation_bytes.max()) for trace in (before, after)]
    assert largest[1] < largest[0] or (name, ranks) in (("1f1b", 4), ("zb-h1", 4))  # 4 microbatches are too few
    if name == "interleaved-1f1b":
        assert after.peak_activation_bytes.tolist()[0] <= before.peak_activation_bytes.tolist()[0] * 0.64


def test_all_activations_offloaded_leave_three_microbatches() -> None:
    """The one that computes, the one before, which is on its way out, and the next, on its way back."""
    for name in ("1f1b", "afab", "interleaved-1f1b"):
        schedule = build_schedule(name, ranks=8, microbatches=16).with_offload()
        host_link = HostLink(bytes_per_s=COST.activation_bytes / COST.forward_s)
        trace = simulate(schedule, [COST] * schedule.stages, engine="compiled", host_link=host_link)
        assert trace.peak_activation_bytes.max() == 3 * COST.activation_bytes


@pytest.mark.parametrize("name", schedule_names())
def test_the_rule_gives_copies_that_may_stand_there(name: str) -> None:
    schedule = build_schedule(name, ranks=2, microbatches=6)
    for ahead in (1, 2, 5):
        moved = schedule.with_offload(ahead=ahead)
        moved.check()
        for order, copies in zip(moved.orders, moved.offload or [Offload()] * 2, strict=True):
            assert all(
                action.kind != Kind.L or _distance(order, place, action) in (ahead, None) for place, action in copies
            )
    assert schedule.with_offload(share=0).offload is None
    one = moved.with_offload([0], microbatches=[5], ahead=1).to_csv(offload=True)
    assert set(re.findall(r"\d[OL]\d", one)) <= {"0O5", "0L5"}


def _distance(order, place: int, load) -> int | None:
    """How many actions from where an L stands to the first that needs it."""
    for at, action in enumerate(order):
        parts = [action] if hasattr(action, "kind") else list(action)
        if any(part.kind in (Kind.R, Kind.B, Kind.I) and part[::2] == load[::2] and at >= place for part in parts):
            return at - place
    return None


def test_what_cannot_be_is_refused() -> None:
    schedule = build_schedule("1f1b", ranks=3, microbatches=6)
    with pytest.raises(InputError, match="ahead must be 1 or more, got 0"):
        schedule.with_offload(ahead=0)
    with pytest.raises(InputError, match="stage 3 is not there"):
        schedule.with_offload([3])
    with pytest.raises(InputError, match="cannot be given for a schedule that offloads activations"):
        simulate(schedule.with_offload(), [COST] * 3, receive_window=2)
    for wrong, said in (({"bytes_per_s": 0}, "bytes_per_s must be > 0"), ({"latency_s": -1}, "latency_s must be sec")):
        with pytest.raises(InputError, match=said):
            HostLink(**wrong)
    with pytest.raises(InputError, match="host_link: unknown"):
        HostLink.from_dict({"rate": 1})


def test_frozen_stages_and_sharding_keep_their_copies() -> None:
    schedule = build_schedule("zb-h1", ranks=2, microbatches=4).with_offload().with_sharding(1)
    frozen = schedule.with_frozen_stages([0])
    kept = [[cell for cell in row if not re.match(r"0W", cell)] for row in cells(schedule.to_csv(offload=True))]
    assert [[re.sub(r"^0I", "0B", cell) for cell in row] for row in kept] == cells(frozen.to_csv(offload=True))


def test_it_is_saved_shown_and_exported(tmp_path) -> None:
    schedule = build_schedule("1f1b", ranks=3, microbatches=4).with_offload(share=0.5)
    trace = simulate(schedule, [COST] * 3, host_link=HostLink(bytes_per_s=8.0, latency_s=0.5))
    trace.save(tmp_path / "step.trace")
    loaded = Trace.load(tmp_path / "step.trace")
    assert loaded.schedule.offload == schedule.offload
    assert loaded.conditions == trace.conditions
    for name in ("copy_start_s", "copy_end_s", "copy_bytes", "host_bytes"):
        assert np.array_equal(getattr(loaded, name), getattr(trace, name))
    frame = trace.to_frame()
    count = len(trace.copy_bytes)
    assert (frame["kind"].isin(["O", "L"])).sum() == count > 0
    assert frame[frame["kind"] == "O"]["microbatch"].isin([1, 3]).all()
    names = [bar.name for bar in trace.plot().data]
    assert {"offloading", "loading"} <= set(names)
    events = json.loads(perfetto_json({"step": trace}))["traceEvents"]
    assert sum(event.get("cat") == "copy" for event in events) == count


def test_conditions_are_stored() -> None:
    given = Conditions(blocking=True)
    assert given.to_dict() == {"blocking": True}
    assert Conditions.from_dict(given.to_dict()) == given
    with pytest.raises(InputError, match="blocking must be"):
        Conditions(blocking=1)
    for host_link in (HostLink(), HostLink(bytes_per_s=2.0), HostLink(latency_s=1.0)):
        assert (
            Conditions.from_dict(json.loads(json.dumps(Conditions(host_link=host_link).to_dict()))).host_link
            == host_link
        )


def test_costs_of_several_layers() -> None:
    assert replace(COST, offload_bytes=100).moved_bytes == 8
    assert Offload([1], 0, [Kind.O], 0) != Offload([1], 0, [Kind.L], 0)


@pytest.mark.parametrize("name", ["dualpipe", "chimera"])
def test_copies_of_the_model_recompute_and_offload_too(name: str) -> None:
    """Schedules in both directions, whose stages stand on two ranks: each microbatch moves where it computes."""
    plain = build_schedule(name, ranks=4, microbatches=8)
    moved = plain.with_recompute(microbatches=[0, 4]).with_offload(microbatches=[1, 5])
    costs = [COST] * plain.model_stages
    before = simulate(plain, costs)
    traces = [
        simulate(moved, costs, engine=engine, host_link=HostLink(bytes_per_s=8.0)) for engine in ("simpy", "compiled")
    ]
    for column in ("start_s", "copy_end_s", "activation_bytes", "host_bytes"):
        assert np.array_equal(getattr(traces[0], column), getattr(traces[1], column))
    assert (traces[0].peak_activation_bytes <= before.peak_activation_bytes).all()
    assert set(traces[0].program.offload.microbatch.tolist()) <= {1, 5}
    text = moved.to_csv(messages=True, offload=True)
    assert Schedule.from_csv(text, copies=moved.copies).to_csv(messages=True, offload=True) == text
