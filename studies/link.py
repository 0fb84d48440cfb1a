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

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppexec.experiment.links import fit_network, link_entry, probe_links, sample_row
from ppexec.experiment.text import environment_rows
from ppexec.study import Findings, StudyCommand, progress, study_main, without_advice
from ppsim import Link, Network
from ppsim.errors import InputError
from ppsim.export.html_report import Report
from ppsim.export.text_table import text_table
from ppsim.plots.link_figure import link_times
from ppsim.plots.units import bytes_text

_MOST_BYTES = 1 << 30
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand):
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

    def __post_init__(self) -> None:
        if not 2 <= self.ranks <= 64:
            raise InputError(f"ranks must be 2 to 64 (a link needs two), got {self.ranks}")
        if not self.sizes or min(self.sizes) < 1 or max(self.sizes) > _MOST_BYTES:
            raise InputError(f"sizes must be whole numbers from 1 to {_MOST_BYTES}, got {self.sizes}")
        for name in ("rounds", "pieces"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")

    def findings(self, directory: Path | None) -> Findings:
        """Measure every link and fit it."""
        with without_advice():
            samples, environment = probe_links(self.ranks, self.sizes, rounds=self.rounds, progress=progress)
        network = fit_network(samples, most_pieces=self.pieces)
        rows = [sample_row(sample, network) for sample in samples]
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
        if directory is not None:
            network.to_file(directory / "network.json", environment=environment, samples=[asdict(s) for s in samples])
        text = f"{text_table(table(rows))}\n(medians in µs)\n\n{text_table(pieces_of({'': network.default}))}"
        return Findings(summary=summary, page=report(network, summary), text=text, files=("network.json",))


def pieces_of(links: Mapping[str, Link]) -> list[Row]:
    """A row for each piece of each link."""
    return [
        {
            "link": name,
            "from size": bytes_text(piece.from_bytes),
            "gap [µs]": f"{piece.gap_s * 1e6:.1f}",
            "bandwidth [GB/s]": f"{piece.bytes_per_s / 1e9:.2f}" if np.isfinite(piece.bytes_per_s) else None,
            "latency [µs]": f"{piece.latency_s * 1e6:.1f}",
        }
        for name, link in links.items()
        for piece in link.pieces
    ]


_COLUMNS = {
    "asleep": lambda entry: entry["asleep_s"]["median_s"],
    "asleep, fit": lambda entry: entry["fit_one_way_s"],
    "awake": lambda entry: entry["awake_s"]["median_s"],
    "posted late": lambda entry: entry["late_s"]["median_s"],
    "each of a burst": lambda entry: entry["occupied_s"],
    "each of a burst, fit": lambda entry: entry["fit_occupied_s"],
    "in send": lambda entry: entry["send_s"]["median_s"],
    "in posting": lambda entry: entry["post_s"]["median_s"],
}


def table(rows: Sequence[Row]) -> list[Row]:
    """A row for each link and size, in microseconds."""
    return [
        {
            "link": f"{entry['source']} to {entry['destination']}",
            "size": bytes_text(entry["size_bytes"]),
            **{name: f"{value(entry) * 1e6:.1f}" for name, value in _COLUMNS.items()},
        }
        for entry in rows
    ]


def report(network: Network, summary: dict[str, Any]) -> Report:
    """The figure of the first link, the pieces, every sample and where it was measured."""
    rows = summary["rows"]
    first = (rows[0]["source"], rows[0]["destination"])
    page = Report(
        title="What a message costs, by size",
        lead=f"The fitted links are {summary['median_error']:.1%} off what was measured in the median, and "
        f"{summary['largest_error']:.1%} at most.",
    )
    page.add(
        "Time against size",
        text="Rings and bars are medians and quartiles of what was measured, lines the fitted links. "
        "Left: one message, to a receiver that slept in its wait, to one that had just begun to wait, and to one "
        "that posted its receive late (counted from then). Right: what each further message of a burst adds, which is "
        "for how long a message keeps the link, and for how long a send and the posting of a receive keep their rank.",
        figure=link_times(
            [entry for entry in rows if (entry["source"], entry["destination"]) == first],
            network.link(*first),
            name=f"rank {first[0]} to rank {first[1]}",
        ),
    )
    named = {"every other pair": network.default, **{f"{a} to {b}": link for (a, b), link in network.links.items()}}
    page.add(
        "The fitted links",
        text="A message keeps the link for gap + bytes / bandwidth and arrives a latency later.",
        table=pieces_of(named),
    )
    page.add("Every link and size", text="Medians in µs.", table=table(rows))
    page.add("Environment", definitions=environment_rows(summary["environment"]))
    return page


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
