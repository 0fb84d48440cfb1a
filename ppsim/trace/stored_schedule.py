"""Stored schedule: a schedule as the header values and arrays of a trace file."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ppsim.schedule.offload import Offload
from ppsim.schedule.order import Order
from ppsim.schedule.posts import Posts
from ppsim.schedule.schedule import Schedule
from ppsim.schedule.sharding import Sharding


def schedule_header(schedule: Schedule) -> dict[str, Any]:
    """What the header says of a schedule, as JSON values. One copy of the model is not written, as in older files."""
    return {
        "name": schedule.name,
        "microbatches": schedule.microbatches,
        "placement": list(schedule.placement),
        **({"copies": schedule.copies} if schedule.copies > 1 else {}),
    }


def schedule_arrays(schedule: Schedule) -> dict[str, npt.NDArray[np.int32]]:
    """The orders, posts, sharding and offload of each rank, as arrays of shape (columns, entries).

    Columns stand in the sequence of the class's parameters. The last one of `Sharding` is left out if it is None.
    """
    arrays = {}
    for rank, order in enumerate(schedule.orders):
        columns = np.stack([order.stage, order.kind, order.microbatch, order.joined])
        arrays[f"order_{rank}"] = columns.astype(np.int32)
    for name, placed in (
        ("posts", schedule.communication),
        ("sharding", schedule.sharding),
        ("offload", schedule.offload),
    ):
        for rank, entries in enumerate(placed or ()):
            arrays[f"{name}_{rank}"] = np.stack(list(entries.columns.values()))
    return arrays


def schedule_of_file(header: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> Schedule:
    """The schedule of a file's header and arrays. Any exception means that the file is damaged."""
    ranks = range(sum(name.startswith("order_") for name in arrays))
    return Schedule(
        orders=tuple(Order(*arrays[f"order_{rank}"]) for rank in ranks),
        placement=tuple(operator.index(rank) for rank in header["placement"]),
        microbatches=operator.index(header["microbatches"]),
        name=str(header["name"]),
        copies=operator.index(header.get("copies", 1)),
        communication=tuple(Posts(*arrays[f"posts_{rank}"]) for rank in ranks) if "posts_0" in arrays else None,
        sharding=tuple(Sharding(*arrays[f"sharding_{rank}"]) for rank in ranks) if "sharding_0" in arrays else None,
        offload=tuple(Offload(*arrays[f"offload_{rank}"]) for rank in ranks) if "offload_0" in arrays else None,
    )
