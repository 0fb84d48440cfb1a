"""Model flags: what a command line says of how ranks compute and share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ppsim.cli.command import OptionalName, OptionalWhole, Real
from ppsim.cli.flags import flag_of, numbers_by_name


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Refinements of the model, off unless asked for; see `ppsim.simulate`."""

    overlap: Real = 1.0
    """An overlapped forward and backward take this share of the sum of both."""
    slow_rank: OptionalName = None
    """Ranks that take longer for all they compute, as in 2=1.5,5=1.2."""
    dispatch_s: Real = 0.0
    """Seconds that a rank spends before each action on running the schedule itself."""
    send_s: Real = 0.0
    """Seconds that a rank spends after each action that sends on handing over its message."""
    receive_window: OptionalWhole = None
    """Receives posted ahead on each link: a transfer waits for its own, and buffers count (default: always posted)."""
    cores: OptionalWhole = None
    """How many ranks compute at once (default: all)."""
    sharing: Literal["turns", "fair"] = "turns"
    """How ranks share the cores: turns (an action keeps its core), or fair (all that are ready run, each slower)."""
    sharing_efficiency: Real = 1.0
    """With fair sharing, what the cores get done where more ranks want them, as a share of what they could."""

    def model_options(self) -> dict[str, Any]:
        """The options of `simulate`. Raises ValueError for flags without meaning."""
        if self.sharing != "turns" and self.cores is None:
            raise ValueError(f"--sharing {self.sharing} says how ranks share cores: give it with --cores N")
        if self.sharing_efficiency != 1 and (self.sharing != "fair" or self.cores is None):
            raise ValueError(
                f"--sharing-efficiency {self.sharing_efficiency} is of ranks that share cores evenly: give it with "
                "--cores N --sharing fair"
            )
        return {
            "overlap": self.overlap,
            "slow_ranks": self._slow_ranks(),
            "dispatch_s": self.dispatch_s,
            "send_s": self.send_s,
            "receive_window": self.receive_window,
            "cores": self.cores,
            "sharing": self.sharing,
            "sharing_efficiency": self.sharing_efficiency,
        }

    def _slow_ranks(self) -> dict[int, float] | None:
        if self.slow_rank is None:
            return None
        wanted = f"{flag_of('slow_rank')} {self.slow_rank}: give ranks and factors, as in 2=1.5"
        found = {}
        for rank, factor in numbers_by_name(self.slow_rank, wanted).items():
            if not rank.isdecimal():
                raise ValueError(wanted)
            found[int(rank)] = factor
        return found
