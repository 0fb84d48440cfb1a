"""Recording: a rank's actions recorded once in their order, and replayed on the data of every step (CUDA graphs).

A replay is one launch, however many kernels an action has. All tensors of a recording stay where they are: data and
messages are copied into its inputs, outputs and gradients are read from where they always come to be. Tensors that
pass from one action to a later one share memory with others, as they did while recording. So actions must be replayed
in the order in which they were recorded.
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


class RecordedAction(NamedTuple):
    """One action of a stage. row: its row of the program. is_split: whether its microbatch has I and W instead of B."""

    row: int
    stage: Stage
    kind: Kind
    microbatch: int
    is_split: bool


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """What replays an action, and its fixed tensors."""

    action: RecordedAction
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
    actions : sequence of RecordedAction
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

    def __init__(self, actions: Sequence[RecordedAction], batch: Batch, recorder: Recorder) -> None:
        self.key = key_of(batch)
        copied = _copied(batch)
        stages = list(dict.fromkeys(action.stage for action in actions))
        self._recorded: dict[int, _Recorded] = {}
        # Libraries are set up, and layers that draw nothing become known, before anything is recorded.
        for is_recording in (False, True):
            for stage in stages:
                stage.clear()
                stage.begin(copied)
            for action in actions:
                if is_recording:
                    self._recorded[action.row] = _record(action, copied, recorder)
                else:
                    act(
                        action.stage,
                        action.kind,
                        action.microbatch,
                        _given(action, copied),
                        copied,
                        split=action.is_split,
                    )
            for stage in stages:
                _refuse_what_changes(stage)
        self._losses = {stage: dict(stage.losses) for stage in stages}
        # The first B or W of each stage makes its gradients anew, and later ones add to the same tensors. So `.grad` is
        # set at the first.
        first_backward = {action.stage: action.row for action in reversed(actions) if action.kind in (Kind.B, Kind.W)}
        self._gradients = {
            row: [(parameter, parameter.grad) for parameter in stage.parameters]
            for stage, row in first_backward.items()
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
            As for `ppexec.stage.actions.act`.
        batch : Batch
            Has the targets.

        Returns
        -------
        Tensor or None
            The output. It stays as it is until the next step.
        """
        recorded = self._recorded[row]
        action = recorded.action
        _copy(recorded.inputs, value)
        if recorded.targets:
            _copy(recorded.targets, batch.targets[action.microbatch])
        recorded.replay()
        if action.kind == Kind.F and action.microbatch in self._losses[action.stage]:
            action.stage.losses[action.microbatch] = self._losses[action.stage][action.microbatch]
        for parameter, gradient in self._gradients.get(row, []):
            parameter.grad = gradient
        return recorded.output


def _record(action: RecordedAction, batch: Batch, recorder: Recorder) -> _Recorded:
    stage = action.stage
    value = _given(action, batch)
    inputs = [tensor.detach() for tensor in tensors_in(value)]  # the stage lets its inputs require gradients
    found: list[torch.Tensor | None] = []

    def work() -> None:
        found.append(act(stage, action.kind, action.microbatch, value, batch, split=action.is_split))

    replay = recorder.record(work)
    return _Recorded(
        action=action,
        replay=replay,
        inputs=inputs,
        targets=tensors_in(batch.targets[action.microbatch])
        if action.kind == Kind.F and stage.loss is not None
        else [],
        output=found[0],
    )


def _given(action: RecordedAction, batch: Batch) -> Tree | None:
    """What an action is recorded on: data for F of the first stage, zeros for a message, None if it takes no input."""
    stage, boundaries = action.stage, batch.boundaries[action.microbatch]
    if action.kind == Kind.W or (action.kind != Kind.F and stage.loss is not None):
        return None
    if action.kind == Kind.F and stage.is_first:
        return batch.inputs[action.microbatch]
    after = stage.first_layer + len(stage.layers)
    spec = boundaries[stage.first_layer].message if action.kind == Kind.F else boundaries[after].gradient
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
