"""Chrome traces of PyTorch's pipeline runtime: made here by it, and written as it writes them on GPUs."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ppexec.experiment.torch_job import profile_schedules
from ppsim import InputError, Network, StageCost, advise, attribute, build_schedule, read_run, simulate
from tests.support.kineto import write_kineto
from tests.support.primus import apart

pytestmark = pytest.mark.xdist_group("kineto")  # the profiled job runs once
SLEEP_S = 0.02
ROOT = Path(__file__).parents[3]
COST = StageCost(forward_s=1.0, backward_input_s=1.25, backward_weight_s=0.75, activation_bytes=100, output_bytes=8)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 ranks: two steps of 1F1B in "1f1b", and two of interleaved 1F1B in "interleaved-1f1b"."""
    folder = tmp_path_factory.mktemp("profiled")
    schedules = {name: build_schedule(name, ranks=4, microbatches=8) for name in ("1f1b", "interleaved-1f1b")}
    profile_schedules(schedules, folder, layers=8, layer_s=SLEEP_S / 2, steps=2)
    return folder


@pytest.mark.parametrize("name", ["1f1b", "interleaved-1f1b"])
def test_a_job_of_pytorchs_runtime_is_read(profiled: Path, name: str) -> None:
    found = read_run(profiled / name)
    assert found.environment["format"] == "kineto"
    assert found.schedule.name == name
    assert found.schedule.orders == build_schedule(name, ranks=4, microbatches=8).orders
    assert len(found.traces) == 2
    first, second = found.traces
    assert second.start_s.min() > first.end_s.max()
    for trace in found.traces:
        messages = trace.program.messages
        assert (trace.message_arrival_s >= trace.message_start_s).all()
        assert (trace.start_s[messages.consumer] >= trace.end_s[messages.producer]).all()
        assert trace.unknown == ("activation bytes", "message bytes")
        assert (trace.total_peak_bytes > 64 * 64 * 4).all()  # at least a weight
        assert sum(attribute(trace).fractions.values()) == pytest.approx(trace.bubble_fraction)


def test_a_wait_for_a_message_is_no_computation(profiled: Path) -> None:
    """Ranges hold the wait for their input. Rank 3 first waits for three forwards, none of which it computes."""
    file = next(each for each in (profiled / "1f1b").iterdir() if each.name == "rank3.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    ranges = sorted((event["ts"], event["dur"]) for event in events if event.get("name") == "PP:3F0")
    trace = read_run(profiled / "1f1b").traces[1]
    row = next(row for row in trace.program.rows_of(3))
    assert trace.end_s[row] - trace.start_s[row] < 0.8 * ranges[1][1] / 1e6


@pytest.mark.parametrize(
    ("name", "kernels", "compressed"),
    [("1f1b", False, False), ("interleaved-1f1b", True, True), ("dualpipe-v", False, True), ("zb-v", True, False)],
)
def test_written_steps_come_back(tmp_path: Path, name: str, kernels: bool, compressed: bool) -> None:
    """With kernels their times count, whatever the host did; NCCL's do not."""
    schedule = build_schedule(name, ranks=3, microbatches=6)
    step = simulate(schedule, [COST] * schedule.stages, network=Network(latency_s=0.125))
    write_kineto([step, step], tmp_path, behind_s=[0.0] * 3, kernels=kernels, compressed=compressed)
    found = read_run(tmp_path)
    assert found.schedule.orders == schedule.orders
    assert found.schedule.name == name
    assert len(found.traces) == 2
    trace = found.traces[1]
    assert trace.makespan_s == pytest.approx(step.makespan_s, abs=1e-4)
    assert trace.compute_s == pytest.approx(step.compute_s, abs=1e-3)
    begun = trace.start_s - trace.start_s.min()
    first = schedule.program.action_start[:-1]
    assert begun[first] == pytest.approx(step.start_s[first], abs=1e-4)


def test_clocks_that_are_apart_are_aligned(tmp_path: Path) -> None:
    schedule = build_schedule("1f1b", ranks=4, microbatches=6)
    step = simulate(schedule, [COST] * 4, network=Network(latency_s=0.125))
    write_kineto([step], tmp_path, behind_s=apart(4))
    trace = read_run(tmp_path).traces[0]
    assert trace.start_s - trace.start_s[0] == pytest.approx(step.start_s, abs=1e-4)
    sent = trace.message_start_s - trace.start_s[0]
    assert sent == pytest.approx(step.message_start_s, abs=1e-4)


def test_clocks_that_agree_are_left_alone(tmp_path: Path) -> None:
    """Messages that are slower one way than the other would shift them."""
    schedule = build_schedule("1f1b", ranks=2, microbatches=6)
    network = Network(links={(0, 1): Network(latency_s=0.5).default})
    step = simulate(schedule, [COST] * 2, network=network)
    write_kineto([step], tmp_path, behind_s=[0.0, 0.0])
    trace = read_run(tmp_path).traces[0]
    assert trace.details["clock_offsets_s"] == [0.0, 0.0]


def _written(path: Path) -> Path:
    step = simulate(build_schedule("1f1b", ranks=3, microbatches=4), [COST] * 3)
    write_kineto([step, step], path, behind_s=[0.0] * 3)
    return path


def _changed(path: Path, rank: int, change) -> None:
    file = path / f"trace_{rank}.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def test_a_missing_rank_is_named_by_its_stage(tmp_path: Path) -> None:
    (_written(tmp_path) / "trace_1.json").unlink()
    with pytest.raises(InputError, match="no trace has ranges of stage 1"):
        read_run(tmp_path)


def test_a_missing_range_is_named(tmp_path: Path) -> None:
    _written(tmp_path)

    def drop(document: dict) -> None:
        events = document["traceEvents"]
        events.remove(next(event for event in events if event["name"] == "PP:2B3"))

    _changed(tmp_path, 2, drop)
    with pytest.raises(InputError, match="rank 2 has 1 ranges PP:2B3 where other actions have 2"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda document: document["traceEvents"][0].__setitem__("name", "PP:junk"), r"range 'PP:junk': 'junk' is not"),
        (lambda document: document.pop("traceEvents"), "no list traceEvents"),
        (lambda document: document.__setitem__("distributedInfo", {"rank": 0}), "both of rank 0"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, change, says: str) -> None:
    _written(tmp_path)
    _changed(tmp_path, 2, change)
    with pytest.raises(InputError, match=says):
        read_run(tmp_path)


def test_traces_without_a_pipeline_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rank0.json").write_text(json.dumps({"traceEvents": []}))
    with pytest.raises(InputError, match="no trace has ranges named PP:0F1"):
        read_run(tmp_path)
    (tmp_path / "rank0.json").unlink()
    (tmp_path / "rank0.json.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="not compressed by gzip"):
        read_run(tmp_path)


def test_without_sends_messages_stay_unknown(tmp_path: Path) -> None:
    _written(tmp_path)
    for rank in range(3):
        _changed(
            tmp_path,
            rank,
            lambda document: document.__setitem__(
                "traceEvents", [event for event in document["traceEvents"] if "SEND" not in event["name"]]
            ),
        )
    trace = read_run(tmp_path).traces[0]
    assert "message times" in trace.unknown
    assert np.isfinite(attribute(trace).messages_s).all()


def test_advice_on_a_profiled_job_loads_into_pytorchs_runtime(profiled: Path, tmp_path: Path) -> None:
    """The runtime runs the schedule that was advised, split backwards and all, and its profile shows that order."""
    advice = advise(read_run(profiled / "1f1b"), with_search=False)
    chosen = next(each for each in advice.candidates if each.name == "zb-h1")
    again = profile_schedules({"again": chosen.schedule}, tmp_path, layers=8, layer_s=SLEEP_S / 2, steps=1)
    assert again["again"].schedule.orders == chosen.schedule.orders


def _all_changed(path: Path, change: Callable[[int, dict], None]) -> None:
    for rank, file in enumerate(sorted(path.glob("*.json"))):
        document = json.loads(file.read_text())
        change(rank, document)
        file.write_text(json.dumps(document))


def _without_stages(document: dict, rank: int, groups: list[tuple[str, list[int]]]) -> None:
    """Ranges as PyTorch's schedules of one stage per rank name them."""
    document["distributedInfo"] = {"rank": rank, "pg_config": [{"pg_desc": d, "ranks": ranks} for d, ranks in groups]}
    for event in document["traceEvents"]:
        if match := re.fullmatch(r"PP:\d+([FB])(\d+)", event["name"]):
            event["name"] = f"{'Forward' if match[1] == 'F' else 'Backward'} {match[2]}"


@pytest.mark.parametrize("description", ["mesh_pp", "pp"])
def test_replicas_are_not_read_as_stages(tmp_path: Path, description: str) -> None:
    """Ranges without a stage took the rank for it: two replicas of two stages were four stages."""
    step = simulate(build_schedule("afab", ranks=2, microbatches=3), [COST] * 2)
    for replica in range(2):
        write_kineto([step], tmp_path, behind_s=[0.0, 0.0], name=f"trace_{replica}{{rank}}.json")
    whole = ("default_pg", [0, 1, 2, 3])

    def name_groups(rank: int, document: dict) -> None:
        own = [0, 1] if rank < 2 else [2, 3]
        _without_stages(document, rank, [whole, ("mesh_dp", [rank % 2, rank % 2 + 2]), (description, own)])

    _all_changed(tmp_path, name_groups)
    found = read_run(tmp_path)
    assert found.schedule.orders == step.schedule.orders
    _all_changed(tmp_path, lambda rank, document: document["distributedInfo"]["pg_config"].pop())
    with pytest.raises(InputError, match="its ranges name no stage, and the job has other groups"):
        read_run(tmp_path)


def test_all_kernels_of_one_launch_are_one_span(tmp_path: Path) -> None:
    """The last kernel of a graph's launch stood for all."""
    step = simulate(build_schedule("1f1b", ranks=2, microbatches=3), [COST] * 2)
    write_kineto([step], tmp_path, behind_s=[0.0, 0.0], kernels=True)

    def one_launch(rank: int, document: dict) -> None:
        for event in document["traceEvents"]:
            if event["name"] in ("gemm", "cudaLaunchKernel"):
                event["args"]["correlation"] -= event["args"]["correlation"] % 10

    _all_changed(tmp_path, one_launch)
    assert read_run(tmp_path).traces[0].makespan_s == pytest.approx(step.makespan_s)


@pytest.mark.parametrize(("name", "value"), [("ts", 10**400), ("dur", True), ("ts", None), ("ts", float("inf"))])
def test_a_time_that_no_float_holds_is_no_time(tmp_path: Path, name: str, value: object) -> None:
    """400 digits were an OverflowError."""
    step = simulate(build_schedule("1f1b", ranks=2, microbatches=3), [COST] * 2)
    write_kineto([step], tmp_path, behind_s=[0.0, 0.0])
    _all_changed(tmp_path, lambda rank, document: document["traceEvents"][0].update({name: value}))
    with pytest.raises(InputError):
        read_run(tmp_path)
