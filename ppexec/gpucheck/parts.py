"""Parts: the questions of the GPU check. Each is asked case by case; a case that fails leaves the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any, get_args

import numpy as np
import torch

import ppsim
from ppexec.config.config import RunConfig
from ppexec.experiment.experiment import predict_and_measure
from ppexec.experiment.overhead import PEER_OF
from ppexec.gpucheck.durations import durations
from ppexec.measure.allocator import predicted_peak_bytes
from ppexec.session import Session
from ppexec.verification.precision import Wider, compare_precision
from ppexec.workers.pool import WorkerPool
from ppsim import Kind

_TURNS, _UNCOUNTED = 80, 3  # of measuring overhead

Row = dict[str, Any]
Case = Callable[[WorkerPool], list[Row]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One question. cases: by name; the rows of each have "what", "passed" (None: nothing to pass) and figures."""

    name: str
    question: str
    cases: Mapping[str, Case]


_SMALL = RunConfig(
    layers=8, hidden=128, seq=32, micro_batch_size=2, microbatches=8, ranks=4, warmup=0, steps=1, timeout_s=60
)


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    """The configuration with other values; sizes that followed from others follow anew."""
    follows = {"global_batch_size": 0, "intermediate": 0, "heads": 0, "vocabulary": 0, "threads": 0, "device": "auto"}
    return replace(config, **{**follows, **changes})


def local(**changes: Any) -> RunConfig:
    """A small run whose ranks share one GPU in one process."""
    return _with(_SMALL, backend="local", **changes)


def nccl(**changes: Any) -> RunConfig:
    """A small run with a process for each rank, over NCCL; on one GPU if there are fewer than ranks."""
    config: dict[str, Any] = {"ranks": 2, **changes}
    needed = config["ranks"] * config.get("dp", 1) * config.get("tp", 1)
    config = {"timeout_s": 25, **config}
    return _with(_SMALL, backend="nccl", devices="own" if needed <= torch.cuda.device_count() else "shared", **config)


def _equal(what: str, make: Callable[..., RunConfig], changes: dict[str, Any], pool: WorkerPool) -> list[Row]:
    """Outputs and gradients against one stream without a pipeline."""
    config = make(**changes)
    with Session(config, pool=pool) as session:
        report = session.verify()
    row = {
        "what": what,
        "passed": report.passed,
        "outputs_bit_equal": report.outputs_bit_equal,
        "gradients_bit_equal": report.gradients_bit_equal,
        "max_gradient_diff": report.max_gradient_diff,
        "tolerance": report.tolerance,
        "first_difference": report.first_difference,
        "devices": config.devices if config.backend == "nccl" else "one stream a rank",
    }
    return [row]


def step_time(schedule: str, pool: WorkerPool) -> list[Row]:
    """Four stages on one GPU, each with its own multiprocessors: the measured step against the predicted one."""
    config = _with(
        _SMALL,
        backend="local",
        schedule=schedule,
        model="ppexec.gpucheck.model:wide",
        hidden=4096,
        seq=1024,
        micro_batch_size=8,
        microbatches=8,
        dtype="bfloat16",
        warmup=1,
        steps=5,
    )
    outcome = predict_and_measure(config, pool=pool, verify=False)
    error = outcome.step_time_error
    row = {
        "what": schedule,
        "passed": abs(error) <= 0.03,
        "predicted_ms": outcome.predicted.makespan_s * 1e3,
        "measured_ms": float(median(outcome.step_times_s)) * 1e3,
        "error": error,
        "bubble_predicted": outcome.predicted.bubble_fraction,
        "bubble_measured": outcome.median.bubble_fraction,
        "speeds": outcome.speeds,
        "host_bound": outcome.is_host_bound,
        "host_delay": outcome.host_delay,
        "launching_ms": sum(outcome.launch_s or []) * 1e3,
        "bytes_equal_at_every_action": outcome.summary()["memory"]["equal_at_every_action"],
        "step_times_ms": [seconds * 1e3 for seconds in outcome.step_times_s],
        "stages": [asdict(stage) for stage in outcome.largest_stages],
        "calibration": outcome.calibration.to_dict(),
        "durations": durations(outcome.predicted, outcome.measured),
        "multiprocessors": outcome.environment.get("multiprocessors"),
    }
    return [row]


def memory(schedule: str, pool: WorkerPool) -> list[Row]:
    """The caching allocator's peak of each rank against the ledger's bytes and what actions need while they run."""
    config = nccl(schedule=schedule, hidden=1024, seq=512, microbatches=6)
    with Session(config, pool=pool) as session:
        found, counted = session.device_peaks(), session.memory()
    rows = []
    for rank, (peak, held) in enumerate(zip(found, counted, strict=True)):
        predicted = predicted_peak_bytes(config.pipeline.program, rank, held, peak)
        error = (predicted - peak.peak_bytes) / peak.peak_bytes
        rows.append(
            {
                "what": f"{schedule}, rank {rank}",
                "passed": abs(error) <= 0.01,
                "predicted_bytes": predicted,
                "measured_bytes": peak.peak_bytes,
                "error": error,
                "base_bytes": peak.base_bytes,
                "ledger_peak_bytes": max(held.activation_bytes),
                "details": {
                    name: {f"stage {stage} {Kind(kind).name}": size for (kind, stage), size in table.items()}
                    for name, table in (("first", peak.first_transient_bytes), ("later", peak.transient_bytes))
                },
            }
        )
    return rows


def overhead(schedule: str, peer: str, pool: WorkerPool) -> list[Row]:
    """Time what a microbatch costs beside its computations, here and in PyTorch, on one rank with tiny tensors.

    The lower quartile of many turns counts, since whatever else the host does can only add to a step.
    """
    config = nccl(schedule=schedule, ranks=1, layers=1, hidden=16, seq=4, microbatches=32)
    times: dict[str, list[float]] = {"plain": [], "ours": [], peer: [], "graphs": []}
    with Session(config, pool=pool) as session:
        for turn in range(_TURNS + _UNCOUNTED):
            plain = session.time_compute(1)[0][0]["whole_s"]
            ours, theirs = session.time_steps(None, 1)[0], session.time_steps(peer, 1)[0]
            if turn >= _UNCOUNTED:
                for name, seconds in (("plain", plain), ("ours", ours), (peer, theirs)):
                    times[name].append(seconds)
    with Session(_with(config, graphs=True), pool=pool) as session:
        times["graphs"] = session.time_steps(None, _TURNS + _UNCOUNTED)[_UNCOUNTED:]
    quartiles = {
        name: np.quantile(seconds, [0.25, 0.5, 0.75]) / config.microbatches * 1e6 for name, seconds in times.items()
    }
    of_plain = quartiles["plain"][0]
    row = {
        "what": schedule,
        "passed": bool(quartiles["ours"][0] <= quartiles[peer][0]),
        "ours_us": float(quartiles["ours"][0] - of_plain),
        "pytorch_us": float(quartiles[peer][0] - of_plain),
        "graphs_us": float(quartiles["graphs"][0] - of_plain),
        "plain_us": float(of_plain),
        "quartiles_us": {name: found.tolist() for name, found in quartiles.items()},
    }
    return [row]


def precision(model: str, reference: Wider, pool: WorkerPool) -> list[Row]:
    """Compare a step in bfloat16 with one in a wider type, both on one stream."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = compare_precision(local(model=model, dtype="bfloat16"), reference, device)
    return [{"what": f"{model}, {reference}", "passed": report.passed, **asdict(report)}]


_LOCAL: dict[str, dict[str, Any]] = {
    **{schedule: {"schedule": schedule} for schedule in ppsim.schedule_names()},
    "zb-h1, recomputed": {"schedule": "zb-h1", "recompute": True},
    "1f1b, GPT with dropout": {"schedule": "1f1b", "model": "gpt", "dropout": 0.1},
    "zb-v, GPT, tied weights": {"schedule": "zb-v", "model": "gpt", "tied": True},
    "zb-h1, GPT, bfloat16": {"schedule": "zb-h1", "model": "gpt", "dtype": "bfloat16"},
    "1f1b, float64": {"schedule": "1f1b", "dtype": "float64"},
    **{f"{schedule}, graphs": {"schedule": schedule, "graphs": True} for schedule in ("afab", "1f1b", "zb-h1")},
    "zb-v, GPT, graphs": {"schedule": "zb-v", "model": "gpt", "graphs": True},
    "1f1b, recomputed, graphs": {"schedule": "1f1b", "recompute": True, "graphs": True},
    "zb-h1, own dropout": {"schedule": "zb-h1", "model": "ppexec.experiment.soak_models:draws"},
    "zb-h1, several tensors": {"schedule": "zb-h1", "model": "ppexec.experiment.soak_models:several_tensors"},
    "1f1b, uneven rows": {"schedule": "1f1b", "model": "ppexec.experiment.soak_models:uneven_rows"},
    "zb-v, opaque backward": {"schedule": "zb-v", "model": "ppexec.experiment.soak_models:opaque"},
}
_NCCL: dict[str, dict[str, Any]] = {
    "1f1b": {"schedule": "1f1b"},
    "zb-v": {"schedule": "zb-v"},
    "zb-h1, graphs": {"schedule": "zb-h1", "graphs": True},
    "zb-h1, GPT": {"schedule": "zb-h1", "model": "gpt"},
    "1f1b, dp 2 x ranks 2": {"schedule": "1f1b", "dp": 2, "microbatches": 4},
    "1f1b, ranks 2 x tp 2, GPT": {"schedule": "1f1b", "tp": 2, "model": "gpt", "microbatches": 4},
}

PARTS = (
    Part(
        name="equivalence",
        question="Are outputs and gradients those of one stream without a pipeline?",
        cases={what: partial(_equal, what, local, changes) for what, changes in _LOCAL.items()},
    ),
    Part(
        name="step times",
        question="Does a step with four stages on one GPU take as long as predicted?",
        cases={each: partial(step_time, each) for each in ("afab", "1f1b", "interleaved-1f1b", "zb-h1")},
    ),
    Part(
        name="overhead",
        question="What does running a microbatch cost beside its computations?",
        cases={each: partial(overhead, each, PEER_OF[each]) for each in ("afab", "1f1b")},
    ),
    Part(
        name="memory",
        question="Does the allocator hold at most what was predicted?",
        cases={each: partial(memory, each) for each in ("afab", "1f1b", "zb-h1")},
    ),
    Part(
        name="nccl",
        question="And with a process for each rank, over NCCL?",
        cases={what: partial(_equal, what, nccl, changes) for what, changes in _NCCL.items()},
    ),
    Part(
        name="bfloat16",
        question="Does rounding explain what a step in bfloat16 differs by from one in a wider type?",
        cases={f"{m}, {r}": partial(precision, m, r) for m in ("mlp", "gpt") for r in get_args(Wider)},
    ),
)
