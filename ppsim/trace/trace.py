"""Trace: when every action ran and every message travelled; the same from the simulated and the real clock."""

from __future__ import annotations

import io
import json
import operator
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ppsim.conditions import Conditions
from ppsim.schedule.action import Kind
from ppsim.schedule.order import Order
from ppsim.schedule.program import Program
from ppsim.schedule.schedule import Schedule
from ppsim.simulation.memory_levels import peak_per_rank
from ppsim.trace import metrics
from ppsim.trace.memory import Memory

if TYPE_CHECKING:
    import pandas

Seconds = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.int64]
SCHEMA_VERSION = 2  # 1 held the conditions among the details
_COLUMNS = (
    "start_s",
    "end_s",
    "activation_bytes",
    "message_bytes",
    "message_start_s",
    "message_left_s",
    "message_arrival_s",
)
_REDUCTIONS = ("reduce_start_s", "reduce_end_s", "reduce_bytes")
_OPTIONAL = ("receive_buffer_bytes", "gradient_bytes", "parameter_bytes", "optimizer_bytes")  # not in older files
_BY_RANK = ("parameter_bytes", "optimizer_bytes")


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """One step of a program on a clock.

    start_s, end_s, activation_bytes: shape (rows,), in the program's rows; the two rows of an overlapped pair share
    the pair's time between them. activation_bytes: what the row's rank holds from the moment the action takes effect
    (start of F, end of B, I and W, in a pair too). message_*: shape (messages,), in the program's message table: size,
    when the transfer began, when it had left the sender's link, and when it was there. Measured messages: posted by
    the sender, seen complete by the sender, seen complete by the receiver.
    reduce_*: shape (stages,): when adding up each stage's gradients over data-parallel replicas began and ended, and
    how many bytes they are; None without replicas.
    receive_buffer_bytes, gradient_bytes: shape (rows,), likewise: buffers of receives posted and not yet used, and the
    parameters' gradients. parameter_bytes, optimizer_bytes: of each rank, shape (p,). None where it is not known.
    clock: "simulated" or "measured". details: how it was made (engine, environment, all steps' times); JSON values.
    conditions: how a simulated step was run.
    """

    program: Program
    clock: str
    start_s: Seconds
    end_s: Seconds
    activation_bytes: npt.NDArray[np.int64]
    message_bytes: npt.NDArray[np.int64]
    message_start_s: Seconds
    message_left_s: Seconds
    message_arrival_s: Seconds
    reduce_start_s: Seconds | None = None
    reduce_end_s: Seconds | None = None
    reduce_bytes: npt.NDArray[np.int64] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    receive_buffer_bytes: Bytes | None = None
    gradient_bytes: Bytes | None = None
    parameter_bytes: Bytes | None = None
    optimizer_bytes: Bytes | None = None
    conditions: Conditions = field(default_factory=Conditions)

    @property
    def schedule(self) -> Schedule:
        """The schedule that ran."""
        return self.program.schedule

    @property
    def ranks(self) -> int:
        """p."""
        return self.program.ranks

    @cached_property
    def first_start_s(self) -> Seconds:
        """Each rank's first start, shape (p,)."""
        return metrics.first_start_s(self)

    @cached_property
    def last_end_s(self) -> Seconds:
        """Each rank's last end, shape (p,)."""
        return metrics.last_end_s(self)

    @cached_property
    def compute_s(self) -> Seconds:
        """Each rank's time in compute actions, shape (p,)."""
        return metrics.compute_s(self)

    @property
    def makespan_s(self) -> float:
        """The step: last end minus first start over all ranks' compute."""
        return metrics.makespan_s(self)

    @property
    def step_s(self) -> float:
        """From the first start until all compute and all reductions have ended, in seconds."""
        if self.reduce_end_s is None:
            return self.makespan_s
        return max(self.makespan_s, float(self.reduce_end_s.max() - self.start_s.min()))

    @property
    def rank_time_s(self) -> Seconds:
        """Each rank's last end minus its own first start, shape (p,); what bounds back-to-back steps."""
        return self.last_end_s - self.first_start_s

    @property
    def bubble_s(self) -> Seconds:
        """Each rank's makespan minus its compute time, shape (p,)."""
        return self.makespan_s - self.compute_s

    @property
    def bubble_fraction(self) -> float:
        """Sum of the bubbles over p times the makespan; 0 for a step without length."""
        return metrics.bubble_fraction(self)

    @cached_property
    def peak_activation_bytes(self) -> npt.NDArray[np.int64]:
        """The largest sum of activations on each rank between its actions, shape (p,)."""
        return peak_per_rank(self.program, self.activation_bytes)

    @cached_property
    def memory(self) -> Memory:
        """All that each rank holds, column by column, shape (p,) each: activations and what stands beside them."""
        return Memory.of(self)

    @property
    def effect_s(self) -> Seconds:
        """When each row's memory change takes effect, shape (rows,): the start of F, the end of B, I and W.

        An overlapped pair's F stands first in its time and its B last: these are the pair's start and end.
        """
        return np.where(self.program.kind == Kind.F, self.start_s, self.end_s)

    def to_frame(self) -> pandas.DataFrame:
        """One row per computation and per message end, by start time.

        Columns rank, stage, kind, microbatch, start_s, end_s, size_bytes. Kinds F, B, I, W compute (size_bytes: the
        activation bytes their rank holds from then on); SEND_F, RECV_F, SEND_B, RECV_B are messages (size_bytes: the
        message's): a send from the transfer's start until it has left the link, a receive until it is there.
        REDUCE_GRAD adds up a stage's gradients over replicas (microbatch -1, size_bytes: the gradients').
        """
        import pandas

        from ppsim.trace.table import frame_columns

        frame = pandas.DataFrame(frame_columns(self))
        return frame.sort_values(["start_s", "rank"], kind="stable", ignore_index=True)

    def save(self, path: str | Path) -> None:
        """Write the trace to one file (a zip of arrays with a JSON header that holds the schema version)."""
        header = {
            "schema": SCHEMA_VERSION,
            "clock": self.clock,
            "details": self.details,
            "conditions": self.conditions.to_dict(),
            "name": self.schedule.name,
            "microbatches": self.schedule.microbatches,
            "placement": list(self.schedule.placement),
        }
        names = (*_COLUMNS, *_REDUCTIONS, *_OPTIONAL)
        arrays = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        for rank, order in enumerate(self.schedule.orders):
            arrays[f"order_{rank}"] = np.stack([order.stage, order.kind, order.microbatch, order.joined]).astype(
                np.int32
            )
        encoded = np.frombuffer(json.dumps(header).encode(), np.uint8)
        with open(path, "wb") as file:
            np.savez_compressed(file, header=encoded, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace that `save` wrote.

        Raises ValueError for another kind of file, a damaged one or another schema, OSError if it cannot be read.
        """
        data = Path(path).read_bytes()
        # A file of another kind or a damaged one fails in a dozen ways (zlib.error, struct.error, TypeError, ...),
        # so everything that reading raises means the same here.
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            header = dict(json.loads(arrays.pop("header").tobytes()))
        except Exception:
            raise ValueError(f"{path} is not a saved trace: write one with Trace.save") from None
        if header.get("schema") not in (1, SCHEMA_VERSION):
            raise ValueError(
                f"{path} has trace schema {header.get('schema')!r}, this version reads 1 to {SCHEMA_VERSION}: "
                "load it with the version that wrote it"
            )
        try:
            return cls._of_parts(header, arrays)
        except Exception as error:
            raise ValueError(f"{path} is a damaged trace: {type(error).__name__}: {error}") from None

    @classmethod
    def _of_parts(cls, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Trace:
        count = sum(name.startswith("order_") for name in arrays)
        schedule = Schedule(
            orders=tuple(Order(*arrays[f"order_{rank}"]) for rank in range(count)),
            placement=tuple(operator.index(rank) for rank in header["placement"]),
            microbatches=operator.index(header["microbatches"]),
            name=str(header["name"]),
        )
        program = schedule.program
        columns: dict[str, np.ndarray] = {}
        for name in (*_COLUMNS, *(name for name in (*_REDUCTIONS, *_OPTIONAL) if name in arrays)):
            wanted = (_length(name, program),)
            if arrays[name].shape != wanted:
                raise ValueError(f"{name} has shape {arrays[name].shape}, its schedule needs {wanted}")
            columns[name] = arrays[name].astype(
                np.int64 if name.endswith("_bytes") else np.float64, casting="same_kind"
            )
        details = dict(header["details"])
        if header["schema"] == 1:
            conditions = {each.name: details.pop(each.name) for each in fields(Conditions) if each.name in details}
        else:
            conditions = header["conditions"]
        return cls(
            program=program,
            clock=str(header["clock"]),
            details=details,
            conditions=Conditions.from_dict(conditions),
            **columns,
        )


def _length(column: str, program: Program) -> int:
    if column.startswith("message_"):
        return len(program.messages)
    if column in _BY_RANK:
        return program.ranks
    return program.schedule.stages if column.startswith("reduce_") else len(program.stage)
