"""Recording: a rank's actions recorded once in their order, and replayed on the data of every step (CUDA graphs).

A replay is one launch, however many kernels an action has. All tensors of a recording stay where they are: data and
messages are copied into its inputs, outputs and gradients are read from where they always come to be. The memory of
what lives between actions is used again by later ones as it was when they were recorded, so the order must be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.utils import _pytree as pytree

from ppexec.machine.device import Recorder
from ppexec.models.batch import Batch
from ppexec.models.shapes import TensorSpec, Tree, tensors_in
from ppexec.stage.actions import act
from ppexec.stage.stage import Stage
from ppsim import Kind
from ppsim.errors import InputError


class RecordedStep(NamedTuple):
    """One action of a stage, as the recording needs it. row: its number. is_split: whether I and W are its backward."""

    row: int
    stage: Stage
    kind: Kind
    microbatch: int
    is_split: bool


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """What replays an action, and its fixed tensors."""

    step: RecordedStep
    replay: Callable[[], None]
    inputs: list[torch.Tensor]
    targets: list[torch.Tensor]
    output: torch.Tensor | None


def key_of(batch: Batch) -> Hashable:
    """What a recording takes for fixed: batches of the same key can use the same one."""
    return tuple(batch.shapes), tuple(batch.shares), batch.rounds


class Recording:
    """A rank's actions on fixed tensors.

    Parameters
    ----------
    steps : sequence of RecordedStep
        The rank's actions, in its order.
    batch : Batch
        Whose shapes are recorded.
    recorder : Recorder
        Of the stream that is current; all work is submitted to it.

    Raises
    ------
    InputError
        If a layer draws random numbers, or the loss counts its terms: both differ from step to step.
    """

    def __init__(self, steps: Sequence[RecordedStep], batch: Batch, recorder: Recorder) -> None:
        self.key = key_of(batch)
        copied = _copied(batch)
        stages = list(dict.fromkeys(step.stage for step in steps))
        self._recorded: dict[int, _Recorded] = {}
        # Libraries are set up, and layers that draw nothing become known, before anything is recorded.
        for is_recording in (False, True):
            for stage in stages:
                stage.clear()
                stage.begin(copied)
            for step in steps:
                if is_recording:
                    self._recorded[step.row] = _record(step, copied, recorder)
                else:
                    act(step.stage, step.kind, step.microbatch, _given(step, copied), copied, split=step.is_split)
            for stage in stages:
                _refuse_what_changes(stage)
        self._losses = {stage: dict(stage.losses) for stage in stages}
        making = {step.stage: step.row for step in reversed(steps) if step.kind in (Kind.B, Kind.W)}
        self._gradients = {
            row: [(parameter, parameter.grad) for parameter in stage.parameters] for stage, row in making.items()
        }
        for stage in stages:
            stage.clear()

    def replay(self, row: int, value: Tree | None, batch: Batch) -> torch.Tensor | None:
        """Do an action on a step's data.

        Parameters
        ----------
        row : int
            The action's number.
        value : Tensor, pytree of tensors or None
            As for `ppexec.stage.stage.act`.
        batch : Batch
            Has the targets.

        Returns
        -------
        Tensor or None
            The output. It stays as it is until the next step.
        """
        recorded = self._recorded[row]
        step = recorded.step
        _copy(recorded.inputs, value)
        if recorded.targets:
            _copy(recorded.targets, batch.targets[step.microbatch])
        recorded.replay()
        if step.kind == Kind.F and step.microbatch in self._losses[step.stage]:
            step.stage.losses[step.microbatch] = self._losses[step.stage][step.microbatch]
        for parameter, gradient in self._gradients.get(row, []):
            parameter.grad = gradient
        return recorded.output


def _record(step: RecordedStep, batch: Batch, recorder: Recorder) -> _Recorded:
    stage = step.stage
    value = _given(step, batch)
    inputs = [tensor.detach() for tensor in tensors_in(value)]  # the stage lets its inputs require gradients
    found: list[torch.Tensor | None] = []

    def work() -> None:
        found.append(act(stage, step.kind, step.microbatch, value, batch, split=step.is_split))

    replay = recorder.record(work)
    return _Recorded(
        step=step,
        replay=replay,
        inputs=inputs,
        targets=tensors_in(batch.targets[step.microbatch]) if step.kind == Kind.F and stage.loss is not None else [],
        output=found[0],
    )


def _given(step: RecordedStep, batch: Batch) -> Tree | None:
    """An action's input, of the right shape."""
    stage, boundaries = step.stage, batch.boundaries[step.microbatch]
    if step.kind == Kind.W or (step.kind != Kind.F and stage.loss is not None):
        return None
    if step.kind == Kind.F and stage.is_first:
        return batch.inputs[step.microbatch]
    after = stage.first_layer + len(stage.layers)
    spec = boundaries[stage.first_layer].message if step.kind == Kind.F else boundaries[after].gradient
    return _zeros(spec, stage)


def _zeros(spec: TensorSpec, stage: Stage) -> torch.Tensor:
    device = next((parameter.device for layer in stage.layers for parameter in layer.parameters()), None)
    return torch.zeros(spec.shape, dtype=spec.dtype, device=device)


def _copied(batch: Batch) -> Batch:
    """The batch with data of its own."""

    def copies(trees: list[Tree]) -> list[Tree]:
        return [pytree.tree_map_only(torch.Tensor, torch.clone, tree) for tree in trees]

    return replace(batch, inputs=copies(batch.inputs), targets=copies(batch.targets))


@torch.no_grad()
def _copy(fixed: Sequence[torch.Tensor], value: Tree | None) -> None:
    for own, given in zip(fixed, tensors_in(value), strict=True):
        own.copy_(given)


def _refuse_what_changes(stage: Stage) -> None:
    if stage.counts_terms:
        raise InputError("graphs do not go with reduction='sum', whose divisor differs from step to step: leave it out")
    drawing = stage.drawing_layers()
    if drawing:
        raise InputError(
            f"{drawing[0]} draws random numbers, which a recorded action would draw once for all steps: leave graphs "
            "out, or dropout"
        )
