"""Plans: ways to run a training step, ranked, each with its parts and the reason why it lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ppsim.planning.framework_flags import layout_of, megatron_flags, torchtitan_flags
from ppsim.planning.training_step import TrainingStep
from ppsim.schedule.named.registry import build_schedule
from ppsim.schedule.schedule import Schedule

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to run the step.

    Parameters
    ----------
    step : TrainingStep
        The way.
    step_s : float
        Predicted seconds of a step; where `is_bound`, what no order of its work beats.
    is_bound : bool
        Whether the plan lost before a simulation: it does not fit, or the bound is slower than plans that do.
    parts_s : mapping from str to float
        What the step's seconds are made of: compute and tensor (communication) on the busiest rank, bubble, gradients
        (their sum over replicas, as far as nothing hides it), optimizer, tied. They add up to `step_s`.
    memory_bytes : mapping from str to int
        By kind, on the rank that holds most; see `StepMemory`.
    utilisation : float
        FLOPs of the model, recomputation not counted, over what the devices' peak does in that time.
    fits : bool or None
        Whether that rank's total is within the device's memory. None where it was not looked at, as the plan is too
        slow; `memory_bytes` is then what it needs at least, as it may be where it does not fit.
    reason : str
        What ended it, or what is best about it.
    """

    step: TrainingStep
    step_s: float
    is_bound: bool
    parts_s: Mapping[str, float]
    memory_bytes: Mapping[str, int]
    utilisation: float
    fits: bool | None
    reason: str

    @property
    def total_bytes(self) -> int:
        """All memory of the rank that holds most."""
        return sum(self.memory_bytes.values())

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule itself, as `build_schedule` makes it."""
        step = self.step
        return build_schedule(
            step.schedule, ranks=step.pp, microbatches=step.microbatches, stages_per_rank=step.stages_per_rank
        )

    @property
    def layout(self) -> str:
        """The partition as Megatron's layout string."""
        return str(layout_of(self.step))

    @property
    def megatron_flags(self) -> list[str] | None:
        """Flags for Megatron-LM; None for a schedule that it does not have."""
        return megatron_flags(self.step)

    def torchtitan_flags(self, csv: str = "schedule.csv") -> list[str] | None:
        """Flags for torchtitan; None for what it cannot be told.

        Parameters
        ----------
        csv : str
            Where the schedule lies, in PyTorch's CSV format. Named only if PyTorch has the schedule under no name.
        """
        return torchtitan_flags(self.step, csv)

    @property
    def row(self) -> dict[str, Any]:
        """The plan as one row of a table, in seconds and bytes."""
        step = self.step
        return {
            "tp": step.tp,
            "pp": step.pp,
            "dp": step.dp,
            "cp": step.cp,
            "ep": step.ep,
            "micro_batch_size": step.micro_batch_size,
            "microbatches": step.microbatches,
            "schedule": step.schedule,
            "stages_per_rank": step.stages_per_rank,
            "recompute": step.recompute,
            "layout": self.layout,
            "step_s": self.step_s,
            "is_bound": self.is_bound,
            **{f"{name}_s": value for name, value in self.parts_s.items()},
            "utilisation": self.utilisation,
            "memory_bytes": self.total_bytes,
            **{f"{name}_bytes": value for name, value in self.memory_bytes.items()},
            "fits": self.fits,
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True)
class Plans(Sequence[Plan]):
    """Plans that fit and were predicted, the fastest first.

    Parameters
    ----------
    ranked : tuple of Plan
        Those.
    losers : tuple of Plan
        All but the best, each with its reason: slower ones, those that a bound ruled out, those that do not fit.
    """

    ranked: tuple[Plan, ...]
    losers: tuple[Plan, ...]

    def __len__(self) -> int:
        return len(self.ranked)

    def __getitem__(self, index: Any) -> Any:
        return self.ranked[index]

    @property
    def best(self) -> Plan:
        """The fastest plan that fits."""
        return self.ranked[0]

    @property
    def considered(self) -> int:
        """How many plans there were."""
        return 1 + len(self.losers)

    @property
    def pareto(self) -> list[Plan]:
        """Plans of the ranked that nothing beats in both time and memory, the fastest first."""
        kept: list[Plan] = []
        for plan in self.ranked:
            if not kept or plan.total_bytes < kept[-1].total_bytes:
                kept.append(plan)
        return kept

    def to_frame(self) -> pd.DataFrame:
        """All plans as a table, the ranked first; seconds and bytes."""
        import pandas as pd

        rest = [plan for plan in self.losers if plan.is_bound]
        return pd.DataFrame([plan.row for plan in (*self.ranked, *rest)])
