"""StepRecord: what one rank recorded of one step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(kw_only=True)
class StepRecord:
    """What one rank recorded of one step. Times are in nanoseconds on the rank's clock.

    Attributes
    ----------
    start_ns, end_ns : list of int, shape (rows,)
        When each of the rank's rows began and ended.
    sent_ns : dict
        Message -> when this rank handed it over.
    received_ns : dict
        Message -> when this rank's wait for it ended.
    levels : list of int, shape (rows,)
        Activation bytes after each row; empty without ledgers, as are `posted` and `gradients`.
    posted : list of int, shape (rows,)
        Bytes of the buffers of receives posted and not used yet, after each row's action.
    gradients : list of int, shape (rows,)
        Bytes of the parameters' gradients, after each row's action.
    outputs : dict
        Microbatch -> output of the last stage, if it was asked for.
    reduced_ns : dict
        Stage -> begin and end of its REDUCE_GRAD; empty where no other process has the stage.
    reduced_bytes : dict
        Stage -> bytes that this rank added up in it; empty where no other process has the stage.
    unsharded : list of int, shape (rows,)
        The most bytes of parameters gathered from all replicas, from each row's end to the next row's.
    unsharded_ns : list of (int, int)
        Begin and end of each UNSHARD of the rank, in sequence; empty unless parameters are sharded.
    unsharded_bytes : list of int
        Size of what each gathers.
    host : list of int, shape (rows,)
        The most bytes of activations in host memory, from each row's end to the next row's.
    copied_ns : list of (int, int)
        Begin and end of each O and L of the rank, in sequence.
    copied_bytes : list of int
        Size of what each moves.
    message_bytes : list of int or None, shape (messages,)
        Size of every message of the program, where microbatches differ in size.
    """

    start_ns: list[int] = field(default_factory=list)
    end_ns: list[int] = field(default_factory=list)
    sent_ns: dict[int, int] = field(default_factory=dict)
    received_ns: dict[int, int] = field(default_factory=dict)
    levels: list[int] = field(default_factory=list)
    posted: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    reduced_ns: dict[int, tuple[int, int]] = field(default_factory=dict)
    reduced_bytes: dict[int, int] = field(default_factory=dict)
    unsharded: list[int] = field(default_factory=list)
    unsharded_ns: list[tuple[int, int]] = field(default_factory=list)
    unsharded_bytes: list[int] = field(default_factory=list)
    host: list[int] = field(default_factory=list)
    copied_ns: list[tuple[int, int]] = field(default_factory=list)
    copied_bytes: list[int] = field(default_factory=list)
    message_bytes: list[int] | None = None

    def shift(self, offset_ns: int) -> None:
        """Add an offset to all times."""
        self.start_ns = [time + offset_ns for time in self.start_ns]
        self.end_ns = [time + offset_ns for time in self.end_ns]
        self.sent_ns = {message: time + offset_ns for message, time in self.sent_ns.items()}
        self.received_ns = {message: time + offset_ns for message, time in self.received_ns.items()}
        self.reduced_ns = {
            stage: (start + offset_ns, end + offset_ns) for stage, (start, end) in self.reduced_ns.items()
        }
        self.unsharded_ns = [(start + offset_ns, end + offset_ns) for start, end in self.unsharded_ns]
        self.copied_ns = [(start + offset_ns, end + offset_ns) for start, end in self.copied_ns]
