"""Simulate: predict one step of a schedule from its stages' costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ppsim.costs.stage_cost import StageCost
from ppsim.network.all_reduce import Reduction
from ppsim.network.network import Network
from ppsim.schedule.action import Kind
from ppsim.schedule.deadlock import smallest_receive_window
from ppsim.schedule.program import Program
from ppsim.schedule.schedule import Schedule
from ppsim.simulation.engines.by_name import run_engine
from ppsim.simulation.memory_levels import activation_levels, gradient_levels, parameters_per_rank
from ppsim.simulation.sharing import Sharing, devices_of
from ppsim.simulation.timed_program import Load
from ppsim.trace.trace import Trace


def simulate(
    schedule: Schedule,
    stages: Sequence[StageCost],
    *,
    network: Network | None = None,
    engine: str = "simpy",
    overlap: float = 1.0,
    scale: npt.ArrayLike = 1.0,
    slow_ranks: Mapping[int, float] | None = None,
    dispatch_s: npt.ArrayLike = 0.0,
    send_s: npt.ArrayLike = 0.0,
    receive_window: int | None = None,
    cores: int | None = None,
    devices: Sequence[int] | None = None,
    sharing: Sharing = "turns",
    sharing_efficiency: float = 1.0,
    reduction: Reduction | None = None,
) -> Trace:
    """Predict one step.

    stages: the cost of each stage for one microbatch. network: links between ranks; None makes messages free.
    engine: "simpy", or "compiled" for the same answer sooner.

    The model: a rank runs its order in sequence, one action at a time; an action starts when its rank is free and its
    inputs have arrived. Nobody waits in a send. A transfer starts when its producer has ended and the transfer before
    it has left the link, keeps the link for bytes / bytes_per_s and arrives latency_s later. Stages on one rank hand
    over for nothing. Memory: see `memory_levels`.

    Refinements, all off unless asked for and all named in the trace's details:
    overlap: an overlapped pair takes this share of the sum of its parts. scale: a factor on what each (stage,
    microbatch) takes, an array that broadcasts to (stages, microbatches), e.g. microbatches of different length.
    slow_ranks: rank -> factor on all it computes, a straggler. dispatch_s: seconds that a rank spends before each
    action, once it could start, on running the schedule itself and on taking messages; one number or an array
    (actions,). send_s: seconds that a rank spends after an action on handing over its messages, which set off then; one
    number for all actions that send, or an array (actions,). The two are the overhead o of LogP (Culler et al., PPoPP
    1993), the receiver's and the sender's. receive_window:
    receives posted ahead on each link, as where a transfer starts only once its receive is posted (rendezvous); None:
    always posted. cores: how many ranks compute at once on what they share; devices: the device of each rank where
    there are several, with `cores` of them at once on each (default 1); sharing, sharing_efficiency: see
    `sharing`. reduction: adds up each stage's gradients over data-parallel replicas as its last backward ends
    (see `ppsim.network.all_reduce`).

    Raises ScheduleError if the schedule is incomplete or could hang, ValueError if costs and stages do not match or an
    option cannot be.
    """
    network = Network() if network is None else network
    load = load_of(
        schedule.program,
        stages,
        network,
        overlap=overlap,
        scale=scale,
        slow_ranks=slow_ranks,
        dispatch_s=dispatch_s,
        send_s=send_s,
        receive_window=receive_window,
        cores=cores,
        devices=devices,
        sharing=sharing,
        sharing_efficiency=sharing_efficiency,
    )
    given = {
        "scale": np.asarray(scale).tolist() if np.any(np.asarray(scale) != 1) else None,
        "slow_ranks": {str(rank): factor for rank, factor in (slow_ranks or {}).items()} or None,
        "dispatch_s": np.asarray(dispatch_s).tolist() if np.any(np.asarray(dispatch_s)) else None,
        "send_s": np.asarray(send_s).tolist() if np.any(np.asarray(send_s)) else None,
        "receive_window": receive_window,
        "cores": cores,
        "devices": None if devices is None else list(devices),
        "sharing": None if cores is None and devices is None else sharing,
        "sharing_efficiency": sharing_efficiency if sharing_efficiency != 1 else None,
        "reduction": None if reduction is None else reduction.to_dict(),
    }
    trace = predicted(
        load,
        stages,
        engine=engine,
        details={
            "engine": engine,
            "overlap": overlap,
            "latency_s": network.latency_s,
            "bytes_per_s": network.bytes_per_s if np.isfinite(network.bytes_per_s) else None,
            "links": len(network.links),
            **{name: value for name, value in given.items() if value is not None},
        },
    )
    return trace if reduction is None else reduction.added_to(trace, stages)


def predicted(load: Load, stages: Sequence[StageCost], *, engine: str, details: dict[str, Any]) -> Trace:
    """The trace of a load. Raises ValueError if the step's length is no float."""
    program = load.program
    with np.errstate(over="ignore"):  # refused below
        times = run_engine(engine, load)
    check_finite(times.end_s, times.message_arrival_s)
    return Trace(
        program=program,
        clock="simulated",
        start_s=times.start_s,
        end_s=times.end_s,
        activation_bytes=activation_levels(program, stages),
        gradient_bytes=gradient_levels(program, stages),
        parameter_bytes=parameters_per_rank(program, stages),
        message_bytes=message_bytes(program, stages),
        message_start_s=times.message_start_s,
        message_left_s=times.message_left_s,
        message_arrival_s=times.message_arrival_s,
        details=details,
    )


def check_finite(*times_s: npt.NDArray[np.float64]) -> None:
    """Raise ValueError if some time is infinite."""
    if not all(np.isfinite(each).all() for each in times_s):
        raise ValueError("the step takes longer than a float holds: give smaller costs, or a higher bytes_per_s")


def load_of(
    program: Program,
    stages: Sequence[StageCost],
    network: Network,
    *,
    overlap: float = 1.0,
    scale: npt.ArrayLike = 1.0,
    slow_ranks: Mapping[int, float] | None = None,
    dispatch_s: npt.ArrayLike = 0.0,
    send_s: npt.ArrayLike = 0.0,
    receive_window: int | None = None,
    cores: int | None = None,
    devices: Sequence[int] | None = None,
    sharing: Sharing = "turns",
    sharing_efficiency: float = 1.0,
) -> Load:
    """What an engine runs: durations and journeys from costs and network. Options and errors as of `simulate`."""
    if len(stages) != program.schedule.stages:
        raise ValueError(
            f"{len(stages)} stage costs for a schedule of {program.schedule.stages} stages: give one for each"
        )
    if not (np.isfinite(overlap) and overlap > 0):
        raise ValueError(f"overlap must be a finite number > 0, got {overlap!r}")
    durations_s = row_durations(program, stages, overlap=overlap, scale=scale)
    if slow_ranks:
        durations_s *= _rank_factors(program.ranks, slow_ranks)[program.rank]
    with np.errstate(over="ignore"):
        occupied_s, latency_s = network.transfer_times(program, message_bytes(program, stages))
    return Load(
        program=program,
        duration_s=durations_s,
        dispatch_s=_by_action(program, "dispatch_s", dispatch_s),
        send_s=_by_action(program, "send_s", send_s) if np.ndim(send_s) else _sending(program, send_s),
        occupied_s=occupied_s,
        latency_s=latency_s,
        receive_window=_checked_window(program, receive_window),
        devices=devices_of(
            program.ranks, cores=cores, devices=devices, sharing=sharing, sharing_efficiency=sharing_efficiency
        ),
    )


def _by_action(program: Program, name: str, given: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Seconds of each action, shape (actions,)."""
    seconds = np.asarray(given, np.float64)
    if not (np.isfinite(seconds).all() and (seconds >= 0).all()):
        raise ValueError(f"{name} must be seconds, finite and >= 0, got {given!r}")
    if seconds.shape not in ((), (program.actions,)):
        raise ValueError(f"{name} has shape {seconds.shape}: give one number, or one for each of {program.actions}")
    return np.broadcast_to(seconds, (program.actions,)).copy()


def _sending(program: Program, send_s: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The same number for each action that sends a message, and 0 for others."""
    sends = np.zeros(program.actions, bool)
    sends[program.row_action[program.message_out >= 0]] = True
    return np.where(sends, _by_action(program, "send_s", send_s), 0.0)


def _factors(program: Program, scale: npt.ArrayLike) -> npt.NDArray[np.float64] | None:
    """The factor of each row, shape (rows,); None if all are 1."""
    table = np.asarray(scale, np.float64)
    shape = (program.schedule.stages, program.schedule.microbatches)
    if not (np.isfinite(table).all() and (table >= 0).all()):
        raise ValueError("scale must hold factors, finite and >= 0")
    try:
        table = np.broadcast_to(table, shape)
    except ValueError:
        raise ValueError(f"scale has shape {np.shape(scale)}: give one that broadcasts to {shape}") from None
    return None if (table == 1).all() else table[program.stage, program.microbatch]


def _rank_factors(ranks: int, slow_ranks: Mapping[int, float]) -> npt.NDArray[np.float64]:
    factors = np.ones(ranks)
    for rank, factor in slow_ranks.items():
        if not 0 <= rank < ranks:
            raise ValueError(f"slow_ranks has rank {rank}, but there are {ranks} ranks, counted from 0")
        if not (np.isfinite(factor) and factor > 0):
            raise ValueError(f"slow_ranks[{rank}] must be a finite factor > 0, got {factor!r}")
        factors[rank] = factor
    return factors


def _checked_window(program: Program, window: int | None) -> int | None:
    if window is None:
        return None
    needed = smallest_receive_window(program)
    if isinstance(window, bool) or not isinstance(window, int) or window < max(needed, 1):
        raise ValueError(
            f"receive_window {window!r} is too small: this schedule needs {max(needed, 1)} receives posted at once on "
            "a link, or it waits for ever; give that or more, or None"
        )
    return window


def row_durations(
    program: Program, stages: Sequence[StageCost], *, overlap: float = 1.0, scale: npt.ArrayLike = 1.0
) -> npt.NDArray[np.float64]:
    """Seconds of each row, shape (rows,), with `simulate`'s overlap and scale. Raises ValueError for a bad scale."""
    table = np.empty((4, len(stages)))
    table[Kind.F] = [stage.forward_s for stage in stages]
    table[Kind.B] = [stage.full_backward_s for stage in stages]
    table[Kind.I] = [stage.backward_input_s for stage in stages]
    table[Kind.W] = [stage.backward_weight_s for stage in stages]
    durations = table[program.kind, program.stage]
    if overlap != 1.0 and program.has_pairs:
        durations[np.diff(program.action_start)[program.row_action] == 2] *= overlap
    factors = _factors(program, scale)
    return durations if factors is None else durations * factors


def message_bytes(program: Program, stages: Sequence[StageCost]) -> npt.NDArray[np.int64]:
    """Bytes of each message, shape (messages,): between s and s + 1 `output_bytes` of stage s, in both directions."""
    output = np.array([stage.output_bytes for stage in stages], np.int64)
    messages = program.messages
    return output[np.minimum(program.stage[messages.producer], program.stage[messages.consumer])]
