"""What does a message between two ranks cost, by size, and what of it is latency?

Question   A link of the model is kept by a message for a while, and the message arrives a latency later. What are the
           two, for messages from 64 B to 16 MiB, and does a line through them say what was measured?

Command    python studies/link.py
           python studies/link.py --ranks 3 --sizes 1024 65536 1048576 --rounds 40 --out DIR
           ppsim simulate --network DIR/network.json ...

Method     Every directed link in turn carries messages of every size through the runtime's own transport: single ones
           to a receiver that has slept in its wait for 3 ms or has just begun to wait, single ones whose receive is
           posted late, and bursts of up to 8. What each further message of a burst adds keeps the link; the rest of
           the single message's time to a sleeping receiver is latency. Pieces are fitted to both (`link_fit`).

Answer     On two cores (torch 2.13), one run. Up to 1 MiB through shared memory: 0.22 to 0.29 ms to 256 KiB, 0.5 ms
           at 1 MiB, to a receiver that had slept; 0.06 to 0.13 ms to one that had just begun to wait, so most of it is
           waking up. The link is kept for 3 us + bytes / 6 to 9 GB/s, as long as the sender copies; nothing is posted,
           and a message looked for late is there. From 2 MiB through gloo: 0.33 ms latency, the link is kept for 0.28
           ms + bytes / 3.3 GB/s, posting takes 0.1 ms, and a late receive waits all of it anew. A send keeps
           its rank for about as long as the message keeps the link (5 ms at 16 MiB), which the model counts only where
           it is told so (`send_s`). Fits are 2.7 % off at the median, 27 % at most. Over gloo alone (`--receive-window`
           asks for it) small messages took 0.2 ms, of which 0.16 ms was latency.
           On two cores of an Intel Xeon, one run: 0.09 to 0.14 ms to 256 KiB and 0.3 ms at 1 MiB to a receiver that had
           slept, 0.014 to 0.19 ms to one that had just begun to wait; over gloo 0.7 ms at 2 MiB and 5.5 to 6.2 at 16.
           Fits were 7 % off at the median and 59 % at most, for 4 MiB in one direction.

Writes DIR/network.json (for ppsim.Network.from_file), report.html and summary.json.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from tqdm import tqdm

import ppexec
import ppsim
from ppexec.cli import existing_directory, study_main
from ppexec.experiment.text import environment_rows
from ppexec.measure.ping import PingSample
from ppsim import Link, Network
from ppsim.cli import command
from ppsim.export.html_report import Report
from ppsim.network.link_fit import fit_link
from ppsim.plots.style import GRID, layout, series_colour
from ppsim.plots.units import bytes_text

_MOST_BYTES = 1 << 30
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A link's latency and bandwidth by message size, from pings and bursts between every two ranks."""

    ranks: int = 2
    """Number of ranks; every ordered pair is a link."""
    sizes: tuple[int, ...] = tuple(64 << power for power in range(19))
    """Sizes of messages in bytes."""
    rounds: int = 30
    """Measured messages of each kind and size; the median is fitted."""
    pieces: int = 4
    """Most pieces of a link."""
    out: Path = Path("studies/out/link")
    """Directory for network.json, report.html and summary.json."""
    json: bool = False
    """Print summary.json's object and nothing else on standard output."""

    def __post_init__(self) -> None:
        if not 2 <= self.ranks <= 64:
            raise ValueError(f"ranks must be 2 to 64 (a link needs two), got {self.ranks}")
        if not self.sizes or min(self.sizes) < 1 or max(self.sizes) > _MOST_BYTES:
            raise ValueError(f"sizes must be whole numbers from 1 to {_MOST_BYTES}, got {self.sizes}")
        for name in ("rounds", "pieces"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")

    def execute(self) -> None:
        """Measure every link, fit it, print the table and write the files."""
        directory = existing_directory(self.out)
        samples, environment = self.measure()
        network = fitted(samples, most_pieces=self.pieces)
        rows = [row(sample, network) for sample in samples]
        errors = [abs(entry["fit_over_measured"] - 1) for entry in rows]
        summary = {
            "default": link_entry(network.default),
            "links": {f"{source} to {there}": link_entry(link) for (source, there), link in network.links.items()},
            "median_error": float(np.median(errors)),
            "largest_error": max(errors),
            "rows": rows,
            "rounds": self.rounds,
            "environment": environment,
        }
        network.to_file(directory / "network.json", environment=environment, samples=[asdict(s) for s in samples])
        (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        report(samples, network, summary).save(directory / "report.html")
        if self.json:
            command.print_json(summary)
            return
        print(table(rows))
        print(f"\n{told(network.default)}")
        print(f"fit / measured - 1: median {summary['median_error']:.1%}, largest {summary['largest_error']:.1%}")
        print(f"written to {directory}: network.json, report.html, summary.json")

    def measure(self) -> tuple[list[PingSample], dict[str, Any]]:
        """All samples, and where they were taken."""
        # The run only brings workers and a group; its stages are never run.
        cost = ppsim.StageCost(forward_s=0.0, backward_input_s=0.0, backward_weight_s=0.0)
        config = ppexec.RunConfig(
            ranks=self.ranks, microbatches=self.ranks, layers=self.ranks, hidden=8, seq=2, compute="timed"
        )
        with ppexec.WorkerPool() as pool, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few microbatches do no harm where none is run
            with ppexec.Session(config, pool=pool, costs=[cost] * self.ranks) as session:
                samples = [
                    sample
                    for size in tqdm(sorted(set(self.sizes)), file=sys.stderr, leave=False)
                    for sample in session.probe_sizes([size], rounds=self.rounds)
                ]
                return samples, session.environment()


def fitted(samples: Sequence[PingSample], *, most_pieces: int) -> Network:
    """Each link fitted to its own samples; all other pairs get what fits all samples."""

    def fit(chosen: Sequence[PingSample]) -> Link:
        return fit_link(
            [sample.size_bytes for sample in chosen],
            [sample.asleep.median_s for sample in chosen],
            [sample.occupied_s for sample in chosen],
            most_pieces=most_pieces,
        )

    pairs = sorted({(sample.source, sample.destination) for sample in samples})
    own = {pair: fit([sample for sample in samples if (sample.source, sample.destination) == pair]) for pair in pairs}
    return Network.of(fit(samples), own)


def row(sample: PingSample, network: Network) -> Row:
    """One link and size: what was measured, and what the fitted link says."""
    link, size = network.link(sample.source, sample.destination), sample.size_bytes
    return {
        "source": sample.source,
        "destination": sample.destination,
        "size_bytes": size,
        "asleep_s": asdict(sample.asleep),
        "awake_s": asdict(sample.awake),
        "late_s": asdict(sample.late),
        "burst_s": {count: burst.median_s for count, burst in sample.bursts.items()},
        "occupied_s": sample.occupied_s,
        "send_s": asdict(sample.send),
        "post_s": asdict(sample.post),
        "fit_one_way_s": link.one_way_s(size),
        "fit_occupied_s": link.occupied_s(size),
        "fit_over_measured": link.one_way_s(size) / sample.asleep.median_s,
    }


def link_entry(link: Link) -> list[Row]:
    """The pieces of a link as JSON."""
    return [
        {**asdict(piece), "bytes_per_s": piece.bytes_per_s if np.isfinite(piece.bytes_per_s) else None}
        for piece in link.pieces
    ]


def told(link: Link) -> str:
    """The pieces in words, a line each."""
    lines = ["a message of      keeps the link for                 and arrives"]
    for piece in link.pieces:
        rate = f" + bytes / {piece.bytes_per_s / 1e9:.2f} GB/s" if np.isfinite(piece.bytes_per_s) else ""
        lines.append(
            f"{bytes_text(piece.from_bytes):>9} or more  {f'{piece.gap_s * 1e6:.0f} µs{rate}':<34} "
            f"{piece.latency_s * 1e6:.0f} µs later"
        )
    return "\n".join(lines)


_COLUMNS = {
    "asleep": lambda entry: entry["asleep_s"]["median_s"],
    "fit": lambda entry: entry["fit_one_way_s"],
    "awake": lambda entry: entry["awake_s"]["median_s"],
    "posted late": lambda entry: entry["late_s"]["median_s"],
    "each of a burst": lambda entry: entry["occupied_s"],
    "fit ": lambda entry: entry["fit_occupied_s"],
    "in send": lambda entry: entry["send_s"]["median_s"],
    "in posting": lambda entry: entry["post_s"]["median_s"],
}


def table(rows: Sequence[Row]) -> str:
    """All rows in microseconds."""
    lines = ["link           size " + "".join(f"{name:>{max(9, len(name) + 2)}}" for name in _COLUMNS) + "   (µs)"]
    for entry in rows:
        cells = "".join(f"{value(entry) * 1e6:>{max(9, len(name) + 2)}.0f}" for name, value in _COLUMNS.items())
        pair = f"{entry['source']} to {entry['destination']}"
        lines.append(f"{pair:<8} {bytes_text(entry['size_bytes']):>10} {cells}")
    return "\n".join(lines)


def report(samples: Sequence[PingSample], network: Network, summary: dict[str, Any]) -> Report:
    """The figure, the pieces, every sample and where it was measured."""
    page = Report(
        title="What a message costs, by size",
        lead="Rings and bars are medians and quartiles of what was measured, lines the fitted links of the model. The "
        f"fit is {summary['median_error']:.1%} off at the median and {summary['largest_error']:.1%} at most.",
    )
    page.add(
        "Time against size",
        text="Left: one message, to a receiver that slept in its wait, to one that had just begun to wait, and to one "
        "that posted its receive late (counted from then). Right: what each further message of a burst adds, which is "
        "for how long a message keeps the link, and for how long a send and the posting of a receive keep their rank.",
        figure=figure(samples, network),
    )
    named = {"every other pair": network.default, **{f"{a} to {b}": link for (a, b), link in network.links.items()}}
    page.add(
        "The fitted links",
        text="A message keeps the link for gap + bytes / bandwidth and arrives a latency later.",
        table=[
            {
                "link": name,
                "from size": bytes_text(piece.from_bytes),
                "gap [µs]": round(piece.gap_s * 1e6, 1),
                "bandwidth [GB/s]": round(piece.bytes_per_s / 1e9, 2) if np.isfinite(piece.bytes_per_s) else None,
                "latency [µs]": round(piece.latency_s * 1e6, 1),
            }
            for name, link in named.items()
            for piece in link.pieces
        ],
    )
    page.add(
        "Every link and size",
        text="Medians in µs.",
        table=[
            {
                "link": f"{entry['source']} to {entry['destination']}",
                "size": bytes_text(entry["size_bytes"]),
                **{name: round(value(entry) * 1e6, 1) for name, value in _COLUMNS.items()},
            }
            for entry in summary["rows"]
        ],
    )
    page.add("Environment", definitions=environment_rows(summary["environment"]))
    return page


_SHOWN = (
    {"asleep": "to a sleeping receiver", "awake": "to an awake receiver", "late": "receive posted late"},
    {"occupied": "each further of a burst", "send": "a send keeps its rank", "post": "posting keeps its rank"},
)


def figure(samples: Sequence[PingSample], network: Network) -> go.Figure:
    """Left single messages, right what keeps links and ranks; both against size, log-log, with the first link's fit.

    A fit has the colour of what it was fitted to. Of several links the first is shown; the table has them all.
    """
    first = (samples[0].source, samples[0].destination)
    shown = [sample for sample in samples if (sample.source, sample.destination) == first]
    link = network.link(*first)
    sizes = [sample.size_bytes for sample in shown]
    dense = np.unique(np.geomspace(min(sizes), max(sizes), 600).astype(int)).tolist()
    dense = sorted({*dense, *(p.from_bytes + d for p in link.larger for d in (-1, 0) if p.from_bytes <= max(sizes))})
    picture = make_subplots(cols=2, horizontal_spacing=0.09, shared_yaxes=True)
    for column, quantities in enumerate(_SHOWN, start=1):
        colours = [series_colour(3 * (column - 1) + number) for number in range(len(quantities))]
        for (quantity, label), colour in zip(quantities.items(), colours, strict=True):
            picture.add_scatter(**_points(shown, quantity, colour), x=sizes, name=label, row=1, col=column)
        fit, label = [(link.one_way_s, "to a sleeping receiver, fit"), (link.occupied_s, "each further, fit")][
            column - 1
        ]
        picture.add_scatter(
            x=dense,
            y=[fit(size) * 1e6 for size in dense],
            mode="lines",
            line={"color": colours[0], "width": 2},
            name=label,
            row=1,
            col=column,
        )
    picture.update_layout(layout(height=460, title=None, bottom=60, entries=8))
    ticks = [size for size in (64 << (3 * power) for power in range(9)) if min(sizes) <= size <= max(sizes)] or sizes
    picture.update_xaxes(
        title_text="size of the message",
        type="log",
        tickvals=ticks,
        ticktext=[bytes_text(size) for size in ticks],
        tickangle=0,
        gridcolor=GRID,
    )
    picture.update_yaxes(type="log", dtick=1, exponentformat="none", showticklabels=True, gridcolor=GRID)
    picture.update_yaxes(title_text=f"rank {first[0]} to rank {first[1]} [µs]", col=1)
    return picture


def _points(samples: Sequence[PingSample], quantity: str, colour: str) -> dict[str, Any]:
    """Medians as markers with quartiles as bars, in µs."""
    marker = {"symbol": "circle-open", "size": 8, "color": colour, "line": {"width": 2}}
    if quantity == "occupied":
        return {"y": [sample.occupied_s * 1e6 for sample in samples], "mode": "markers", "marker": marker}
    spreads = [getattr(sample, quantity) for sample in samples]
    return {
        "y": [spread.median_s * 1e6 for spread in spreads],
        "mode": "markers",
        "marker": marker,
        "error_y": {
            "array": [(spread.p75_s - spread.median_s) * 1e6 for spread in spreads],
            "arrayminus": [(spread.median_s - spread.p25_s) * 1e6 for spread in spreads],
            "color": colour,
            "thickness": 1,
            "width": 2,
        },
    }


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
