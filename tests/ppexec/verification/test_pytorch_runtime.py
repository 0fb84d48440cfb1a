"""PyTorch's pipeline runtime reads our schedule files and gets the gradients that one process gets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from ppexec.config.config import RunConfig
from ppexec.verification.reference import Reference, accumulation_orders
from ppsim import Action, Kind, OverlappedPair, Schedule, build_schedule

SETTINGS = {"layers": 4, "hidden": 8, "seq": 4, "microbatches": 4, "ranks": 2, "threads": 1}
CASES = [
    ("1f1b", "compute_only"),
    ("1f1b", "compute_comms"),
    ("zb-v", "compute_comms"),
    ("dualpipe-v", "compute_comms"),
    ("interleaved-1f1b", "compute_comms"),
]


def with_full_backwards(name: str) -> Schedule:
    """The schedule with B for I and W: PyTorch 2.13 cannot split the backward of a layer whose output is a view."""
    schedule = build_schedule(name, ranks=2, microbatches=SETTINGS["microbatches"])
    return Schedule.of(
        [
            action._replace(kind=Kind.B) if isinstance(action, Action) and action.kind == Kind.I else action
            for action in order
            if isinstance(action, OverlappedPair) or action.kind != Kind.W
        ]
        for order in schedule.orders
    )


def test_pytorch_trains_with_our_files(tmp_path: Path) -> None:
    # m is a power of two: PyTorch divides gradients by m after the backward, we divide the loss before it.
    torch.save(SETTINGS, tmp_path / "config.pt")
    jobs: list[str] = []
    for number, (name, form) in enumerate(CASES):
        schedule = with_full_backwards(name)
        path, out = tmp_path / f"{number}.csv", tmp_path / str(number)
        path.write_text(schedule.to_csv(messages=form == "compute_comms"))
        out.mkdir()
        jobs += [str(path), form, str(out)]
    script = str(Path(__file__).parents[2] / "support" / "pytorch_runtime.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        script,
        str(tmp_path / "config.pt"),
        *jobs,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-5000:]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, (name, _) in enumerate(CASES):
            config = RunConfig(**SETTINGS)
            orders = set(accumulation_orders(with_full_backwards(name).program))
            assert len(orders) == 1  # or the reference would have to run once for each
            reference = Reference(config, torch.device("cpu"))
            reference.run(orders.pop())
            theirs = {}
            for rank in range(2):
                theirs.update(torch.load(tmp_path / str(number) / f"rank{rank}.pt"))
            assert len(theirs) == 4 * SETTINGS["layers"]
            for (layer, parameter), gradient in theirs.items():
                assert torch.equal(gradient, reference.gradient(layer, parameter)), (name, layer, parameter)
    finally:
        torch.set_num_threads(before)
