"""Reduction flags: what a command line says of data-parallel replicas."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ppsim.cli.command import OptionalReal, OptionalWhole
from ppsim.cli.flags import flag_of
from ppsim.conditions import Conditions
from ppsim.errors import InputError
from ppsim.network.all_reduce import Reduction
from ppsim.network.collectives import Collectives
from ppsim.schedule.action import Kind
from ppsim.schedule.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class ReductionFlags:
    """Data-parallel replicas, and what adding up gradients over them costs."""

    replicas: OptionalWhole = None
    """Data-parallel replicas; each stage's gradients are added up over them and over the schedule's copies of the
    model, by a ring (default: nothing is added up)."""
    reduce_latency_s: OptionalReal = None
    """Seconds of each of the ring's rounds, whatever its bytes; with --replicas (default: 0)."""
    reduce_bytes_per_s: OptionalReal = None
    """Bandwidth between neighbours of the ring, in bytes per second; with --replicas (default: no limit)."""

    active_stages: OptionalWhole = None
    """Shard parameters over the replicas too; a rank keeps so many stages whole, the next that it computes. A file that
    says UNSHARD is sharded as it says; with --replicas (default: parameters are not sharded)."""

    def shard(self, schedule: Schedule, conditions: Conditions) -> tuple[Schedule, Conditions]:
        """The schedule with its sharding, and the conditions with what the replicas cost."""
        reduction = self.load_reduction()
        if self.active_stages is not None:
            if reduction is None:
                raise InputError(f"{flag_of('active_stages')} shards over replicas: give --replicas too")
            schedule = schedule.with_sharding(self.active_stages)
        gathers = bool((schedule.program.collectives.kind == Kind.UNSHARD).any())
        if reduction is None or not gathers:
            return schedule, replace(conditions, reduction=reduction)
        return schedule, replace(conditions, collectives=Collectives(**vars(reduction)))

    def load_reduction(self) -> Reduction | None:
        """The ring; None without replicas. Raises InputError for flags that contradict."""
        values = {"latency_s": self.reduce_latency_s, "bytes_per_s": self.reduce_bytes_per_s}
        given = {name: value for name, value in values.items() if value is not None}
        if self.replicas is None:
            if given:
                raise InputError(
                    f"{flag_of('reduce_' + next(iter(given)))} says what replicas cost: give --replicas too"
                )
            return None
        return Reduction(replicas=self.replicas, **given)
