"""Under torchrun the processes that exist are the workers."""

from __future__ import annotations

import json
import socket

from tests.support.launching import launch, torchrun

TINY = "--layers 4 --hidden 8 --seq 2 --micro-batch-size 1 --microbatches 4 --steps 1"


def test_verify_under_torchrun_prints_one_report() -> None:
    done = torchrun(2, f"verify {TINY} --schedule 1f1b --json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert report["outputs_bit_equal"] is True
    assert report["gradients_bit_equal"] is True
    assert report["config"]["ranks"] == 2


def test_another_number_of_processes_is_refused_with_both_numbers() -> None:
    done = torchrun(1, f"verify {TINY} --ranks 2 --json")
    assert done.returncode != 0
    assert done.stdout == ""
    assert "ppexec: dp 1 x ranks 2 x tp 1 needs 2 processes, there are 1: start that many" in done.stderr


def test_a_mesh_over_two_nodes() -> None:
    """Two launchers, as on two machines: tp within each, the pipeline and the replicas across."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"verify {TINY} --schedule zb-h1 --ranks 2 --tp 2 --json"
    where = f"--nnodes 2 --master-addr 127.0.0.1 --master-port {port} --node-rank"
    nodes = [launch(f"{where} {node}", 2, words) for node in (0, 1)]
    answers = [node.communicate(timeout=240) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], answers
    (line,) = answers[0][0].splitlines()
    assert answers[1][0] == ""
    report = json.loads(line)
    assert report["gradients_equal"] is True
    assert report["outputs_equal"] is True
    assert report["compared"] == 2 * (4 + 4 * 4)
