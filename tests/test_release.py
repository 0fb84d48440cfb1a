"""A release: its version and date are the same wherever they are said, and what is built holds what it needs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import ppsim

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RELEASES = re.findall(
    r"^## (\d+\.\d+\.\d+), (\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
)


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"] == {"path": "ppsim/__init__.py"}
    literal = f'"{ppsim.__version__}"'
    sources = [path for package in ("ppsim", "ppexec") for path in (ROOT / package).rglob("*.py")]
    assert [p.relative_to(ROOT).as_posix() for p in sources if literal in p.read_text(encoding="utf-8")] == [
        "ppsim/__init__.py"
    ]


def test_changelog_and_citation_name_the_version_and_its_date() -> None:
    version, date = RELEASES[0]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert ppsim.__version__ == version
    assert f"\nversion: {version}\n" in citation
    assert f"\ndate-released: {date}\n" in citation
    assert sorted(RELEASES, key=lambda release: release[1], reverse=True) == RELEASES


def test_the_changelog_begins_with_what_is_not_released() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\w+)", text, re.MULTILINE)[0] == "Unreleased"
