"""Tensor parallelism: shards are slices, bytes are as they should be, and what does not divide is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel

import ppexec
import ppsim
from ppexec import Model, RunConfig, Session, WorkerPool
from ppexec.machine.mesh import build_mesh, meet
from ppexec.models.initialize import initialize_layer
from ppexec.models.mlp import MLPBlock, mlp
from ppexec.stage.build import build_stage
from ppexec.stage.stage import Stage
from ppexec.stage.tensor_parallel import check_plan, local, local_gradient, shard_layer, slice_like
from tests.support.factories import spelled
from tests.support.remote import on_every_rank, tiny

CPU = torch.device("cpu")
CONFIG = tiny(hidden=6, intermediate=12, seed=7)


def built(*, tp: int, index: int = 1) -> Stage:
    mesh = build_mesh(dp=1, pp=1, tp=tp)["tp"]
    return build_stage(
        index, mlp(CONFIG), range(index, index + 2), is_last=False, microbatches=1, trains=True, seed=CONFIG.seed,
        device=CPU, mesh=mesh,
    )  # fmt: skip


def shards(tp: int) -> dict[str, Any]:
    stage = built(tp=tp)
    named = [(layer, *item) for layer, module in enumerate(stage.layers) for item in module.named_parameters()]
    return {
        "parameters": {(layer, name): local(parameter).detach() for layer, name, parameter in named},
        "kept_bytes": {(layer, name): local(p).untyped_storage().nbytes() for layer, name, p in named},
    }


def test_a_shard_is_the_slice_of_the_full_parameter_and_keeps_no_more(pool: WorkerPool) -> None:
    whole = [initialize_layer(mlp(CONFIG).layers[index], index=index, seed=7, device=CPU) for index in (1, 2)]
    cut = {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1}
    for rank, found in enumerate(on_every_rank(pool, 3, shards, tp=3)):
        for layer, module in enumerate(whole):
            for name, full in module.named_parameters():
                mine = found["parameters"][layer, name]
                expected = full.detach().chunk(3, dim=cut[name])[rank] if name in cut else full.detach()
                assert torch.equal(mine, expected), (rank, layer, name)
                assert found["kept_bytes"][layer, name] == mine.nbytes


def communication(tp: int) -> dict[str, Any]:
    """Collectives in B, I and W of two blocks, and what W gives beside what B gave."""
    stage = built(tp=tp)
    inputs = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    gradient = torch.ones(3, 6)
    counts, found = {}, {}

    def counted(name: str, work: Any) -> Any:
        with CommDebugMode() as mode:
            value = work()
        counts[name] = mode.get_total_counts()
        return value

    stage.forward(0, inputs.clone(), None)
    found["B"] = counted("B", lambda: stage.backward(0, gradient))
    whole = [local_gradient(p).clone() for layer in stage.layers for p in layer.parameters()]
    stage.clear()
    output = stage.forward(0, inputs.clone(), None, split=True)
    found["I"] = counted("I", lambda: stage.backward_input(0, gradient))
    counted("W", lambda: stage.backward_weight(0))
    halves = [local_gradient(p) for layer in stage.layers for p in layer.parameters()]
    return {
        "counts": counts,
        "types": {type(output).__name__, *(type(value).__name__ for value in found.values())},
        "same": torch.equal(found["B"], found["I"]) and all(map(torch.equal, whole, halves)),
    }


def test_i_communicates_and_w_does_not(pool: WorkerPool) -> None:
    """One sum for each block, of its input's gradient, in B or I."""
    for found in on_every_rank(pool, 2, communication, tp=2):
        assert found["counts"] == {"B": 2, "I": 2, "W": 0}
        assert found["types"] == {"Tensor"}
        assert found["same"]


class Normed(nn.Module):
    """A norm whose ranks see their part of the sequence, as sequence parallelism has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.norm(inputs)


def sequence_parallel(tp: int) -> list[Any]:
    from torch.distributed.tensor.parallel import SequenceParallel

    mesh = build_mesh(dp=1, pp=1, tp=tp)["tp"]
    inputs = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(2))
    part = inputs.chunk(tp, dim=1)[dist.get_rank()]
    layer = Normed()
    model = Model(layers=[layer], sample=lambda index: (inputs, inputs), loss=nn.functional.mse_loss,
                  plan=lambda module: {"norm": SequenceParallel()})  # fmt: skip
    shard_layer(layer, model, mesh, index=0)
    output = layer(part)
    output.to_local().square().sum().backward()
    whole = Normed()
    whole(inputs).square().sum().backward()
    return [
        torch.allclose(local_gradient(parameter), expected.grad)
        for parameter, expected in zip(layer.parameters(), whole.parameters(), strict=True)
    ]


def test_a_gradient_in_parts_is_added_up(pool: WorkerPool) -> None:
    assert on_every_rank(pool, 2, sequence_parallel, tp=2) == [[True, True]] * 2


def slices(tp: int) -> list[Any]:
    stage = built(tp=tp)
    parameter = stage.layers[0].fc2.weight
    full = torch.arange(72.0).reshape(6, 12)
    return [
        slice_like(parameter, full),
        slice_like(stage.layers[0].fc2.bias, full[0]),
        slice_like(nn.Linear(2, 2).weight, full),
    ]


def test_a_full_tensor_is_sliced_as_a_parameter_is(pool: WorkerPool) -> None:
    full = torch.arange(72.0).reshape(6, 12)
    for rank, (mine, bias, plain) in enumerate(on_every_rank(pool, 2, slices, tp=2)):
        assert torch.equal(mine, full[:, 6 * rank : 6 * rank + 6])
        assert torch.equal(bias, full[0])
        assert torch.equal(plain, full)


# Bytes and costs


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-v"])
def test_activations_are_the_closed_form_of_a_shard_and_as_predicted(pool: WorkerPool, schedule: str) -> None:
    """Inputs and outputs are whole on every rank of tp, what lies between fc1 and fc2 is divided by tp."""
    config = tiny(schedule=schedule, tp=2, intermediate=32, microbatches=6)
    with Session(config, pool=pool) as session:
        counted = session.count_memory()
        layers = session.profile(1).layers
    stages = ppsim.partition(layers, stages=config.pipeline.stages, method=config.layer_sizes)
    predicted = ppsim.simulate(config.pipeline, stages)
    for rank in range(2):
        assert counted[rank] == predicted.activation_bytes[list(predicted.program.rows_of(rank))].tolist()
    rows = 4 * config.seq * config.micro_batch_size
    assert {layer.activation_bytes for layer in layers} == {rows * (8 + 2 * 32 // 2 + 8)}
    assert {layer.parameter_bytes for layer in layers} == {4 * (8 * 16 + 16 + 16 * 8 + 8)}
    assert {layer.output_bytes for layer in layers} == {rows * 8}


def test_traces_are_of_the_pipeline_whatever_tp_is(pool: WorkerPool) -> None:
    with Session(tiny(dp=2, tp=2, schedule="interleaved-1f1b"), pool=pool) as session:
        (trace,) = session.measure(1)
        assert trace.ranks == 2
        assert (trace.end_s >= trace.start_s).all()


# What cannot be sharded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tp": 3, "intermediate": 32},
            r"layer 0 \(MLPBlock\) fc1: out_features 32 does not divide by tp=3: take a mu",
        ),
        ({"tp": 4, "intermediate": 30}, "out_features 30 does not divide by tp=4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_before_workers_start(changes: dict[str, Any], message: str) -> None:
    pool = WorkerPool()
    with pytest.raises(ValueError, match=message):
        ppexec.verify(RunConfig(hidden=8, layers=2, ranks=1, **changes), pool=pool)
    assert pool.process_ids == []


def model_of(layer: nn.Module, plan: dict[str, Any]) -> Model:
    return Model(layers=[layer], sample=lambda index: (torch.zeros(1),) * 2, loss=nn.functional.mse_loss,
                 plan=lambda module: plan)  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "plan", "message"),
    [
        (
            MLPBlock(4, 6),
            {"fc3": ColwiseParallel()},
            "names 'fc3', which it does not have: it has fc1, activation, fc2",
        ),
        (
            MLPBlock(4, 6),
            {"activation": ColwiseParallel()},
            "activation is a GELU, but ColwiseParallel shards only nn.Linear and",
        ),
        (MLPBlock(4, 6), {"fc*": RowwiseParallel()}, "fc2: in_features 6 does not divide by tp=4"),
        (nn.Linear(4, 6), {"": ColwiseParallel()}, r"layer 0 \(Linear\): out_features 6 does not divide by tp=4"),
        (nn.Embedding(6, 8), {"": RowwiseParallel()}, "num_embeddings 6 does not divide by tp=4"),
        (nn.Embedding(8, 6), {"": ColwiseParallel()}, "embedding_dim 6 does not divide by tp=4"),
    ],
)
def test_a_plan_that_does_not_fit_is_named(layer: nn.Module, plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_plan(model_of(layer, plan), 4)


def test_plans_that_fit_are_not_refused() -> None:
    check_plan(model_of(MLPBlock(4, 8), {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}), 4)
    check_plan(model_of(nn.Tanh(), {"": PrepareModuleInput(input_layouts=(), desired_input_layouts=())}), 4)
    check_plan(model_of(nn.Tanh(), {}), 4)
    check_plan(model_of(MLPBlock(4, 7), {"fc1": ColwiseParallel()}), 1)


def test_a_model_without_a_plan_is_replicated(pool: WorkerPool) -> None:
    """Every rank of tp computes the same, and no sum is taken otherwise: so bits are equal."""
    report = ppexec.verify(tiny(tp=2, model=spelled("with_one", kind="Linear", at=0), hidden=3), pool=pool)
    assert report.passed
    assert report.outputs_bit_equal
    assert report.gradients_bit_equal
    assert report.compared == 2 * (4 + 4 * 2)


def waits(tp: int) -> bool:
    meet(build_mesh(dp=1, pp=1, tp=tp))
    return True


def test_all_processes_meet(pool: WorkerPool) -> None:
    assert on_every_rank(pool, 2, waits, tp=2) == [True, True]
