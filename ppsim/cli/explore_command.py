"""The command `ppsim explore`: a page on this machine in which one changes a schedule and sees what becomes of it."""

from __future__ import annotations

import base64
import contextlib
import sys
import threading
import urllib.parse
import webbrowser
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from ppsim.cli import ending
from ppsim.cli.command import OptionalFile, OptionalWhole
from ppsim.cli.flags import ScheduleFlags
from ppsim.files import read_text

if TYPE_CHECKING:
    from ppsim.explorer.server import ExplorerServer


@dataclass(frozen=True, kw_only=True)
class ExploreCommand(ScheduleFlags):
    """Open a page in which to change schedule, costs, links and orders, and see the step at once. Ends with Ctrl-C.

    The page is served at 127.0.0.1 alone. Its address holds all that it shows.
    """

    run_file: Annotated[OptionalFile, tyro.conf.arg(name="run")] = None
    """A measured run to lay over the prediction: a trace that ppexec run --out wrote, or a folder as ppsim import reads
    it, whose median step is taken."""
    port: OptionalWhole = None
    """Where to serve the page; 0 for any free port (default: 8137, or the next that is free)."""
    no_browser: bool = False
    """Only print the address."""
    json: bool = False
    """Print one JSON object with the address instead of text."""

    def run(self) -> None:
        """Serve the page until interrupted."""
        from ppsim.explorer.server import start_server

        server = start_server(self.port)
        with contextlib.closing(server.socket):
            address = server.address + self._view(server)
            if self.json:
                ending.print_json({"address": address})
            else:
                print(f"explorer at {address}\nCtrl-C ends it")
            sys.stdout.flush()
            threading.Thread(target=server.warm_up, daemon=True).start()
            if not self.no_browser:
                # Beside the server: a browser in the terminal holds its caller until it ends, and needs the page.
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()

    def _view(self, server: ExplorerServer) -> str:
        """What the flags ask to be shown, as the page's address has it."""
        from ppsim.explorer.question import Question

        view: dict[str, str] = {}
        self.refuse_both()
        text = self._order_text()
        if text is not None:
            Question(csv=text).review()  # refuses what the page does not draw; other problems it marks at their cells
            view["csv"] = packed(text)
        elif any(value is not None for value in (self.schedule, self.ranks, self.microbatches, self.stages_per_rank)):
            if self.schedule is None or self.ranks is None or self.microbatches is None:
                self.load_schedule()  # says which flag is missing
            named = {name: getattr(self, name) for name in ("schedule", "ranks", "microbatches", "stages_per_rank")}
            Question(**named).review()
            view |= {name: str(getattr(self, name)) for name in ("schedule", "ranks", "microbatches")}
            if self.stages_per_rank is not None:
                view["stages"] = str(self.stages_per_rank)
        if self.run_file is not None:
            from ppsim.runs.read_run import read_run

            name = ending.printable(self.run_file.name)
            view["run"] = server.runs.keep(read_run(self.run_file).median, name)
        return f"#{urllib.parse.urlencode(view)}" if view else ""

    def _order_text(self) -> str | None:
        """The order that the page shows as a text; None for what its own fields can say."""
        if self.communication != "as-given" or self.microbatch_group is not None:
            schedule = self.load_schedule()
            # What is written counts as stated, so receives that the schedule leaves open are left out.
            return schedule.to_csv(messages=schedule.communication is not None)
        return None if self.from_csv is None else read_text(self.from_csv)


def packed(text: str) -> str:
    """A text as the page's address holds it: compressed, in letters that need no escape."""
    deflate = zlib.compressobj(9, wbits=-15)
    return base64.urlsafe_b64encode(deflate.compress(text.encode()) + deflate.flush()).decode().rstrip("=")
