"""Benchmarks: what an answer costs, beside what it is measured against in the same run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import simpy
from torch.distributed.pipelining import schedules as torch_schedules

import ppsim
from ppexec.config.config import RunConfig
from ppexec.experiment.overhead import PEER_OF, measure_overhead
from ppexec.experiment.timing import BenchmarkRow, seconds_of, time_in_turn
from ppexec.workers.pool import WorkerPool
from ppsim.simulation.engines.by_name import run_engine
from ppsim.simulation.timed_program import TimedProgram

_COST = ppsim.StageCost(
    forward_s=1e-3,
    backward_input_s=1e-3,
    backward_weight_s=0.8e-3,
    activation_bytes=40_000_000,
    weight_activation_bytes=30_000_000,
    output_bytes=2_000_000,
)
_NETWORK = ppsim.Network(latency_s=1e-5, bytes_per_s=25e9)
_PASSES = 20  # of one program, whose tables stay in the cache as they do in a sweep


def engine_rates(turns: int, *, quick: bool) -> list[BenchmarkRow]:
    """Actions per second of both engines on 1F1B, 32 x 256, beside bare SimPy timeouts."""
    ranks, microbatches = (8, 32) if quick else (32, 256)
    actions = 2 * ranks * microbatches
    stages = [_COST] * ranks

    def new_schedule() -> ppsim.Schedule:
        return ppsim.build_schedule("1f1b", ranks=ranks, microbatches=microbatches)

    timed_program = TimedProgram.of(new_schedule().program, stages, _NETWORK)
    run_engine("compiled", timed_program)  # so that no turn compiles

    def passes(_: ppsim.Schedule) -> None:
        for _pass in range(_PASSES):
            run_engine("compiled", timed_program)

    times = time_in_turn(
        {
            "bare": lambda _: _bare_timeouts(ranks, 2 * microbatches),
            "simpy": lambda schedule: ppsim.simulate(schedule, stages, network=_NETWORK),
            "compiled": lambda schedule: ppsim.simulate(schedule, stages, network=_NETWORK, engine="compiled"),
            "pass": passes,
        },
        turns=3 * turns,
        prepare=new_schedule,
    )
    rates = {name: actions / values for name, values in times.items()}
    rates["pass"] *= _PASSES
    size = f"1F1B {ranks} x {microbatches}"
    return [
        BenchmarkRow.of("engines", "bare SimPy timeouts", rates["bare"] / 1e6, "M/s"),
        BenchmarkRow.of("engines", f"SimPy engine, whole simulate call, {size}", rates["simpy"] / 1e6, "M actions/s"),
        BenchmarkRow.of("engines", "SimPy engine / bare timeouts", rates["simpy"] / rates["bare"], "x", ">= 0.5"),
        BenchmarkRow.of("engines", f"compiled, whole simulate call, {size}", rates["compiled"] / 1e6, "M actions/s"),
        BenchmarkRow.of("engines", f"compiled engine alone, {size}", rates["pass"] / 1e6, "M actions/s", ">= 50"),
    ]


def _bare_timeouts(processes: int, each: int) -> None:
    environment = simpy.Environment()

    def wait() -> Generator[simpy.Event, Any, None]:
        timeout = environment.timeout
        for _ in range(each):
            yield timeout(1.0)

    for _ in range(processes):
        environment.process(wait())
    environment.run()


def large_schedules(turns: int, *, quick: bool) -> list[BenchmarkRow]:
    """Seconds to build, check and predict small and large 1F1B schedules, and to search an order."""
    ranks, microbatches = (16, 64) if quick else (64, 1024)
    size = f"{ranks} x {microbatches}"
    stages, limit_bytes = [_COST] * ranks, _COST.activation_bytes * ranks

    def predict(ranks: int, microbatches: int) -> None:
        schedule = ppsim.build_schedule("1f1b", ranks=ranks, microbatches=microbatches)
        schedule.check()
        ppsim.simulate(schedule, [_COST] * ranks, network=_NETWORK, engine="compiled")

    def search() -> None:
        ppsim.search(stages, ranks=ranks, microbatches=microbatches, memory_limit_bytes=limit_bytes)

    predict(2, 2)  # so that nothing below loads the engine
    # `build_schedule` keeps small schedules: only one that nobody has asked for is built.
    new_ms = [1e3 * seconds_of(partial(predict, 8, each)) for each in range(32, 32 + turns)]
    again_ms = [1e3 * seconds_of(partial(predict, 8, 32)) for _ in range(20 * turns)]
    large_s = [seconds_of(partial(predict, ranks, microbatches)) for _ in range(turns)]
    most = (64, 256) if quick else (1024, 4096)
    largest = [_predict_in_a_process(*most) for _ in range(1 if quick else 3)]
    search_s = [seconds_of(search) for _ in range(3)]
    largest_s, peak_gigabytes = ([found[name] for found in largest] for name in ("seconds", "gigabytes"))
    return [
        BenchmarkRow.of("scale", "1F1B 8 x 32 and up, each for the first time", new_ms, "ms"),
        BenchmarkRow.of("scale", "1F1B 8 x 32 built, checked, predicted again", again_ms, "ms", "< 0.5"),
        BenchmarkRow.of("scale", f"1F1B {size} built, checked, predicted", large_s, "s", "< 0.5"),
        BenchmarkRow.of("scale", f"1F1B {most[0]:,} x {most[1]:,}, the same", largest_s, "s", "< 10"),
        BenchmarkRow.of("scale", "its peak memory", peak_gigabytes, "GB", "< 4"),
        BenchmarkRow.of("scale", f"search {size} (compiled before)", search_s, "s", "< 2"),
    ]


# Run in a process without torch, whose memory would count too.
_PREDICTION = """
import json, resource, sys, time, ppsim
cost = ppsim.StageCost(forward_s=1e-3, backward_input_s=1e-3, backward_weight_s=8e-4, output_bytes=2000000)
network = ppsim.Network(latency_s=1e-5, bytes_per_s=25e9)

def predict(ranks, microbatches):
    schedule = ppsim.build_schedule("1f1b", ranks=ranks, microbatches=microbatches)
    schedule.check()
    trace = ppsim.simulate(schedule, [cost] * ranks, network=network, engine="compiled")
    return trace.makespan_s, trace.bubble_fraction, trace.peak_activation_bytes

predict(4, 8)
began = time.perf_counter()
predict(*map(int, sys.argv[1:]))
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
"""


def _predict_in_a_process(ranks: int, microbatches: int) -> dict[str, float]:
    """Seconds and peak memory of one prediction in a new process, once its engine is loaded."""
    command = [sys.executable, "-c", _PREDICTION, str(ranks), str(microbatches)]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def pytorch_rates(turns: int, *, quick: bool) -> list[BenchmarkRow]:
    """PyTorch's lowering and simulator, which counts ticks and knows no durations, beside ours on the same orders."""
    ranks, microbatches = (4, 16) if quick else (8, 128)
    stages = [_COST] * ranks
    text = ppsim.build_schedule("1f1b", ranks=ranks, microbatches=microbatches).to_csv()
    parse = torch_schedules._Action.from_str
    orders = {rank: [parse(cell) for cell in line.split(",") if cell] for rank, line in enumerate(text.splitlines())}

    def theirs(_: ppsim.Schedule) -> None:
        given = {rank: list(order) for rank, order in orders.items()}  # PyTorch empties what it is given
        with_messages = torch_schedules._add_send_recv(given, lambda stage: stage, ranks)
        torch_schedules._simulate_comms_compute(with_messages, lambda stage: stage, ranks)

    def ours(schedule: ppsim.Schedule) -> None:
        ppsim.simulate(schedule, stages, network=_NETWORK)

    times = time_in_turn({"theirs": theirs, "ours": ours}, turns=turns, prepare=lambda: ppsim.Schedule.from_csv(text))
    size = f"1F1B {ranks} x {microbatches}"
    rates = {name: 2 * ranks * microbatches / values / 1e6 for name, values in times.items()}
    return [
        BenchmarkRow.of("pytorch", f"PyTorch's lowering and simulator, {size}", rates["theirs"], "M actions/s"),
        BenchmarkRow.of("pytorch", "SimPy engine with checks and trace, the same", rates["ours"], "M actions/s"),
        BenchmarkRow.of("pytorch", "ours / PyTorch's rate", times["theirs"] / times["ours"], "x"),
    ]


def sweep_rates(function: Callable[..., float], *, quick: bool) -> list[BenchmarkRow]:
    """Points per second of a sweep of `function(forward_s=...)` into a store, beside a plain loop.

    `function` should be importable without torch, which each new process of the sweep would load too.
    """
    count = 100 if quick else 2000
    points = [{"forward_s": 1e-3 + 1e-6 * number} for number in range(count)]
    loop_s = seconds_of(lambda: [function(**point) for point in points])
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "sweep.sqlite"

        def swept() -> None:
            ppsim.sweep(function, points, store=store, progress=False)

        sweep_s, again_s = seconds_of(swept), seconds_of(swept)
    return [
        BenchmarkRow.of("sweep", f"{count} simulations of 1F1B 8 x 32, a plain loop", [count / loop_s], "points/s"),
        BenchmarkRow.of("sweep", "the same swept over processes into SQLite", [count / sweep_s], "points/s"),
        BenchmarkRow.of("sweep", "sweep / loop, starting the processes included", [loop_s / sweep_s], "x"),
        BenchmarkRow.of("sweep", "the same once more, all from the store", [count / again_s], "points/s"),
    ]


def executor_overheads(turns: int, *, quick: bool) -> list[BenchmarkRow]:
    """Overhead of the executor with tiny tensors, and whole steps at hidden 512, beside PyTorch's executor."""
    steps = 4 if quick else 3 * turns
    tiny = RunConfig(layers=2, hidden=8, seq=2, micro_batch_size=1, microbatches=32, ranks=2, steps=steps, warmup=3)
    real = RunConfig(layers=2, hidden=512, seq=256, microbatches=8, ranks=2, steps=max(steps // 2, 2), warmup=2)
    rows = []
    with WorkerPool() as pool:
        for name, peer in PEER_OF.items():
            found = measure_overhead(replace(tiny, schedule=name), pool=pool)
            over_us, what = found.overhead_us, f"{name}, tiny tensors: ours beyond compute"
            rows += [
                BenchmarkRow.of("executor", what, [over_us["ours"]], "us"),
                BenchmarkRow.of("executor", "PyTorch's", [over_us[peer]], "us"),
                BenchmarkRow.of("executor", "ours / PyTorch's", [found.ratio], "x", "<= 0.2"),
            ]
        for name, peer in PEER_OF.items() if not quick else ():
            found = measure_overhead(replace(real, schedule=name), pool=pool)
            step_s, what = found.step_s, f"{name}, hidden 512, seq 256: step"
            rows += [
                BenchmarkRow.of("executor", f"{what} / floor", [step_s["ours"] / found.floor_s], "x", "<= 1.03"),
                BenchmarkRow.of("executor", f"{what} / PyTorch's", [step_s["ours"] / step_s[peer]], "x", "<= 1"),
            ]
    return rows
