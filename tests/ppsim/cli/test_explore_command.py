"""`ppsim explore`: the page shows what the flags say, at once or not at all."""

from __future__ import annotations

import base64
import json
import urllib.parse
import urllib.request
import webbrowser
import zlib
from typing import Any

import pytest

import ppsim.explorer.server
from ppsim import Network, StageCost, simulate
from ppsim.cli.flags import ScheduleFlags, flag_of
from ppsim.cli.main import main
from ppsim.explorer import answers
from ppsim.explorer.runs import Runs
from ppsim.explorer.server import ExplorerServer, start_server


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ends as soon as the page is served."""
    monkeypatch.setattr(ExplorerServer, "serve_forever", lambda server: None)


def _view(capsys: pytest.CaptureFixture[str], words: list[str]) -> dict[str, str]:
    """What the address holds."""
    assert main(["explore", "--no-browser", "--port", "0", "--json", *words]) == 0
    address = json.loads(capsys.readouterr().out)["address"]
    return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(address).fragment))


def _unpacked(text: str) -> str:
    return zlib.decompress(base64.urlsafe_b64decode(f"{text}=="), -15).decode()


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize(
    "given",
    [
        {"schedule": "1f1b", "communication": "derived"},
        {"schedule": "1f1b", "communication": "late"},
        {"schedule": "interleaved-1f1b", "microbatch_group": 4},
    ],
)
def test_the_page_posts_receives_where_the_schedule_does(
    capsys: pytest.CaptureFixture[str], given: dict[str, Any]
) -> None:
    """Cause: sends and receives were written for schedules that state none, and so posted late instead of ahead."""
    given = {"ranks": 4, "microbatches": 8, **given}
    view = _view(capsys, [word for name, value in given.items() for word in (flag_of(name), str(value))])
    network = {"latency_s": 0.02, "bytes_per_s": 1e8}
    costs = {"forward_s": 0.01, "backward_input_s": 0.01, "backward_weight_s": 0.01}
    asked = {"output_bytes": 10**6, **network, **{name: [value] for name, value in costs.items()}}
    answer = answers.step({"csv": _unpacked(view["csv"]), **asked}, Runs())
    schedule = ScheduleFlags(**given).load_schedule()
    v = schedule.stages // schedule.ranks
    cost = StageCost(**{name: value / v for name, value in costs.items()}, output_bytes=10**6)
    predicted = simulate(schedule, [cost] * schedule.stages, network=Network(**network))
    assert answer["picture"]["numbers"]["makespan"] == pytest.approx(predicted.makespan_s)


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("more", [[], ["--communication", "late"]])
def test_what_the_page_does_not_draw_is_refused_before_it_opens(
    capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """Cause: the command held sizes against its own bound alone, so a browser opened on a page that refused them."""
    words = ["explore", "--no-browser", "--port", "0", "--schedule", "1f1b", "--ranks", "64", "--microbatches", "2048"]
    assert main([*words, *more]) == 2
    assert "the page draws at most 60000" in capsys.readouterr().err


def test_a_browser_that_holds_its_caller_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cause: the browser was opened before the server answered, and one in a terminal returns only when it is left."""
    servers: list[ExplorerServer] = []
    pages: list[bytes] = []

    def started(port: int | None) -> ExplorerServer:
        servers.append(start_server(port))
        return servers[-1]

    def terminal_browser(address: str) -> None:
        pages.append(urllib.request.urlopen(address, timeout=20).read())
        servers[0].shutdown()

    monkeypatch.setattr(ppsim.explorer.server, "start_server", started)
    monkeypatch.setattr(webbrowser, "open", terminal_browser)
    assert main(["explore", "--port", "0"]) == 0
    assert b"<title>ppsim explorer</title>" in pages[0]
