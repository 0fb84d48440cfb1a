"""Figure file: a figure as an HTML page or as a picture."""

from __future__ import annotations

import importlib.util
from importlib import resources
from pathlib import Path

import plotly.graph_objects as go

from ppsim.checks import checked
from ppsim.errors import InputError
from ppsim.files import write_bytes, write_text

PICTURES = (".svg", ".png", ".pdf")
"""Endings of pictures, which Chromium draws."""
_WIDTH_PX = 1000  # as the reports' pages are wide
_PNG_SCALE = 2  # pixels of a .png for each of the figure's
_REMEDY = (
    "install Chromium and kaleido (pip install 'pipeline-schedules[png]'), or take a name that ends in .html, which "
    "needs neither"
)


@checked
def check_figure_path(path: Path) -> None:
    """Check that a figure can be written under this name on this machine.

    Raises
    ------
    InputError
        For other endings than .html, .svg, .png and .pdf, and for pictures where kaleido or Chromium is missing.
    """
    if path.suffix == ".html":
        return
    if path.suffix not in PICTURES:
        raise InputError(f"{path} is no figure's name: take one that ends in .html, {', '.join(PICTURES)}")
    if importlib.util.find_spec("kaleido") is None:
        raise InputError(f"{path} needs kaleido, which is not installed: {_REMEDY}")
    from choreographer.browsers.chromium import Chromium

    if Chromium.find_browser(skip_local=False) is None:  # one that choreographer has downloaded counts too
        raise InputError(f"{path} needs Chromium or Chrome, which is not found: {_REMEDY}")


@checked
def save_figure(figure: go.Figure, path: Path) -> None:
    """Write a figure as the ending of the name says.

    Parameters
    ----------
    figure : plotly.graph_objects.Figure
        It keeps its height. Pictures are 1000 pixels wide unless it sets a width; pages fill the window.
    path : Path
        .html is a page that needs no network. .svg, .png (twice as many pixels each way) and .pdf are pictures.

    Raises
    ------
    InputError
        As `check_figure_path`.
    OSError
        If the file cannot be written.
    """
    check_figure_path(path)
    if path.suffix == ".html":
        # Numbers in cells show only where they have room, which changes with the window.
        script = f"{resource('cell_numbers.js')}numberCells(document.getElementById('figure'));"
        write_text(path, figure.to_html(include_plotlyjs=True, div_id="figure", post_script=script))
        return
    scale = _PNG_SCALE if path.suffix == ".png" else 1
    write_bytes(path, figure.to_image(format=path.suffix[1:], width=figure.layout.width or _WIDTH_PX, scale=scale))


def resource(name: str) -> str:
    """The text of a file that stands beside this one: a script, a style sheet or a template of pages."""
    return resources.files("ppsim.export").joinpath(name).read_text(encoding="utf-8")
