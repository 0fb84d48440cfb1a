"""Profile: the cost of each layer and stage, from rounds that were measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

import numpy as np

from ppexec.measure.layer_samples import LAYER_TIMES, LayerSamples
from ppsim import HostLink, LayerCost, StageCost, partition


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Layer and stage costs, their spread, and where they were measured.

    Parameters
    ----------
    layers : list of LayerCost
        In model order.
    stages : list of StageCost
        Measured on whole stages. A stage costs less than the sum of its layers: layers share bytes, and one call takes
        less time than a call for each layer. Where a stage had no split backward in the run, its I and W are sums over
        its layers, and where it had no whole one, its B.
    spread : list of dict, shape (layers,)
        Field of LayerCost -> (lower, upper) quartile of the rounds' means, in seconds.
    environment : dict
        Machine, versions and settings.
    by_shape : dict
        Shape of microbatch (see `Batch.shapes`) -> the costs of all stages for it, as in `stages`. Empty if all
        microbatches have one shape. `Session.stage_costs` picks the costs of each microbatch of a step from it.
    host_link : HostLink or None
        Fitted to the times of activations' copies to host memory and back. None if the schedule has no such copies.
    """

    layers: list[LayerCost]
    stages: list[StageCost]
    spread: list[dict[str, tuple[float, float]]]
    environment: dict[str, Any]
    by_shape: dict[str, list[StageCost]] = field(default_factory=dict)
    host_link: HostLink | None = None


def summarise(
    rounds_by_rank: Sequence[Sequence[LayerSamples]],
    names: Sequence[str],
    environment: dict[str, Any],
    layer_sizes: Sequence[int],
    *,
    copies: int = 1,
) -> Profile:
    """Compute costs from all ranks' rounds.

    A cost is the mean over the microbatches of a round, then the median over the rounds of all ranks that have the
    layer or stage. The mean, because a step takes the sum of its microbatches. The median, because other programs may
    disturb a round.

    Parameters
    ----------
    rounds_by_rank : sequence of sequences of LayerSamples
        The rounds of each rank. Every layer must be timed in at least one round.
    names : sequence of str, shape (layers,)
        The layers' names.
    environment : dict
        Where the rounds were measured.
    layer_sizes : sequence of int, shape (stages,)
        Number of layers of each stage of the model.
    copies : int
        Number of copies of the model that the ranks hold. The stages of every copy are measured.

    Returns
    -------
    Profile
    """
    by_layer: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in LAYER_TIMES}
    sizes: dict[int, dict[str, int | None]] = {}
    stage_sizes: dict[int, dict[str, int]] = {}
    by_stage: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rounds in rounds_by_rank:
        for samples in rounds:
            for name, measured in samples.stage_seconds.items():
                for stage, seconds in measured.items():
                    by_stage[stage][name].append(fmean(seconds))
            sizes.update(samples.sizes)
            stage_sizes.update(samples.stage_sizes)
            for name, layers in samples.seconds.items():
                for layer, seconds in layers.items():
                    by_layer[name][layer].append(fmean(seconds))
    costs, spread = [], []
    for layer in sorted(by_layer["forward_s"]):
        middle = {name: median(layers[layer]) if layers[layer] else 0.0 for name, layers in by_layer.items()}
        costs.append(LayerCost(name=names[layer], **middle, **sizes.get(layer, {})))  # type: ignore[arg-type]
        spread.append({name: _quartiles(layers[layer]) for name, layers in by_layer.items() if layers[layer]})
    # In each copy stage k has the layers of stage k of the model.
    summed = partition(costs, stages=len(layer_sizes), method=list(layer_sizes)) * copies
    stages = [
        replace(
            stage,
            **stage_sizes.get(index, {}),
            **{name: median(seconds) for name, seconds in by_stage[index].items()},  # type: ignore[arg-type]
        )
        for index, stage in enumerate(summed)
    ]
    every = [samples for rounds in rounds_by_rank for samples in rounds]
    return Profile(
        layers=costs,
        stages=stages,
        spread=spread,
        environment=environment,
        by_shape=_stages_by_shape(stages, every),
        host_link=_host_link(every),
    )


def _host_link(rounds: Sequence[LayerSamples]) -> HostLink | None:
    """Fit the host link to the times of copies: for each size, the median over rounds of the rounds' means."""
    by_size: dict[int, list[float]] = defaultdict(list)
    for samples in rounds:
        for size_bytes, seconds in samples.copy_seconds.items():
            by_size[size_bytes].append(fmean(seconds))
    if not by_size:
        return None
    return HostLink.fitted(list(by_size), [median(means) for means in by_size.values()])


def _stages_by_shape(stages: Sequence[StageCost], rounds: Sequence[LayerSamples]) -> dict[str, list[StageCost]]:
    """The costs of all stages for each shape of microbatch; empty if there is one shape."""
    seconds: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    sizes: dict[tuple[str, int], dict[str, int | None]] = {}
    for samples in rounds:
        for shape, (stage_seconds, stage_sizes) in samples.by_shape.items():
            sizes.update({(shape, stage): found for stage, found in stage_sizes.items()})
            for name, by_stage in stage_seconds.items():
                for stage, values in by_stage.items():
                    seconds[shape, stage][name].append(fmean(values))
    costs: dict[str, list[StageCost]] = {}
    shapes = sorted({shape for shape, _ in sizes})
    for shape in shapes if len(shapes) > 1 else []:
        costs[shape] = [
            replace(
                stage,
                **sizes[shape, index],  # type: ignore[arg-type]
                **{name: median(values) for name, values in seconds[shape, index].items()},  # type: ignore[arg-type]
            )
            for index, stage in enumerate(stages)
        ]
    return costs


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    lower, upper = np.percentile(values, [25, 75])
    return float(lower), float(upper)
