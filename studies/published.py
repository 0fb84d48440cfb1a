"""Do the figures that others published come out of this model?

Question   Row by row: the zero-bubble paper's tables, the closed forms of the schedules' papers, GPipe's speed-ups.

Command    python studies/published.py
           python studies/published.py --json

Method     Every published figure is computed anew with ppsim from the costs stated beside it (published/*.json, facts
           copied from the papers) and compared within the tolerance stated there: schedules to the printed digits,
           searched ones equal or better, closed forms to rounding. GPipe's are measurements on hardware: the ideal must
           bound them from above, and the distance is shown.

Answer     Every row holds; the study exits with 1 if one does not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ppsim
from ppexec.study import Findings, StudyCommand, progress, study_main
from ppsim.export.html_report import Report
from ppsim.export.text_table import text_table
from ppsim.simulation import theory

_DATA = Path(__file__).parent / "published"
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure beside ours. holds: whether ours is where the tolerance says it must be."""

    source: str
    what: str
    published: float
    ours: float
    demand: str
    holds: bool

    @property
    def difference(self) -> float:
        """Ours minus the published figure."""
        return self.ours - self.published

    @property
    def cells(self) -> dict[str, str]:
        """The figures as a row of a table."""
        return {
            "figure": self.what,
            "published": f"{self.published:.4f}",
            "ours": f"{self.ours:.4f}",
            "difference": f"{self.difference:+.2e}",
            "demand": self.demand,
        }


@dataclass(frozen=True, kw_only=True)
class Study(StudyCommand):
    """Published figures against this model's, row by row."""

    search: bool = True
    """Search for orders under the papers' memory limits too (ZB-1p, ZB-2p); some seconds a row."""

    def findings(self, directory: Path | None) -> Findings:
        """Compute every row."""
        rows = list(progress(self.rows(), unit=" rows"))
        documents = [{**asdict(row), "difference": row.difference} for row in rows]
        holds = all(row.holds for row in rows)
        table = [{"": "ok" if row.holds else "OFF", "source": row.source, **row.cells} for row in rows]
        text = f"{text_table(table)}\n\n{sum(row.holds for row in rows)} of {len(rows)} rows hold"
        return Findings(summary={"rows": documents, "holds": holds}, page=report(rows), text=text, holds=holds)

    def rows(self) -> Iterator[Row]:
        """All rows, source by source."""
        yield from zero_bubble_rows(with_search=self.search)
        yield from formula_rows()
        yield from gpipe_rows()


def read(name: str) -> dict[str, Any]:
    """A file of published figures."""
    return json.loads((_DATA / name).read_text(encoding="utf-8"))


def zero_bubble_rows(*, with_search: bool) -> Iterator[Row]:
    """Qi et al., ICLR 2024, tables 5 and 6: bubble rates."""
    table = read("zero_bubble_iclr2024.json")
    for values in table["rows"]:
        entry = dict(zip(table["columns"], values, strict=True))
        for name in ("1f1b", "interleaved_1f1b", "zb_h1", "zb_h2", *(("zb_1p", "zb_2p") if with_search else ())):
            published = entry[name]
            ours = zero_bubble_rate(entry, name)
            if name == "interleaved_1f1b":
                demand, holds = "0 to 0.01 above: see its note", 0 <= round(ours, 4) - published <= 0.01 + 1e-12
            elif name in ("zb_1p", "zb_2p"):
                demand, holds = "equal or lower", round(ours, 4) <= published
            else:
                demand, holds = "equal to the printed digits", round(ours, 4) == published
            size = f"{entry['ranks']} ranks, {entry['microbatches']} microbatches, hidden {entry['hidden']}"
            what = f"bubble rate of {name}, {size}"
            yield Row(
                source="Qi et al., ICLR 2024", what=what, published=published, ours=ours, demand=demand, holds=holds
            )


def zero_bubble_rate(entry: dict[str, Any], name: str) -> float:
    """(cost - m (F + I + W)) / cost; the cost is the makespan, or for ZB-H2 and the searched orders the longest rank's.

    Memory as the paper states it: 34 h + 5 a s bytes (times the batch, which cancels) per layer, of which W holds 32 h.
    """
    ranks, microbatches = entry["ranks"], entry["microbatches"]
    chunks = entry["v"] if name == "interleaved_1f1b" else 1
    layer_bytes = 34 * entry["hidden"] + 5 * entry["heads"] * 1024
    cost = ppsim.StageCost(
        forward_s=entry["forward_ms"] / 1e3 / chunks,
        backward_input_s=entry["backward_input_ms"] / 1e3 / chunks,
        backward_weight_s=entry["backward_weight_ms"] / 1e3 / chunks,
        activation_bytes=layer_bytes,
        weight_activation_bytes=32 * entry["hidden"],
    )
    stages = [cost] * (ranks * chunks)
    network = ppsim.Network(latency_s=entry["communication_ms"] / 1e3)
    if name in ("zb_1p", "zb_2p"):
        limit = ranks * layer_bytes * (1 if name == "zb_1p" else 2)
        found = ppsim.search(
            stages,
            ranks=ranks,
            microbatches=microbatches,
            network=network,
            memory_limit_bytes=limit,
            objective="rank_time",
        )
        trace = found.trace
    else:
        schedule = ppsim.build_schedule(
            name.replace("_", "-"),
            ranks=ranks,
            microbatches=microbatches,
            stages_per_rank=chunks if chunks > 1 else None,
        )
        trace = ppsim.simulate(schedule, stages, network=network)
    step_s = trace.makespan_s if name in ("1f1b", "interleaved_1f1b", "zb_h1") else float(trace.rank_time_s.max())
    return (step_s - microbatches * chunks * (cost.forward_s + cost.full_backward_s)) / step_s


def formula_rows() -> Iterator[Row]:
    """The schedules' closed forms at several sizes; `published` is the formula, `ours` the simulation."""
    sources: dict[str, str] = {}
    source = ""
    for entry in read("formulas.json")["results"]:
        source = source if entry["source"] == "the same" else entry["source"]
        sources.setdefault(entry["schedule"], source)
    for ranks in (2, 4, 8):
        microbatches = 4 * ranks
        for schedule, what, published, ours in closed_forms(ranks, microbatches):
            yield Row(
                source=sources[schedule],
                what=f"{schedule}: {what}, p = {ranks}, m = {microbatches}",
                published=published,
                ours=ours,
                demand="equal but for rounding",
                holds=abs(ours - published) <= _ROUNDING * max(1.0, abs(published)),
            )


def closed_forms(p: int, m: int) -> Iterator[tuple[str, str, float, float]]:
    """(schedule, measure, formula, simulated) for equal stages; bytes count whole activations of a rank unless said."""
    f, i, w, c = 1.0, 1.2, 0.7, 0.01
    unit = {"ranks": p, "microbatches": m}
    times = {"forward_s": f, "backward_s": i + w}
    split = {"forward_s": f, "backward_input_s": i, "backward_weight_s": w}

    trace = step("afab", p, m, (f, i, w), latency_s=c)
    yield "afab", "step", theory.afab_makespan_s(**unit, **times, latency_s=c), trace.makespan_s
    yield "afab", "peak", theory.afab_peak_activations(microbatches=m), int(trace.peak_activation_bytes.max())
    trace = step("1f1b", p, m, (f, i, w))
    yield "1f1b", "step", theory.one_f_one_b_makespan_s(**unit, **times), trace.makespan_s
    held = [theory.one_f_one_b_peak_activations(**unit, stage=stage) for stage in range(p)]
    yield "1f1b", "peaks, summed over ranks", sum(held), int(trace.peak_activation_bytes.sum())
    trace = step("1f1b", p, m, (f, i, w), latency_s=c)
    yield "1f1b", "step with messages", theory.one_f_one_b_makespan_s(**unit, **times, latency_s=c), trace.makespan_s
    trace = step("interleaved-1f1b", p, m, (f, i, w), chunks=2)
    yield (
        "interleaved-1f1b",
        "step",
        theory.interleaved_1f1b_makespan_s(**unit, stages_per_rank=2, **times),
        trace.makespan_s,
    )
    formula = theory.interleaved_1f1b_peak_activations(**unit, stages_per_rank=2)
    yield "interleaved-1f1b", "peak on rank 0", formula, int(trace.peak_activation_bytes[0]) / 2
    trace = step("zb-h1", p, m, (f, i, w), whole=10, kept=7)
    yield "zb-h1", "step", theory.zb_h1_makespan_s(**unit, **split), trace.makespan_s
    held = [
        theory.zb_h1_peak_activation_bytes(ranks=p, stage=s, activation_bytes=10, weight_activation_bytes=7)
        for s in range(p)
    ]
    yield "zb-h1", "peaks in bytes, summed over ranks", sum(held), int(trace.peak_activation_bytes.sum())
    trace = step("zb-h2", p, m, (f, i, w), latency_s=c)
    yield (
        "zb-h2",
        "longest rank time",
        theory.zb_h2_rank_time_s(**unit, **split, latency_s=c),
        float(trace.rank_time_s.max()),
    )
    yield "zb-h2", "peak", theory.zb_h2_peak_activations(ranks=p), int(trace.peak_activation_bytes.max())
    trace = step("zb-v", p, m, (1, 1, 1), chunks=2)
    yield "zb-v", "longest rank time", 3 * m, float(trace.rank_time_s.max())
    yield "zb-v", "peak", theory.zb_v_peak_activations(ranks=p), int(trace.peak_activation_bytes.max()) / 2
    for name, formula in (("v-half", theory.v_half_peak_activations), ("v-min", theory.v_min_peak_activations)):
        trace = step(name, p, m, (1, 1, 1), chunks=2)
        yield name, "peak", formula(ranks=p), int(trace.peak_activation_bytes.max()) / 2
    trace = step("dualpipe-v", p, m, (2, 2, 2), chunks=2)
    bubble_s = theory.dualpipe_v_bubble_s(ranks=p, pair_s=3, backward_s=2, backward_weight_s=1)
    yield "dualpipe-v", "longest bubble", bubble_s, float(trace.bubble_s.max())
    yield (
        "dualpipe-v",
        "peak in chunks",
        theory.dualpipe_v_peak_activations(ranks=p),
        int(trace.peak_activation_bytes.max()),
    )


def step(
    name: str,
    ranks: int,
    microbatches: int,
    times: tuple[float, float, float],
    *,
    chunks: int = 1,
    latency_s: float = 0.0,
    whole: int = 1,
    kept: int = 1,
) -> ppsim.Trace:
    """A simulated step of equal stages; `times`: F, I, W of a whole rank; `whole`, `kept`: bytes of one stage."""
    schedule = ppsim.build_schedule(name, ranks=ranks, microbatches=microbatches)
    f, i, w = (seconds / chunks for seconds in times)
    cost = ppsim.StageCost(
        forward_s=f, backward_input_s=i, backward_weight_s=w, activation_bytes=whole, weight_activation_bytes=kept
    )
    return ppsim.simulate(schedule, [cost] * schedule.stages, network=ppsim.Network(latency_s=latency_s))


def gpipe_rows() -> Iterator[Row]:
    """Huang et al., 2019, tables 2 and 3: measured speed-ups over K = 2, M = 32, Transformer; the ideal bounds them.

    The tables' unit is the speed with K = 2 and M = 1, which is that of one partition.
    """
    table = read("gpipe_2019.json")
    for device, model, microbatches, *speedups in table["rows"]:
        if (device, model, microbatches) != ("TPU", "Transformer", 32):
            continue
        for name, published in zip(table["columns"][3:], speedups, strict=True):
            partitions = int(name.removeprefix("K="))
            whole = step("afab", 1, microbatches, (1.0, 1.0, 1.0)).makespan_s
            ours = whole * partitions / step("afab", partitions, microbatches, (1.0, 1.0, 1.0)).makespan_s
            yield Row(
                source="Huang et al., GPipe, 2019",
                what=f"speed-up of {model} on {device}, M = {microbatches}, {name}",
                published=published,
                ours=ours,
                demand="bounds it from above, within 8 %",
                holds=published <= ours <= published * 1.08,
            )


def report(rows: list[Row]) -> Report:
    """All rows as a page."""
    off = [row for row in rows if not row.holds]
    page = Report(
        title="Published figures, computed anew",
        lead=f"{len(rows) - len(off)} of {len(rows)} rows hold their stated tolerance.",
    )
    for source in dict.fromkeys(row.source for row in rows):
        chosen = [row for row in rows if row.source == source]
        page.add(source, table=[{**row.cells, "holds": "yes" if row.holds else "NO"} for row in chosen])
    return page


def main() -> int:
    """Run the study with the command line's flags; the exit code."""
    return study_main(Study, __doc__)


if __name__ == "__main__":
    sys.exit(main())
