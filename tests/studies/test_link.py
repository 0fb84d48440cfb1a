"""The link study runs, at a small size, and writes a network that predictions can use."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ppexec.experiment.links import fit_network, sample_row
from ppexec.measure.ping import PingSample, Spread
from ppsim import Link, LinkPiece, Network
from ppsim.plots.link_figure import link_times
from tests.support.commandline import AFAB, COSTS, run_json
from tests.support.studies import STUDIES, load

TRUTH = Link(latency_s=1e-4, gap_s=2e-5, larger=[LinkPiece(from_bytes=1 << 16, latency_s=1e-4, bytes_per_s=1e9)])


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load("link")


def sample(size_bytes: int, link: Link, *, destination: int = 1) -> PingSample:
    """What a link without noise gives."""
    times = [link.one_way_s(size_bytes) + (count - 1) * link.occupied_s(size_bytes) for count in (1, 2)]
    first, second = (Spread(p25_s=t, median_s=t, p75_s=t) for t in times)
    return PingSample(
        source=0,
        destination=destination,
        size_bytes=size_bytes,
        asleep=first,
        awake=first,
        late=first,
        bursts={1: first, 2: second},
        occupied_s=times[1] - times[0],
        send=first,
        post=first,
    )


def test_every_link_is_fitted_to_its_own_samples_and_the_others_to_all() -> None:
    sizes = [1 << power for power in range(6, 25)]
    slow = TRUTH.slowed(3.0)
    samples = [s for size in sizes for s in (sample(size, TRUTH), sample(size, slow, destination=2))]
    network = fit_network(samples, most_pieces=4)
    assert set(network.links) == {(0, 1), (0, 2)}
    for size in sizes:
        assert network.link(0, 1).one_way_s(size) == pytest.approx(TRUTH.one_way_s(size), rel=0.005)
        assert network.link(0, 2).one_way_s(size) == pytest.approx(slow.one_way_s(size), rel=0.005)
        between = network.link(1, 2).one_way_s(size) / TRUTH.one_way_s(size)
        assert 0.99 <= between <= 3.01
    assert sample_row(samples[0], network)["fit_over_measured"] == pytest.approx(1, rel=0.005)
    rows = [sample_row(each, network) for each in samples if each.destination == 1]
    picture = link_times(rows, network.link(0, 1), name="rank 0 to rank 1")
    measured = next(trace for trace in picture.data if trace.name == "to a sleeping receiver")
    assert list(measured.x) == sizes
    assert list(measured.y) == pytest.approx([TRUTH.one_way_s(size) * 1e6 for size in sizes])


def test_a_small_study_writes_a_network_that_simulates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, study: ModuleType
) -> None:
    words = f"--sizes 64 4096 65536 --rounds 2 --out {tmp_path} --json"
    monkeypatch.setattr(sys, "argv", ["link.py", *words.split()])
    assert study.main() == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert [(row["size_bytes"], row["source"]) for row in summary["rows"]] == [
        (size, source) for size in (64, 4096, 65536) for source in (0, 1)
    ]
    network = Network.from_file(tmp_path / "network.json")
    assert set(network.links) == {(0, 1), (1, 0)}
    for row in summary["rows"]:
        link = network.link(row["source"], row["destination"])
        assert link.one_way_s(row["size_bytes"]) == row["fit_one_way_s"]
        assert math.isfinite(row["fit_one_way_s"])
    document = json.loads((tmp_path / "network.json").read_text())
    assert [entry["size_bytes"] for entry in document["samples"]] == [64, 64, 4096, 4096, 65536, 65536]
    assert document["environment"]["backend"] == "gloo"
    assert (tmp_path / "report.html").stat().st_size > 1_000_000
    told = run_json(capsys, "simulate", AFAB, COSTS, f"--output-bytes 4096 --network {tmp_path}/network.json")
    assert told["makespan_s"] > run_json(capsys, "simulate", AFAB, COSTS, "--output-bytes 4096")["makespan_s"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--ranks 1", "ranks must be 2 to 64"),
        ("--sizes 0", "sizes must be whole numbers from 1 to"),
        ("--sizes 2000000000", "sizes must be whole numbers from 1 to"),
        ("--rounds 0", "rounds must be 1 or more, got 0"),
        ("--pieces 0", "pieces must be 1 or more, got 0"),
        ("--out pyproject.toml", "pyproject.toml is not a directory"),
    ],
)
def test_bad_flags_end_with_2_and_one_message(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], study: ModuleType
) -> None:
    monkeypatch.chdir(STUDIES.parent)
    monkeypatch.setattr(sys, "argv", ["link.py", *words.split()])
    assert study.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err.splitlines()[-1]
