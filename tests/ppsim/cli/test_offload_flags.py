"""Flags of recomputed and offloaded activations: the same answers as the API gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppsim import HostLink, StageCost, build_schedule, search, simulate
from tests.support.commandline import run, run_json

COST = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=8)
WORDS = (
    "simulate --schedule 1f1b --ranks 4 --microbatches 8 --forward-s 1 --backward-input-s 1 --backward-weight-s 1 "
    "--activation-bytes 8"
)


def test_shares_and_rates_are_those_of_the_api(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = build_schedule("1f1b", ranks=4, microbatches=8)
    offloaded = simulate(
        schedule.with_offload(share=0.5), [COST] * 4, host_link=HostLink(bytes_per_s=4.0, latency_s=0.5)
    )
    printed = run_json(capsys, WORDS, "--offload-share 0.5 --copy-bytes-per-s 4 --copy-latency-s 0.5")
    assert printed["makespan_s"] == offloaded.makespan_s > simulate(schedule, [COST] * 4).makespan_s
    assert printed["memory"]["host_bytes"] == offloaded.memory.host_bytes.tolist()
    words = "--offload-share 0.5 --copy-bytes-per-s 4 --copy-latency-s 0.5 --blocking"
    host_link = HostLink(bytes_per_s=4.0, latency_s=0.5)
    between = simulate(schedule.with_offload(share=0.5), [COST] * 4, host_link=host_link, blocking=True)
    assert run_json(capsys, WORDS, words)["makespan_s"] == between.makespan_s > offloaded.makespan_s
    again = simulate(schedule.with_recompute(share=0.25), [COST] * 4)
    assert run_json(capsys, WORDS, "--recompute-share 0.25")["makespan_s"] == again.makespan_s


def test_a_file_says_where_copies_stand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "moved.csv"
    path.write_text("0F0,0O0,0F1,0L0,0R1,0B1,0B0\n")
    flags = "--forward-s 1 --backward-input-s 1 --backward-weight-s 1 --activation-bytes 8 --copy-bytes-per-s 2"
    assert run_json(capsys, f"simulate --from-csv {path}", flags)["makespan_s"] == 11.0
    code, _, said = run(capsys, f"simulate --from-csv {path}", flags, "--receive-window 2")
    assert code == 2
    assert "receive_window cannot be given for a schedule that offloads activations" in said


def test_a_search_takes_both(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = (
        "search --ranks 4 --microbatches 8 --forward-s 1 --backward-input-s 1 --backward-weight-s 1 "
        f"--activation-bytes 8 --memory-limit-bytes 16 --csv {tmp_path / 'found.csv'}"
    )
    how = {"ranks": 4, "microbatches": 8, "memory_limit_bytes": 16}
    found = search([COST] * 4, recompute=True, offload=HostLink(bytes_per_s=8.0), **how)
    printed = run_json(capsys, words, "--recompute --copy-bytes-per-s 8")
    assert printed["makespan_s"] == found.trace.makespan_s < search([COST] * 4, **how).trace.makespan_s
    assert (tmp_path / "found.csv").read_text() == found.schedule.to_csv(offload=True)
