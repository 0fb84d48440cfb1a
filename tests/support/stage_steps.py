"""A step of one stage without workers, however it keeps its activations, and its bits held against another's."""

from __future__ import annotations

import copy
import gc
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import nn

from ppexec.machine.device import HostDevice
from ppexec.models.batch import Batch
from ppexec.models.dropout import Randomness, SeededDropout
from ppexec.stage.ledger import Ledger, tensors_of
from ppexec.stage.stage import Stage
from tests.support.layers import LAYERS, WIDTH

HOST = HostDevice().host_buffer
MICROBATCHES = 3


def uses_nothing(_: torch.Tensor) -> None:
    """What `Stream.uses` does where streams run work at once."""


def stage_of(layers: list[nn.Module], kind: type[Stage] = Stage, *, index: int = 1, **changes: Any) -> Stage:
    """A stage of these layers that trains, in the middle of a model unless changes say otherwise."""
    return kind(index, layers, first_layer=0, **{"loss": None, "microbatches": 3, "trains": True, **changes})


class StageCase(NamedTuple):
    """A stage of random layers, which may be first or last, and how its backward goes.

    kinds: of `LAYERS`. has_dropout: whether one keyed by its microbatch stands among them.
    """

    kinds: list[int]
    is_first: bool
    is_last: bool
    is_split: bool
    has_dropout: bool
    seed: int

    def stages(self, other: type[Stage] = Stage) -> tuple[Stage, Stage]:
        """A plain stage, and one of the same weights that is to have the same bits."""
        torch.manual_seed(self.seed)
        layers = [LAYERS[kind]() for kind in self.kinds]
        randomness = Randomness(self.seed) if self.has_dropout else None
        if randomness is not None:
            layers.insert(1, SeededDropout(0.4, layer=0, site="between", randomness=randomness))
        changes: dict[str, Any] = {"index": 0 if self.is_first else 1, "randomness": randomness}
        if self.is_last:
            changes["loss"] = nn.functional.mse_loss
        pair = stage_of(layers, **changes), stage_of(copy.deepcopy(layers), other, **changes)
        for copied in pair[1].layers:
            if isinstance(copied, SeededDropout) and randomness is not None:
                copied.randomness = randomness  # deepcopy made one of its own
        return pair


STAGE_CASES = st.builds(
    StageCase,
    kinds=st.lists(st.integers(0, len(LAYERS) - 1), min_size=1, max_size=4),
    is_first=st.booleans(),
    is_last=st.booleans(),
    is_split=st.booleans(),
    has_dropout=st.booleans(),
    seed=st.integers(0, 2**31),
)


class StepData(NamedTuple):
    """Inputs, targets and gradients of three microbatches; random."""

    inputs: list[torch.Tensor]
    targets: list[torch.Tensor | None]
    gradients: list[torch.Tensor | None]

    @classmethod
    def drawn(cls, *, is_last: bool) -> StepData:
        """Of the last stage of a model, whose backward starts from its loss, or of another."""
        inputs, gradients, targets = ([torch.randn(2, 5, WIDTH) for _ in range(MICROBATCHES)] for _ in range(3))
        none: list[torch.Tensor | None] = [None] * MICROBATCHES
        return cls(inputs, [*targets] if is_last else none, none if is_last else [*gradients])


def stepped(
    stage: Stage,
    data: StepData,
    *,
    split: bool,
    again: Collection[int] = (),
    moved: Collection[int] = (),
    counts: bool = False,
) -> list[torch.Tensor | None]:
    """Run a step, with backwards out of order; give its messages and losses.

    again, moved: the microbatches that are recomputed, and those that go to host memory and back. counts: also check
    that a ledger ends at nothing.
    """
    if counts:
        stage.ledger = Ledger([*tensors_of(stage.layers), *(target for target in data.targets if target is not None)])
    stage.begin(Batch(step=1, samples=[range(2), range(2, 4), range(4, 6)]))
    back: list[torch.Tensor | None] = []
    for b in range(MICROBATCHES):
        how = {"split": split, "again": b in again, "moves": b in moved}
        back.append(stage.forward(b, data.inputs[b].clone(), data.targets[b], **how).clone())
        if b in moved:
            stage.offload(b, HOST, uses_nothing)
    for b in (1, 0, 2):
        if b in moved:
            stage.load(b, uses_nothing)
        if b in again:
            stage.recompute(b, split=split)
        back.append((stage.backward_input if split else stage.backward)(b, data.gradients[b]))
    for b in (2, 1, 0) if split else ():
        stage.backward_weight(b)
    if stage.ledger:
        gc.collect()
        assert stage.ledger.level_bytes == 0
    return [*back, *(stage.losses[b] for b in sorted(stage.losses))]


def assert_same_bits(
    stages: tuple[Stage, Stage], sent: tuple[list[torch.Tensor | None], list[torch.Tensor | None]]
) -> None:
    """Two stages gave the same messages and losses, and have the same gradients."""
    for one, other in zip(*sent, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    for mine, theirs in zip(*(stage.layers for stage in stages), strict=True):
        for (name, parameter), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None), name
            assert parameter.grad is None or torch.equal(parameter.grad, other.grad), name
