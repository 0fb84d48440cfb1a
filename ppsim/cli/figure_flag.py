"""Figure flag: where a command writes its figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ppsim.cli.command import OptionalFile
from ppsim.files import check_files

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, kw_only=True)
class FigureFlag:
    """The flag of commands that have a figure."""

    figure: OptionalFile = None
    """Draw it: .html, or .svg, .png or .pdf where kaleido and Chromium are installed."""

    def check_figure(self) -> None:
        """Refuse, before the work, a name under which no figure can be written. Raises InputError."""
        if self.figure is not None:
            from ppsim.export.figure_file import check_figure_path

            check_files(self.figure)
            check_figure_path(self.figure)

    def draw(self, made: Callable[[], go.Figure]) -> None:
        """Make the figure and write it, if it is asked for."""
        if self.figure is not None:
            from ppsim.export.figure_file import save_figure

            save_figure(made(), self.figure)
