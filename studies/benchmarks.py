"""How fast are prediction, search, sweeps and execution, beside what they are measured against?

Question   What does an answer cost: a simulated step, a million of them, a searched order, a sweep, an executed action?

Command    python studies/benchmarks.py
           python studies/benchmarks.py --only engines scale --json

Method     Everything is a ratio taken in one run: ours and what it is held against run in turn, and medians are
           compared, with quartiles beside them. engines: 1F1B on 32 ranks with 256 microbatches and latency, whole
           `simulate` calls with their trace, against bare SimPy timeouts of the same number. scale: building, checking
           and predicting large 1F1B schedules (the largest in a process of its own, whose peak memory is read), and a
           search. pytorch: PyTorch's own lowering and tick simulator on the same orders. sweep: 2,000 simulations
           through a store in SQLite against a plain loop. executor: see executor_overhead.py.

Answer     On two cores (AMD EPYC, torch 2.13): SimPy's engine runs at 0.54 to 0.56 of the rate of bare timeouts, 0.6 M
           actions/s with lowering and trace, 4.7 times PyTorch's lowering and tick simulator; the compiled engine does
           59 M actions/s. 1F1B on 64 ranks with 1,024 microbatches is built, checked and predicted in 0.05 s, on 1,024
           ranks with 4,096 in 4 to 5 s and 1.9 GB; a search at 64 x 1,024 takes 0.24 s. A sweep of simulations of 3 ms
           gains 1.1 from the second core, starting its processes included, and finds 46,000 points/s in its store.
           Beside its computations a microbatch costs 0.05 to 0.09 ms, 0.05 to 0.16 of PyTorch's.

Where the time goes, and why it cannot go much lower
  SimPy engine   An event costs SimPy itself 0.9 us (made, pushed on a heap, popped, its callback called), and an action
                 costs one event at most. Ours adds 0.5 us of reading and writing lists around it; lowering is 0.1 us
                 an action. A process per rank, resumed by SimPy, made the same step 1.6 times as long, and an event for
                 a message costs as much as an action: neither is there any more.
  compiled       The engine is one pass over the actions in an order in which what they need has come before: 8 ns an
                 action while the tables are in the cache, 17 ns with what is allocated around it. Beyond the cache
                 (131,072 actions: 10 MB) it waits for memory, 20 to 40 ns: 1F1B alternates between ranks, so each
                 action touches lines of another rank's tables.
  scale          Of 8.4 million actions lowering takes a third to a half (a sort by link, tables of rows by stage and
                 microbatch), the proof that the schedule ends a twentieth, the pass and the trace's columns the rest:
                 passes over arrays that no cache holds.
  executor       A gloo message costs its receiver 0.1 to 0.3 ms of waking up; through shared memory nobody is woken. A
                 small send takes 1.1 us and a receive 1.5 us (two copies and a flag), and F and B of a stage 13 us more
                 than the same calls in a plain loop, most of it holding and handing over tensors. The rest of the 45 to
                 106 us is the runtime's loop and waiting for a neighbour's flag; it has not been taken apart further.

Writes DIR/report.html and summary.json.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simpy
from tqdm import tqdm

import ppexec
import ppsim
from ppexec.cli import existing_directory, study_main
from ppexec.config.config import RunConfig
from ppexec.experiment.overhead import PEER_OF, measure_overhead
from ppexec.experiment.text import environment_rows
from ppexec.machine.environment import describe_environment
from ppsim.cli import command
from ppsim.export.html_report import Report
from ppsim.simulation.engines.by_name import run_engine
from ppsim.simulation.timed_program import TimedProgram

Part = Literal["engines", "scale", "pytorch", "sweep", "executor"]
_PARTS: tuple[Part, ...] = ("engines", "scale", "pytorch", "sweep", "executor")
_COST = ppsim.StageCost(
    forward_s=1e-3,
    backward_input_s=1e-3,
    backward_weight_s=0.8e-3,
    activation_bytes=40_000_000,
    weight_activation_bytes=30_000_000,
    output_bytes=2_000_000,
)
_PASSES = 20  # of a program in the cache, as in a sweep
_NETWORK = ppsim.Network(latency_s=1e-5, bytes_per_s=25e9)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. value: the median, in `unit`; low, high: quartiles. target: what it is to be, as text."""

    part: str
    what: str
    value: float
    low: float
    high: float
    unit: str
    target: str = ""

    @classmethod
    def of(cls, part: str, what: str, values: Any, unit: str, target: str = "") -> Row:
        """From every turn's figure."""
        low, middle, high = np.quantile(np.asarray(values, float), [0.25, 0.5, 0.75]).tolist()
        return cls(part=part, what=what, value=middle, low=low, high=high, unit=unit, target=target)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What answers cost, as ratios taken in one run."""

    only: tuple[Part, ...] = _PARTS
    """Parts to run."""
    turns: int = 9
    """How often everything short is measured, in turn with what it is held against."""
    quick: bool = False
    """Smaller sizes: to see that it runs, not to be quoted."""
    out: Path = Path("studies/out/benchmarks")
    """Directory for report.html and summary.json."""
    json: bool = False
    """Print summary.json's object and nothing else on standard output."""

    def execute(self) -> None:
        """Measure, print the table, write the files."""
        if self.turns < 1:
            raise ValueError(f"turns must be 1 or more, got {self.turns}")
        directory = existing_directory(self.out)
        parts: dict[str, Callable[[], list[Row]]] = {
            "engines": self.engines,
            "scale": self.scale,
            "pytorch": self.pytorch,
            "sweep": self.sweep,
            "executor": self.executor,
        }
        rows: list[Row] = []
        for part in tqdm([name for name in _PARTS if name in self.only], file=sys.stderr, leave=False):
            rows += parts[part]()
        environment = describe_environment(ranks=0, processes=1, threads_per_rank=1, backend="", worker_allocator={})
        summary = {"rows": [vars(row) for row in rows], "quick": self.quick, "environment": environment}
        (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        report(rows, environment).save(directory / "report.html")
        if self.json:
            command.print_json(summary)
            return
        for row in rows:
            target = f"  (target {row.target})" if row.target else ""
            print(f"{row.part:<9} {row.what:<62} {row.value:>10.4g} {row.unit:<12}{target}")

    def engines(self) -> list[Row]:
        """Rates of the engines on 1F1B, 32 x 256, against bare timeouts."""
        ranks, microbatches = (8, 32) if self.quick else (32, 256)
        actions = 2 * ranks * microbatches
        stages = [_COST] * ranks

        def fresh() -> ppsim.Schedule:
            return ppsim.build_schedule("1f1b", ranks=ranks, microbatches=microbatches)

        program = fresh().program
        load = TimedProgram.of(program, stages, _NETWORK)
        run_engine("compiled", load)  # compiled now, if it never was

        def passes() -> None:
            for _ in range(_PASSES):
                run_engine("compiled", load)

        times = alternate(
            {
                "bare": lambda _: _bare_timeouts(ranks, 2 * microbatches),
                "simpy": lambda schedule: ppsim.simulate(schedule, stages, network=_NETWORK),
                "compiled": lambda schedule: ppsim.simulate(schedule, stages, network=_NETWORK, engine="compiled"),
                "pass": lambda _: passes(),
            },
            turns=3 * self.turns,
            prepare=fresh,
        )
        rates = {name: actions / values for name, values in times.items()}
        rates["pass"] *= _PASSES
        size = f"1F1B {ranks} x {microbatches}"
        return [
            Row.of("engines", "bare SimPy timeouts", rates["bare"] / 1e6, "M/s"),
            Row.of("engines", f"SimPy engine, whole simulate call, {size}", rates["simpy"] / 1e6, "M actions/s"),
            Row.of("engines", "SimPy engine / bare timeouts", rates["simpy"] / rates["bare"], "x", ">= 0.5"),
            Row.of("engines", f"compiled, whole simulate call, {size}", rates["compiled"] / 1e6, "M actions/s"),
            Row.of("engines", f"compiled engine alone, {size}", rates["pass"] / 1e6, "M actions/s", ">= 50"),
        ]

    def scale(self) -> list[Row]:
        """Large schedules built, checked and predicted, and one searched."""
        ranks, microbatches = (16, 64) if self.quick else (64, 1024)
        size = f"{ranks} x {microbatches}"
        whole = [_timed(lambda: _predict(ranks, microbatches)) for _ in range(self.turns)]
        huge = [_in_a_process(*((64, 256) if self.quick else (1024, 4096))) for _ in range(1 if self.quick else 3)]
        stages, limit = [_COST] * ranks, _COST.activation_bytes * ranks
        search_s = [
            _timed(lambda: ppsim.search(stages, ranks=ranks, microbatches=microbatches, memory_limit_bytes=limit))
            for _ in range(3)
        ]
        rows = [Row.of("scale", f"1F1B {size} built, checked, predicted", whole, "s", "< 0.5")]
        rows.append(Row.of("scale", "1F1B 1,024 x 4,096, the same", [found["seconds"] for found in huge], "s", "< 10"))
        rows.append(Row.of("scale", "its peak memory", [found["gigabytes"] for found in huge], "GB", "< 4"))
        rows.append(Row.of("scale", f"search {size} (compiled before)", search_s, "s", "< 2"))
        return rows

    def pytorch(self) -> list[Row]:
        """PyTorch's lowering and simulator, which counts ticks and knows no durations, on the same orders."""
        from torch.distributed.pipelining import schedules as torch_schedules

        ranks, microbatches = (4, 16) if self.quick else (8, 128)
        stages = [_COST] * ranks
        text = ppsim.build_schedule("1f1b", ranks=ranks, microbatches=microbatches).to_csv()
        parse = torch_schedules._Action.from_str
        orders = {
            rank: [parse(cell) for cell in line.split(",") if cell] for rank, line in enumerate(text.splitlines())
        }

        def theirs(_: Any) -> None:
            given = {rank: list(order) for rank, order in orders.items()}  # it empties what it is given
            with_messages = torch_schedules._add_send_recv(given, lambda stage: stage, ranks)
            torch_schedules._simulate_comms_compute(with_messages, lambda stage: stage, ranks)

        def ours(schedule: ppsim.Schedule) -> None:
            ppsim.simulate(schedule, stages, network=_NETWORK)

        times = alternate(
            {"theirs": theirs, "ours": ours}, turns=self.turns, prepare=lambda: ppsim.Schedule.from_csv(text)
        )
        size = f"1F1B {ranks} x {microbatches}"
        rates = {name: 2 * ranks * microbatches / values / 1e6 for name, values in times.items()}
        return [
            Row.of("pytorch", f"PyTorch's lowering and simulator, {size}", rates["theirs"], "M actions/s"),
            Row.of("pytorch", "SimPy engine with checks and trace, the same", rates["ours"], "M actions/s"),
            Row.of("pytorch", "ours / PyTorch's rate", times["theirs"] / times["ours"], "x"),
        ]

    def sweep(self) -> list[Row]:
        """Simulations of 1F1B 8 x 32 through a sweep with a store, against a plain loop."""
        count = 100 if self.quick else 2000
        points = [{"forward_s": 1e-3 + 1e-6 * number} for number in range(count)]
        loop_s = _timed(lambda: [makespan(**point) for point in points])
        with tempfile.TemporaryDirectory() as directory:
            store = Path(directory) / "sweep.sqlite"

            def swept() -> None:
                ppsim.sweep(makespan, points, store=store, progress=False)

            sweep_s, again_s = _timed(swept), _timed(swept)
        return [
            Row.of("sweep", f"{count} simulations of 1F1B 8 x 32, a plain loop", [count / loop_s], "points/s"),
            Row.of("sweep", "the same swept over processes into SQLite", [count / sweep_s], "points/s"),
            Row.of("sweep", "sweep / loop, starting the processes included", [loop_s / sweep_s], "x"),
            Row.of("sweep", "the same once more, all from the store", [count / again_s], "points/s"),
        ]

    def executor(self) -> list[Row]:
        """Overhead with tiny tensors, and whole steps at hidden 512, against PyTorch's executor."""
        rows = []
        steps = 4 if self.quick else 3 * self.turns
        tiny = RunConfig(layers=2, hidden=8, seq=2, micro_batch_size=1, microbatches=32, ranks=2, steps=steps, warmup=3)
        real = RunConfig(layers=2, hidden=512, seq=256, microbatches=8, ranks=2, steps=max(steps // 2, 2), warmup=2)
        with ppexec.WorkerPool() as pool, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in PEER_OF:
                found = measure_overhead(replace(tiny, schedule=name), pool=pool)
                over = found.overhead_us
                rows.append(Row.of("executor", f"{name}, tiny tensors: ours beyond compute", [over["ours"]], "us"))
                rows.append(Row.of("executor", "PyTorch's", [over[PEER_OF[name]]], "us"))
                rows.append(Row.of("executor", "ours / PyTorch's", [found.ratio], "x", "<= 0.2"))
            for name in PEER_OF if not self.quick else ():
                found = measure_overhead(replace(real, schedule=name), pool=pool)
                what = f"{name}, hidden 512, seq 256: step"
                rows.append(
                    Row.of("executor", f"{what} / floor", [found.step_s["ours"] / found.floor_s], "x", "<= 1.03")
                )
                theirs = found.step_s["ours"] / found.step_s[PEER_OF[name]]
                rows.append(Row.of("executor", f"{what} / PyTorch's", [theirs], "x", "<= 1"))
        return rows


def makespan(forward_s: float) -> float:
    """One step of 1F1B on 8 ranks with 32 microbatches."""
    cost = ppsim.StageCost(forward_s=forward_s, backward_input_s=1e-3, backward_weight_s=0.8e-3)
    schedule = ppsim.build_schedule("1f1b", ranks=8, microbatches=32)
    return ppsim.simulate(schedule, [cost] * 8, network=_NETWORK).makespan_s


def alternate(
    functions: dict[str, Callable[[Any], Any]], *, turns: int, prepare: Callable[[], Any]
) -> dict[str, np.ndarray]:
    """Seconds of every function in each turn, after one turn that is not counted.

    Each is called with what `prepare` makes for it, untimed, and with no garbage left by the one before.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            given = prepare()
            gc.collect()
            elapsed_s = _timed(lambda: function(given))  # noqa: B023  (called at once)
            if turn:
                times[name].append(elapsed_s)
    return {name: np.array(values) for name, values in times.items()}


def _timed(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _bare_timeouts(processes: int, each: int) -> None:
    environment = simpy.Environment()

    def wait() -> Any:
        timeout = environment.timeout
        for _ in range(each):
            yield timeout(1.0)

    for _ in range(processes):
        environment.process(wait())
    environment.run()


def _predict(ranks: int, microbatches: int) -> tuple[float, float]:
    schedule = ppsim.build_schedule("1f1b", ranks=ranks, microbatches=microbatches)
    schedule.check()
    trace = ppsim.simulate(schedule, [_COST] * ranks, network=_NETWORK, engine="compiled")
    return trace.makespan_s, trace.bubble_fraction


def _in_a_process(ranks: int, microbatches: int) -> dict[str, float]:
    """Seconds and peak memory of one prediction in a new process, once its engine is loaded."""
    code = (
        "import json, resource, time, ppsim\n"
        "cost = ppsim.StageCost(forward_s=1e-3, backward_input_s=1e-3, backward_weight_s=8e-4, output_bytes=2000000)\n"
        "network = ppsim.Network(latency_s=1e-5, bytes_per_s=25e9)\n"
        "def predict(p, m):\n"
        "    schedule = ppsim.build_schedule('1f1b', ranks=p, microbatches=m)\n"
        "    schedule.check()\n"
        "    trace = ppsim.simulate(schedule, [cost] * p, network=network, engine='compiled')\n"
        "    return trace.makespan_s, trace.bubble_fraction, trace.peak_activation_bytes\n"
        "predict(4, 8)\n"
        "began = time.perf_counter()\n"
        f"predict({ranks}, {microbatches})\n"
        "seconds = time.perf_counter() - began\n"
        "print(json.dumps({'seconds': seconds,\n"
        "    'gigabytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def report(rows: list[Row], environment: dict[str, Any]) -> Report:
    """The table and where it was measured."""
    page = Report(title="What answers cost", lead="Medians, with quartiles of the turns beside them.")
    page.add(
        "Figures",
        table=[
            {
                "part": row.part,
                "figure": row.what,
                "median": f"{row.value:.4g} {row.unit}",
                "quartiles": f"{row.low:.4g} to {row.high:.4g}" if row.low < row.high else "",
                "target": row.target,
            }
            for row in rows
        ],
    )
    page.add("Environment", definitions=environment_rows(environment))
    return page


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
