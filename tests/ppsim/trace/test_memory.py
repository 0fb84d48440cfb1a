"""Memory columns: against a loop over the actions, written from the definitions alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Action, Collectives, Kind, Network, Schedule, StageCost, Trace, build_schedule, simulate
from ppsim.explain.memory_difference import first_difference
from ppsim.schedule.deadlock import smallest_receive_window
from ppsim.simulation.memory_columns import with_columns
from ppsim.simulation.memory_levels import gradient_levels, optimizer_state_bytes, parameters_per_rank, receive_levels
from tests.support.strategies import networks, schedules, stage_costs


def _parts(schedule: Schedule, rank: int) -> list[list[Action]]:
    return [[action] if isinstance(action, Action) else list(action) for action in schedule.orders[rank]]


@given(data=st.data(), extra=st.integers(0, 3))
def test_receive_buffers_are_those_of_a_rank_that_posts_and_uses(data: st.DataObject, extra: int) -> None:
    schedule = data.draw(schedules())
    program = schedule.program
    sizes = data.draw(st.lists(st.integers(0, 99), min_size=len(program.messages), max_size=len(program.messages)))
    window = max(smallest_receive_window(program), 1) + extra
    found = receive_levels(program, np.array(sizes, np.int64), window)
    for rank in range(schedule.ranks):
        to_post: dict[int, list[int]] = {}
        for message in range(len(program.messages)):
            if program.messages.destination[message] == rank:
                to_post.setdefault(int(program.messages.source[message]), []).append(message)
        posted = {message for link in to_post.values() for message in link[:window]}
        to_post = {source: link[window:] for source, link in to_post.items()}
        wanted = []
        row = program.rows_of(rank).start
        for parts in _parts(schedule, rank):
            for message in program.message_in[row : row + len(parts)].tolist():
                if message >= 0:
                    posted.remove(message)
                    link = to_post[int(program.messages.source[message])]
                    posted |= set(link[:1])
                    del link[:1]
            wanted += [sum(sizes[message] for message in posted)] * len(parts)
            row += len(parts)
        assert found[list(program.rows_of(rank))].tolist() == wanted


def test_a_window_of_none_is_refused() -> None:
    program = build_schedule("afab", ranks=2, microbatches=2).program
    with pytest.raises(ValueError, match="a receive window must be 1 or more, got 0"):
        receive_levels(program, np.ones(4, np.int64), 0)


@given(st.data())
def test_gradients_are_there_from_a_stages_first_b_or_w(data: st.DataObject) -> None:
    schedule = data.draw(schedules())
    sizes = data.draw(st.lists(st.integers(0, 99), min_size=schedule.stages, max_size=schedule.stages))
    costs = [_cost(parameter_bytes=2 * size, gradient_bytes=size) for size in sizes]
    found = gradient_levels(schedule.program, costs)
    for rank in range(schedule.ranks):
        touched: set[int] = set()
        wanted = []
        for parts in _parts(schedule, rank):
            touched |= {part.stage for part in parts if part.kind in (Kind.B, Kind.W)}
            wanted += [sum(sizes[stage] for stage in touched)] * len(parts)
        assert found[list(schedule.program.rows_of(rank))].tolist() == wanted
    held = [0] * schedule.ranks
    for stage, rank in enumerate(schedule.placement):
        held[rank] += 2 * sizes[stage]
    assert parameters_per_rank(schedule.program, costs).tolist() == held


def _cost(**changes: int) -> StageCost:
    return StageCost(**{"forward_s": 1, "backward_input_s": 1, "backward_weight_s": 1, **changes})  # type: ignore[arg-type]


@given(st.data())
def test_unfinished_sends_are_those_between_their_producers_end_and_leaving(data: st.DataObject) -> None:
    schedule = data.draw(schedules())
    if data.draw(st.booleans()):
        schedule = schedule.forward_only()
    trace = simulate(schedule, data.draw(stage_costs(schedule.stages)), network=data.draw(networks(schedule.ranks)))
    program, messages = trace.program, trace.program.messages
    ends = trace.end_s[(program.action_start[1:] - 1)[program.row_action]]
    found = trace.send_buffer_bytes
    for row in range(len(program.stage)):
        time_s = trace.effect_s[row]
        wanted = sum(
            int(trace.message_bytes[message])
            for message in range(len(messages))
            if messages.source[message] == program.rank[row]
            and (schedule.is_forward_only or program.kind[messages.producer[message]] != Kind.F)
            and ends[messages.producer[message]] <= time_s < trace.message_left_s[message]
        )
        assert found[row] == wanted


@given(st.data())
def test_parts_at_the_peak_add_up_to_the_total(data: st.DataObject) -> None:
    schedule = data.draw(schedules())
    network = data.draw(networks(schedule.ranks))
    trace = simulate(schedule, data.draw(stage_costs(schedule.stages)), network=network)
    trace = with_columns(trace, receive_window=smallest_receive_window(trace.program) + 1, optimizer="adam")
    memory = trace.memory
    parts = trace.held_at_peak()
    assert sum(parts.values(), np.zeros(trace.ranks, np.int64)).tolist() == memory.total_bytes.tolist()
    for name, part in parts.items():
        assert (part <= getattr(memory, name)).all()
    frame = memory.to_frame()
    assert frame.index.name == "rank"
    assert frame["total_bytes"].tolist() == memory.total_bytes.tolist()


def test_one_step_by_hand() -> None:
    """Two ranks, two microbatches, AFAB, a window of 1, transfers of 5 s."""
    cost = _cost(activation_bytes=10, output_bytes=5, parameter_bytes=7)
    trace = simulate(build_schedule("afab", ranks=2, microbatches=2), [cost] * 2, network=Network(bytes_per_s=1))
    trace = with_columns(trace, receive_window=1, optimizer="momentum")
    assert trace.receive_buffer_bytes is not None
    assert trace.receive_buffer_bytes.tolist() == [5, 5, 5, 0, 5, 0, 0, 0]  # a rank uses, then posts, then computes
    memory = trace.memory
    assert memory.to_dict() == {
        "activation_bytes": [20, 20],
        "receive_buffer_bytes": [5, 5],
        "send_buffer_bytes": [0, 10],  # both gradients: the first takes 5 s, the next B only 2
        "parameter_bytes": [7, 7],
        "gradient_bytes": [7, 7],
        "optimizer_bytes": [7, 7],
        "total_bytes": [7 + 7 + 25, 7 + 7 + 22],
    }


def test_optimizers_by_name() -> None:
    assert [optimizer_state_bytes(name, 12) for name in ("sgd", "momentum", "adam", "adamw")] == [0, 12, 24, 24]
    assert optimizer_state_bytes("adamw", 12, tensors=2) == 32
    with pytest.raises(ValueError, match="unknown optimizer 'lion': take sgd, momentum, adam, adamw"):
        optimizer_state_bytes("lion", 12)
    trace = simulate(build_schedule("afab", ranks=2, microbatches=2), [_cost()] * 2)
    with pytest.raises(ValueError, match="this trace does not know them"):
        with_columns(replace(trace, gradient_bytes=None), optimizer="adam")


def test_the_first_difference_names_rank_action_and_both_numbers() -> None:
    cost = _cost(activation_bytes=10, output_bytes=5, parameter_bytes=7)
    schedule = build_schedule("afab", ranks=2, microbatches=2)
    one = with_columns(simulate(schedule, [cost] * 2), receive_window=2)
    assert first_difference(one, one) is None
    other = with_columns(simulate(schedule, [cost, replace(cost, activation_bytes=11)]), receive_window=2)
    assert first_difference(one, other) == {
        "column": "activations",
        "rank": 1,
        "action": "1F0",
        "predicted": 10,
        "measured": 11,
    }
    other = simulate(schedule, [cost, replace(cost, parameter_bytes=8, gradient_bytes=7)])
    assert first_difference(one, other) == {
        "column": "parameters",
        "rank": 1,
        "action": None,
        "predicted": 7,
        "measured": 8,
    }
    unknown = replace(other, gradient_bytes=None, parameter_bytes=None)
    assert first_difference(one, unknown) is None
    schedule = build_schedule("1f1b", ranks=2, microbatches=6).with_offload().with_sharding()
    moved = simulate(schedule, [cost] * 2, collectives=Collectives(replicas=2))
    for name, column in (("host_bytes", "activations in host memory"), ("unsharded_bytes", "whole parameters")):
        more = getattr(moved, name) + (np.arange(len(moved.start_s)) == 5)
        found = first_difference(moved, replace(moved, **{name: more}))
        assert found is not None
        assert (found["column"], found["action"]) == (column, str(moved.program.action_of(5)))
        assert found["measured"] == found["predicted"] + 1


def test_columns_are_saved_and_older_files_have_none(tmp_path: Path) -> None:
    schedule = build_schedule("1f1b", ranks=2, microbatches=4)
    trace = simulate(schedule, [_cost(parameter_bytes=3, output_bytes=2)] * 2)
    full = with_columns(trace, receive_window=2, optimizer="adam")
    full.save(tmp_path / "full")
    again = Trace.load(tmp_path / "full")
    assert again.memory.to_dict() == full.memory.to_dict()
    assert first_difference(full, again) is None
    bare = replace(trace, gradient_bytes=None, parameter_bytes=None)
    bare.save(tmp_path / "bare")
    again = Trace.load(tmp_path / "bare")
    assert (again.gradient_bytes, again.receive_buffer_bytes, again.optimizer_bytes) == (None, None, None)
    assert set(again.memory.to_dict()) == {"activation_bytes", "send_buffer_bytes", "total_bytes"}
    with np.load(tmp_path / "full") as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["parameter_bytes"] = arrays["parameter_bytes"][:1]
    with open(tmp_path / "bad", "wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(ValueError, match=r"damaged trace: parameter_bytes has shape \(1,\)"):
        Trace.load(tmp_path / "bad")
