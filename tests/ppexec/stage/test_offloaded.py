"""O and L for real: the same bits, memory that is really given back, and every byte as predicted."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import ppexec
import ppsim
from ppexec import Session, WorkerPool
from ppexec.models.mlp import MLPBlock
from ppexec.stage.ledger import Ledger, tensors_of
from ppexec.stage.offloaded import Offloadable
from tests.support.chains import Case, cases
from tests.support.layers import WIDTH
from tests.support.remote import tiny
from tests.support.settings import with_workers
from tests.support.stage_steps import (
    HOST,
    STAGE_CASES,
    StageCase,
    StepData,
    assert_same_bits,
    stage_of,
    stepped,
    uses_nothing,
)
from tests.support.strategies import offloads, schedules

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")


@settings(max_examples=40)
@given(case=STAGE_CASES, again=st.sets(st.sampled_from([0, 1, 2])), counts=st.booleans())
def test_gradients_outputs_and_losses_have_the_same_bits(case: StageCase, again: set[int], counts: bool) -> None:
    """Microbatches 0 and 2 move, some are recomputed."""
    plain, other = case.stages()
    data = StepData.drawn(is_last=case.is_last)
    how: dict[str, Any] = {"split": case.is_split, "again": again, "counts": counts}
    assert_same_bits((plain, other), (stepped(plain, data, **how), stepped(other, data, moved=(0, 2), **how)))


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_memory_is_given_back_while_activations_are_away(is_split: bool, again: bool) -> None:
    """Every storage that was made in F is gone, but for what the layers own; and back after L, with the same bits."""
    width, rows, size = 16, 6, 4
    layers: list[nn.Module] = [MLPBlock(width, 4 * width) for _ in range(2)]
    stage = stage_of(layers)
    made: list[StorageWeakRef] = []
    stage.ledger = ledger = Ledger(tensors_of(layers), remembers=True)
    output = stage.forward(0, torch.randn(rows, width), None, split=is_split, again=again, moves=True)
    made = [*(ledger._remembered or {}).values(), StorageWeakRef(output.untyped_storage())]
    held, kept = ledger.level_bytes, output.clone()
    del output
    assert held == ((2 if again else 2 * 9 + 1) * rows * width * size)
    assert stage.offload(0, HOST, uses_nothing) == held
    gc.collect()
    assert ledger.level_bytes == 0
    assert all(each.expired() for each in made)
    assert stage.load(0, uses_nothing) == held
    assert ledger.level_bytes == held
    outputs = stage._held_until_again[0].tensors[1:] if again else stage._held[0].outputs
    assert torch.equal(outputs[0], kept)


def test_tensors_that_share_a_storage_still_do_and_views_stay_views() -> None:
    whole = torch.arange(12.0)
    parts = [whole[:4], whole[4:].view(2, 4).t(), torch.empty(0), torch.tensor(3)]
    wanted = [(each.clone(), each.stride()) for each in parts]
    movable = Offloadable([], None)
    movable.keep(parts)
    assert movable.leave(HOST, uses_nothing) == 12 * 4 + 8
    assert [each.untyped_storage().nbytes() <= 8 for each in parts] == [True] * 4
    assert [each.shape for each in parts] == [each.shape for each, _ in wanted]
    movable.come_back(uses_nothing)
    for found, (values, stride) in zip(parts, wanted, strict=True):
        assert torch.equal(found, values)
        assert found.stride() == stride
    assert parts[0].untyped_storage().data_ptr() == parts[1].untyped_storage().data_ptr()


def test_a_stage_that_hands_on_its_input_holds_it_once() -> None:
    """Cause of a bug: input and output are one tensor, which had lost its storage when it was dropped once more."""
    stage = stage_of([nn.Identity()])
    stage.ledger = ledger = Ledger([])
    value = torch.randn(2, WIDTH)
    stage.forward(0, value, None, moves=True)
    assert ledger.level_bytes == value.nbytes
    assert stage.offload(0, HOST, uses_nothing) == value.nbytes
    assert ledger.level_bytes == 0
    stage.load(0, uses_nothing)
    assert ledger.level_bytes == value.nbytes
    assert torch.equal(stage.backward(0, torch.ones(2, WIDTH)), torch.ones(2, WIDTH))
    assert ledger.level_bytes == 0


@pytest.mark.parametrize(("option", "value"), [("recompute", True), ("graphs", True), ("tp", 2)])
def test_what_does_not_go_with_offloading_is_refused(option: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "moved.csv"
    moved = ppsim.build_schedule("1f1b", ranks=2, microbatches=4).with_offload()
    path.write_text(moved.to_csv(offload=True))
    with pytest.raises(ppsim.InputError, match=f"offloads activations, and {option} {value} does not go with that"):
        tiny(from_csv=path, **{option: value})


# On real workers


def levels(config: ppexec.RunConfig, pool: WorkerPool) -> None:
    """Check that every level is counted as it is predicted from a profile, on devices and in host memory."""
    with Session(config, pool=pool) as session:
        memory = session.memory()
        stages = session.profile(1).stages
        trace = session.measure(1)[0]
    predicted = ppsim.simulate(config.pipeline, stages)
    for rank, counted in enumerate(memory):
        rows = list(predicted.program.rows_of(rank))
        assert counted.activation_bytes == predicted.activation_bytes[rows].tolist()
        if predicted.host_bytes is not None:
            assert counted.host_bytes == predicted.host_bytes[rows].tolist()
    if predicted.copy_bytes is None:
        return
    # A table that a layer keeps for all microbatches is copied along with each where no ledger knows it.
    assert (trace.copy_bytes >= predicted.copy_bytes).all()
    table = trace.program.offload
    assert (trace.copy_end_s >= trace.copy_start_s).all()
    back = np.flatnonzero(table.after >= 0)
    assert (trace.copy_start_s[back] >= trace.copy_end_s[table.after[back]]).all()


@pytest.mark.parametrize("schedule", ["afab", "1f1b", "zb-h1", "zb-v", "dualpipe-v"])
@pytest.mark.parametrize("recompute", [0.0, 0.5])
def test_runs_are_bit_equal_and_hold_what_is_predicted(
    schedule: str, recompute: float, pool: WorkerPool, tmp_path: Path
) -> None:
    built = ppsim.build_schedule(schedule, ranks=2, microbatches=6).with_recompute(share=recompute).with_offload()
    path = tmp_path / "moved.csv"
    path.write_text(built.to_csv(offload=True))
    config = tiny(from_csv=path, microbatches=6, layers=8, hidden=6, intermediate=10, seq=3)
    report = ppexec.verify(config, pool=pool)
    assert report.gradients_bit_equal
    assert report.outputs_bit_equal
    levels(config, pool)


def test_copies_of_the_model_move_too(pool: WorkerPool, tmp_path: Path) -> None:
    built = ppsim.build_schedule("dualpipe", ranks=2, microbatches=4).with_recompute(microbatches=[0]).with_offload()
    path = tmp_path / "both.csv"
    path.write_text(built.to_csv(offload=True))
    config = tiny(from_csv=path, copies=2, layers=4)
    report = ppexec.verify(config, pool=pool)
    assert report.gradients_bit_equal
    assert report.outputs_bit_equal
    levels(config, pool)


@pytest.mark.parametrize("backend", ["gloo", "local"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_streams_of_their_own_change_times_alone(backend: str, schedule: str, pool: WorkerPool, tmp_path: Path) -> None:
    """On an asynchronous device, here threads, copies run beside computations; bytes are counted at their places."""
    built = ppsim.build_schedule(schedule, ranks=2, microbatches=6).with_recompute(share=0.5).with_offload(ahead=2)
    path = tmp_path / "moved.csv"
    path.write_text(built.to_csv(offload=True))
    config = tiny(from_csv=path, microbatches=6, device="threads", backend=backend, hidden=32, seq=16)
    report = ppexec.verify(config, pool=pool)
    assert report.gradients_bit_equal
    assert report.outputs_bit_equal
    levels(config, pool)
    with Session(config, pool=pool) as session:
        (trace,) = session.measure(1)
    program, table = trace.program, trace.program.offload
    waiting = np.flatnonzero(table.load >= 0)
    assert (trace.start_s[waiting] >= trace.copy_end_s[table.load[waiting]]).all()
    for index in np.flatnonzero(table.kind == ppsim.Kind.O):
        made = (program.stage == table.stage[index]) & (program.microbatch == table.microbatch[index])
        assert trace.copy_start_s[index] >= trace.end_s[made & (program.kind == ppsim.Kind.F)].min()
    assert ppsim.attribute(trace).bubble_s.tolist() == trace.bubble_s.tolist()


@with_workers
@given(case=cases(odd=True), data=st.data())
def test_every_model_and_order_holds_what_is_predicted(
    case: Case, data: st.DataObject, pool: WorkerPool, tmp_path: Path
) -> None:
    config = case.config(tmp_path)
    moved = data.draw(offloads(config.pipeline))
    values = {name: value for name, value in case.values.items() if name != "schedule"} | {"copies": moved.copies}
    levels(Case(values=values, csv=moved.to_csv(offload=True)).config(tmp_path), pool)


@with_workers
@given(data=st.data())
def test_every_order_is_bit_equal(data: st.DataObject, pool: WorkerPool, tmp_path: Path) -> None:
    moved = data.draw(schedules(max_microbatches=6).flatmap(offloads))
    case = Case(
        values={"layers": 2 * moved.stages, "ranks": moved.ranks, "microbatches": moved.microbatches},
        csv=moved.to_csv(offload=True),
    )
    report = ppexec.verify(case.config(tmp_path), pool=pool)
    assert report.first_difference is None
    assert report.passed
