"""Memory levels: the bytes that a rank holds after each of its actions, from its order alone."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ppsim.costs.by_microbatch import CostTable, StageCosts
from ppsim.errors import CostError, InputError
from ppsim.schedule.action import Kind
from ppsim.schedule.program import Program

_HELD_BYTES = operator.attrgetter("activation_bytes", "weight_activation_bytes", "kept_bytes")
OPTIMIZERS = {"sgd": (0, 0), "momentum": (1, 0), "adam": (2, 1), "adamw": (2, 1)}  # numbers a parameter, step counters


def activation_levels(program: Program, stages: StageCosts) -> npt.NDArray[np.int64]:
    """Activation bytes that a row's rank holds once the row has taken effect.

    Parameters
    ----------
    program : Program
        What is run.
    stages : sequence of StageCost, or of sequences of StageCost
        The cost of each stage for one microbatch, or for each microbatch.

    Returns
    -------
    array of shape (rows,)
        All 0 in an evaluation, where nothing outlives its F.

    Raises
    ------
    CostError
        For sums that 64 bits do not hold.

    Notes
    -----
    F takes the stage's `activation_bytes` at its start, and B releases them at its end. I leaves
    `weight_activation_bytes` of them at its end, and W releases those. The F of a microbatch that has an R takes
    `kept_bytes` alone, and R the rest at its start. An overlapped pair takes the bytes of its F when
    it starts and releases those of its B when it ends: its first row has the level while both are under way, its second
    row the level after the pair.
    """
    if program.schedule.is_forward_only:
        return np.zeros(len(program.stage), np.int64)
    costs = CostTable.of(stages, program.schedule.microbatches)
    whole, kept, until_again = costs.table(_HELD_BYTES, np.int64).transpose(2, 0, 1)
    most = np.maximum(np.maximum(whole, kept), until_again)
    if program.schedule.microbatches // whole.shape[1] * sum(map(int, most.ravel())) >= 2**63:
        raise CostError("the activations of all microbatches exceed 2**63 bytes: give smaller activation_bytes")
    change = np.zeros((len(Kind), *whole.shape), np.int64)
    change[Kind.F], change[Kind.B], change[Kind.I], change[Kind.W] = whole, -whole, kept - whole, -kept
    change[Kind.R] = whole - until_again
    column = costs.column(program.microbatch)
    of_rows = change[program.kind, program.stage, column]
    if program.is_recomputed.any():
        spared = program.is_recomputed & (program.kind == Kind.F)
        of_rows[spared] -= change[Kind.R, program.stage, column][spared]
    return _after_rows(program, of_rows)


def gradient_levels(program: Program, stages: StageCosts) -> npt.NDArray[np.int64]:
    """Bytes of the gradients that a row's rank holds once the row's action has ended.

    Parameters
    ----------
    program : Program
        What is run.
    stages : sequence of StageCost
        Their `trained_bytes` count.

    Returns
    -------
    array of shape (rows,)
        The gradients of a stage are there from the end of its first B or W to the end of the step.

    Raises
    ------
    CostError
        For sums that 64 bits do not hold.
    """
    costs = CostTable.of(stages, program.schedule.microbatches).of_stages
    sizes = np.array(_fitting([cost.trained_bytes for cost in costs], "parameter_bytes"), np.int64)
    change = np.zeros(len(program.stage), np.int64)
    first = program.first_gradient_row
    change[first[first >= 0]] = sizes[first >= 0]
    after = _after_rows(program, change)
    return after[program.action_start[1:] - 1][program.row_action] if program.has_pairs else after


def parameters_per_rank(program: Program, stages: StageCosts) -> npt.NDArray[np.int64]:
    """Bytes of the parameters on each rank.

    Parameters
    ----------
    program : Program
        What is run.
    stages : sequence of StageCost
        Their `parameter_bytes` count.

    Returns
    -------
    array of shape (p,)

    Raises
    ------
    CostError
        For sums that 64 bits do not hold.
    """
    costs = CostTable.of(stages, program.schedule.microbatches).of_stages
    held = np.zeros(program.ranks, np.int64)
    sizes = _fitting([cost.parameter_bytes for cost in costs], "parameter_bytes")
    np.add.at(held, np.asarray(program.schedule.placement), sizes)
    return held


def receive_levels(program: Program, message_bytes: npt.NDArray[np.int64], window: int) -> npt.NDArray[np.int64]:
    """Bytes of receives that a row's rank has posted and not yet used once the row's action runs.

    Parameters
    ----------
    program : Program
        What is run.
    message_bytes : array of shape (messages,)
        Size of each message.
    window : int
        Receives posted ahead on each link, 1 or more.

    Returns
    -------
    array of shape (rows,)

    Raises
    ------
    InputError
        For a window below 1.

    Notes
    -----
    On each link a rank has posted the messages that it has used and `window` more, in the order of the link. An action
    uses its messages as it starts. From then on they count as the input of its stage.
    """
    if window < 1:
        raise InputError(f"a receive window must be 1 or more, got {window}")
    messages, row_action = program.messages, program.row_action
    held = np.zeros(len(program.stage), np.int64)
    bounds = [*np.flatnonzero(messages.position == 0).tolist(), len(messages)]
    for begin, end in pairwise(bounds):
        rows = program.rows_of(int(messages.destination[begin]))
        inside = slice(rows.start, rows.stop)
        used_in = row_action[messages.consumer[begin:end]]
        by_use = np.argsort(used_in, kind="stable")
        used = np.searchsorted(used_in[by_use], row_action[inside], side="right")
        posted_bytes = np.concatenate([[0], np.cumsum(message_bytes[begin:end])])
        used_bytes = np.concatenate([[0], np.cumsum(message_bytes[begin:end][by_use])])
        held[inside] += posted_bytes[np.minimum(used + window, end - begin)] - used_bytes[used]
    return held


def optimizer_state_bytes(optimizer: str, trained_bytes: int, *, tensors: int = 0) -> int:
    """Bytes that an optimizer keeps from step to step, as the defaults of torch.optim do.

    Parameters
    ----------
    optimizer : str
        "sgd" keeps nothing, "momentum" one number per parameter, "adam" and "adamw" two, and a step counter of 4 bytes
        for each tensor.
    trained_bytes : int
        Size of the trained parameters. The optimizer's numbers are of their type.
    tensors : int
        How many parameter tensors there are.

    Returns
    -------
    int

    Raises
    ------
    InputError
        For other optimizers.
    """
    if optimizer not in OPTIMIZERS:
        raise InputError(f"unknown optimizer {optimizer!r}: take {', '.join(OPTIMIZERS)}")
    moments, counters = OPTIMIZERS[optimizer]
    return moments * trained_bytes + counters * 4 * tensors


def _after_rows(program: Program, change: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The sum of all changes on a row's rank up to and with the row, shape (rows,)."""
    total = np.cumsum(change)
    first_row = program.action_start[program.rank_actions[:-1]]
    before_rank = np.where(first_row > 0, total[np.maximum(first_row - 1, 0)], 0)
    return total - before_rank[program.rank]


def _fitting(amounts: Sequence[int], name: str) -> list[int]:
    """The amounts, unless their sum exceeds 64 bits."""
    if sum(map(int, amounts)) >= 2**63:
        raise CostError(f"the stages exceed 2**63 bytes together: give smaller {name}")
    return [int(amount) for amount in amounts]
