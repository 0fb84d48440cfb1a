"""Data: inputs where the first stage is, targets where the last is, nothing elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ppexec
from ppexec import Session, WorkerPool
from ppexec.models.batch import load_batch
from ppexec.models.seeds import microbatch_order
from tests.support.factories import spelled
from tests.support.remote import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")

CPU = torch.device("cpu")


def sample(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([float(index)]), torch.tensor([-float(index)])


def load(reader: Any = sample, *, step: int = 0, first: bool = True, last: bool = True, seed: int = 0) -> Any:
    return load_batch(reader, seed=seed, step=step, microbatches=4, has_first=first, has_last=last, device=CPU)


@given(st.integers(0, 99), st.integers(0, 9))
def test_a_step_reads_its_microbatches_in_the_order_of_seed_and_step(seed: int, step: int) -> None:
    order = microbatch_order(seed, step=step, microbatches=4).tolist()
    batch = load(seed=seed, step=step)
    assert [int(value) for value in batch.inputs] == order
    assert [-int(value) for value in batch.targets] == order


def test_the_first_stage_has_inputs_alone_and_the_last_targets_alone() -> None:
    first, last = load(last=False), load(first=False)
    assert (len(first.inputs), first.targets) == (4, [])
    assert (last.inputs, len(last.targets)) == ([], 4)


def test_between_them_nothing_is_read() -> None:
    def refuse(index: int) -> Any:
        raise AssertionError("a middle stage read data")

    batch = load(refuse, first=False, last=False)
    assert (batch.inputs, batch.targets) == ([], [])


def test_a_slice_of_a_data_set_gets_a_storage_of_its_own() -> None:
    """Else a microbatch would count the whole data set as its activation."""
    data = torch.arange(1000.0)
    batch = load(lambda index: (data[index : index + 1], data[index + 1 : index + 2]))
    assert all(value.untyped_storage().nbytes() == 4 for value in [*batch.inputs, *batch.targets])


@pytest.mark.parametrize(
    ("pair", "name"),
    [(torch.zeros(2), "Tensor"), ((torch.zeros(1),) * 3, "tuple"), ([[1], [2]], "list"), (None, "NoneType")],
)
def test_a_sample_that_is_no_pair_of_tensors_is_refused(pair: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"sample\(\d\) must give \(inputs, targets\), two tensors, got {name}"):
        load(lambda index: pair)


@pytest.mark.parametrize("gives", ["one", "three", "list", "none"])
def test_a_run_with_such_a_sample_says_the_same(pool: WorkerPool, gives: str) -> None:
    """Shapes are inferred from a sample before data is read; that too must not end in a traceback."""
    with pytest.raises(ValueError, match=r"sample\(0\) must give \(inputs, targets\), two tensors"):
        ppexec.verify(tiny(model=spelled("bad_sample", gives=gives)), pool=pool)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_only_the_first_and_the_last_rank_read_data(ranks: int, pool: WorkerPool, tmp_path: Path) -> None:
    model = spelled("noting", directory=str(tmp_path))
    with Session(tiny(model=model, ranks=ranks, layers=ranks, microbatches=3), pool=pool) as session:
        session.measure(1, first_step=2)
    read = {(int(rank), int(index)) for rank, index in (path.name.split("-") for path in tmp_path.iterdir())}
    expected = {(rank, index) for rank in {0, ranks - 1} for index in (6, 7, 8)}
    assert read == expected | {(0, 0)}  # the first rank reads one sample for its shape


def test_every_input_and_target_has_a_storage_of_its_own() -> None:
    """Cause of activation bytes that did not add up: a data set that gives one tensor again and again."""
    constant = torch.ones(3)
    batch = load(lambda index: (constant, constant))
    storages = {tensor.untyped_storage().data_ptr() for tensor in [*batch.inputs, *batch.targets]}
    assert len(storages) == 8
    assert all(torch.equal(tensor, constant) for tensor in [*batch.inputs, *batch.targets])
