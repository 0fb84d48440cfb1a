"""Traces: what is read off them, and files that come back the same or are refused."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ppsim import Action, Schedule, StageCost, Trace, build_schedule, simulate
from tests.support.strategies import assume_runs, communications, networks, schedules, stage_costs

_in_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
_ARRAYS = ["start_s", "end_s", "activation_bytes", "message_bytes", "message_start_s", "message_left_s"]


def _trace(schedule: Schedule | None = None) -> Trace:
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=5, output_bytes=3)
    schedule = build_schedule("afab", ranks=2, microbatches=2) if schedule is None else schedule
    return simulate(schedule, [cost] * schedule.stages)


@_in_folder
@given(data=st.data())
def test_save_and_load(tmp_path: Path, data: st.DataObject) -> None:
    schedule = data.draw(schedules() | schedules().flatmap(communications))
    assume_runs(schedule)
    trace = simulate(
        schedule, data.draw(stage_costs(schedule.stages)), network=data.draw(networks(schedule.ranks)), overlap=0.5
    )
    trace.save(tmp_path / "t.trace")
    again = Trace.load(tmp_path / "t.trace")
    assert again.schedule == schedule
    assert again.schedule.communication == schedule.communication
    assert (again.clock, again.details) == (trace.clock, trace.details)
    for name in [*_ARRAYS, "message_arrival_s"]:
        assert np.array_equal(getattr(again, name), getattr(trace, name))
        assert getattr(again, name).dtype == getattr(trace, name).dtype
    assert again.to_frame().equals(trace.to_frame())


@given(st.data())
def test_the_frame_has_every_computation_and_both_ends_of_every_message(data: st.DataObject) -> None:
    schedule = data.draw(schedules())
    trace = simulate(schedule, data.draw(stage_costs(schedule.stages)), network=data.draw(networks(schedule.ranks)))
    frame, program = trace.to_frame(), trace.program
    assert list(frame.columns) == ["rank", "stage", "kind", "microbatch", "start_s", "end_s", "size_bytes"]
    assert frame.start_s.is_monotonic_increasing
    spelled = sorted(zip(frame["rank"], frame.stage, frame.kind, frame.microbatch, strict=True))
    wanted = sorted(
        (rank, part.stage, part.kind.name, part.microbatch)
        for rank in range(program.ranks)
        for action in program.order_with_messages(rank)
        for part in ([action] if isinstance(action, Action) else action)
    )
    assert spelled == wanted
    rows = {
        (f"{row.stage}{row.kind}{row.microbatch}", row.rank): (row.start_s, row.end_s, row.size_bytes)
        for row in frame.itertuples()
    }
    messages = program.messages
    for k in range(len(messages)):
        sent, received = (str(program.message_action(k, sending=sending)) for sending in (True, False))
        begun, size = trace.message_start_s[k], trace.message_bytes[k]
        assert rows[sent, messages.source[k]] == (begun, trace.message_left_s[k], size)
        assert rows[received, messages.destination[k]] == (begun, trace.message_arrival_s[k], size)
    for k in range(len(program.stage)):
        computed = (trace.start_s[k], trace.end_s[k], trace.activation_bytes[k])
        assert rows[str(program.action_of(k)), program.rank[k]] == computed
    computes = frame[frame.kind.isin(list("FBIWR"))]
    assert (computes.end_s.max() - computes.start_s.min()) == trace.makespan_s
    assert (frame.end_s >= frame.start_s).all()


def test_metrics_by_hand() -> None:
    """Two ranks, one microbatch, F 1, B 2, a message of 1 s: F at 0 and 2, B at 3 and 6."""
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=5)
    from ppsim import Network

    trace = simulate(build_schedule("afab", ranks=2, microbatches=1), [cost] * 2, network=Network(latency_s=1))
    assert trace.makespan_s == 8
    assert trace.first_start_s.tolist() == [0, 2]
    assert trace.last_end_s.tolist() == [8, 5]
    assert trace.rank_time_s.tolist() == [8, 3]
    assert trace.compute_s.tolist() == [3, 3]
    assert trace.bubble_s.tolist() == [5, 5]
    assert trace.bubble_fraction == 10 / 16
    assert trace.peak_activation_bytes.tolist() == [5, 5]
    assert trace.ranks == 2


def test_a_rank_without_actions_is_all_bubble() -> None:
    trace = _trace(Schedule.of([["0F0", "0B0"], []]))
    assert trace.makespan_s == 3
    assert trace.rank_time_s.tolist() == [3, 0]
    assert trace.bubble_s.tolist() == [0, 3]
    assert trace.bubble_fraction == 0.5
    assert trace.peak_activation_bytes.tolist() == [5, 0]


def test_memory_takes_effect_at_the_start_of_f_and_at_the_end_of_all_else() -> None:
    trace = _trace(Schedule.of([["0F0", "(0F1;0B0)OVERLAP_F_B", "0I1", "0W1"]]))
    assert trace.start_s.tolist() == [0, 1, 2, 4, 5]
    assert trace.effect_s.tolist() == [0, 1, 4, 5, 6]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    _trace().save(tmp_path / "good.trace")
    return tmp_path / "good.trace"


def _rewritten(path: Path, change: Callable[[dict], object]) -> Path:
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    header = json.loads(arrays.pop("header").tobytes())
    parts = {"header": header, **arrays}
    change(parts)
    header = np.frombuffer(json.dumps(parts.pop("header")).encode(), np.uint8)
    with open(path.with_name("bad.trace"), "wb") as file:
        np.savez(file, header=header, **parts)
    return path.with_name("bad.trace")


def test_another_schema_is_refused(saved: Path) -> None:
    path = _rewritten(saved, lambda parts: parts["header"].update(schema=99))
    with pytest.raises(ValueError, match=r"bad\.trace has trace schema 99, this version reads 1 to 3"):
        Trace.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts.pop("start_s"),
        lambda parts: parts.pop("order_0"),
        lambda parts: parts["header"].pop("placement"),
        lambda parts: parts["header"].update(placement=[0, "1"]),
        lambda parts: parts["header"].update(placement=None),
        lambda parts: parts["header"].update(microbatches=10**15),
        lambda parts: parts["header"].update(microbatches=2.5),
        lambda parts: parts["header"].update(details=[1]),
        lambda parts: parts.update(start_s=parts["start_s"][1:]),
        lambda parts: parts.update(start_s=parts["start_s"].astype(str)),
        lambda parts: parts.update(message_bytes=parts["message_bytes"].astype(float)),
        lambda parts: parts.update(order_0=parts["order_0"][:2]),
        lambda parts: parts.update(order_0=parts["order_0"] + 1),
        lambda parts: parts.update(order_0=parts["order_0"].astype(float)),
        lambda parts: parts.update(order_0=np.zeros((4, 0), int), order_1=np.zeros((4, 0), int)),
    ],
)
def test_a_damaged_trace_is_refused(saved: Path, change: Callable[[dict], object]) -> None:
    """Cause of several bugs: KeyError, TypeError, IndexError and traces with arrays of another schedule came out."""
    with pytest.raises(ValueError, match=r"bad\.trace is a damaged trace"):
        Trace.load(_rewritten(saved, change))


def _npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(3))
    return file.getvalue()


def _zip(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"not a trace", _npy(), _zip(), _zip(header=b"{}"), _zip(**{"header.npy": b"{}"})],
    ids=["empty", "zip magic", "text", "npy", "empty zip", "raw header", "no array"],
)
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    """Cause of a bug: a lone .npy array came out as a TypeError."""
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="x is not a saved trace"):
        Trace.load(tmp_path / "x")


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        _trace().save(tmp_path)


@_in_folder
@given(data=st.binary(max_size=80), at=st.floats(0, 1), length=st.integers(0, 8))
@example(data=b"\x08", at=0.5, length=1)
def test_bytes_changed_anywhere_give_the_same_trace_or_a_value_error(
    tmp_path: Path, data: bytes, at: float, length: int
) -> None:
    """Cause of bugs: zlib.error, NotImplementedError and RuntimeError of damaged archives are no ValueErrors."""
    _trace().save(tmp_path / "t")
    content = (tmp_path / "t").read_bytes()
    place = int(at * len(content))
    (tmp_path / "t").write_bytes(content[:place] + data + content[place + length :])
    try:
        again = Trace.load(tmp_path / "t")
    except ValueError:
        return
    assert again.schedule == _trace().schedule
    assert again.end_s.tolist() == _trace().end_s.tolist()


@_in_folder
@given(st.binary(max_size=200))
def test_rubbish_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(ValueError, match="is not a saved trace"):
        Trace.load(tmp_path / "t")
