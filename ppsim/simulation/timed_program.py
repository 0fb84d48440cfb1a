"""Timed program: what an engine is given to run."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ppsim.conditions import Conditions
from ppsim.costs.by_microbatch import CostTable, StageCosts, costs_of_copies
from ppsim.errors import InputError
from ppsim.network.network import Network
from ppsim.schedule.action import Kind
from ppsim.schedule.deadlock import smallest_receive_window
from ppsim.schedule.program import Program
from ppsim.schedule.side_table import SideTable
from ppsim.schedule.streams import MessageGraph, Streams
from ppsim.simulation.offloaded_activations import copy_seconds
from ppsim.simulation.sharded_parameters import collective_seconds
from ppsim.simulation.sharing import Devices

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TimedProgram:
    """A program that can end, and what its rows and messages take.

    Parameters
    ----------
    program : Program
        What is run.
    duration_s : array of shape (rows,)
        Seconds of each row.
    message_bytes : array of shape (messages,)
        Size of each message.
    dispatch_s, send_s : arrays of shape (actions,)
        Seconds that a rank spends before each action, once it could start, and after it until its messages leave.
    occupied_s, latency_s : arrays of shape (messages,)
        Seconds that each message keeps its link, and from there until it arrives.
    receive_window : int or None
        Receives posted ahead on each link. None: a receive is always posted.
    devices : Devices or None
        What the ranks share. None: each computes by itself.
    streams : "link", "pair" or "rank"
        Who has a communicator.
    graph : MessageGraph or None
        What messages wait for on their communicators. None: they leave as they are made, each link by itself.
    side : SideTable
        What runs beside computations, or with `Conditions.blocking` between them: copies, and with
        `Conditions.collectives` collectives.
    side_s : array of shape (entries,)
        Seconds of each.
    """

    program: Program
    duration_s: Seconds
    message_bytes: npt.NDArray[np.int64]
    dispatch_s: Seconds
    send_s: Seconds
    occupied_s: Seconds
    latency_s: Seconds
    receive_window: int | None = None
    devices: Devices | None = None
    streams: Streams = "link"
    graph: MessageGraph | None = None
    side: SideTable = field(default_factory=SideTable.none)
    side_s: Seconds = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(
        cls, program: Program, stages: StageCosts, network: Network, conditions: Conditions | None = None
    ) -> TimedProgram:
        """Time a program by its costs, its network and its conditions.

        Parameters
        ----------
        program : Program
            What is run.
        stages : sequence of StageCost, or of sequences of StageCost
            The cost of each stage for one microbatch, or for each microbatch; of the stages of one copy of the model,
            or of all.
        network : Network
            The links between ranks.
        conditions : Conditions, optional
            How it is run.

        Raises
        ------
        InputError
            If stages or conditions do not fit the program.
        ScheduleError
            If the program hangs on the streams of the conditions.
        """
        conditions = conditions or Conditions()
        stages = costs_of_copies(stages, program.schedule.copies, program.schedule.stages)
        sizes = message_bytes(program, stages)
        with np.errstate(over="ignore"):  # whoever runs this refuses infinite times
            occupied_s, latency_s = network.transfer_times(program, sizes)
        sharded = conditions.collectives is not None
        side = program.beside(sharded=sharded)
        has_copies = len(program.offload.stage) > 0
        if has_copies and conditions.receive_window is not None:
            raise InputError(
                "receive_window cannot be given for a schedule that offloads activations: leave it out, or take "
                "schedule.with_offload(share=0)"
            )
        side_s, is_copy = np.zeros(len(side.stage)), side.is_copy
        side_s[~is_copy] = collective_seconds(program, stages, conditions.collectives)
        side_s[is_copy] = copy_seconds(program, stages, conditions.host_link)
        return cls(
            program=program,
            message_bytes=sizes,
            duration_s=_durations(program, stages, conditions),
            dispatch_s=_by_action(program, "dispatch_s", conditions.dispatch_s),
            send_s=_send_times(program, conditions.send_s),
            occupied_s=occupied_s,
            latency_s=latency_s,
            receive_window=_checked_window(program, conditions.receive_window),
            devices=Devices.of(conditions, program.ranks),
            streams=conditions.streams,
            graph=program.message_graph(conditions.streams)
            if program.is_posted(conditions.streams) or sharded or has_copies
            else None,
            side=side.blocking() if conditions.blocking else side,
            side_s=side_s,
        )

    def posts(self) -> npt.NDArray[np.int32]:
        """The message whose receive is posted when each message is used.

        Returns
        -------
        array of shape (messages,)
            -1 for none.

        Notes
        -----
        A receiver posts its receives in the order in which the link carries them: the first `receive_window` of them
        before the step, and one more at each use. It may use them in another order.
        """
        messages = self.program.messages
        posted = np.full(len(messages), -1, np.int32)
        if self.receive_window is None:
            return posted
        used = np.lexsort((messages.consumer, messages.link))  # a link's messages stand side by side
        later = np.arange(len(messages)) + self.receive_window
        same_link = later < len(messages)
        same_link[same_link] = messages.link[later[same_link]] == messages.link[used[same_link]]
        posted[used[same_link]] = later[same_link]
        return posted

    def receives(self) -> tuple[npt.NDArray[np.int32], Seconds]:
        """`posts`, and when each receive is posted as far as is known before the step.

        Returns
        -------
        posts, posted_s : arrays of shape (messages,)
            posted_s is 0 for receives posted before the step, else NaN. Both are empty if receives are always posted.
        """
        if self.receive_window is None:
            return np.zeros(0, np.int32), np.zeros(0)
        return self.posts(), np.where(self.program.messages.position < self.receive_window, 0.0, np.nan)


def row_durations(program: Program, stages: StageCosts, *, overlap: float = 1.0, scale: npt.ArrayLike = 1.0) -> Seconds:
    """Seconds of each row, as costs say.

    Parameters
    ----------
    program : Program
        What is run.
    stages : sequence of StageCost, or of sequences of StageCost
        The cost of each stage for one microbatch, or for each microbatch.
    overlap, scale
        See `Conditions`.

    Returns
    -------
    array of shape (rows,)

    Raises
    ------
    InputError
        If `scale` does not broadcast to (stages, microbatches).
    """
    costs = CostTable.of(stages, program.schedule.microbatches)
    rows = program.kind, program.stage, costs.column(program.microbatch)
    communication_s = _by_kind(costs, _COMMUNICATION_S)
    durations_s: Seconds = (_by_kind(costs, _COMPUTE_S) + communication_s)[rows]
    if program.has_pairs:
        first = program.action_start[:-1][np.diff(program.action_start) == 2]
        pair = np.stack([first, first + 1])
        durations_s[pair] *= pair_share(durations_s[pair], communication_s[rows][pair]) * overlap
    given: Seconds = np.asarray(scale, np.float64)
    shape = (program.schedule.stages, program.schedule.microbatches)
    try:
        factors = np.broadcast_to(given, shape)
    except ValueError:
        raise InputError(f"scale has shape {given.shape}: give one that broadcasts to {shape}") from None
    if (given == 1).all():
        return durations_s
    with np.errstate(over="ignore"):  # whoever adds the times up says what is too large
        return durations_s * factors[program.stage, program.microbatch]


_BACK_AND_AHEAD_BYTES = operator.attrgetter("backward_message_bytes", "output_bytes")
# Fields of StageCost by kind.
_COMPUTE_S = {
    Kind.F: "forward_s",
    Kind.B: "full_backward_s",
    Kind.I: "backward_input_s",
    Kind.W: "backward_weight_s",
    Kind.R: "again_s",
}
_COMMUNICATION_S = {
    Kind.F: "forward_communication_s",
    Kind.B: "full_backward_communication_s",
    Kind.I: "backward_input_communication_s",
    Kind.W: "backward_weight_communication_s",
    Kind.R: "forward_communication_s",
}


def _by_kind(costs: CostTable, names: Mapping[Kind, str]) -> Seconds:
    """Seconds of each kind, stage and microbatch, shape (kinds, stages, columns)."""
    found = costs.table(operator.attrgetter(*names.values()), np.float64)
    seconds = np.zeros((len(Kind), *found.shape[:-1]))
    seconds[list(names)] = found.transpose(2, 0, 1)
    return seconds


def pair_share(alone_s: Seconds, communication_s: Seconds) -> Seconds:
    """What an overlapped pair takes, as a share of the time of its parts alone.

    Parameters
    ----------
    alone_s, communication_s : arrays of shape (2, pairs)
        Seconds of each part alone, and what it communicates of them.

    Returns
    -------
    array of shape (pairs,)
        1 where nothing is communicated.

    Notes
    -----
    A device has two streams. In a pair the communication of one part runs under the compute of the other. So the pair
    takes the longer of two sums, that of compute and that of communication.

    Examples
    --------
    DeepSeek-V3's pair of four layers (deepseek-ai/profile-data, train.json): F takes 35.9 ms of compute and 61.5 of
    communication, B 88.4 and 53.0. The model gives 124.3 ms, the profile 129.0.

    >>> alone_ms = np.array([[97.4], [141.4]])
    >>> share = pair_share(alone_ms, np.array([[61.5], [53.0]]))
    >>> (share * alone_ms.sum(0)).round(1).tolist()
    [124.3]
    """
    both_s, communicated_s = alone_s.sum(0), communication_s.sum(0)
    longer_s = np.maximum(both_s - communicated_s, communicated_s)
    share: Seconds = np.divide(longer_s, both_s, out=np.ones_like(both_s), where=communicated_s > 0)
    return share


def message_bytes(program: Program, stages: StageCosts) -> npt.NDArray[np.int64]:
    """Bytes of each message, shape (messages,).

    From stage s to s + 1 `output_bytes` of s. From s + 1 to s its `backward_message_bytes`.
    """
    costs = CostTable.of(stages, program.schedule.microbatches)
    producer, consumer = program.messages.producer, program.messages.consumer
    lower = np.minimum(program.stage[producer], program.stage[consumer])
    is_ahead = (program.kind[producer] == Kind.F).astype(np.intp)
    both = costs.table(_BACK_AND_AHEAD_BYTES, np.int64)
    sizes: npt.NDArray[np.int64] = both[lower, costs.column(program.microbatch[producer]), is_ahead]
    return sizes


def _durations(program: Program, stages: StageCosts, conditions: Conditions) -> Seconds:
    """Seconds of each row: as measured or as costs say, longer on slow ranks."""
    if conditions.durations_s is None:
        durations_s = row_durations(program, stages, overlap=conditions.overlap, scale=conditions.scale)
    else:
        durations_s = np.array(conditions.durations_s, np.float64)
        rows = len(program.stage)
        if durations_s.shape != (rows,):
            raise InputError(
                f"durations_s has shape {durations_s.shape}: give one number for each of the program's {rows} rows"
            )
    if not conditions.slow_ranks:
        return durations_s
    factors = np.ones(program.ranks)
    for rank, factor in conditions.slow_ranks.items():
        if not 0 <= rank < program.ranks:
            raise InputError(f"slow_ranks has rank {rank}, but there are {program.ranks} ranks, counted from 0")
        factors[rank] = factor
    with np.errstate(over="ignore"):  # as above
        return durations_s * factors[program.rank]


def _by_action(program: Program, name: str, given_s: npt.ArrayLike) -> Seconds:
    """Seconds of each action, shape (actions,)."""
    if np.shape(given_s) not in ((), (program.actions,)):
        raise InputError(f"{name} has shape {np.shape(given_s)}: give one number, or one for each of {program.actions}")
    return np.full(program.actions, given_s, np.float64)


def _send_times(program: Program, given_s: npt.ArrayLike) -> Seconds:
    """Seconds of sending after each action, shape (actions,). One number holds for the actions that send."""
    if np.ndim(given_s) > 0:
        return _by_action(program, "send_s", given_s)
    send_s = np.zeros(program.actions)
    if given_s != 0:
        send_s[program.row_action[program.message_out >= 0]] = given_s
    return send_s


def _checked_window(program: Program, window: int | None) -> int | None:
    if window is not None and program.written is not None:
        raise InputError(
            "receive_window is of receives posted ahead, and this schedule states where each is posted: leave it out, "
            "or take schedule.with_communication('derived')"
        )
    if window is not None and window < (needed := smallest_receive_window(program)):
        raise InputError(
            f"receive_window {window} is too small: this schedule needs {needed} receives posted at once on a link, or "
            "it waits for ever; give that or more, or None"
        )
    return window
