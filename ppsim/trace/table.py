"""Table of a step: columns with a row for each computation, for each end of a message, and for each reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Kind
from ppsim.schedule.program import Program
from ppsim.trace.side_work import SideWork

Column = npt.NDArray[np.generic]
_KIND_NAMES = np.array([kind.name for kind in Kind])


def computation_columns(
    program: Program, start_s: Column, end_s: Column, size_bytes: Column | None
) -> dict[str, Column]:
    """Rows F, B, I, W and R in the program's sequence, from arrays of shape (rows,)."""
    return {
        "rank": program.rank,
        "stage": program.stage,
        "kind": _KIND_NAMES[program.kind],
        "microbatch": program.microbatch,
        "start_s": start_s,
        "end_s": end_s,
        "size_bytes": np.full(len(start_s), np.nan) if size_bytes is None else size_bytes,
    }


def message_columns(
    program: Program, start_s: Column, left_s: Column, arrival_s: Column, size_bytes: Column | None
) -> dict[str, Column]:
    """Rows SEND_F and SEND_B, then RECV_F and RECV_B, from arrays of shape (messages,).

    Both begin with the transfer. A send lasts until the message has left the link, a receive until it has arrived.
    """
    messages, count = program.messages, len(program.messages)
    sizes = np.full(count, np.nan) if size_bytes is None else size_bytes
    stage, kind, microbatch = program.post_columns(np.tile(np.arange(count), 2), np.arange(2 * count) < count)
    return {
        "rank": np.concatenate([messages.source, messages.destination]),
        "stage": stage,
        "kind": _KIND_NAMES[kind],
        "microbatch": microbatch,
        "start_s": np.concatenate([start_s, start_s]),
        "end_s": np.concatenate([left_s, arrival_s]),
        "size_bytes": np.concatenate([sizes, sizes]),
    }


def side_columns(side_work: SideWork) -> dict[str, Column]:
    """Rows REDUCE_GRAD, UNSHARD, O and L."""
    return side_work._asdict() | {"kind": _KIND_NAMES[side_work.kind]}


def joined(parts: Sequence[Mapping[str, Column]]) -> dict[str, Column]:
    """Tables with the same columns, one below the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
