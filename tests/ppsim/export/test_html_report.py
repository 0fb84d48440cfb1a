import html.parser
import re
import subprocess
import sys

import plotly.graph_objects as go
import pytest

from ppsim import StageCost, build_schedule, simulate
from ppsim.export.html_report import Report
from ppsim.plots.bubble_figure import bubbles
from ppsim.plots.memory_figure import memory
from ppsim.plots.timeline_figure import timeline

COST = StageCost(forward_s=0.010, backward_input_s=0.012, backward_weight_s=0.008, activation_bytes=1000)
SCRIPT = '</script><script>alert("&")</script>'


class Page(html.parser.HTMLParser):
    """What a browser would find: elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br", "hr"):
            self._inside.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self._inside.pop() == tag

    def handle_data(self, data):
        if self._inside and self._inside[-1] == "script":
            self.scripts[-1] += data
        elif self._inside and self._inside[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def full_report() -> Report:
    trace = simulate(build_schedule("afab", ranks=2, microbatches=4), [COST] * 2)
    traces = {"predicted": trace}
    report = Report(
        title="AFAB on 2 ranks", subtitle="4 microbatches", lead="First.\n\nSecond, with `2F0`.", facts={"step": 0.1}
    )
    report.add("Timeline", text="Grey is bubble.", figure=timeline(traces), caption="Drag to zoom.")
    report.add("Bubble", figure=bubbles(traces))
    report.add("", figure=memory(traces))
    report.add("Numbers", table=[{"rank": 0, "bubble": 0.25}, {"rank": 1, "bubble": 0.5}])
    return report.add("Environment", definitions={"torch": "2.13.0", "threads": 1})


@pytest.fixture(scope="module")
def full_text() -> str:
    return full_report().to_html()


def test_nothing_is_loaded_from_anywhere(full_text):
    page = Page(full_text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("#"), (tag, name, value)
    assert not page.all("link")
    styles = "".join(re.findall(r"<style>(.*?)</style>", full_text, re.DOTALL))
    assert "url(" not in styles
    assert "@import" not in styles
    (policy,) = (meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_plotly_is_inlined_once_and_figures_have_fixed_places(full_text):
    page = Page(full_text)
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1
    places = [attributes["id"] for attributes in page.all("div") if attributes.get("class") == "plot"]
    assert places == ["figure-1", "figure-2", "figure-3"]
    drawn = [re.match(r'draw\("(.*?)"', script).group(1) for script in page.scripts if script.startswith("draw(")]
    assert drawn == places
    assert "sendChartToCloud" in page.scripts[-1]  # among the buttons to remove


def test_same_report_same_bytes(full_text, tmp_path):
    path = tmp_path / "report.html"
    full_report().save(path)
    assert path.read_bytes() == full_text.encode()


def test_contents_link_to_the_headings(full_text):
    page = Page(full_text)
    links = [attributes["href"] for attributes in page.all("a")]
    assert links == ["#section-1", "#section-2", "#section-4", "#section-5"]
    identifiers = {attributes["id"] for attributes in page.all("section")}
    assert {link[1:] for link in links} <= identifiers


def test_text_becomes_paragraphs_with_code(full_text):
    assert "<p>First.</p><p>Second, with <code>2F0</code>.</p>" in full_text
    assert "<figcaption><p>Drag to zoom.</p></figcaption>" in full_text


def test_a_report_without_figures_has_no_script():
    text = Report(title="Plain").add("Only text", text="Hello.").to_html()
    assert "<script" not in text
    assert len(text) < 10_000


def test_everything_is_escaped():
    report = Report(title=SCRIPT, subtitle=SCRIPT, lead=SCRIPT, facts={SCRIPT: SCRIPT})
    figure = go.Figure(go.Bar(x=[SCRIPT], y=[1], name=SCRIPT), layout={"title": {"text": SCRIPT}})
    report.add(SCRIPT, text=SCRIPT, caption=SCRIPT, table=[{SCRIPT: SCRIPT}], definitions={SCRIPT: SCRIPT})
    report.add("Figure", figure=figure)
    page = Page(report.to_html())
    assert len(page.scripts) == 4  # plotly, cell_numbers.js, html_report.js, the figure; none of the texts
    assert page.text.count(SCRIPT) == 13
    assert "alert" in page.scripts[-1]
    assert "<" not in page.scripts[-1]


def test_amounts_are_right_aligned_and_formatted():
    rows = [
        {"schedule": "afab", "m": 8, "step": "12.3 ms", "share": 0.123456, "peak": 201326592, "held": True},
        {"schedule": "1f1b", "m": 16, "step": "−3%", "share": 12345.6, "peak": None, "held": False},
    ]
    text = Report(title="T").add("Table", table=rows).to_html()
    right = re.findall(r'<th scope="col" class="amount">(\w+)</th>', text)
    assert right == ["m", "step", "share", "peak"]
    assert '<td class="amount">0.1235</td><td class="amount">201,326,592</td><td>yes</td>' in text
    assert '<td class="amount">12,346</td><td class="amount">–</td><td>no</td>' in text


def test_tables_take_all_rows_columns():
    text = Report(title="T").add("Table", table=[{"a": "x"}, {"b": "y"}]).to_html()
    assert "<tr><td>x</td><td>–</td></tr>\n<tr><td>–</td><td>y</td></tr>" in text.replace(' class="amount"', "")


def test_the_figure_given_is_not_changed():
    figure = go.Figure(layout={"paper_bgcolor": "#ffffff", "width": 500})
    Report(title="T").add("Figure", figure=figure).to_html()
    assert (figure.layout.paper_bgcolor, figure.layout.width) == ("#ffffff", 500)


def test_importing_ppsim_or_an_exporter_does_not_import_plotly():
    code = (
        "import sys, ppsim, ppsim.export.perfetto\n"
        "assert not {'plotly', 'pandas', 'torch', 'ppexec'} & set(sys.modules)\n"
        "import ppsim.plots.timeline_figure, ppsim.plots.attribution_figure, ppsim.export.html_report\n"
        "assert not {'torch', 'ppexec'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
