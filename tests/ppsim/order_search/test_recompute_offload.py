"""Searches that may recompute and offload: never worse than without, within the limit, and as good as published."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppsim import HostLink, InputError, Kind, Network, StageCost, attribute, build_schedule, search, simulate

COST = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=8)
FITTING = HostLink(bytes_per_s=8.0)  # a copy takes as long as a forward
_amounts = st.integers(0, 16)


@st.composite
def costs(draw: st.DrawFn, stages: int) -> list[StageCost]:
    """Uneven stages, whose activations are worth sparing or not."""
    seconds = st.integers(1, 16).map(lambda quarters: quarters / 4)
    cost = st.builds(
        StageCost,
        forward_s=seconds,
        backward_input_s=seconds,
        backward_weight_s=seconds,
        activation_bytes=st.integers(4, 16),
        weight_activation_bytes=st.integers(0, 8),
        output_bytes=st.integers(0, 4),
        recompute_bytes=st.none() | _amounts,
        offload_bytes=st.none() | _amounts,
    )
    return draw(st.lists(cost, min_size=stages, max_size=stages))


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_it_is_never_worse_than_without_and_fits_the_limit(data: st.DataObject) -> None:
    ranks, microbatches = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    stages = data.draw(costs(ranks))
    whole = max(max(cost.activation_bytes, cost.weight_activation_bytes) for cost in stages)
    limit = whole * data.draw(st.integers(1, 3)) + data.draw(st.integers(0, 5))
    how: dict[str, Any] = {
        "ranks": ranks,
        "microbatches": microbatches,
        "network": Network(latency_s=data.draw(st.sampled_from([0.0, 0.5]))),
        "objective": data.draw(st.sampled_from(["makespan", "rank_time"])),
        "memory_limit_bytes": limit,
    }
    host_link = data.draw(
        st.none() | st.sampled_from([HostLink(bytes_per_s=4.0), HostLink(bytes_per_s=64.0, latency_s=0.25)])
    )
    without = search(stages, **how)
    lighter = search(stages, recompute=data.draw(st.booleans()), offload=host_link, **how)
    reached = {
        found: found.trace.makespan_s if how["objective"] == "makespan" else float(found.trace.rank_time_s.max())
        for found in (without, lighter)
    }
    assert reached[lighter] <= reached[without]
    assert lighter.lower_bound_s <= reached[lighter]
    assert (lighter.trace.peak_activation_bytes <= limit).all()
    lighter.schedule.check()
    # And it is what a simulation says of the schedule as it is written.
    again = simulate(lighter.schedule, stages, network=how["network"], host_link=host_link)
    assert np.array_equal(again.start_s, lighter.trace.start_s)
    assert np.array_equal(again.activation_bytes, lighter.trace.activation_bytes)


@pytest.mark.parametrize("ranks", [4, 6])
def test_half_of_the_memory_costs_no_time_where_copies_fit_under_compute(ranks: int) -> None:
    """The claim of PipeOffload (Wan et al., 2025), for the best order there is: no order is faster without a limit."""
    limit = (ranks // 2 + (ranks == 4)) * COST.activation_bytes
    found = search([COST] * ranks, ranks=ranks, microbatches=2 * ranks, memory_limit_bytes=limit, offload=FITTING)
    assert found.trace.makespan_s == found.lower_bound_s
    assert found.trace.peak_activation_bytes.max() <= limit
    assert not attribute(found.trace).copies_s.any()
    without = search([COST] * ranks, ranks=ranks, microbatches=2 * ranks, memory_limit_bytes=limit)
    assert found.trace.makespan_s < without.trace.makespan_s


def test_recomputing_is_worth_it_where_hardly_anything_fits() -> None:
    """Room for two microbatches on six ranks: 1F1B with R on all but the last ranks needs no more."""
    how = {"ranks": 6, "microbatches": 12, "memory_limit_bytes": 2 * COST.activation_bytes}
    without, found = (search([COST] * 6, recompute=each, **how) for each in (False, True))
    assert found.trace.makespan_s < 0.7 * without.trace.makespan_s
    assert any((order.kind == Kind.R).any() for order in found.schedule.orders)
    known = build_schedule("1f1b", ranks=6, microbatches=12).with_recompute(range(5))
    assert found.trace.makespan_s <= simulate(known, [COST] * 6).makespan_s


def test_without_a_limit_nothing_is_recomputed_or_moved() -> None:
    found = search([COST] * 3, ranks=3, microbatches=6, recompute=True, offload=FITTING)
    assert found.schedule.offload is None
    assert not any((order.kind == Kind.R).any() for order in found.schedule.orders)
    assert found.trace.makespan_s == search([COST] * 3, ranks=3, microbatches=6).trace.makespan_s


def test_activations_that_are_all_input_and_output_are_not_recomputed() -> None:
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=8, recompute_bytes=8)
    how = {"ranks": 3, "microbatches": 6, "memory_limit_bytes": 16}
    assert search([cost] * 3, recompute=True, **how).trace.makespan_s == search([cost] * 3, **how).trace.makespan_s


def test_several_stages_of_a_rank() -> None:
    for placement in ("loop", "v"):
        how = {"ranks": 2, "microbatches": 6, "stages_per_rank": 2, "placement": placement, "memory_limit_bytes": 24}
        without, found = (search([COST] * 4, offload=each, **how) for each in (None, FITTING))
        assert found.trace.makespan_s <= without.trace.makespan_s
        assert (found.trace.peak_activation_bytes <= 24).all()


def test_a_proof_of_other_orders_is_refused() -> None:
    for more in ({"recompute": True}, {"offload": FITTING}):
        with pytest.raises(InputError, match="prove goes through orders that keep their activations"):
            search([COST] * 2, ranks=2, microbatches=2, prove=True, **more)
