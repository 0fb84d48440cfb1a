"""The fidelity study: small runs, going on where it stopped, disturbed steps, and the table's figures."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ppexec import WorkerPool
from ppexec.experiment import accuracy
from ppexec.experiment.cases import GROUPS, Case, case_row, cases, measure_missing, run_case, stored_rows
from ppexec.machine.outside_load import CpuTimes, OutsideLoad
from ppsim.parameter_sweep.store import Store
from tests.support.studies import run


def entry(error: float, *, spread: float = 0.001, **more: Any) -> dict[str, Any]:
    return {"group": "timed", "schedule": "afab", "ranks": 2, "relative_error": error, "spread": spread,
            "disturbed_steps": 1, "bytes_equal_at_every_action": True, **more}  # fmt: skip


def test_the_table_has_absolute_errors_by_group_and_ranks() -> None:
    rows = [entry(-0.01), entry(0.002, ranks=4), entry(0.003, ranks=4, schedule="zb-v"), entry(0.2, group="real")]
    found = {(of["group"], of["ranks"]): of for of in accuracy.table(rows, GROUPS)}
    assert set(found) == {("timed", None), ("timed", 2), ("timed", 4), ("real", None), ("real", 2)}
    whole = found["timed", None]
    assert (whole["n"], whole["median"], whole["worst"], whole["disturbed_steps"]) == (3, 0.003, 0.01, 3)
    assert whole["p90"] == pytest.approx(0.003 + 0.8 * 0.007)
    assert whole["worst_schedule"] == "afab"
    assert whole["within_target"] is True
    assert found["real", None]["within_target"] is False


def test_an_error_within_the_machines_spread_is_within_the_target() -> None:
    (of_group, _) = accuracy.table([entry(0.08, spread=0.1, group="real")], GROUPS)
    assert of_group["within_target"] is True


def test_where_compute_is_timed_the_spread_is_no_excuse() -> None:
    of_group, _ = accuracy.table([entry(0.02, spread=0.1)], GROUPS)
    assert of_group["within_target"] is False


def test_what_was_done_several_times_says_what_stays_and_what_varies() -> None:
    more = {"microbatches": 4, "size": "small"}
    times = [
        entry(0.02, predicted_s=1.02, measured_s=1.0, **more),
        entry(0.0, predicted_s=1.02, measured_s=1.02, **more),
    ]
    (found,) = accuracy.repeated([*times, entry(0.5, predicted_s=1.5, measured_s=1.0, ranks=4, **more)])
    assert (found["times"], found["ranks"]) == (2, 2)
    assert found["bias"] == pytest.approx(0.01)
    assert found["error_deviation"] == pytest.approx(0.02 / 2**0.5)
    assert found["bias_standard_error"] == pytest.approx(0.01)
    assert found["predicted_deviation"] == 0
    assert found["measured_deviation"] == pytest.approx(0.02 / 2**0.5 / 1.01)


def test_repeats_are_other_cases_and_the_first_is_kept_as_ever() -> None:
    once, twice = (cases(("timed",), 1, 2, repeats) for repeats in (1, 2))
    assert twice[: len(once)] == once
    assert len({case.key for case in twice}) == 2 * len(once)
    assert "repeat" not in twice[0].text


def test_bytes_that_differ_anywhere_show() -> None:
    rows = [entry(0.0), entry(0.0, bytes_equal_at_every_action=False)]
    assert not any(of["bytes_equal_everywhere"] for of in accuracy.table(rows, GROUPS))


def test_what_was_measured_is_not_measured_again(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("ppexec.machine.outside_load.read_proc", lambda _: CpuTimes(busy_s=0, own_s=0, now_s=0))
    words = f"--only timed --ranks 2 --schedules 1f1b --steps 1 --out {tmp_path} --json"
    code, out = run("fidelity", f"{words} --limit-s 0.001", monkeypatch, capsys)
    first = json.loads(out)
    assert code == 0
    assert first["missing"] == 3
    code, out = run("fidelity", words, monkeypatch, capsys)
    second = json.loads(out)
    assert second["missing"] == 0
    assert second["configurations"][0] == first["configurations"][0]
    for row in second["configurations"]:
        assert row["bytes_equal_at_every_action"] is True
        assert row["measured_s"] == row["steps_s"][0] > 0
    assert (tmp_path / "report.html").stat().st_size > 1_000_000


def test_disturbed_steps_are_counted_and_left_out(pool: WorkerPool) -> None:
    """The first step, and that one alone, has a whole second of somebody else's."""
    busy = iter([0.0, 1.0, *[1.0] * 100])

    def read(_: object) -> CpuTimes:
        return CpuTimes(busy_s=next(busy), own_s=0.0, now_s=0.0)

    case = Case(group="timed", schedule="1f1b", ranks=2, microbatches=2, size="small", steps=2)
    outcome = run_case(case, pool, OutsideLoad(read=read))
    found = case_row(case, outcome)
    assert found["disturbed_steps"] == 1
    assert len(found["steps_s"]) == 2


def test_a_case_disturbed_throughout_is_tried_again(tmp_path) -> None:
    clock = iter(range(10_000))

    def read(_: object) -> CpuTimes:
        return CpuTimes(busy_s=next(clock), own_s=0.0, now_s=0.0)

    case = Case(group="timed", schedule="afab", ranks=2, microbatches=2, size="small", steps=1)
    with Store(tmp_path / "results.sqlite") as store:
        measure_missing([case], store, limit_s=0, watch=OutsideLoad(read=read))
        rows, failed = stored_rows([case], store)
        assert rows == []
        assert "disturbed" in failed[0]
        measure_missing(
            [case], store, limit_s=0, watch=OutsideLoad(read=lambda _: CpuTimes(busy_s=0, own_s=0, now_s=0))
        )
        assert len(stored_rows([case], store)[0]) == 1


def test_real_compute_is_predicted_from_cores_of_its_own() -> None:
    found = cases(GROUPS, 1, 2)
    assert {case.ranks for case in found if case.group == "real"} == {2}
    assert {case.ranks for case in found if case.group == "shared-cores"} == {4}
    assert {case.ranks for case in found if case.group == "timed"} == {2, 4, 8}


@pytest.mark.parametrize("words", ["--steps -1", "--repeats 0", "--limit-s -1", "--schedules 1f1c", "--ranks 3"])
def test_bad_flags_end_with_2(words: str, monkeypatch, capsys) -> None:
    code, out = run("fidelity", words, monkeypatch, capsys)
    assert (code, out) == (2, "")
