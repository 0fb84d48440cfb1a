"""Answers: held against what `simulate`, `attribute` and the reader of schedules say."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ppsim
from ppsim import Network, StageCost, attribute, build_schedule, schedule_names, simulate
from ppsim.errors import InputError
from ppsim.explorer import answers
from ppsim.explorer.question import MOST_ACTIONS
from ppsim.explorer.runs import Runs
from tests.support.named import BOTH_WAYS

ASKED: dict[str, Any] = {
    "schedule": "1f1b",
    "ranks": 4,
    "microbatches": 8,
    "forward_s": [0.01],
    "backward_input_s": [0.012],
    "backward_weight_s": [0.008],
    "activation_bytes": 1000,
    "weight_activation_bytes": 500,
    "output_bytes": 10**6,
    "latency_s": 1e-5,
    "bytes_per_s": 1e9,
}


def _step(**changes: Any) -> dict[str, Any]:
    answer = answers.step(ASKED | changes, Runs())
    return dict(json.loads(json.dumps(answer, allow_nan=False)))


def _saved(trace: ppsim.Trace) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        trace.save(Path(folder) / "step.trace")
        return (Path(folder) / "step.trace").read_bytes()


@pytest.mark.parametrize("name", schedule_names())
def test_the_step_is_what_simulate_predicts(name: str) -> None:
    picture = _step(schedule=name)["picture"]
    schedule = build_schedule(name, ranks=4, microbatches=8)
    v = schedule.model_stages // 4
    cost = StageCost(
        forward_s=0.01 / v,
        backward_input_s=0.012 / v,
        backward_weight_s=0.008 / v,
        activation_bytes=1000 // v,
        weight_activation_bytes=500 // v,
        output_bytes=10**6,
    )
    trace = simulate(schedule, [cost] * schedule.stages, network=Network(latency_s=1e-5, bytes_per_s=1e9))
    found = attribute(trace)
    numbers = picture["numbers"]
    assert numbers["makespan"] == pytest.approx(trace.makespan_s)
    assert numbers["bubble"] == pytest.approx(trace.bubble_fraction)
    assert numbers["peak"] == trace.peak_activation_bytes.tolist()
    assert numbers["parts"] == pytest.approx(found.fractions)
    assert picture["rows"]["start"] == pytest.approx(trace.start_s.tolist())
    assert picture["rows"]["slack"] == pytest.approx(found.slack_s.tolist(), abs=1e-12)
    assert picture["messages"]["arrival"] == pytest.approx(trace.message_arrival_s.tolist())
    idle = picture["idle"]
    lengths = np.array(idle["end"]) - np.array(idle["begin"])
    assert np.bincount(idle["rank"], lengths, 4) == pytest.approx(trace.bubble_s)
    assert ppsim.Schedule.from_csv(picture["csv"], copies=schedule.copies).orders == schedule.orders


def test_what_runs_beside_computations_is_shown() -> None:
    """Copies, gathered parameters and sums over replicas, as `simulate` times them, and the rows that wait for them."""
    options = {"recompute": 0.5, "offload": 0.5, "host_bytes_per_s": 1e5, "replicas": 2, "whole_stages": 1}
    asked = options | {"parameter_bytes": 4 * 10**6, "replica_bytes_per_s": 1e9, "schedule": "interleaved-1f1b"}
    picture = _step(**asked)["picture"]
    schedule = build_schedule("interleaved-1f1b", ranks=4, microbatches=8)
    schedule = schedule.with_recompute(share=0.5).with_offload(share=0.5).with_sharding(1)
    cost = StageCost(
        forward_s=0.005,
        backward_input_s=0.006,
        backward_weight_s=0.004,
        activation_bytes=500,
        weight_activation_bytes=250,
        output_bytes=10**6,
        parameter_bytes=2 * 10**6,
    )
    trace = simulate(
        schedule,
        [cost] * 8,
        network=Network(latency_s=1e-5, bytes_per_s=1e9),
        host_link=ppsim.HostLink(bytes_per_s=1e5),
        collectives=ppsim.Collectives(replicas=2, bytes_per_s=1e9),
    )
    assert picture["numbers"]["makespan"] == pytest.approx(trace.makespan_s)
    beside, rows = picture["beside"], picture["rows"]
    frame = trace.to_frame()
    frame = frame[frame["kind"].isin(["REDUCE_GRAD", "UNSHARD", "O", "L"])]
    frame[["start_s", "end_s"]] -= trace.start_s.min()
    expected = frame[["kind", "rank", "start_s", "end_s", "size_bytes"]].itertuples(index=False, name=None)
    columns = (beside[name] for name in ("kind", "rank", "start", "end", "bytes"))
    assert sorted(zip(*columns, strict=True)) == sorted(expected)
    assert set(beside["kind"]) == {"REDUCE_GRAD", "UNSHARD", "O", "L"}
    awaited = [(row, at) for row, found in enumerate(rows["awaits"]) for at in found]
    assert {beside["kind"][at] for _, at in awaited} == {"UNSHARD", "L"}
    for row, at in awaited:
        assert rows["rank"][row] == beside["rank"][at]
        assert rows["start"][row] >= beside["end"][at] - 1e-12
        if beside["kind"][at] == "L":
            assert beside["name"][at] == f"{rows['stage'][row]}L{rows['microbatch'][row]}"
        else:
            assert beside["name"][at] == f"{rows['stage'][row]}UNSHARD"
    assert sum(len(found) for found in rows["awaits"]) > beside["kind"].count("L")
    again = _step(**asked | {"schedule": None, "ranks": None, "microbatches": None, "csv": picture["csv"]})["picture"]
    assert again["numbers"] == picture["numbers"]
    assert again["beside"] == beside


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_an_order_of_two_copies_is_read_with_their_number(name: str) -> None:
    named = _step(schedule=name)["picture"]
    assert named["copies"] == 2
    none = {"schedule": None, "ranks": None, "microbatches": None}
    again = _step(**none, csv=named["csv"], copies=2)
    assert again["picture"]["numbers"] == named["numbers"]
    assert "has no F" in _step(**none, csv=named["csv"])["problems"][0]["message"]
    assert "copies must be" in str(_step(**none, csv=named["csv"], copies=0))
    # A microbatch passes a rank once, so it computes there as long as with one stage on each rank.
    one = _step(schedule="1f1b")["picture"]
    lengths = [sum(np.array(each["rows"]["end"]) - np.array(each["rows"]["start"])) for each in (one, named)]
    assert lengths[0] == pytest.approx(lengths[1])


def test_the_same_model_on_one_and_on_two_stages_per_rank_computes_as_long() -> None:
    one, two = (_step(schedule=name)["picture"] for name in ("1f1b", "interleaved-1f1b"))
    lengths = [sum(np.array(each["rows"]["end"]) - np.array(each["rows"]["start"])) for each in (one, two)]
    assert lengths[0] == pytest.approx(lengths[1])
    ranks = [0.01, 0.01, 0.02, 0.01]
    one, two = (_step(schedule=name, forward_s=ranks)["picture"] for name in ("1f1b", "zb-v"))
    for each in (one, two):
        rows = each["rows"]
        is_forward = np.array(rows["kind"]) == 0
        lengths_s = (np.array(rows["end"]) - np.array(rows["start"]))[is_forward]
        assert np.bincount(np.array(rows["rank"])[is_forward], lengths_s) == pytest.approx(8 * np.array(ranks))


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"schedule": "2f2b"}, "schedule", "unknown schedule"),
        ({"ranks": 0}, "ranks", "1 or more"),
        ({"ranks": 2.5}, "ranks", "whole number"),
        ({"ranks": None}, "ranks", "missing"),
        ({"microbatches": 10**9}, "microbatches", "at most"),
        ({"stages_per_rank": 3}, "schedule", "stage"),
        ({"forward_s": [1.0, 2.0]}, "forward_s", "4, one for each rank"),
        ({"forward_s": []}, "forward_s", "missing"),
        ({"forward_s": [-1.0]}, "forward_s", "finite and >= 0"),
        ({"forward_s": ["a"]}, "forward_s", "number"),
        ({"activation_bytes": -1}, "activation_bytes", "bytes"),
        ({"latency_s": -1.0}, "latency_s", "latency_s"),
        ({"bytes_per_s": 0.0}, "bytes_per_s", "bytes_per_s"),
        ({"offload": 1.5}, "offload", "from 0 to 1"),
        ({"recompute": -0.5}, "recompute", "from 0 to 1"),
        ({"host_bytes_per_s": 0.0}, "host_bytes_per_s", "above 0"),
        ({"replica_bytes_per_s": -1.0}, "replica_bytes_per_s", "above 0"),
        ({"replicas": 0}, "replicas", "1 or more"),
        ({"whole_stages": 0}, "whole_stages", "1 or more"),
        ({"parameter_bytes": -1}, "parameter_bytes", "bytes"),
        ({"csv": "0F0"}, "schedule", "one of the two"),
        ({"colour": "red"}, None, "unknown field"),
    ],
)
def test_what_cannot_be_is_said_of_its_field(changes: dict[str, Any], field: str | None, said: str) -> None:
    answer = _step(**changes)
    assert said in answer["error"]
    assert answer["field"] == field
    assert "picture" not in answer


@pytest.mark.parametrize("given", [None, 3, [], "x", {"ranks": {}}])
def test_any_json_value_is_answered(given: Any) -> None:
    assert answers.step(given, Runs())["error"]


def test_an_order_that_cannot_run_is_drawn_without_waiting() -> None:
    text = "0F0,0B1,0F1,0B0\n1F0,1B0,1F1,1B1\n"
    answer = _step(schedule=None, ranks=None, microbatches=None, csv=text)
    assert [each["places"] for each in answer["problems"]] == [[[1, 3], [1, 2]]]
    rows = answer["picture"]["rows"]
    assert rows["start"] == pytest.approx([0, 0.01, 0.03, 0.04, 0, 0.01, 0.03, 0.04])
    assert rows["action"] == [*range(8)]
    pairs = "0F0,0F1,(0F2;0B0)OVERLAP_F_B,0B1,0B2,0B3\n1F0,1B0,1F1,1B1,1F2,1B2\n"
    answer = _step(schedule=None, ranks=None, microbatches=None, csv=pairs)
    assert answer["problems"]
    answer = _step(schedule=None, ranks=None, microbatches=None, csv="0F0,0X0\n1F0,1B0")
    assert answer["picture"] is None
    assert answer["problems"][0]["places"] == [[1, 2]]


def test_an_order_beyond_the_pages_bounds_is_refused() -> None:
    count = MOST_ACTIONS // 2 + 1
    text = ",".join([f"0F{each}" for each in range(count)] + [f"0B{each}" for each in range(count)])
    assert "at most" in _step(schedule=None, ranks=None, microbatches=None, csv=text)["error"]


def test_a_run_of_the_same_orders_is_compared() -> None:
    runs = Runs()
    schedule = build_schedule("1f1b", ranks=4, microbatches=8)
    cost = StageCost(forward_s=0.01, backward_input_s=0.012, backward_weight_s=0.008)
    slow = simulate(schedule, [cost] * 4, slow_ranks={2: 1.5})
    number = runs.add(_saved(slow), "slow.trace")
    assert number == runs.add(_saved(slow), "slow.trace")
    shown = answers.run(number, runs)
    assert shown["name"] == "slow.trace"
    assert shown["usual"]["F"] == pytest.approx([0.01, 0.01, 0.015, 0.01])
    answer = answers.step(ASKED | {"run": number}, runs)
    assert "longer" in answer["comparison"]
    assert answers.step(ASKED | {"run": number, "schedule": "afab"}, runs)["comparison"] is None
    assert answers.step(ASKED | {"run": "0" * 16}, runs)["comparison"] is None
    with pytest.raises(InputError, match="drop its trace file"):
        answers.run("0" * 16, runs)
    document = json.loads(answers.perfetto({"predicted": ASKED, "measured": number}, runs))
    assert len(document["traceEvents"]) > 2 * 4 * 16


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 no zip", b"\x00" * 100])
def test_what_is_no_run_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="not a saved trace"):
        Runs().add(data, "x.trace")


def test_a_small_file_that_holds_too_much_is_refused() -> None:
    packed = io.BytesIO()
    np.savez_compressed(packed, header=np.zeros(2**29 + 1, np.int8))
    assert len(packed.getvalue()) < 2**20
    with pytest.raises(InputError, match="at most"):
        Runs().add(packed.getvalue(), "bomb.trace")


def test_only_the_last_runs_are_kept() -> None:
    runs = Runs()
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
    numbers = [
        runs.add(_saved(simulate(build_schedule("1f1b", ranks=2, microbatches=m), [cost] * 2)), f"{m}")
        for m in range(1, 11)
    ]
    assert runs.get(numbers[-1])[0] == "10"
    with pytest.raises(InputError):
        runs.get(numbers[0])
