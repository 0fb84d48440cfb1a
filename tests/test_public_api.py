"""The public API: what users and studies rely on stays, and no signature changes unnoticed."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ppexec
import ppsim
from tests.support.public_api import FILE, describe

STAGE = ppsim.StageCost(
    forward_s=1.0,
    backward_input_s=1.0,
    backward_weight_s=1.0,
    activation_bytes=4,
    weight_activation_bytes=2,
    output_bytes=1,
    parameter_bytes=8,
    backward_s=None,
)
LAYER = ppsim.LayerCost(
    forward_s=1.0,
    backward_input_s=1.0,
    backward_weight_s=1.0,
    activation_bytes=4,
    weight_activation_bytes=2,
    output_bytes=1,
    parameter_bytes=8,
    backward_s=None,
    name="linear",
)

# By function: the keywords that a call may rely on.
KEYWORDS = {
    ppsim.build_schedule: "ranks microbatches stages_per_rank",
    ppsim.partition: "stages method",
    ppsim.Network: "latency_s bytes_per_s",
    ppsim.simulate: "network engine",
    ppsim.search: "ranks microbatches network memory_limit_bytes stages_per_rank placement objective",
    ppexec.Model: "layers sample loss",
}


def test_the_api_is_the_one_written_down() -> None:
    """After a change that is meant: `python -m tests.support.public_api`, and a line in the changelog."""
    assert describe().splitlines() == FILE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("function", KEYWORDS, ids=lambda function: function.__name__)
def test_promised_keywords_are_taken(function: Any) -> None:
    assert set(KEYWORDS[function].split()) - set(inspect.signature(function).parameters) == set()


def test_a_schedule_has_what_is_promised() -> None:
    assert ppsim.schedule_names()[:3] == ["afab", "afab-eager", "1f1b"]
    assert ppsim.build_schedule("gpipe", ranks=2, microbatches=2).name == "afab"
    schedule = ppsim.build_schedule("interleaved-1f1b", ranks=4, microbatches=8)
    assert (schedule.ranks, schedule.stages, schedule.microbatches) == (4, 8, 8)
    assert [schedule.placement[stage] for stage in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert str(schedule.orders[2][0]) == "2F0"
    schedule.check()
    assert ppsim.Schedule.from_csv(schedule.to_csv()).orders == schedule.orders
    assert issubclass(ppsim.ScheduleError, ValueError)


def test_costs_have_what_is_promised(tmp_path: Path) -> None:
    ppsim.save_costs([LAYER] * 4, tmp_path / "costs.json")
    layers = ppsim.load_costs(tmp_path / "costs.json")
    assert layers == [LAYER] * 4
    assert ppsim.partition(layers, stages=2, method="even") == ppsim.partition(layers, stages=2, method="optimal")
    assert ppsim.partition(layers, stages=2, method=[1, 3])[1].forward_s == 3.0


def test_a_trace_has_what_is_promised(tmp_path: Path) -> None:
    schedule = ppsim.build_schedule("1f1b", ranks=2, microbatches=4)
    trace = ppsim.simulate(schedule, [STAGE] * 2, network=ppsim.Network(latency_s=1.0, bytes_per_s=1.0), engine="simpy")
    assert trace.makespan_s > 0
    assert 0 < trace.bubble_fraction < 1
    for name in ("bubble_s", "rank_time_s", "peak_activation_bytes"):
        assert np.shape(getattr(trace, name)) == (2,)
    frame = trace.to_frame()
    assert {"rank", "stage", "kind", "microbatch", "start_s", "end_s"} <= set(frame.columns)
    assert set(frame["kind"]) == {"F", "B", "SEND_F", "RECV_F", "SEND_B", "RECV_B"}
    trace.save(tmp_path / "step.trace")
    assert ppsim.Trace.load(tmp_path / "step.trace").makespan_s == trace.makespan_s
    assert math.isclose(ppsim.attribute(trace).bubble_s.sum(), trace.bubble_s.sum())
    assert callable(ppsim.compare)
    assert callable(ppsim.sweep)


def test_a_search_has_what_is_promised() -> None:
    found = ppsim.search(
        [STAGE] * 2, ranks=2, microbatches=2, stages_per_rank=1, placement="loop", objective="makespan"
    )
    assert isinstance(found.schedule, ppsim.Schedule)
    assert found.trace.makespan_s >= found.lower_bound_s


def test_a_run_has_what_is_promised() -> None:
    for task in (ppexec.run, ppexec.verify, ppexec.profile):
        assert next(iter(inspect.signature(task).parameters)) == "config"
    report = set(inspect.signature(ppexec.VerifyReport).parameters)
    assert {"outputs_bit_equal", "gradients_bit_equal", "gradients_equal"} <= report
    assert {"max_output_diff", "max_gradient_diff", "tolerance"} <= report
    assert ppexec.RunConfig().layers == 8


def test_the_citation_has_the_version() -> None:
    citation = (Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [ppsim.__version__]
