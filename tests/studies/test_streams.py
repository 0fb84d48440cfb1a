"""The study of streams: who hangs, who is slow, and real steps beside them."""

from __future__ import annotations

import json

from tests.support.studies import run

_PLACES = ("posted ahead", "when sent", "at use", "deferred by PyTorch")


def test_placements_hang_or_run_as_the_study_says(monkeypatch, capsys, tmp_path) -> None:
    code, out = run("streams", f"--no-measure --json --out {tmp_path}", monkeypatch, capsys)
    assert code == 0
    rows = {(row["case"], row["place"], row["streams"]): row for row in json.loads(out)["rows"]}
    assert {place for _, place, _ in rows} <= set(_PLACES)
    for case in ("172668", "188833"):
        for place in ("at use", "deferred by PyTorch"):
            if (case, place, "rank") not in rows:  # torch before 2.13 defers nothing
                continue
            assert rows[case, place, "link"]["predicted_s"] is not None
            for streams in ("pair", "rank"):
                assert rows[case, place, streams]["predicted_s"] is None
                assert "would wait for ever" in rows[case, place, streams]["why"]
    best_s = rows["188833", "posted ahead", "link"]["predicted_s"]
    assert rows["188833", "when sent", "pair"]["predicted_s"] <= best_s * 1.001
    blocked = rows["188833", "when sent", "rank"]
    assert blocked["predicted_s"] > 1.4 * best_s
    assert blocked["waits_s"] > 0.9 * (blocked["predicted_s"] - best_s)
    assert (tmp_path / "report.html").stat().st_size > 1_000_000


def test_what_does_not_hang_is_run(monkeypatch, capsys, tmp_path) -> None:
    words = "--ranks 2 --microbatches 2 --forward-s 0.002 --steps 1"
    code, out = run("streams", f"{words} --json --out {tmp_path}", monkeypatch, capsys)
    assert code == 0
    for row in json.loads(out)["rows"]:
        # Every action sleeps at least its time, so a step is no shorter than one rank's computations.
        is_run = row["measured_s"] is not None
        assert is_run == (row["predicted_s"] is not None)
        assert not is_run or row["measured_s"] >= 2 * 2 * 3 * 0.002
