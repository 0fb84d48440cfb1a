"""Conditions: one value that says how a step is run, checked once, and carried by every trace."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from ppsim import Conditions, InputError, Network, Reduction, StageCost, Trace, build_schedule, simulate
from tests.support import strategies

COST = StageCost(forward_s=1.0, backward_input_s=1.0, backward_weight_s=1.0, output_bytes=8)
SCHEDULE = build_schedule("1f1b", ranks=3, microbatches=4)
NAMES = [each.name for each in fields(Conditions)]


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_drawn_where_any_option_is_tested(name: str) -> None:
    """So that a new option comes under all tests that draw conditions."""
    posted = SCHEDULE.with_communication("early")  # 1F1B hangs on streams of pairs and ranks, unless received early
    drawn_of = st.sampled_from([SCHEDULE, posted, SCHEDULE.with_sharding()]).flatmap(strategies.conditions)
    find(drawn_of, lambda drawn: name in drawn.to_dict(), settings=settings(phases=[Phase.generate], max_examples=2000))


@given(st.data())
def test_conditions_survive_json(data: st.DataObject) -> None:
    drawn = data.draw(strategies.conditions(data.draw(strategies.schedules())))
    again = Conditions.from_dict(json.loads(json.dumps(drawn.to_dict(), allow_nan=False)))
    assert again == drawn
    assert again.to_dict() == drawn.to_dict()


def test_the_defaults_say_nothing() -> None:
    assert Conditions().to_dict() == {}
    assert Conditions(slow_ranks={}, scale=np.float64(1.0)) == Conditions()
    assert Conditions(scale=[1.0, 2.0]) != Conditions(scale=[1.0, 3.0])
    assert Conditions() != {}


def test_nobody_can_change_them() -> None:
    scale = np.array([1.0, 2.0])
    conditions = Conditions(scale=scale, slow_ranks={0: 2.0})
    scale[0] = 5.0
    assert np.array_equal(conditions.scale, [1.0, 2.0])
    with pytest.raises(ValueError, match="read-only"):
        conditions.scale[0] = 5.0  # type: ignore[index]
    with pytest.raises(TypeError):
        conditions.slow_ranks[0] = 5.0  # type: ignore[index]


def test_single_options_replace_those_of_an_object() -> None:
    conditions = Conditions(slow_ranks={1: 2.0}, dispatch_s=0.5)
    trace = simulate(SCHEDULE, [COST] * 3, conditions=conditions, dispatch_s=0.25)
    assert trace.conditions == replace(conditions, dispatch_s=0.25)
    assert trace.makespan_s == simulate(SCHEDULE, [COST] * 3, slow_ranks={1: 2.0}, dispatch_s=0.25).makespan_s
    with pytest.raises(InputError, match="unknown field 'nonsense'; known are overlap"):
        simulate(SCHEDULE, [COST] * 3, nonsense=1)


@pytest.mark.parametrize("engine", ["simpy", "compiled"])
def test_measured_durations_make_the_step_that_they_were_measured_in(engine: str) -> None:
    costs, network = [replace(COST, forward_s=1.0 + stage) for stage in range(3)], Network(latency_s=0.25)
    first = simulate(SCHEDULE, costs, network=network, slow_ranks={1: 1.5})
    durations_s = first.end_s - first.start_s
    again = simulate(SCHEDULE, costs, network=network, durations_s=durations_s, engine=engine)
    assert again.end_s.tolist() == first.end_s.tolist()
    slower = simulate(SCHEDULE, costs, network=network, durations_s=durations_s, slow_ranks={2: 2.0}, engine=engine)
    assert slower.compute_s.tolist() == (first.compute_s * [1, 1, 2]).tolist()


def test_a_trace_keeps_its_conditions(tmp_path: Path) -> None:
    conditions = Conditions(scale=[1.0, 2.0, 1.0, 1.0], slow_ranks={2: 1.5}, reduction=Reduction(replicas=2), cores=2)
    trace = simulate(SCHEDULE, [COST] * 3, conditions=conditions)
    trace.save(tmp_path / "trace")
    assert Trace.load(tmp_path / "trace").conditions == trace.conditions == conditions


def test_a_file_of_the_first_schema_held_them_among_its_details(tmp_path: Path) -> None:
    trace = simulate(SCHEDULE, [COST] * 3, slow_ranks={2: 1.5}, scale=[1.0, 2.0, 1.0, 1.0])
    trace.save(tmp_path / "new")
    with np.load(tmp_path / "new") as archive:
        arrays = dict(archive)
    header = json.loads(arrays["header"].tobytes())
    header["details"] |= {"overlap": 1.0, **header.pop("conditions")}
    arrays["header"] = np.frombuffer(json.dumps(header | {"schema": 1}).encode(), np.uint8)
    with open(tmp_path / "old", "wb") as file:
        np.savez_compressed(file, **arrays)
    found = Trace.load(tmp_path / "old")
    assert (found.conditions, found.details) == (trace.conditions, trace.details)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"durations_s": [1.0], "scale": 2.0}, "leave out scale or durations_s"),
        ({"durations_s": [1.0], "scale": [1.0, 2.0]}, "leave out scale or durations_s"),
        ({"durations_s": [1.0], "overlap": 0.5}, "leave out overlap or durations_s"),
        ({"durations_s": [1.0, -1.0]}, "durations_s must be seconds, finite and >= 0"),
        ({"durations_s": [np.nan]}, "durations_s must be seconds, finite and >= 0"),
        ({"receive_window": 1.0}, "receive_window must be a whole number, got 1.0"),
        ({"cores": True}, "cores must be a whole number, got True"),
        ({"sharing": "fair"}, "sharing 'fair' is of ranks that share a device: give it with cores or devices"),
        ({"speeds": [1.0]}, "speeds are of ranks that compute at once: give them with sharing 'fair'"),
        ({"speeds": [], "sharing": "fair"}, "speeds must be one or more numbers above 0 and at most 1, got []"),
        ({"speeds": [1.5], "sharing": "fair"}, "above 0 and at most 1, got [1.5]"),
        ({"speeds": [1.0, 0.0], "sharing": "fair"}, "above 0 and at most 1, got [1.0, 0.0]"),
        ({"speeds": [1.0], "sharing": "fair", "cores": 2}, "leave out cores or speeds"),
        ({"speeds": [1.0], "sharing": "fair", "sharing_efficiency": 0.5}, "leave out sharing_efficiency or speeds"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"durations_s|whole number|sharing|speeds") as caught:
        Conditions(**options)
    assert said in str(caught.value)


def test_durations_of_another_program_are_refused() -> None:
    with pytest.raises(ValueError, match=r"durations_s has shape \(3,\): give one number for each of the program's 24"):
        simulate(SCHEDULE, [COST] * 3, durations_s=[1.0, 1.0, 1.0])
