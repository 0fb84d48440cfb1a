"""Lane cells: the actions of traces as pictures of coloured cells, which stay fluid where bars are too many."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from ppsim.plots import style
from ppsim.plots.lane_block import BAR, Block, chunk_of_stage, hover_texts, shade, stages_per_rank
from ppsim.plots.units import Unit

_LIGHTER = 0.1  # the colour of odd microbatches, so that neighbours of one kind can be told apart


def lane_cells(blocks: list[Block], unit: Unit) -> list[go.Heatmap | go.Bar]:
    """A picture of each lane, with a cell for each action and each idle span, and an entry in the legend for each kind.

    The browser draws a bar as an object of its own, and 10,000 of them take a second. A lane of cells is one image.
    Pages show numbers where cells have room for them, see `ppsim/export/cell_numbers.js`.
    """
    chunks = max(stages_per_rank(block.trace) for block in blocks)
    kinds = [kind for kind in style.KIND_COLOURS if any((block.trace.program.kind == kind).any() for block in blocks)]
    colours = [style.BUBBLE]
    for kind in kinds:
        for chunk in range(chunks):
            plain = shade(kind, chunk, chunks)
            colours += [plain, style.lighter(plain, _LIGHTER)]
    steps = [[each / len(colours), colour] for at, colour in enumerate(colours) for each in (at, at + 1)]
    entries = [(style.KIND_NAMES[kind], shade(kind, 0, chunks)) for kind in kinds] + [("bubble", style.BUBBLE)]
    found: list[go.Heatmap | go.Bar] = [
        go.Bar(name=name, x=[None], y=[None], orientation="h", marker={"color": colour}) for name, colour in entries
    ]
    colour_of_kind = np.zeros(max(kinds) + 1, np.int64)
    colour_of_kind[kinds] = 1 + 2 * chunks * np.arange(len(kinds))
    for block in blocks:
        program, said = block.trace.program, hover_texts(block, unit)
        of_rows = colour_of_kind[program.kind] + 2 * chunk_of_stage(block.trace)[program.stage] + program.microbatch % 2
        for rank in range(block.trace.ranks):
            own = program.rows_of(rank)
            rows = np.arange(own.start, own.stop)
            edges_s, row = _cells(block, rows)
            lengths_s = np.diff(edges_s).tolist()
            hover = [
                said[each] if each >= 0 else f"rank {rank} is idle for {unit.text(length_s)}"
                for each, length_s in zip(row.tolist(), lengths_s, strict=True)
            ]
            found.append(
                go.Heatmap(
                    x=(edges_s * unit.scale).tolist(),  # a list, which scripts of a page can read
                    y=block.top + rank + np.array([-BAR, BAR]) / 2,
                    z=[np.where(row >= 0, of_rows[row], 0)],
                    text=[[str(program.microbatch[each]) if each >= 0 else "" for each in row.tolist()]],
                    hovertext=[hover],
                    hovertemplate="%{hovertext}<extra></extra>",
                    colorscale=steps,
                    zmin=-0.5,
                    zmax=len(colours) - 0.5,
                    showscale=False,
                )
            )
    return found


def _cells(block: Block, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The edges of a lane's cells, from the step's begin to its end, and the row of each; -1 where the rank is idle."""
    trace = block.trace
    ends = np.stack([trace.start_s[rows], trace.end_s[rows]], axis=1).ravel() - block.origin_s
    edges_s = np.concatenate([[0.0], ends, [trace.makespan_s]])
    row = np.full(len(edges_s) - 1, -1)
    row[1::2] = rows
    is_seen = np.diff(edges_s) > 0  # not what takes no time, nor where one clock reads a little before another
    return np.concatenate([edges_s[:-1][is_seen], edges_s[-1:]]), row[is_seen]
