"""Bad arguments: every public callable refuses what it cannot use with an InputError that names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ppsim
from ppexec import RunConfig
from ppsim import (
    Conditions,
    Device,
    Execution,
    InputError,
    Jitter,
    LayerCost,
    Link,
    LinkPiece,
    Network,
    Order,
    Reduction,
    Schedule,
    StageCost,
    Trace,
    Transformer,
    build_schedule,
)

COST = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
LAYER = LayerCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
SCHEDULE = build_schedule("1f1b", ranks=2, microbatches=4)
TRACE = ppsim.simulate(SCHEDULE, [COST] * 2)
MODEL = Transformer.gpt(layers=2, hidden=8, heads=2, vocabulary=16, positions=8)
DEVICE = Device(flops_per_s=1e12, bytes_per_s=1e12)
SAMPLES = ppsim.monte_carlo(SCHEDULE, [COST] * 2, jitter=Jitter(action=0.1), samples=3, engine="simpy")


def check_schedule(**given: Any) -> None:
    """A schedule's numbers need each other, so some are looked at by `check` alone."""
    Schedule(**given).check()


NO_NUMBER: list[Any] = [math.nan, "1", b"1", None, [], [1.0], {}, 1j, object(), True, 10**400, np.zeros((2, 2))]
BAD: dict[str, list[Any]] = {
    # What each kind of argument never is.
    "seconds": [*NO_NUMBER, -1, -1e-9, math.inf, -math.inf],
    "rate": [*NO_NUMBER, 0, -1, -math.inf],
    "share": [*NO_NUMBER, 0, -0.5, 1.5, math.inf],
    "count": [*NO_NUMBER, 0, -1, 1.5, math.inf, 2**63, -(2**63)],
    "giant": [*NO_NUMBER, 0, -1, 1.5, 2**40, 2**61 - 1, 2**62],
    "number": [math.nan, "1", None, [], {}, 1j, 10**400],
    "index": [*NO_NUMBER, 1.5, math.inf, 2**63],
    "seed": ["1", None, [], {}, 1.5, math.nan, True, -1],
    "percent": [math.nan, math.inf, -1, 100.5, "50", None, {}, 1j, 10**400],
    "percents": [[math.nan], [101], [-1], "50", None, 50.0, {}, [None], [[1], [2]]],
    "amounts": [
        [math.nan],
        [-1.0],
        "1",
        ["x"],
        [None],
        {},
        1j,
        object(),
        [[1.0], [1.0, 2.0]],
        10**400,
        [True],
        math.inf,
    ],
    "text": [1, None, b"afab", [], {}, True, object(), "\ud800"],
    "name": ["nonsense", "", "\0", 1, None, [], b"afab", True],
    "path": [1, None, b"x", [], {}, True, 1.5, "a\0b", "\ud800"],
    "flag": [1, 0, None, "yes", [], 0.5],
    "object": [1, "x", None, [], {}, 0.5, object],
    "objects": [1, "x", None, [1], [None], ["x"], {}, 0.5, {"x": 1}, object()],
    "mapping": [1, "x", [], [1], object(), 0.5, True],
    "array": ["x", None, {}, ["x"], [None], 1j, object(), [[1], [1, 2]], [0.5], [-1], [2**31], [math.nan]],
}

_STAGE = {"forward_s": "seconds", "backward_input_s": "seconds", "backward_weight_s": "seconds"}
_LINK = {"latency_s": "seconds", "gap_s": "seconds", "bytes_per_s": "rate"}
_SPREADS = dict.fromkeys(("action", "rank", "step", "message", "hiccup_probability", "hiccup_s"), "seconds")
# Each callable with arguments that it takes, and the kind of each that is tried.
CALLS: list[tuple[Callable[..., Any], dict[str, Any], dict[str, str]]] = [
    (
        Conditions,
        {},
        {
            "overlap": "rate",
            "scale": "amounts",
            "dispatch_s": "amounts",
            "send_s": "amounts",
            "receive_window": "count",
            "cores": "count",
            "slow_ranks": "mapping",
            "sharing": "name",
        },
    ),
    (Conditions, {"cores": 2, "sharing": "fair"}, {"sharing_efficiency": "share"}),
    (Conditions.from_dict, {}, {"given": "mapping"}),
    (Device, {"flops_per_s": 1.0, "bytes_per_s": 1.0}, {"flops_per_s": "rate", "efficiency": "share"}),
    (Device, {"flops_per_s": 1.0, "bytes_per_s": 1.0}, {"bandwidth_efficiency": "share", "launch_s": "seconds"}),
    (Device, {"flops_per_s": 1.0, "bytes_per_s": 1.0}, {"name": "text", "source": "text"}),
    (DEVICE.time_s, {}, {"works": "objects"}),
    (SAMPLES.percentile, {}, {"q": "percent"}),
    (SAMPLES.quantiles, {}, {"q": "percents"}),
    (SAMPLES.start_quantiles_s, {}, {"q": "percents"}),
    (SAMPLES.nearest, {}, {"q": "percent"}),
    (SAMPLES.trace, {}, {"sample": "index"}),
    (
        Execution,
        {"micro_batch_size": 1, "seq": 1},
        {
            **dict.fromkeys(("micro_batch_size", "seq", "dtype_bytes", "tp"), "count"),
            **dict.fromkeys(("split_vocabulary", "skip_masked", "dropout", "loss"), "flag"),
            **dict.fromkeys(("attention", "recompute"), "name"),
        },
    ),
    (Jitter, {"hiccup_probability": 0.5}, {**_SPREADS, "factors": "mapping"}),
    (Jitter.from_samples, {}, {"samples": "mapping"}),
    (Jitter.from_traces, {}, {"traces": "objects"}),
    (StageCost, dict.fromkeys(_STAGE, 1.0), _STAGE),
    (LayerCost, dict.fromkeys(_STAGE, 1.0), {"name": "object"}),
    (Link, {}, {**_LINK, "larger": "objects"}),
    (LinkPiece, {}, {**_LINK, "from_bytes": "index"}),
    (Link().slowed, {}, {"factor": "rate"}),
    (Link().one_way_s, {}, {"size_bytes": "number"}),
    (Network, {}, {**_LINK, "links": "mapping"}),
    (Network.of, {}, {"default": "object"}),
    (Network.from_file, {}, {"path": "path"}),
    (Network().to_file, {}, {"path": "path"}),
    (Network().link, {"source": 0, "destination": 1}, {"source": "index", "destination": "index"}),
    (Network().slowed, {}, {"factors": "mapping"}),
    (Order, {"stage": [0], "kind": [0], "microbatch": [0]}, dict.fromkeys(("stage", "kind", "microbatch"), "array")),
    (Order.of, {}, {"actions": "objects"}),
    (Order.of(["0F0", "0B0"]).take, {}, {"parts": "array"}),
    (Reduction, {"replicas": 2}, {"replicas": "count", "latency_s": "seconds", "bytes_per_s": "rate"}),
    (Reduction.from_dict, {}, {"given": "mapping"}),
    (Reduction(replicas=2).seconds, {}, {"size_bytes": "number"}),
    (
        check_schedule,
        {"orders": (Order.of(["0F0"]),), "placement": (0,), "microbatches": 1},
        {"orders": "objects", "placement": "objects", "microbatches": "index", "name": "text"},
    ),
    (Schedule.of, {"orders": [["0F0"]]}, {"orders": "objects", "name": "text"}),
    (Schedule.from_csv, {"text": "0F0"}, {"text": "text", "name": "text"}),
    (SCHEDULE.stages_of, {}, {"rank": "index"}),
    (SCHEDULE.to_csv, {}, {"messages": "flag"}),
    (Trace.load, {}, {"path": "path"}),
    (TRACE.save, {}, {"path": "path"}),
    (
        Transformer,
        dict.fromkeys(("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocabulary"), 2),
        {
            **dict.fromkeys(("layers", "hidden", "heads", "kv_heads", "vocabulary"), "count"),
            **dict.fromkeys(("gated", "tied", "mlp_bias"), "flag"),
            "norm": "name",
            "positions": "index",
        },
    ),
    (
        Transformer.gpt,
        {"layers": 1, "hidden": 2, "heads": 1, "vocabulary": 4, "positions": 4},
        {**dict.fromkeys(("layers", "hidden", "heads", "vocabulary"), "count"), "tied": "flag"},
    ),
    (MODEL.shard_parameters, {}, {"tp": "count"}),
    (ppsim.attribute, {}, {"trace": "object"}),
    (ppsim.attribute, {"trace": TRACE}, {"expected": "mapping"}),
    (
        build_schedule,
        {"name": "1f1b", "ranks": 2, "microbatches": 2},
        {"name": "name", "ranks": "giant", "microbatches": "giant"},
    ),
    (build_schedule, {"name": "looped-bfs", "ranks": 2, "microbatches": 2}, {"stages_per_rank": "mapping"}),
    (ppsim.compare, {"predicted": TRACE, "measured": TRACE}, {"predicted": "object", "measured": "object"}),
    (ppsim.critical_path, {}, {"trace": "object"}),
    (
        ppsim.estimate_costs,
        {"architecture": MODEL, "device": DEVICE, "micro_batch_size": 1, "seq": 4},
        {"architecture": "object", "device": "object", "micro_batch_size": "count", "seq": "count", "tp": "count"},
    ),
    (ppsim.load_costs, {}, {"path": "path"}),
    (ppsim.load_sweep, {}, {"path": "path"}),
    (
        ppsim.monte_carlo,
        {"schedule": SCHEDULE, "stages": [COST] * 2, "jitter": Jitter(), "samples": 1},
        {"schedule": "object", "stages": "objects", "jitter": "object", "samples": "giant", "engine": "mapping"},
    ),
    (
        ppsim.monte_carlo,
        {"schedule": SCHEDULE, "stages": [COST] * 2, "jitter": Jitter(), "samples": 1},
        {"seed": "seed", "nonsense": "object"},
    ),
    (ppsim.named_device, {"name": "h100"}, {"name": "name", "efficiency": "share", "launch_s": "seconds"}),
    (ppsim.parse_action, {}, {"text": "name"}),
    (
        ppsim.partition,
        {"layers": [LAYER] * 4, "stages": 2},
        {"layers": "objects", "stages": "count", "method": "name"},
    ),
    (ppsim.partition_sizes, {"stages": 2}, {"layers": "giant"}),
    (ppsim.partition_sizes, {"layers": 4, "stages": 2}, {"layers": "count", "stages": "count", "method": "name"}),
    (ppsim.read_huggingface_config, {}, {"path": "path"}),
    (ppsim.recompute_layers, {"layers": [LAYER]}, {"layers": "objects", "input_bytes": "index"}),
    (ppsim.save_costs, {"layers": [LAYER], "path": "x.json"}, {"layers": "objects", "path": "path"}),
    (
        ppsim.search,
        {"stages": [COST] * 2, "ranks": 2, "microbatches": 2},
        {
            **dict.fromkeys(("ranks", "microbatches", "stages_per_rank"), "giant"),
            **dict.fromkeys(("placement", "objective"), "name"),
            "stages": "objects",
        },
    ),
    (
        ppsim.simulate,
        {"schedule": SCHEDULE, "stages": [COST] * 2},
        {"schedule": "object", "stages": "objects", "engine": "name", "nonsense": "object"},
    ),
    (
        ppsim.simulate,
        {"schedule": SCHEDULE, "stages": [COST] * 2, "engine": "simpy"},
        {"network": "mapping", "conditions": "mapping", "scale": "amounts", "cores": "count"},
    ),
    (ppsim.sweep, {"function": abs, "grid": {}}, {"workers": "count", "in_flight": "count", "progress": "flag"}),
    (
        RunConfig,
        {},
        {
            **dict.fromkeys(("layers", "dp", "tp", "steps"), "count"),
            **dict.fromkeys(("hidden", "seq", "micro_batch_size", "microbatches", "ranks", "warmup"), "index"),
            **dict.fromkeys(("schedule", "partition", "preset", "dtype", "backend", "device", "compute"), "name"),
            **dict.fromkeys(("tied", "recompute", "forward_only"), "flag"),
            **dict.fromkeys(("learning_rate", "weight_decay", "dropout"), "seconds"),
            "timeout_s": "rate",
            "seed": "seed",
        },
    ),
    (ppsim.transformer_work, {"execution": Execution(micro_batch_size=1, seq=1)}, {"model": "object"}),
]
# Values that have a meaning for single arguments of a kind that has none for the others.
MEANT: dict[str, Callable[[Any], bool]] = {
    "Conditions.slow_ranks": lambda value: isinstance(value, list) and not value,
    "Conditions.receive_window": lambda value: value is None,
    "Conditions.cores": lambda value: value is None,
    "simulate.cores": lambda value: value is None,
    "RunConfig.seed": lambda value: value == -1,
    "sweep.workers": lambda value: value is None,
    "sweep.in_flight": lambda value: value is None,
    "LayerCost.name": lambda value: value == "x",
    "build_schedule.stages_per_rank": lambda value: value == 1,
    "take.parts": lambda value: value == [-1],
}


def _cases() -> list[Any]:
    cases = []
    for function, given, kinds in CALLS:
        for name, kind in kinds.items():
            of_what = getattr(function, "__name__", str(function))
            is_meant = MEANT.get(f"{of_what}.{name}", lambda value: False)
            for number, value in enumerate(BAD[kind]):
                if not is_meant(value):
                    identity = f"{of_what}-{name}-{number}"
                    cases.append(pytest.param(function, {**given, name: value}, name, id=identity))
    return cases


@pytest.mark.parametrize(("function", "given", "name"), _cases())
@pytest.mark.timeout(60)
def test_bad_arguments_are_refused(
    function: Callable[..., Any], given: dict[str, Any], name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        function(**given)
    said = str(refused.value)
    assert len(said) < 600
    assert "\n" not in said
    assert not list(tmp_path.iterdir())
