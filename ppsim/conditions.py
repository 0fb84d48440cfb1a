"""Conditions: how a step is run, as one value that every way to run a step shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ppsim.checks import check_fields, check_names, check_whole, checked, shown
from ppsim.errors import InputError
from ppsim.network.all_reduce import Reduction
from ppsim.network.collectives import Collectives
from ppsim.network.host_link import HostLink
from ppsim.network.latency_bandwidth import LatencyBandwidth
from ppsim.schedule.streams import Streams

Sharing = Literal["turns", "fair"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditions:
    """How a step is run. The defaults are the plain model of `simulate`.

    Parameters
    ----------
    overlap : float
        An overlapped pair takes this share of the sum of its parts; of the longer stream where communication is stated
        (see `StageCost`).
    scale : float or array that broadcasts to (stages, microbatches)
        Factor on the cost of each stage and microbatch, as for microbatches of different length.
    durations_s : array of shape (rows,), or None
        Seconds of each row of the program, as measured. They take the place of the stages' seconds.
    slow_ranks : mapping from rank to factor, or None
        Ranks that take longer for all they compute: stragglers.
    dispatch_s : float or array of shape (actions,)
        Seconds that a rank spends before each action, once it could start: on running the schedule and on taking
        messages.
    send_s : float or array of shape (actions,)
        Seconds that a rank spends after an action on handing over its messages, which leave then. One number holds for
        actions that send.
    receive_window : int or None
        Receives posted ahead on each link. A transfer waits for its receive (rendezvous). By default all are
        posted.
    streams : "link", "pair" or "rank"
        Who has a communicator: each directed link, each pair of ranks, or each rank for all that it sends and receives.
        A communicator runs what is posted on it one after another. A transfer begins when its send and its receive are
        posted and what stands before them on both their communicators has left. With "link", receives that the schedule
        does not state are posted ahead.
    cores : int or None
        How many ranks a device runs at full speed at once. By default all, or 1 where `devices` is given.
    devices : sequence of p ints, or None
        The device of each rank, counted from 0. By default all ranks share one.
    sharing : "turns" or "fair"
        How ranks share a device. "turns": an action keeps its core to its end, others queue. "fair": all that are ready
        run at once, each slower.
    sharing_efficiency : float
        With "fair", what the cores get done where more ranks want them, as a share of what they could.
    speeds : sequence of floats, or None
        With "fair", the speed of each rank when n ranks of its device are at work, as a share of its speed alone, at
        index n - 1. The last value holds for more ranks. Takes the place of `cores` and `sharing_efficiency`.
    reduction : Reduction or None
        Adds up the gradients of each stage over data-parallel replicas, and over the copies of a model that the ranks
        hold (`Schedule.copies`). Without it adding up takes no time.
    gradients_ready_s : array of shape (stages,), or None
        When the slowest replica has the gradients of each stage, on this step's clock: its reduction starts no earlier.
        By default all replicas are as fast as this one. See `simulate_replicas`.
    collectives : Collectives or None
        Gathers parameters and reduces gradients where the schedule states its sharding (`Schedule.with_sharding`), in
        place of `reduction`. Without it sharding takes no time and no memory.
    host_link : HostLink or None
        How long moving activations to host memory and back takes, where the schedule states it
        (`Schedule.with_offload`). Without it copies take no time.
    blocking : bool
        Whether O, L and REDUCE_GRAD keep their rank from computing while they run, as on a CPU, which does them in the
        rank's own thread between two actions. By default they run beside computations, on streams of their own. UNSHARD
        always does.

    Raises
    ------
    InputError
        For an option that cannot be, or two that contradict. What depends on the program (shapes, numbers of ranks, the
        smallest window) is checked when a step is run.

    Notes
    -----
    `dispatch_s` and `send_s` are the overhead o of LogP (Culler et al., PPoPP 1993), the receiver's and the sender's.
    `speeds` describes one GPU whose multiprocessors are shared out while memory bandwidth, L2 and power stay common.

    Examples
    --------
    >>> Conditions(slow_ranks={2: 1.5}, dispatch_s=1e-5).to_dict()
    {'slow_ranks': {'2': 1.5}, 'dispatch_s': 1e-05}
    """

    overlap: float = 1.0
    scale: npt.ArrayLike = 1.0
    durations_s: npt.ArrayLike | None = None
    slow_ranks: Mapping[int, float] | None = None
    dispatch_s: npt.ArrayLike = 0.0
    send_s: npt.ArrayLike = 0.0
    receive_window: int | None = None
    streams: Streams = "link"
    cores: int | None = None
    devices: Sequence[int] | None = None
    sharing: Sharing = "turns"
    sharing_efficiency: float = 1.0
    speeds: Sequence[float] | None = None
    reduction: Reduction | None = None
    gradients_ready_s: npt.ArrayLike | None = None
    collectives: Collectives | None = None
    host_link: HostLink | None = None
    blocking: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not (math.isfinite(self.overlap) and self.overlap > 0):
            raise InputError(f"overlap must be a finite number > 0, got {self.overlap!r}")
        self._set("scale", _amounts("scale", self.scale, "factors"))
        self._set("dispatch_s", _amounts("dispatch_s", self.dispatch_s, "seconds"))
        self._set("send_s", _amounts("send_s", self.send_s, "seconds"))
        if self.durations_s is not None:
            self._set("durations_s", _amounts("durations_s", self.durations_s, "seconds"))
            for name in ("scale", "overlap"):
                if np.any(np.asarray(getattr(self, name)) != 1):
                    raise InputError(f"durations_s holds what each row takes: leave out {name} or durations_s")
        self._set("slow_ranks", MappingProxyType(dict(self.slow_ranks)) if self.slow_ranks else None)
        if self.slow_ranks is not None:
            for rank, factor in self.slow_ranks.items():
                if not (math.isfinite(factor) and factor > 0):
                    raise InputError(f"slow_ranks[{rank}] must be a finite factor > 0, got {factor!r}")
        for name in ("receive_window", "cores"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        if self.streams != "link" and self.receive_window is not None:
            raise InputError(
                f"receive_window is of receives posted ahead on links: with streams {self.streams!r} they are posted "
                "where they stand in the schedule; leave one of the two out"
            )
        if self.gradients_ready_s is not None:
            self._set("gradients_ready_s", _amounts("gradients_ready_s", self.gradients_ready_s, "seconds"))
            if self.reduction is None:
                raise InputError("gradients_ready_s is what a reduction waits for: give reduction too")
        if self.collectives is not None:
            for name in ("reduction", "receive_window"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name} cannot be given with collectives: leave one of the two out")
        self._check_sharing()

    def _check_sharing(self) -> None:
        if self.devices is not None:
            self._set("devices", tuple(self.devices))
            if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in self.devices):
                raise InputError(f"devices are counted from 0, got {list(self.devices)}")
        if self.sharing not in get_args(Sharing):
            raise InputError(f"sharing must be one of {', '.join(get_args(Sharing))}, got {self.sharing!r}")
        if not 0 < self.sharing_efficiency <= 1:
            raise InputError(f"sharing_efficiency must be above 0 and at most 1, got {self.sharing_efficiency!r}")
        is_fair = self.sharing == "fair"
        if self.speeds is not None:
            self._set("speeds", tuple(self.speeds))
            if not self.speeds or not all(0 < speed <= 1 for speed in self.speeds):
                raise InputError(f"speeds must be one or more numbers above 0 and at most 1, got {list(self.speeds)}")
            if not is_fair:
                raise InputError("speeds are of ranks that compute at once: give them with sharing 'fair'")
            for name in ("cores", "sharing_efficiency"):
                if self._is_given(name):
                    raise InputError(f"speeds say how fast ranks run together: leave out {name} or speeds")
        elif self.cores is None and self.devices is None:
            for name in ("sharing", "sharing_efficiency"):
                if self._is_given(name):
                    raise InputError(
                        f"{name} {getattr(self, name)!r} is of ranks that share a device: give it with cores or devices"
                    )
        elif self.sharing_efficiency != 1 and not is_fair:
            raise InputError(
                f"sharing_efficiency {self.sharing_efficiency!r} is of ranks that compute at once: give it with "
                "sharing 'fair'"
            )

    def _is_given(self, name: str) -> bool:
        """Whether an option differs from its default."""
        return not np.array_equal(getattr(self, name), getattr(Conditions, name))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Conditions):
            return NotImplemented
        return all(np.array_equal(getattr(self, each.name), getattr(other, each.name)) for each in fields(self))

    def to_dict(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON values."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self) if self._is_given(each.name)}

    @classmethod
    @checked
    def from_dict(cls, given: Mapping[str, Any]) -> Conditions:
        """The conditions that `to_dict` wrote. Raises InputError for other content."""
        read = dict(given)
        if read.get("slow_ranks") is not None:
            read["slow_ranks"] = _by_rank(read["slow_ranks"])
        if read.get("reduction") is not None:
            read["reduction"] = Reduction.from_dict(read["reduction"])
        if read.get("collectives") is not None:
            read["collectives"] = Collectives.from_dict(read["collectives"])
        if read.get("host_link") is not None:
            read["host_link"] = HostLink.from_dict(read["host_link"])
        return cls().having(read)

    def having(self, options: Mapping[str, Any]) -> Conditions:
        """The same conditions with these options in place of their own. Raises InputError for unknown ones."""
        if not options:
            return self
        check_names("conditions", options, [each.name for each in fields(self)])
        return replace(self, **options)


def _amounts(name: str, given: npt.ArrayLike, unit: str) -> float | npt.NDArray[np.float64]:
    """A number, or an array that nobody can change."""
    amounts = np.array(given, np.float64)
    if np.asarray(given).dtype == bool or not (np.isfinite(amounts).all() and (amounts >= 0).all()):
        raise InputError(f"{name} must be {unit}, finite and >= 0" + (f", got {given!r}" if amounts.ndim == 0 else ""))
    amounts.flags.writeable = False
    return amounts if amounts.ndim else amounts.item()


def _by_rank(given: Any) -> dict[int, float]:
    """JSON has text for keys."""
    try:
        return {int(rank): factor for rank, factor in given.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise InputError(f"slow_ranks must be a mapping from rank to factor, got {shown(given)}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, LatencyBandwidth):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(rank): factor for rank, factor in value.items()}
    return np.asarray(value).tolist()
