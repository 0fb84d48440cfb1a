"""Offload flags: what a command line says of activations that go to host memory and back, or are computed anew."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ppsim.cli.command import OptionalReal
from ppsim.conditions import Conditions
from ppsim.network.host_link import HostLink
from ppsim.schedule.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class CopyFlags:
    """What copying activations to host memory and back takes."""

    copy_bytes_per_s: OptionalReal = None
    """Bandwidth between a device and its host, in each direction, in bytes per second (default: no limit)."""
    copy_latency_s: OptionalReal = None
    """Seconds of each copy, whatever its bytes (default: 0)."""

    @property
    def host_link(self) -> HostLink | None:
        """How long copies take; None where no flag says it."""
        given = {"bytes_per_s": self.copy_bytes_per_s, "latency_s": self.copy_latency_s}
        known = {name: value for name, value in given.items() if value is not None}
        return HostLink(**known) if known else None


@dataclass(frozen=True, kw_only=True)
class OffloadFlags(CopyFlags):
    """Activations that are computed once more (R), or move to host memory and back (O and L)."""

    recompute_share: OptionalReal = None
    """Compute this share of all forwards once more, right before their backwards (default: what a file says, or 0)."""
    offload_share: OptionalReal = None
    """Move this share of all activations to host memory, and back in time (default: what a file says, or 0)."""

    def offload(self, schedule: Schedule, conditions: Conditions) -> tuple[Schedule, Conditions]:
        """The schedule with R, O and L, and the conditions with what copies take."""
        if self.recompute_share is not None:
            schedule = schedule.with_recompute(share=self.recompute_share)
        if self.offload_share is not None:
            schedule = schedule.with_offload(share=self.offload_share)
        return schedule, replace(conditions, host_link=self.host_link)
