"""Figures as files: pages anywhere, pictures where kaleido and Chromium are, and one sentence where they are not."""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path

import plotly.graph_objects as go
import pytest

import ppsim
from ppsim import InputError
from ppsim.cli.main import main
from ppsim.export import figure_file
from ppsim.export.figure_file import check_figure_path, save_figure

FIGURE = go.Figure(go.Bar(x=[1, 2], y=[3, 4]), layout={"height": 300})


def _pictures_or_skip(path: Path) -> None:
    try:
        check_figure_path(path)
    except InputError as error:
        pytest.skip(str(error))


def test_a_page_needs_no_network(tmp_path: Path) -> None:
    save_figure(FIGURE, tmp_path / "figure.html")
    text = (tmp_path / "figure.html").read_text()
    assert 'src="http' not in text
    assert "plotly.js v" in text


def test_pictures_have_the_figures_size(tmp_path: Path) -> None:
    _pictures_or_skip(tmp_path / "figure.png")
    save_figure(FIGURE, tmp_path / "figure.png")
    head = (tmp_path / "figure.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:]) == (2000, 600)
    save_figure(FIGURE, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().startswith('<svg class="main-svg"')


@pytest.mark.parametrize("name", ["figure", "figure.jpeg", "figure.svg.gz", ".html"])
def test_other_endings_are_refused_with_those_that_are_known(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no figure's name: take one that ends in \.html, \.svg, \.png, \.pdf"):
        save_figure(FIGURE, tmp_path / name)


def test_pictures_without_kaleido_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(figure_file.importlib.util, "find_spec", lambda name: None if name == "kaleido" else find(name))
    words = ["schedule", "--schedule", "1f1b", "--ranks", "2", "--microbatches", "2"]
    assert main([*words, "--figure", str(tmp_path / "figure.png")]) == 2
    said = capsys.readouterr().err
    assert "needs kaleido, which is not installed" in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_pictures_without_chromium_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chromium = pytest.importorskip("choreographer.browsers.chromium")
    monkeypatch.setattr(chromium.Chromium, "find_browser", classmethod(lambda cls, **_: None))
    with pytest.raises(InputError, match="needs Chromium or Chrome, which is not found: install Chromium"):
        check_figure_path(tmp_path / "figure.svg")


def test_commands_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--schedule", "1f1b", "--ranks", "2", "--microbatches", "2"]
    costs = ["--forward-s", "1", "--backward-input-s", "1", "--backward-weight-s", "1"]
    trace = str(tmp_path / "step.trace")
    commands = {
        "schedule": ["schedule", *words],
        "simulate": ["simulate", *words, *costs, "--out", trace],
        "samples": ["simulate", *words, *costs, "--jitter", "0.1", "--samples", "20"],
        "attribute": ["attribute", trace],
        "compare": ["compare", trace, trace],
    }
    for name, command in commands.items():
        path = tmp_path / f"{name}.html"
        assert main([*command, "--figure", str(path)]) == 0, capsys.readouterr().err
        assert path.stat().st_size > 1_000_000


def test_a_studys_figures_are_written_beside_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pictures_or_skip(tmp_path / "figure.svg")
    from tests.support.studies import load

    monkeypatch.setattr(sys, "argv", ["streams.py", "--out", str(tmp_path), "--svg", "--no-measure"])
    assert load("streams").main() == 0
    assert [path.suffix for path in sorted(tmp_path.glob("figure_*"))].count(".svg") >= 1


def test_pictures_of_a_report_want_a_directory(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from tests.support.studies import load

    _pictures_or_skip(Path("figure.svg"))
    monkeypatch.setattr(sys, "argv", ["plan.py", "--svg"])
    assert load("plan").main() == 2
    assert "give --out DIR too" in capsys.readouterr().err


def test_a_comparison_is_drawn_small() -> None:
    schedules = [ppsim.build_schedule(name, ranks=2, microbatches=2) for name in ("1f1b", "afab")]
    assert len(list(ppsim.compare_schedules(schedules).plot_small(columns=2).select_xaxes())) == 2
