"""GPU: the parts of the GPU check, case by case, where there is a GPU. See `python -m ppexec.gpucheck`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ppexec import WorkerPool
from ppexec.gpucheck.parts import PARTS, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason=f"PyTorch {torch.__version__} sees no NVIDIA GPU on this machine"
    ),
    pytest.mark.timeout(300),
]
CASES = {part.name: part.cases for part in PARTS}


def of(*names: str) -> list[object]:
    """The cases of these parts."""
    return [pytest.param(case, id=f"{name}: {what}") for name in names for what, case in CASES[name].items()]


@pytest.fixture
def gpu_pool() -> Iterator[WorkerPool]:
    """Workers of its own for each test: a process that failed on a GPU may hang in the next run."""
    with WorkerPool() as workers:
        yield workers


def failed(case: Case, pool: WorkerPool) -> list[dict[str, object]]:
    """The rows that did not pass."""
    return [row for row in case(pool) if row["passed"] is False]


@pytest.mark.parametrize("case", of("equivalence", "nccl", "bfloat16"))
def test_outputs_and_gradients_are_those_of_one_stream(gpu_pool: WorkerPool, case: Case) -> None:
    assert failed(case, gpu_pool) == []


@pytest.mark.parametrize("case", of("memory"))
def test_the_allocator_holds_what_was_predicted(gpu_pool: WorkerPool, case: Case) -> None:
    assert failed(case, gpu_pool) == []


@pytest.mark.parametrize("case", of("step times"))
def test_a_step_takes_as_long_as_predicted(gpu_pool: WorkerPool, case: Case) -> None:
    assert failed(case, gpu_pool) == []
