"""Trace: when every action ran and every message travelled; the same from the simulated and the real clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from ppsim.checks import checked
from ppsim.conditions import Conditions
from ppsim.errors import InputError
from ppsim.schedule.action import Kind
from ppsim.schedule.program import Program
from ppsim.schedule.schedule import Schedule
from ppsim.shown import shown_by
from ppsim.trace import table
from ppsim.trace.memory import Bytes, Memory, Seconds, levels_at_peak, peak_per_rank, sending_levels
from ppsim.trace.side_work import SideWork
from ppsim.trace.stored_schedule import schedule_arrays, schedule_header, schedule_of_file
from ppsim.trace.trace_file import read_file, write_file

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """One step of a program on a clock.

    Parameters
    ----------
    program : Program
        What ran.
    clock : str
        "simulated" or "measured".
    start_s, end_s : arrays of shape (rows,)
        When each row of the program ran. The two rows of an overlapped pair share the pair's time between them.
    activation_bytes : array of shape (rows,), or None where not known
        What the row's rank holds once the row has taken effect: from the start of F and R, from the end of B, I and W.
        In an overlapped pair, the row of F has the level while both are under way and the row of B the level after it.
        Where activations are offloaded, the most that is held until the next row takes effect.
    message_bytes : array of shape (messages,), or None where not known
        The size of each message in the program's message table.
    message_start_s, message_left_s, message_arrival_s : arrays of shape (messages,), or None where not known
        When the transfer began, when it had left the sender's link, and when it was there. Measured: posted by the
        sender, seen complete by the sender, seen complete by the receiver.
    reduce_start_s, reduce_end_s, reduce_bytes : arrays of shape (stages,), or None without replicas
        When adding up each stage's gradients over data-parallel replicas began and ended, and the gradients' size.
    details : dict
        How the trace was made (engine, environment, all steps' times); JSON values.
    receive_buffer_bytes, gradient_bytes : arrays of shape (rows,), or None where not known
        What the row's rank holds in receives posted and not yet used once the row's action runs, and in gradients of
        parameters once it has ended.
    parameter_bytes, optimizer_bytes, other_bytes : arrays of shape (p,), or None where not known
        What each rank holds all the time; `other_bytes` is what was not told apart.
    total_peak_bytes : array of shape (p,), or None where not known
        The most that each rank held in all, where that was measured and not what it was made of.
    unsharded_bytes : array of shape (rows,), or None where parameters are not sharded
        What the row's rank holds in parameters gathered from all replicas, from when the row takes effect until the
        next one does; beside its share, which is in `parameter_bytes`.
    unshard_start_s, unshard_end_s, unshard_bytes : arrays of shape (unshards,), or None
        When each UNSHARD of the program's collectives began and ended, and the size of what it gathers.
    host_bytes : array of shape (rows,), or None where nothing is offloaded
        The most that the rank's activations take in host memory from when the row takes effect until the next one does.
    copy_start_s, copy_end_s, copy_bytes : arrays of shape (copies,), or None
        When each O and L of the program's copies began and ended, and the size of what it moves.
    conditions : Conditions
        How a simulated step was run.

    Raises
    ------
    InputError
        If some but not all of the messages' times are known.

    Notes
    -----
    Other people's runs may tell when computations ran and nothing else. What follows from a column that is not known is
    None, or left out of tables and figures, and texts say so.

    Examples
    --------
    >>> import ppsim
    >>> cost = ppsim.StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=10)
    >>> trace = ppsim.simulate(ppsim.build_schedule("1f1b", ranks=2, microbatches=4), [cost] * 2)
    >>> trace.makespan_s, trace.bubble_fraction
    (15.0, 0.2)
    >>> trace.bubble_s.tolist(), trace.peak_activation_bytes.tolist()
    ([3.0, 3.0], [20, 10])
    """

    program: Program
    clock: str
    start_s: Seconds
    end_s: Seconds
    activation_bytes: Bytes | None = None
    message_bytes: Bytes | None = None
    message_start_s: Seconds | None = None
    message_left_s: Seconds | None = None
    message_arrival_s: Seconds | None = None
    reduce_start_s: Seconds | None = None
    reduce_end_s: Seconds | None = None
    reduce_bytes: Bytes | None = None
    details: dict[str, Any] = field(default_factory=dict)
    receive_buffer_bytes: Bytes | None = None
    gradient_bytes: Bytes | None = None
    parameter_bytes: Bytes | None = None
    optimizer_bytes: Bytes | None = None
    conditions: Conditions = field(default_factory=Conditions)
    other_bytes: Bytes | None = None
    total_peak_bytes: Bytes | None = None
    unsharded_bytes: Bytes | None = None
    unshard_start_s: Seconds | None = None
    unshard_end_s: Seconds | None = None
    unshard_bytes: Bytes | None = None
    host_bytes: Bytes | None = None
    copy_start_s: Seconds | None = None
    copy_end_s: Seconds | None = None
    copy_bytes: Bytes | None = None

    def __post_init__(self) -> None:
        if len({each is None for each in (self.message_start_s, self.message_left_s, self.message_arrival_s)}) > 1:
            raise InputError(
                "of the messages' times some are known and some are not: give message_start_s, message_left_s and "
                "message_arrival_s, or none of them"
            )

    @property
    def message_times_s(self) -> tuple[Seconds, Seconds, Seconds] | None:
        """`message_start_s`, `message_left_s` and `message_arrival_s`; None where they are not known."""
        if self.message_start_s is None or self.message_left_s is None or self.message_arrival_s is None:
            return None
        return self.message_start_s, self.message_left_s, self.message_arrival_s

    @property
    def unknown(self) -> tuple[str, ...]:
        """What is not known of activations and messages: "activation bytes", "message times", "message bytes"."""
        columns = {
            "activation bytes": self.activation_bytes,
            "message times": self.message_start_s,
            "message bytes": self.message_bytes,
        }
        return tuple(name for name, column in columns.items() if column is None)

    @property
    def schedule(self) -> Schedule:
        """The schedule that ran."""
        return self.program.schedule

    @property
    def ranks(self) -> int:
        """Number of ranks, p."""
        return self.program.ranks

    @cached_property
    def first_start_s(self) -> Seconds:
        """Each rank's first start, shape (p,); the step's first start for a rank without actions."""
        return self._at_rank_edge(self.start_s, last=False)

    @cached_property
    def last_end_s(self) -> Seconds:
        """Each rank's last end, shape (p,); the step's first start for a rank without actions."""
        return self._at_rank_edge(self.end_s, last=True)

    def _at_rank_edge(self, times_s: Seconds, *, last: bool) -> Seconds:
        """The time of each rank's first or last row."""
        edges = self.program.action_start[self.program.rank_actions]
        begin, end = edges[:-1], edges[1:]
        row = np.clip(end - 1 if last else begin, 0, len(times_s) - 1)  # of a rank without actions any row
        return np.where(end > begin, times_s[row], self.start_s.min())

    @cached_property
    def compute_s(self) -> Seconds:
        """Each rank's time in compute actions, shape (p,)."""
        lengths_s = self.end_s - self.start_s
        return np.bincount(self.program.rank, lengths_s, self.program.ranks).astype(np.float64)

    @property
    def makespan_s(self) -> float:
        """The step without reductions: last end minus first start over all ranks' compute, in seconds."""
        return float(self.end_s.max() - self.start_s.min())

    @property
    def step_s(self) -> float:
        """From the first start until all compute and all reductions have ended, in seconds."""
        if self.reduce_end_s is None:
            return self.makespan_s
        return max(self.makespan_s, float(self.reduce_end_s.max() - self.start_s.min()))

    @property
    def rank_time_s(self) -> Seconds:
        """Each rank's last end minus its own first start, shape (p,): what bounds back-to-back steps."""
        return self.last_end_s - self.first_start_s

    @property
    def bubble_s(self) -> Seconds:
        """The makespan minus each rank's compute time, shape (p,)."""
        return self.makespan_s - self.compute_s

    @property
    def bubble_fraction(self) -> float:
        """The sum of the bubbles over p times the makespan; 0 for a step without length."""
        total_s = self.program.ranks * self.makespan_s
        return float((total_s - self.compute_s.sum()) / total_s) if total_s > 0 else 0.0

    @property
    def effect_s(self) -> Seconds:
        """When each row's change of memory takes effect, shape (rows,): the start of F and R, the end of B, I and W.

        In the time of an overlapped pair the F stands first and the B last, so these are the pair's start and end.
        """
        return np.where(np.isin(self.program.kind, (Kind.F, Kind.R)), self.start_s, self.end_s)

    @cached_property
    def peak_activation_bytes(self) -> Bytes | None:
        """The largest sum of activations on each rank between its actions, shape (p,); None where not known."""
        return None if self.activation_bytes is None else peak_per_rank(self.program, self.activation_bytes)

    @cached_property
    def send_buffer_bytes(self) -> Bytes | None:
        """What the row's rank has handed over and has not left once the row has taken effect, shape (rows,).

        Gradients, and in an evaluation outputs; in training the outputs are activations. None where messages are not
        known.
        """
        if self.message_bytes is None or self.message_left_s is None:
            return None
        return sending_levels(
            self.program,
            end_s=self.end_s,
            effect_s=self.effect_s,
            message_left_s=self.message_left_s,
            message_bytes=self.message_bytes,
        )

    @cached_property
    def side_work(self) -> SideWork:
        """What ran beside computations: REDUCE_GRAD, UNSHARD, O and L."""
        return SideWork.of(self)

    @cached_property
    def memory(self) -> Memory:
        """The most that each rank holds, kind by kind and in all."""
        return Memory.of(
            self.program, self._levels(), self._constant(), self.total_peak_bytes, host_bytes=self.host_bytes
        )

    def held_at_peak(self) -> dict[str, Bytes]:
        """Each known kind of memory when a rank first holds the most in all, shape (p,) each. They add up to that.

        Where no more than a measured total is known, it is all "other_bytes".
        """
        if self.total_peak_bytes is not None:
            return {"other_bytes": self.total_peak_bytes}
        return levels_at_peak(self.program, self._levels()) | self._constant()

    def _levels(self) -> dict[str, Bytes]:
        """The known kinds of memory that change during the step, shape (rows,) each."""
        return self._known(
            "activation_bytes", "receive_buffer_bytes", "gradient_bytes", "send_buffer_bytes", "unsharded_bytes"
        )

    def _constant(self) -> dict[str, Bytes]:
        """The known kinds of memory that do not change, shape (p,) each."""
        return self._known("parameter_bytes", "optimizer_bytes", "other_bytes")

    def _known(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def to_frame(self) -> pandas.DataFrame:
        """The step as a table, by start time.

        Returns
        -------
        pandas.DataFrame
            Columns rank, stage, kind, microbatch, start_s, end_s, size_bytes. A size that is not known is missing
            (`pandas.NA`), and so are the rows of messages whose times are not known.

            - F, B, I, W, R: computations; `size_bytes` is the activation bytes that their rank holds from then on.
            - SEND_F, RECV_F, SEND_B, RECV_B: messages and their size. Both ends begin with the transfer; a send lasts
              until the message has left the link, a receive until it has arrived.
            - REDUCE_GRAD: a stage's gradients added up over replicas, and their size; the microbatch is -1.
            - UNSHARD: a stage's parameters gathered from all replicas, and their size; the microbatch is -1.
            - O, L: activations moved to host memory and back, and their size.

        Examples
        --------
        >>> import ppsim
        >>> cost = ppsim.StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=10)
        >>> trace = ppsim.simulate(ppsim.build_schedule("1f1b", ranks=1, microbatches=1), [cost])
        >>> print(trace.to_frame().to_string(index=False))
         rank  stage kind  microbatch  start_s  end_s  size_bytes
            0      0    F           0      0.0    1.0          10
            0      0    B           0      1.0    3.0           0
        """
        import pandas

        parts = [table.computation_columns(self.program, self.start_s, self.end_s, self.activation_bytes)]
        if self.message_times_s is not None:
            parts.append(table.message_columns(self.program, *self.message_times_s, self.message_bytes))
        if len(self.side_work.rank):
            parts.append(table.side_columns(self.side_work))
        frame = pandas.DataFrame(table.joined(parts))
        if frame["size_bytes"].dtype.kind == "f":  # some are not known
            frame["size_bytes"] = frame["size_bytes"].astype("Int64")
        return frame.sort_values(["start_s", "rank"], kind="stable", ignore_index=True)

    @checked
    def plot(self, *, messages: bool = False, critical_path: bool = False) -> go.Figure:
        """The step as a figure: a lane for each rank, a bar for each action.

        Parameters
        ----------
        messages : bool
            Whether to draw each message as a thin line.
        critical_path : bool
            Whether to draw the critical path as a red line.

        Returns
        -------
        plotly.graph_objects.Figure
            `ppsim.plots.timeline_figure.timeline` of this trace.
        """
        found: go.Figure = shown_by("trace_figure", self, messages=messages, critical_path=critical_path)
        return found

    def _repr_html_(self) -> str:
        return str(shown_by("trace_html", self))

    @checked
    def save(self, path: str | Path) -> None:
        """Write the trace to one file, which `load` reads.

        Examples
        --------
        >>> import os, tempfile
        >>> import ppsim
        >>> cost = ppsim.StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1)
        >>> trace = ppsim.simulate(ppsim.build_schedule("1f1b", ranks=2, microbatches=4), [cost] * 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "step.trace")
        ...     trace.save(path)
        ...     Trace.load(path).makespan_s
        15.0
        """
        header = {
            "clock": self.clock,
            "details": self.details,
            "conditions": self.conditions.to_dict(),
        }
        arrays = self._known(*_array_fields())
        write_file(path, {**header, **schedule_header(self.schedule)}, {**arrays, **schedule_arrays(self.schedule)})

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Trace:
        """Read a trace that `save` wrote.

        Raises
        ------
        InputError
            If the file is of another kind, damaged, or of a schema that this version does not read.
        OSError
            If the file cannot be read.
        """
        header, arrays = read_file(path)
        try:
            return cls._of_file(header, arrays)
        except Exception as error:  # as in `read_file`: damage shows in many ways
            what = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            raise InputError(f"{path} is a damaged trace: {what}; save it again") from None

    @classmethod
    def _of_file(cls, header: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> Trace:
        """The trace of a file's header and arrays; any exception means that the file is damaged."""
        schedule = schedule_of_file(header, arrays)
        columns: dict[str, Any] = {}
        for name, is_required in _array_fields().items():
            if is_required or name in arrays:  # older files lack some columns
                wanted = (_length(name, schedule.program),)
                if arrays[name].shape != wanted:
                    raise InputError(f"{name} has shape {arrays[name].shape}, its schedule needs {wanted}")
                number = np.int64 if name.endswith("_bytes") else np.float64
                columns[name] = arrays[name].astype(number, casting="same_kind")
        details = dict(header["details"])
        if header["schema"] == 1:
            conditions = {each.name: details.pop(each.name) for each in fields(Conditions) if each.name in details}
        else:
            conditions = header["conditions"]
        return cls(
            program=schedule.program,
            clock=str(header["clock"]),
            details=details,
            conditions=Conditions.from_dict(conditions),
            **columns,
        )


def known(column: npt.NDArray[_Number] | None, what: str = "this column") -> npt.NDArray[_Number]:
    """The column of a trace, where it must be known.

    Raises
    ------
    InputError
        If it is not; the message says `what`.
    """
    if column is None:
        raise InputError(f"the trace does not know {what}: give a trace that `simulate` or `ppexec run` made")
    return column


def _array_fields() -> dict[str, bool]:
    """The fields of a trace that are arrays, and whether each is required."""
    others = ("program", "clock", "details", "conditions")
    return {each.name: each.default is MISSING for each in fields(Trace) if each.name not in others}


def _length(column: str, program: Program) -> int:
    """How many entries an array field has."""
    if column.startswith("message_"):
        return len(program.messages)
    if column in ("parameter_bytes", "optimizer_bytes", "other_bytes", "total_peak_bytes"):
        return program.ranks
    if column.startswith("unshard_"):
        return int((program.collectives.kind == Kind.UNSHARD).sum())
    if column.startswith("copy_"):
        return len(program.offload.stage)
    return program.schedule.stages if column.startswith("reduce_") else len(program.stage)


def median_step(traces: Sequence[Trace]) -> Trace:
    """The step of the median makespan; of two in the middle the shorter.

    Parameters
    ----------
    traces : sequence of Trace
        At least one.
    """
    in_order: list[Trace] = sorted(traces, key=lambda trace: trace.makespan_s)
    return in_order[(len(in_order) - 1) // 2]
