"""Assemble: what the ranks recorded of a step, as one trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ppexec.workers.step_record import StepRecord
from ppsim import Conditions, Program, Trace


def assemble_trace(
    program: Program,
    records: Sequence[StepRecord],
    message_bytes: Sequence[int],
    *,
    conditions: Conditions | None = None,
) -> Trace:
    """Assemble a trace from the records of one step. Its time 0 is the start of the first action.

    Parameters
    ----------
    program : Program
        What ran.
    records : sequence of StepRecord, shape (p,)
        The record of each rank, all on one clock.
    message_bytes : sequence of int, shape (messages,)
        Size of each message, where the records do not say it themselves.
    conditions : Conditions, optional
        How the step was run.

    Returns
    -------
    Trace

    Notes
    -----
    A message starts when its sender handed it over. It has arrived when the receiver's wait for it ended, which is the
    latest time it can have arrived. The same time counts as that at which it left the sender, since the actual one is
    not known. With replicas a stage's reduction begins when this replica handed its gradients over, and ends when the
    sums had arrived. A gathering of sharded parameters ends when the rank's wait for it ended.
    """
    start_ns = np.concatenate([np.array(record.start_ns, np.int64) for record in records])
    end_ns = np.concatenate([np.array(record.end_ns, np.int64) for record in records])
    zero = start_ns.min()
    sent, received = {}, {}
    for record in records:
        sent.update(record.sent_ns)
        received.update(record.received_ns)
    reduced: dict[int, tuple[int, int]] = {}
    reduced_bytes: dict[int, int] = {}
    for record in records:
        reduced.update(record.reduced_ns)
        reduced_bytes.update(record.reduced_bytes)
    reduced_s = (np.array([reduced[stage] for stage in sorted(reduced)], np.int64).reshape(-1, 2) - zero) / 1e9
    gathered_s = (
        np.array([s for record in records for s in record.unsharded_ns], np.int64).reshape(-1, 2) - zero
    ) / 1e9
    gathered_bytes = np.array([size for record in records for size in record.unsharded_bytes], np.int64)
    is_sharded = len(gathered_s) > 0
    copied_s = (np.array([s for record in records for s in record.copied_ns], np.int64).reshape(-1, 2) - zero) / 1e9
    copied_bytes = np.array([size for record in records for size in record.copied_bytes], np.int64)
    has_copies = len(copied_s) > 0
    count = len(program.messages)
    sent_s = (np.array([sent[message] for message in range(count)], np.int64) - zero) / 1e9
    received_s = (np.array([received[message] for message in range(count)], np.int64) - zero) / 1e9
    return Trace(
        program=program,
        clock="measured",
        conditions=conditions or Conditions(),
        start_s=(start_ns - zero) / 1e9,
        end_s=(end_ns - zero) / 1e9,
        activation_bytes=np.zeros(len(program.stage), np.int64),
        message_bytes=np.array(records[0].message_bytes or message_bytes, np.int64),
        message_start_s=sent_s,
        message_left_s=received_s,
        message_arrival_s=received_s,
        reduce_start_s=reduced_s[:, 0] if reduced else None,
        reduce_end_s=reduced_s[:, 1] if reduced else None,
        reduce_bytes=np.array([reduced_bytes[stage] for stage in sorted(reduced)], np.int64) if reduced else None,
        unshard_start_s=gathered_s[:, 0] if is_sharded else None,
        unshard_end_s=gathered_s[:, 1] if is_sharded else None,
        unshard_bytes=gathered_bytes if is_sharded else None,
        copy_start_s=copied_s[:, 0] if has_copies else None,
        copy_end_s=copied_s[:, 1] if has_copies else None,
        copy_bytes=copied_bytes if has_copies else None,
    )


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """The bytes that one rank counted in an untimed step.

    Fields are None where there is nothing to count: with timed compute, or without an optimizer.

    Parameters
    ----------
    activation_bytes : list of int, shape (rows,)
        Activations after each of the rank's rows.
    buffer_bytes : list of int, shape (rows,)
        Buffers of receives posted and not used yet, after each row's action.
    gradient_bytes : list of int, shape (rows,)
        The parameters' gradients, after each row's action.
    parameter_bytes : int
        Parameters, the same throughout the step.
    optimizer_bytes : int
        Optimizer state, the same throughout the step.
    unsharded_bytes : list of int, shape (rows,)
        Parameters gathered from all replicas, beside the rank's share; None unless parameters are sharded.
    host_bytes : list of int, shape (rows,)
        Activations in host memory; None unless the schedule offloads some.
    """

    activation_bytes: list[int]
    buffer_bytes: list[int]
    gradient_bytes: list[int] | None
    parameter_bytes: int | None
    optimizer_bytes: int | None = None
    unsharded_bytes: list[int] | None = None
    host_bytes: list[int] | None = None


def with_memory(trace: Trace, by_rank: Sequence[RankMemory]) -> Trace:
    """The trace with the bytes that each rank counted in an untimed step of the same program."""
    gradients = [rank.gradient_bytes for rank in by_rank if rank.gradient_bytes is not None]
    whole = [rank.unsharded_bytes for rank in by_rank if rank.unsharded_bytes is not None]
    on_host = [rank.host_bytes for rank in by_rank if rank.host_bytes is not None]
    return replace(
        trace,
        unsharded_bytes=_joined(whole) if len(whole) == len(by_rank) else None,
        host_bytes=_joined(on_host) if len(on_host) == len(by_rank) else None,
        activation_bytes=_joined([rank.activation_bytes for rank in by_rank]),
        receive_buffer_bytes=_joined([rank.buffer_bytes for rank in by_rank]),
        gradient_bytes=_joined(gradients) if len(gradients) == len(by_rank) else None,
        parameter_bytes=_known([rank.parameter_bytes for rank in by_rank]),
        optimizer_bytes=_known([rank.optimizer_bytes for rank in by_rank]),
    )


def _known(by_rank: Sequence[int | None]) -> np.ndarray | None:
    """One number for each rank, or None if any rank has none."""
    return None if None in by_rank else np.array(by_rank, np.int64)


def _joined(levels_by_rank: Sequence[Sequence[int]]) -> np.ndarray:
    return np.concatenate([np.array(levels, np.int64) for levels in levels_by_rank])
