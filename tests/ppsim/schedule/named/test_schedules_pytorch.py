"""Orders against PyTorch's own, wherever PyTorch accepts the configuration."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as peer
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from ppsim import Schedule, build_schedule

RANKS = (1, 2, 3, 4, 8)
MICROBATCHES = range(1, 17)


@pytest.fixture(autouse=True)
def _quiet():
    """PyTorch logs a warning for every schedule with overlapped pairs."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def stand_in(stage, stages, ranks, rank):
    """What a schedule's constructor asks of a stage."""
    return SimpleNamespace(
        num_stages=stages,
        group_size=ranks,
        group_rank=rank,
        submod=None,
        stage_index=stage,
        is_first=stage == 0,
        is_last=stage == stages - 1,
        has_backward=True,
        stage_index_to_group_rank=None,
    )


def pytorch_orders(kind, ranks, microbatches, stages_per_rank, style):
    """Each rank's compute actions as PyTorch spells them; ValueError where PyTorch refuses."""
    stages = ranks * stages_per_rank
    holder = generate_stage_to_rank_mapping(ranks, stages, style=style)
    held = [stand_in(stage, stages, ranks, 0) for stage in range(stages) if holder[stage] == 0]
    orders = kind(held, microbatches).pipeline_order
    return [[str(action) for action in orders[rank] if action is not None] for rank in range(ranks)]


def accepted(build, *arguments):
    try:
        return build(*arguments)
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("name", "kind", "chunks", "style", "configurations"),
    [
        ("interleaved-1f1b", peer.ScheduleInterleaved1F1B, (1, 2, 3, 4), "loop", 256),
        ("interleaved-zb", peer.ScheduleInterleavedZeroBubble, (1, 2, 3, 4), "loop", 256),
        ("looped-bfs", peer.ScheduleLoopedBFS, (1, 2, 3, 4), "loop", 320),
        ("zb-v", peer.ScheduleZBVZeroBubble, (2,), "v", 80),
        ("dualpipe-v", peer.ScheduleDualPipeV, (2,), "v", 49),
    ],
)
def test_orders_equal_pytorch_s(name, kind, chunks, style, configurations):
    """Overlapped pairs included; `configurations` counts what PyTorch accepts of the grid."""
    compared = 0
    for ranks in RANKS:
        for microbatches in MICROBATCHES:
            for v in chunks:
                wanted = accepted(pytorch_orders, kind, ranks, microbatches, v, style)
                if wanted is None:
                    continue
                schedule = build_schedule(name, ranks=ranks, microbatches=microbatches, stages_per_rank=v)
                holder = generate_stage_to_rank_mapping(ranks, ranks * v, style=style)
                assert schedule.placement == tuple(holder[stage] for stage in range(ranks * v))
                assert [[str(action) for action in order] for order in schedule.orders] == wanted
                compared += 1
    assert compared == configurations


def executed_by_pytorch(kind, rank, ranks, microbatches):
    """What PyTorch's step really runs on a rank that holds one stage: the calls that its stage gets."""
    calls = []
    stage = stand_in(rank, ranks, ranks, rank)
    for name in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
        setattr(stage, name, lambda microbatch: [])
    stage.forward_one_chunk = lambda microbatch, *_, **__: calls.append(f"{rank}F{microbatch}")
    stage.backward_one_chunk = lambda microbatch, **_: calls.append(f"{rank}B{microbatch}")
    stage.perform_reduce_grad = lambda factor: None
    schedule = kind(stage, microbatches)
    schedule._initialize_stage = lambda *_: None
    schedule._maybe_compute_loss = schedule._maybe_get_loss = schedule._update_losses = lambda *_: None
    schedule._step_microbatches([()] * microbatches, [{}] * microbatches)
    return calls


@pytest.mark.parametrize(("name", "kind"), [("1f1b", peer.Schedule1F1B), ("gpipe", peer.ScheduleGPipe)])
def test_orders_equal_what_pytorch_executes(name, kind):
    """Executed, not `pipeline_order`: that of Schedule1F1B counts the last rank's forwards from 1."""
    compared = 0
    for ranks in RANKS:
        for microbatches in MICROBATCHES:
            wanted = accepted(lambda p, m: [executed_by_pytorch(kind, r, p, m) for r in range(p)], ranks, microbatches)
            if wanted is None:
                assert name == "1f1b"
                assert microbatches < ranks  # the only thing that it refuses
                continue
            schedule = build_schedule(name, ranks=ranks, microbatches=microbatches)
            assert [[str(action) for action in order] for order in schedule.orders] == wanted
            compared += 1
    assert compared == {"1f1b": 67, "gpipe": 80}[name]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_file_of_pytorchs_gpipe_order_with_its_reductions_is_read(ranks):
    """PyTorch ends each rank's GPipe order with REDUCE_GRAD; read as what lowering derives anyway."""
    pipeline_order = peer.ScheduleGPipe(stand_in(0, ranks, ranks, 0), 5)._get_pipeline_order()
    orders = [[str(action) for action in pipeline_order[rank] if action is not None] for rank in range(ranks)]
    assert all(order[-1] == f"{rank}REDUCE_GRAD" for rank, order in enumerate(orders))
    schedule = Schedule.from_csv("\n".join(",".join(order) for order in orders))
    schedule.check()
    assert [[str(action) for action in order] for order in schedule.orders] == [order[:-1] for order in orders]
    assert Schedule.from_csv(schedule.to_csv(messages=True)).orders == schedule.orders
