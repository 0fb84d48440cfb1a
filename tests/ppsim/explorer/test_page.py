"""Page: the explorer in a real browser, as a person uses it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import ppsim
from ppsim import Network, StageCost, build_schedule, simulate
from ppsim.cli.explore_command import packed
from ppsim.explorer.server import ExplorerServer
from tests.support.browser import chromium
from tests.support.explorer import serving

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("page")]  # one browser serves all
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server() -> Iterator[ExplorerServer]:
    with serving() as found:
        found.warm_up()
        yield found


@pytest.fixture
def visit(browser: Any, server: ExplorerServer) -> Iterator[Open]:
    """Opens the page with a view; whatever the browser complains about fails the test."""
    said: list[str] = []
    context = browser.new_context(accept_downloads=True)

    def open_page(view: str = "", *, width: int = 1280, height: int = 900) -> Any:
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": height})
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"{server.address}{view}")
        settled(page)
        return page

    yield open_page
    context.close()
    assert said == []


def settled(page: Any) -> None:
    """Wait until the page shows the answer to its last question."""
    page.wait_for_timeout(30)  # for what is asked only after an event, such as a file's content
    page.wait_for_selector("#timeline[aria-busy=false]")


def facts(page: Any, row: int = 0) -> dict[str, str]:
    """The numbers of a timeline."""
    result = page.locator(".result").nth(row)
    return dict(zip(result.locator("dt").all_inner_texts(), result.locator("dd").all_inner_texts(), strict=True))


def pixels(page: Any) -> str:
    """What is drawn."""
    return str(page.evaluate("document.getElementById('picture').toDataURL()"))


def seconds(text: str) -> float:
    number, unit = text.split("\n")[0].split()
    return float(number.replace(",", "")) * {"s": 1.0, "ms": 1e-3, "µs": 1e-6}[unit]


def test_it_shows_what_simulate_predicts(visit: Open) -> None:
    page = visit("#latency=0&message=0&second=")
    assert [each.inner_text() for each in page.locator(".result h2").all()] == ["1f1b"]
    cost = StageCost(forward_s=0.01, backward_input_s=0.01, backward_weight_s=0.01)
    trace = simulate(build_schedule("1f1b", ranks=4, microbatches=8), [cost] * 4)
    assert seconds(facts(page)["step"]) == pytest.approx(trace.makespan_s, rel=1e-3)
    assert facts(page)["bubble"] == f"{100 * trace.bubble_fraction:.1f} %"
    assert facts(page)["peak activations"].startswith("256 MiB")


def test_a_change_redraws_and_the_address_follows(visit: Open) -> None:
    page = visit()
    before, step = pixels(page), facts(page)["step"]
    page.fill("#microbatches", "12")
    settled(page)
    assert pixels(page) != before
    assert facts(page)["step"] != step
    page.select_option("#schedule", "zb-v")
    settled(page)
    assert "microbatches=12" in page.url
    assert "schedule=zb-v" in page.url
    assert page.locator(".result h2").first.inner_text() == "zb-v"
    page.go_back()
    settled(page)
    assert page.locator(".result h2").first.inner_text() == "1f1b"


def test_eight_ranks_and_64_microbatches_are_drawn(visit: Open) -> None:
    page = visit("#ranks=8&microbatches=64&second=zb-h2&path=1&messages=1")
    before = pixels(page)
    page.fill("#weight", "12")
    settled(page)
    assert pixels(page) != before
    assert int(page.get_attribute("#timeline", "data-took")) >= 0


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(
    "view",
    [
        "",
        "#ranks=16&microbatches=64&second=interleaved-1f1b&secondStages=4&limit=300",
        "#schedule=nonsense&second=",
        f"#csv={packed('0F0,0X0,' + ','.join(f'0B{each}' for each in range(100)))}",
    ],
)
def test_nothing_is_wider_than_the_page(visit: Open, view: str, width: int) -> None:
    page = visit(view, width=width)
    if width == 390:
        page.click("#settings-toggle")
    page.click("#text summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        """width => [...document.querySelectorAll('main *, header *, #settings *')].filter(each =>
        !each.closest('.editor') && each.getBoundingClientRect().right > width + 0.5).map(each => each.outerHTML)""",
        width,
    )
    assert outside == []


def test_a_link_reproduces_the_view(visit: Open) -> None:
    page = visit()
    page.fill("#ranks", "3")
    page.fill("#microbatches", "5")
    page.fill("#limit", "100")
    page.check("#path")
    page.check("#messages")
    page.select_option("#colours", "microbatch")
    page.click("#zoom-in")
    page.wait_for_timeout(400)
    page.locator("#timeline").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Alt+ArrowRight")
    settled(page)
    assert page.locator(".result h2").first.inner_text() == "your order"
    again = visit(page.url.rpartition("/")[2])
    assert pixels(again) == pixels(page)
    assert facts(again) == facts(page)
    for box in ("#path", "#messages"):
        assert again.is_checked(box)
    assert again.input_value("#csv") == page.input_value("#csv")


def test_a_bad_cell_is_marked_and_its_message_shown(visit: Open) -> None:
    page = visit("#second=")
    page.click("#text summary")
    page.fill("#csv", "0F0,0F1,0B0,0B1\n1F0,1Q0,1F1,1B1\n")
    settled(page)
    message = page.locator("#problems li").all_inner_texts()
    assert len(message) == 1
    assert message[0].startswith("row 2, column 2: '1Q0' is not an action")
    assert page.locator("#csv-marks mark").all_text_contents() == ["1Q0"]
    page.click("#problems li button")
    selected = page.evaluate("(a => a.value.slice(a.selectionStart, a.selectionEnd))(document.getElementById('csv'))")
    assert selected == "1Q0"
    page.fill("#csv", "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    settled(page)
    assert page.is_hidden("#problems")
    assert facts(page)["step"]


def test_a_file_that_is_dropped_is_shown(visit: Open) -> None:
    page = visit("#second=")
    page.evaluate(
        """text => {
          const files = new DataTransfer();
          files.items.add(new File([text], 'order.csv', { type: 'text/csv' }));
          window.dispatchEvent(new DragEvent('drop', { dataTransfer: files, bubbles: true, cancelable: true }));
        }""",
        "0F0,0B0,0F1,0B1\n1F0,1B0,1F1,1B1,1B1\n",
    )
    settled(page)
    assert "1B1 occurs 2 times" in page.locator("#problems").inner_text()
    assert page.locator("#csv-marks mark").all_text_contents() == ["1B1", "1B1"]


def bar(page: Any, name: str, rank: int) -> tuple[float, float]:
    """The middle of an action of the first timeline, found as a person would: by pointing until its card shows."""
    box = page.locator("#picture").bounding_box()
    for y in range(30, int(box["height"]), 8):
        for x in range(70, int(box["width"]), 9):
            page.mouse.move(box["x"] + x, box["y"] + y)
            if page.is_visible("#card") and page.inner_text("#card h3") == f"{name} on rank {rank}":
                return box["x"] + x, box["y"] + y
    raise AssertionError(f"{name} is nowhere")


def test_an_action_says_what_it_waited_for(visit: Open) -> None:
    page = visit("#second=&ranks=2&microbatches=2")
    bar(page, "1F0", 1)
    text = page.inner_text("#card")
    assert "0F0 on rank 0: its message came at" in text
    assert "1B0" in text
    assert page.evaluate(
        "!!document.getElementById('marks').getContext('2d').getImageData(0,0,2000,400).data.some(x => x)"
    )


def test_an_idle_span_says_why(visit: Open) -> None:
    page = visit("#second=&ranks=2&microbatches=2")
    box = page.locator("#picture").bounding_box()
    found = set()
    for y in range(30, int(box["height"]), 12):
        for x in range(70, int(box["width"]), 12):
            page.mouse.move(box["x"] + x, box["y"] + y)
            if page.is_visible("#card"):
                found.add(page.inner_text("#card"))
    idle = [text for text in found if "is idle for" in text]
    assert any("Rank 1 is idle for" in text and "warm-up" in text and "0F0 on rank 0" in text for text in idle)
    assert any("after its last action" in text and "drain" in text for text in idle)


def test_dragging_an_action_changes_its_order(visit: Open) -> None:
    page = visit("#second=&ranks=2&microbatches=3&latency=0&message=0")
    x, y = bar(page, "1F1", 1)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 130, y, steps=8)
    page.wait_for_timeout(200)
    preview = page.inner_text("#card")
    page.mouse.up()
    settled(page)
    assert "step" in preview
    assert page.input_value("#csv").split("\n")[1].startswith("1F0,1F1,1B0")
    assert page.locator(".result h2").first.inner_text() == "your order"
    page.go_back()
    settled(page)
    assert page.input_value("#csv").split("\n")[1].startswith("1F0,1B0,1F1")


def test_a_moved_action_keeps_the_communication_that_is_stated(visit: Open) -> None:
    """Cause: the new order was made of the computations alone, so sends and receives were lost and the step changed."""
    text = build_schedule("1f1b", ranks=2, microbatches=3).with_communication("late").to_csv(messages=True)
    page = visit(f"#second=&csv={packed(text)}")
    _, row = page.input_value("#csv").splitlines()
    assert row.startswith("1RECV_F0,1F0,1B0,1SEND_B0,1RECV_F1,1F1,1B1")
    page.locator("#timeline").focus()
    for key in ("ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
        settled(page)
    while page.inner_text("#card h3") != "1F1 on rank 1":
        page.keyboard.press("ArrowRight")
        settled(page)
    page.keyboard.press("Alt+ArrowLeft")
    settled(page)
    first, row = page.input_value("#csv").splitlines()
    assert first == text.splitlines()[0]
    assert row.startswith("1RECV_F0,1F0,1RECV_F1,1F1,1B0,1SEND_B0,1B1")
    assert page.is_hidden("#problems")
    stated = ppsim.Schedule.from_csv(page.input_value("#csv"))
    cost = StageCost(forward_s=0.01, backward_input_s=0.01, backward_weight_s=0.01, output_bytes=2**23)
    trace = simulate(stated, [cost] * 2, network=Network(latency_s=1e-5, bytes_per_s=25e9))
    assert seconds(facts(page)["step"]) == pytest.approx(trace.makespan_s, rel=1e-3)


def test_a_runs_order_is_taken_with_the_communication_that_it_states(visit: Open, tmp_path: Path) -> None:
    """Cause: the order was taken from what the page draws, which are computations alone."""
    cost = StageCost(forward_s=0.01, backward_input_s=0.01, backward_weight_s=0.01)
    schedule = build_schedule("1f1b", ranks=2, microbatches=3).with_communication("late")
    simulate(schedule, [cost] * 2).save(tmp_path / "run.trace")
    page = visit("#second=&ranks=2&microbatches=3")
    page.set_input_files("#run-file", tmp_path / "run.trace")
    settled(page)
    page.click("#run-use")
    settled(page)
    assert page.input_value("#csv") == schedule.to_csv(messages=True)


def test_recomputed_and_offloaded_actions_are_moved(visit: Open) -> None:
    """Cause: R was taken for no action, so that all actions after one were counted wrong and others were moved."""
    page = visit(f"#second=&csv={packed('0F0,0O0,0F1,0L0,0B0,0R1,0B1')}")
    page.locator("#timeline").focus()
    page.keyboard.press("ArrowRight")
    settled(page)
    assert "go to host memory" in page.inner_text("#card")
    page.keyboard.press("Alt+ArrowRight")
    settled(page)
    assert page.input_value("#csv").strip() == "0F1,0F0,0O0,0L0,0B0,0R1,0B1"
    while page.inner_text("#card h3") != "0R1 on rank 0":
        page.keyboard.press("ArrowRight")
        settled(page)
    page.keyboard.press("Alt+ArrowLeft")
    settled(page)
    assert page.input_value("#csv").strip() == "0F1,0F0,0O0,0R1,0L0,0B0,0B1"
    assert page.is_hidden("#problems")


def test_offloading_and_sharding_are_drawn_and_explained(visit: Open) -> None:
    page = visit("#second=&schedule=interleaved-1f1b&activations=1024&hostBandwidth=20")
    plain, peak = pixels(page), facts(page)["peak activations"]
    page.fill("#offload", "50")
    settled(page)
    assert pixels(page) != plain
    assert facts(page)["peak activations"] != peak
    assert "activations to host memory" in page.inner_text("#legend")
    assert "0O1" in page.input_value("#csv")
    page.fill("#replicas", "4")
    page.fill("#whole", "1")
    settled(page)
    assert "parameters gathered from replicas" in page.inner_text("#legend")
    assert "0UNSHARD" in page.input_value("#csv")
    page.locator("#timeline").focus()
    page.keyboard.press("ArrowRight")
    settled(page)
    assert "0UNSHARD: its parameters, gathered at" in page.inner_text("#card")
    page.fill("#offload", "150")
    settled(page)
    assert page.get_attribute("#offload", "aria-invalid") == "true"


def test_keys_move_an_action_and_violations_are_listed_at_once(visit: Open) -> None:
    page = visit("#second=&ranks=2&microbatches=2")
    page.locator("#timeline").focus()
    page.keyboard.press("ArrowRight")
    settled(page)
    assert page.inner_text("#card h3") == "0F0 on rank 0"
    for _ in range(3):
        page.keyboard.press("Alt+ArrowRight")
        settled(page)
    assert page.input_value("#csv").split("\n")[0] == "0F1,0B0,0B1,0F0"
    assert "0B0 comes before 0F0" in page.inner_text("#problems")
    assert "cannot run" in page.locator(".result h2").first.inner_text()
    marked = page.locator("#csv-marks mark").all_text_contents()
    assert sorted(marked) == ["0B0", "0F0"]
    page.click("#text summary")
    page.click("#own-drop")
    settled(page)
    assert page.is_hidden("#problems")
    assert "csv=" not in page.url


def test_keys_go_from_action_to_action_and_zoom(visit: Open) -> None:
    page = visit("#second=&ranks=2&microbatches=2")
    page.locator("#timeline").focus()
    titles = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
        page.wait_for_timeout(60)
        titles.append(page.inner_text("#card h3"))
    assert titles[0] == "0F0 on rank 0"
    assert titles[1] == "0F1 on rank 0"
    assert "ank 1" in titles[2]
    page.keyboard.press("+")
    page.wait_for_timeout(400)
    assert "from=" in page.url
    page.keyboard.press("0")
    settled(page)
    assert "from=" not in page.url
    page.keyboard.press("c")
    settled(page)
    assert page.is_checked("#path")
    page.keyboard.press("Escape")
    assert page.is_hidden("#card")


def test_a_measured_run_is_laid_over_the_prediction(visit: Open, tmp_path: Path) -> None:
    cost = StageCost(forward_s=0.01, backward_input_s=0.01, backward_weight_s=0.01)
    slow = simulate(build_schedule("1f1b", ranks=4, microbatches=8), [cost] * 4, slow_ranks={1: 1.3})
    slow.save(tmp_path / "run.trace")
    page = visit("#second=")
    page.set_input_files("#run-file", tmp_path / "run.trace")
    settled(page)
    page.wait_for_selector(".result >> nth=1")
    assert seconds(facts(page, 1)["step"]) == pytest.approx(slow.makespan_s, rel=1e-3)
    assert "longer" in page.inner_text("#comparison")
    both = pixels(page)
    page.uncheck("#overlay")
    settled(page)
    assert pixels(page) != both
    page.click("#run-use")
    settled(page)
    assert page.input_value("#forward").startswith("10, 13, 10")
    assert seconds(facts(page)["step"]) == pytest.approx(slow.makespan_s, rel=2e-2)
    (tmp_path / "other.trace").write_bytes(b"PK junk")
    page.set_input_files("#run-file", tmp_path / "other.trace")
    settled(page)
    assert "other.trace is not a saved trace" in page.inner_text("#problems")


def test_what_is_saved_can_be_read(visit: Open, tmp_path: Path) -> None:
    page = visit("#second=zb-v&ranks=2&microbatches=4")

    def saved(button: str) -> bytes:
        with page.expect_download() as download:
            page.click(button)
        download.value.save_as(tmp_path / "saved")
        return (tmp_path / "saved").read_bytes()

    schedule = ppsim.Schedule.from_csv(saved("#save-csv").decode())
    assert schedule.orders == build_schedule("1f1b", ranks=2, microbatches=4).orders
    events = json.loads(saved("#save-perfetto"))["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert any("1f1b" in name for name in names)
    assert any("zb-v" in name for name in names)
    svg = ElementTree.fromstring(saved("#save-svg"))
    texts = [each.text for each in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"1f1b", "zb-v", "rank 1"} <= set(texts)
    assert saved("#save-png").startswith(b"\x89PNG\r\n\x1a\n")


def test_errors_name_their_field(visit: Open) -> None:
    page = visit("#second=")
    page.fill("#ranks", "0")
    settled(page)
    assert "Ranks must be a whole number of 1 or more, got 0" in page.inner_text("#problems")
    assert page.get_attribute("#ranks", "aria-invalid") == "true"
    page.fill("#ranks", "4")
    page.fill("#forward", "10, 20")
    settled(page)
    assert "F has 2 numbers" in page.inner_text("#problems")
    page.fill("#forward", "abc")
    settled(page)
    assert page.get_attribute("#forward", "aria-invalid") == "true"
    page.fill("#forward", "10")
    settled(page)
    assert page.is_hidden("#problems")


def test_names_are_text(visit: Open, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>.trace"
    cost = StageCost(forward_s=0.01, backward_input_s=0.01, backward_weight_s=0.01)
    simulate(build_schedule("1f1b", ranks=2, microbatches=2), [cost] * 2).save(tmp_path / name)
    page = visit(f"#csv={packed('<script>alert(1)</script>,0F0')}&at=%3Cb%3E:0:1&from=x")
    assert "<script>" in page.inner_text("#problems")
    page.set_input_files("#run-file", tmp_path / name)
    settled(page)
    assert name in page.inner_text("#run-name")
    assert page.locator("main img, main script, form img").count() == 0


@pytest.mark.parametrize(
    "view", ["#csv=%%%", "#csv=AAAA", "#ranks=&microbatches=x", "#from=9&to=1", "#at=first:9:9", "#run=abc"]
)
def test_any_address_opens(visit: Open, view: str) -> None:
    page = visit(view)
    assert page.locator("h1").inner_text() == "ppsim explorer"


def test_the_file_of_an_order_is_csv(visit: Open) -> None:
    page = visit("#schedule=dualpipe-v&ranks=2&microbatches=8&second=")
    rows = list(csv.reader(io.StringIO(page.input_value("#csv"))))
    assert any(re.fullmatch(r"\(.*\)OVERLAP_F_B", cell) for row in rows for cell in row)


def test_an_order_in_both_directions_stays_one_when_it_is_changed(visit: Open, tmp_path: Path) -> None:
    """Cause of a bug to be: its text does not say that its stages are of two copies, and would be refused as one's."""
    page = visit("#schedule=chimera&second=&ranks=2&microbatches=4&latency=0&message=0")
    before = page.input_value("#csv")
    page.locator("#timeline").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Alt+ArrowRight")
    settled(page)
    assert page.is_hidden("#problems")
    assert page.input_value("#csv") != before
    assert "copies=2" in page.url
    again = visit(page.url[page.url.index("#") :])
    assert again.is_hidden("#problems")
    again.click("#text summary")
    again.fill("#csv", before)
    settled(again)
    assert again.is_hidden("#problems")
    assert again.locator(".result h2").first.inner_text() == "your order"
    cost = StageCost(forward_s=0.01, backward_input_s=0.01, backward_weight_s=0.01)
    simulate(build_schedule("dualpipe", ranks=2, microbatches=4), [cost] * 2).save(tmp_path / "both.trace")
    other = visit("#second=&ranks=2&microbatches=4")
    other.set_input_files("#run-file", tmp_path / "both.trace")
    settled(other)
    other.click("#run-use")
    settled(other)
    assert other.is_hidden("#problems")
    assert "copies=2" in other.url
