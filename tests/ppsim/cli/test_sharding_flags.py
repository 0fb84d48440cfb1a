"""Flags of sharded parameters: the same step as from Python."""

from __future__ import annotations

import json

from ppsim import Collectives, StageCost, build_schedule, simulate
from ppsim.cli.main import main

COSTS = ["--forward-s", "1", "--backward-input-s", "1", "--backward-weight-s", "1", "--parameter-bytes", "100"]
REPLICAS = ["--replicas", "4", "--reduce-bytes-per-s", "50"]


def test_sharded_stages_of_flags_and_of_a_file_are_those_of_python(tmp_path, capsys) -> None:
    schedule = build_schedule("interleaved-1f1b", ranks=2, microbatches=4).with_sharding(1)
    cost = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, parameter_bytes=100)
    trace = simulate(schedule, [cost] * 4, collectives=Collectives(replicas=4, bytes_per_s=50))
    (tmp_path / "file.csv").write_text(schedule.to_csv(sharding=True))
    named = ["--schedule", "interleaved-1f1b", "--ranks", "2", "--microbatches", "4", "--active-stages", "1"]
    for given in (named, ["--from-csv", str(tmp_path / "file.csv")]):
        main(["simulate", *given, *COSTS, *REPLICAS, "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["makespan_s"] == trace.makespan_s
        assert found["memory"]["unsharded_bytes"] == [100, 100]


def test_active_stages_without_replicas_are_refused(capsys) -> None:
    named = ["--schedule", "1f1b", "--ranks", "2", "--microbatches", "4", "--active-stages", "1"]
    assert main(["simulate", *named, *COSTS]) == 2
    assert "--active-stages shards over replicas: give --replicas too" in capsys.readouterr().err
