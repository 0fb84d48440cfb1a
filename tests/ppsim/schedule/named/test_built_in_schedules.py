"""Every built-in schedule under random sizes, costs and links: it passes, beats no bound, and gives memory back."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ppsim import Link, Network, StageCost, Trace, schedule_names, simulate
from ppsim.order_search.lower_bound import lower_bound_s
from ppsim.order_search.problem import make_problem
from ppsim.schedule.placement import loop_placement, v_placement
from ppsim.schedule.schedule import Schedule
from tests.support.named import ONE_WAY, built

SECONDS = st.floats(0.01, 4)
CHUNKED = {"interleaved-1f1b", "interleaved-1f1b-overlap", "interleaved-zb", "looped-bfs"}


@st.composite
def steps(draw: st.DrawFn, names: list[str]) -> tuple[Schedule, list[StageCost], Network]:
    name = draw(st.sampled_from(names))
    chunks = draw(st.integers(2, 4)) if name in CHUNKED else None
    schedule = built(name, ranks=draw(st.integers(1, 5)), microbatches=draw(st.integers(1, 9)), stages_per_rank=chunks)
    ranks = schedule.ranks
    stages = []
    for _ in range(schedule.stages):
        split = {"backward_input_s": draw(SECONDS), "backward_weight_s": draw(SECONDS)}
        stages.append(
            StageCost(
                forward_s=draw(SECONDS),
                **split,
                backward_s=draw(st.none() | st.floats(0.01, sum(split.values()))),
                activation_bytes=draw(st.integers(0, 100)),
                weight_activation_bytes=draw(st.integers(0, 100)),
                output_bytes=draw(st.integers(0, 50)),
            )
        )
    pairs = [(a, b) for a in range(ranks) for b in range(ranks) if a != b]
    chosen = draw(st.lists(st.sampled_from(pairs), max_size=3)) if pairs else []
    links = {
        pair: Link(latency_s=draw(st.floats(0, 1)), bytes_per_s=draw(st.sampled_from([10.0, 100.0]))) for pair in chosen
    }
    return schedule, stages, Network(latency_s=draw(st.floats(0, 0.5)), bytes_per_s=50.0, links=links)


def bound_s(schedule: Schedule, stages: list[StageCost], network: Network, objective: str) -> float:
    chunks = schedule.stages // schedule.ranks
    is_loop = schedule.placement == loop_placement(schedule.ranks, chunks)
    assert is_loop or schedule.placement == v_placement(schedule.ranks, chunks)
    return lower_bound_s(
        make_problem(
            stages,
            ranks=schedule.ranks,
            microbatches=schedule.microbatches,
            network=network,
            memory_limit_bytes=None,
            stages_per_rank=chunks,
            placement="loop" if is_loop else "v",
            objective=objective,
        )
    )


@given(steps(ONE_WAY))  # the bound is of one copy of the model
def test_it_passes_beats_no_bound_and_gives_all_memory_back(step: tuple[Schedule, list[StageCost], Network]) -> None:
    schedule, stages, network = step
    schedule.check()
    trace = simulate(schedule, stages, network=network)
    assert trace.makespan_s >= bound_s(schedule, stages, network, "makespan") * (1 - 1e-12)
    assert trace.rank_time_s.max() >= bound_s(schedule, stages, network, "rank_time") * (1 - 1e-12)
    for rank in range(schedule.ranks):
        assert trace.activation_bytes[trace.program.rows_of(rank)[-1]] == 0
    assert (trace.activation_bytes >= 0).all()


@given(steps(schedule_names()))
def test_both_engines_give_the_same_bits(step: tuple[Schedule, list[StageCost], Network]) -> None:
    schedule, stages, network = step
    first, second = (simulate(schedule, stages, network=network, engine=engine) for engine in ("simpy", "compiled"))
    for column in ("start_s", "end_s", "message_start_s", "message_left_s", "message_arrival_s", "activation_bytes"):
        assert np.array_equal(getattr(first, column), getattr(second, column)), column
    assert isinstance(first, Trace)
