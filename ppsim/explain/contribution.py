"""Contribution: what one group of edge times adds to the difference between two steps of one program."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppsim.schedule.action import Kind
from ppsim.schedule.program import Program
from ppsim.trace.trace import Trace

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one group of edge times adds to the difference in step time; negative where it takes away.

    Parameters
    ----------
    part : str
        "compute": a stage's actions of one kind. "messages": those of a link. "device": the time between a rank's
        actions being ready and their start. "residual": rounding.
    seconds : float
        What it adds.
    stage, kind : int, str
        Of "compute"; None otherwise.
    source, destination : int
        The ranks of "messages"; None otherwise.
    rank : int
        Of "device"; None otherwise.
    """

    part: str
    seconds: float
    stage: int | None = None
    kind: str | None = None
    source: int | None = None
    destination: int | None = None
    rank: int | None = None

    @property
    def name(self) -> str:
        """In words: "F of stage 2", "messages from rank 0 to 1", "device or dispatch on rank 1"."""
        if self.part == "compute":
            return f"{self.kind} of stage {self.stage}"
        if self.part == "messages":
            return f"messages from rank {self.source} to {self.destination}"
        return f"device or dispatch on rank {self.rank}" if self.part == "device" else "rounding"


@dataclass(frozen=True, kw_only=True)
class MemoryDifference:
    """The first computation in a rank's order after which it holds different activation bytes in the two traces."""

    rank: int
    row: int
    action: str
    predicted_bytes: int
    measured_bytes: int


def contributions(program: Program, *, row_s: Seconds, message_s: Seconds, device_s: Seconds) -> list[Contribution]:
    """Add up what rows, messages and devices contribute by stage and kind, by link and by rank.

    Parameters
    ----------
    program : Program
        What ran.
    row_s : array of shape (rows,)
        Seconds that each row contributes.
    message_s : array of shape (messages,)
        Seconds that each message contributes.
    device_s : array of shape (p,)
        Seconds that each rank's device contributes.

    Returns
    -------
    list of Contribution
        Largest first.
    """
    messages = program.messages
    found = [
        *(
            Contribution(part="compute", stage=stage, kind=Kind(kind).name, seconds=seconds)
            for (stage, kind), seconds in _sums(program.stage, program.kind, row_s)
        ),
        *(
            Contribution(part="messages", source=source, destination=destination, seconds=seconds)
            for (source, destination), seconds in _sums(messages.source, messages.destination, message_s)
        ),
        *(Contribution(part="device", rank=rank, seconds=seconds) for rank, seconds in enumerate(device_s.tolist())),
    ]
    return sorted(found, key=lambda each: -abs(each.seconds))


def _sums(
    first: npt.NDArray[np.integer], second: npt.NDArray[np.integer], seconds: Seconds
) -> list[tuple[tuple[int, int], float]]:
    """Sums over equal pairs of keys, by ascending pair."""
    if not len(first):
        return []
    pairs, index = np.unique(np.stack([first, second], axis=1), axis=0, return_inverse=True)
    sums = np.bincount(index.reshape(-1), seconds, len(pairs))
    return [((int(a), int(b)), float(total)) for (a, b), total in zip(pairs.tolist(), sums.tolist(), strict=True)]


def memory_differences(predicted: Trace, measured: Trace) -> tuple[MemoryDifference, ...]:
    """The first difference in activation bytes of each rank that has one; none if a trace does not know them."""
    program, found = predicted.program, []
    ours, theirs = predicted.activation_bytes, measured.activation_bytes
    if ours is None or theirs is None:
        return ()
    for rank in range(program.ranks):
        rows = np.array(program.rows_of(rank), np.int64)
        differs = rows[ours[rows] != theirs[rows]]
        if len(differs):
            row = int(differs[0])
            found.append(
                MemoryDifference(
                    rank=rank,
                    row=row,
                    action=str(program.action_of(row)),
                    predicted_bytes=int(ours[row]),
                    measured_bytes=int(theirs[row]),
                )
            )
    return tuple(found)
