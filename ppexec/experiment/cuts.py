"""Cuts: one model cut into stages in several ways, each predicted and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

import ppsim
from ppexec.config.config import RunConfig
from ppexec.experiment.profiling import profiling_config
from ppexec.measure.assemble import with_memory
from ppexec.measure.layer_samples import LAYER_TIMES, LayerSamples
from ppexec.session import Session
from ppexec.workers.pool import WorkerPool
from ppsim import LayerCost, StageCost, Trace
from ppsim.simulation.memory_columns import with_columns
from ppsim.trace.trace import known, median_step

_CHOOSING_ROUNDS = 5  # of profiling, from which the optimal cut is chosen


@dataclass(kw_only=True)
class Cut:
    """One way to cut the layers into stages, with its predicted and measured steps.

    Parameters
    ----------
    name : str
        "even", "optimal" and the like.
    sizes : list of int
        Layers of each stage; an embedding and a head count.
    simulated_s : float
        Step time simulated before measuring, from the costs that chose the cut and free messages.
    rounds : list
        By rank: the rounds of profiling.
    measured : list of Trace
        Every measured step.
    stages : list of StageCost
        What the prediction is made from.
    predicted : Trace or None
        The predicted step, once there is one.
    """

    name: str
    sizes: list[int]
    simulated_s: float
    rounds: list[list[LayerSamples]] = field(default_factory=list)
    measured: list[Trace] = field(default_factory=list)
    stages: list[StageCost] = field(default_factory=list)
    predicted: Trace | None = None

    @property
    def prediction(self) -> Trace:
        """The predicted step; RuntimeError before there is one."""
        if self.predicted is None:
            raise RuntimeError(f"the cut {self.name} has not been predicted yet")
        return self.predicted

    @property
    def times_s(self) -> npt.NDArray[np.float64]:
        """Every measured step in seconds."""
        return np.array([trace.makespan_s for trace in self.measured])

    def summary(self) -> dict[str, Any]:
        """The cut as JSON values; seconds and bytes."""
        low, middle, high = np.quantile(self.times_s, [0.25, 0.5, 0.75]).tolist()
        predicted_s, held = self.prediction.makespan_s, median_step(self.measured)
        return {
            "cut": self.name,
            "layers": self.sizes,
            "work_s": [stage.work_s for stage in self.stages],
            "step_time_s": {
                "predicted": predicted_s,
                "measured_median": middle,
                "measured_p25": low,
                "measured_p75": high,
                "relative_error": (predicted_s - middle) / middle,
                "measured": self.times_s.tolist(),
            },
            "bubble_fraction": {
                "predicted": self.prediction.bubble_fraction,
                "measured": float(np.median([trace.bubble_fraction for trace in self.measured])),
            },
            "peak_activation_bytes": {
                "predicted": known(self.prediction.peak_activation_bytes).tolist(),
                "measured": known(held.peak_activation_bytes).tolist(),
            },
            "memory": {"predicted": self.prediction.memory.to_dict(), "measured": held.memory.to_dict()},
        }


@dataclass(frozen=True, kw_only=True)
class CutComparison:
    """Several cuts of one model, measured beside one another.

    Parameters
    ----------
    cuts : list of Cut
        The first is the baseline, the second the optimal cut.
    layers : list of LayerCost
        What every cut was predicted from.
    simulated : int or None
        How many cuts were simulated; None if that was not asked for.
    best : Cut or None
        The shortest simulated step of those; the optimal cut where no other is shorter.
    """

    cuts: list[Cut]
    layers: list[LayerCost]
    simulated: int | None
    best: Cut | None
    environment: dict[str, Any]
    config: dict[str, Any]

    def speedup(self, cut: Cut) -> dict[str, float]:
        """How many times as fast as the first cut; measured step by step, each against the one beside it."""
        low, middle, high = np.quantile(self.cuts[0].times_s / cut.times_s, [0.25, 0.5, 0.75]).tolist()
        predicted = self.cuts[0].prediction.makespan_s / cut.prediction.makespan_s
        return {"predicted": predicted, "measured_median": middle, "measured_p25": low, "measured_p75": high}

    def summary(self) -> dict[str, Any]:
        """Everything as JSON values."""
        best, optimal = self.best, self.cuts[1]
        return {
            "cuts": [{**cut.summary(), "speedup": self.speedup(cut)} for cut in self.cuts],
            "layers": [{"layer": layer.name, "work_s": layer.work_s} for layer in self.layers],
            "every_cut": None
            if best is None
            else {
                "simulated": self.simulated,
                "best": best.sizes,
                "best_s": best.simulated_s,
                "optimal": optimal.sizes,
                "optimal_s": optimal.simulated_s,
            },
            "config": self.config,
            "environment": self.environment,
        }


def compare_cuts(config: RunConfig, *, max_cuts: int, advance: Callable[[], Any] = lambda: None) -> CutComparison:
    """Choose cuts from a profile, then profile and measure them in turn.

    Every cut has workers of its own. Turns go round the cuts, so that a machine whose speed drifts drifts under all
    alike. One set of layer costs, of all rounds, predicts every cut.

    Parameters
    ----------
    config : RunConfig
        `partition` is the baseline cut.
    max_cuts : int
        Simulate every cut if there are at most so many.
    advance : callable
        Called after each of `config.warmup + config.steps` turns.
    """
    config = config.plain()
    is_timed = config.compute == "timed"
    with ExitStack() as stack:
        pool = stack.enter_context(WorkerPool())
        layers = config.layer_costs or _choosing_profile(config, pool)
        cuts, simulated, best = choose_cuts(config, layers, max_cuts=max_cuts)
        sessions = []
        for number, cut in enumerate(cuts):
            as_cut = replace(config, partition=_partition_flag(config, cut.sizes), costs=None)
            workers = pool if number == 0 else stack.enter_context(WorkerPool())
            cut.stages = ppsim.partition(layers, stages=len(cut.sizes), method=cut.sizes) if is_timed else []
            sessions.append(stack.enter_context(Session(as_cut, pool=workers, costs=cut.stages or None)))
            cut.rounds = [[] for _ in range(config.world_size)]
        for step in range(-config.warmup, config.steps):
            for cut, session in zip(cuts, sessions, strict=True):
                _take_turn(cut, session, step, profiles=not is_timed)
            advance()
        if not is_timed:
            together = [[each for cut in cuts for each in cut.rounds[rank]] for rank in range(config.world_size)]
            layers = sessions[0].summarise(together).layers
            for cut, session in zip(cuts, sessions, strict=True):
                cut.stages = _stages_of(layers, cut.sizes, counted=session.summarise(cut.rounds).stages)
        for cut, session in zip(cuts, sessions, strict=True):
            network = session.probe_network()
            step_trace = ppsim.simulate(config.pipeline, cut.stages, network=network, streams=config.streams)
            cut.predicted = with_columns(step_trace, receive_window=session.receive_window)
            memory = session.memory()
            cut.measured = [with_memory(trace, memory) for trace in cut.measured]
        return CutComparison(
            cuts=cuts,
            layers=layers,
            simulated=simulated,
            best=best,
            environment=sessions[0].environment(),
            config=config.to_dict(),
        )


def choose_cuts(
    config: RunConfig, layers: Sequence[LayerCost], *, max_cuts: int
) -> tuple[list[Cut], int | None, Cut | None]:
    """Choose the cuts to measure: the given one, the optimal one, and a better one where simulation finds it.

    The optimal cut has the smallest largest stage. Messages cost nothing here, as in choosing that.

    Returns
    -------
    cuts : list of Cut
    simulated : int or None
        How many cuts there are; None if that is more than `max_cuts`, of which none is simulated then.
    best : Cut or None
        The one with the shortest simulated step.
    """
    pipeline = config.pipeline

    def step_s(sizes: Sequence[int]) -> float:
        stages = ppsim.partition(layers, stages=pipeline.model_stages, method=sizes)
        return ppsim.simulate(pipeline, stages, engine="compiled", streams=config.streams).makespan_s

    work_s = [layer.work_s for layer in layers]
    optimal = ppsim.partition_sizes(len(layers), stages=pipeline.model_stages, method="optimal", work_s=work_s)
    found = [
        Cut(name=name, sizes=sizes, simulated_s=step_s(sizes))
        for name, sizes in ((config.partition, config.layer_sizes), ("optimal", optimal))
    ]
    count = math.comb(len(layers) - 1, pipeline.model_stages - 1)
    if count > max_cuts:
        return found, None, None
    steps_s = {sizes: step_s(sizes) for sizes in every_cut(len(layers), pipeline.model_stages)}
    shortest = min(steps_s, key=steps_s.__getitem__)
    if steps_s[shortest] >= found[1].simulated_s:
        return found, count, found[1]
    best = next((cut for cut in found if cut.sizes == list(shortest)), None)
    if best is None:
        best = Cut(name="best simulated", sizes=list(shortest), simulated_s=steps_s[shortest])
        found.append(best)
    return found, count, best


def every_cut(layers: int, stages: int) -> list[tuple[int, ...]]:
    """List all ways to cut so many layers into so many stages of at least one layer.

    Examples
    --------
    >>> every_cut(4, 2)
    [(1, 3), (2, 2), (3, 1)]
    """
    return [
        tuple(stop - start for start, stop in pairwise((0, *inner, layers)))
        for inner in combinations(range(1, layers), stages - 1)
    ]


def _choosing_profile(config: RunConfig, pool: WorkerPool) -> list[LayerCost]:
    """The layers' costs on as many processes as compute at once later."""
    real = profiling_config(config) if config.compute == "timed" else config
    with Session(real, pool=pool) as session:
        session.profile_rounds(1)
        return session.profile(_CHOOSING_ROUNDS).layers


def _take_turn(cut: Cut, session: Session, step: int, *, profiles: bool) -> None:
    """A round of profiling and a step; they do not count while `step` is negative."""
    rounds = session.profile_rounds(1, first_step=max(step, 0)) if profiles else []
    traces = session.measure(1, first_step=max(step, 0))
    if step < 0:
        return
    cut.measured += traces
    for gathered, new in zip(cut.rounds, rounds, strict=False):
        gathered += new


def _stages_of(layers: Sequence[LayerCost], sizes: Sequence[int], *, counted: Sequence[StageCost]) -> list[StageCost]:
    """Stages with the seconds of `layers` and the bytes counted on each stage as cut."""
    summed = ppsim.partition(layers, stages=len(sizes), method=sizes)
    return [
        replace(stage, **{name: getattr(of, name) for name in LAYER_TIMES})
        for stage, of in zip(counted, summed * (len(counted) // len(sizes)), strict=True)
    ]


def _partition_flag(config: RunConfig, sizes: Sequence[int]) -> str:
    """Stage sizes as the flag `--partition` counts them: a GPT's embedding and head left out."""
    counted = list(sizes)
    if config.chain_length > config.layers:
        counted[0] -= 1
        counted[-1] -= 1
    return ",".join(map(str, counted))
