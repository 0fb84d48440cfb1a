"""Costs of layers and of stages: what one microbatch takes in time and holds in memory."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass, fields

from ppsim.checks import check_text, shown
from ppsim.errors import CostError, InputError

MOST_BYTES = 2**53  # 9 PB; every smaller whole number is exact as a float


def _is_amount(value: object) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return 0 <= float(value) < math.inf
    except OverflowError:  # a whole number of hundreds of digits
        return False


def total_s(seconds: Iterable[float]) -> float:
    """The sum, correctly rounded; infinite where no float holds it, which StageCost then refuses."""
    try:
        return math.fsum(seconds)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one microbatch costs on one stage.

    Parameters
    ----------
    forward_s : float
        Seconds of F.
    backward_input_s : float
        Seconds of I, the backward for the input.
    backward_weight_s : float
        Seconds of W, the backward for the weights.
    activation_bytes : int
        Bytes held from the start of F to the end of B, or of I where the backward is split: what autograd saved, each
        storage once, plus the stage's input and output.
    weight_activation_bytes : int
        Bytes held from the end of I to the end of W.
    output_bytes : int
        Bytes of the message to the next stage.
    parameter_bytes : int
        Bytes of the weights.
    backward_s : float, optional
        Seconds of B, the whole backward at once, which is often cheaper than I + W. By default I + W.
    gradient_bytes : int, optional
        Bytes of the weights that are trained. By default all weights are.
    output_gradient_bytes : int, optional
        Bytes of the message with the gradient that comes back. Fewer than `output_bytes`, the default, where the output
        has masks or positions, which have no gradient.
    forward_communication_s, backward_input_communication_s, backward_weight_communication_s : float
        Seconds that the device communicates within F, I and W: dispatch and combine of a mixture of experts, or
        reductions of tensor parallelism. They come on top of the seconds above, which are then compute alone.
    backward_communication_s : float, optional
        The same within B. By default that of I and W.
    recompute_s : float, optional
        Seconds of R, which computes F once more for a backward. By default those of F. It communicates as F does.
    recompute_bytes : int, optional
        Bytes held in place of `activation_bytes` from an F to its R: the stage's input, and its output, which may be
        under way. By default two outputs, as large as that where all stages hand on the same, but at most
        `activation_bytes`.
    offload_bytes : int, optional
        Bytes of the activations that O moves to host memory and L back. By default, and at most, all.

    Raises
    ------
    CostError
        If seconds are not finite and >= 0, or bytes are not whole numbers from 0 to 2**53.

    Notes
    -----
    An action that runs alone takes its compute and its communication, one after the other: `alone_s`. In an overlapped
    pair the communication of one part runs under the compute of the other, so that the pair takes the longer of both
    sums: `ppsim.simulation.timed_program.pair_share`.

    Examples
    --------
    >>> StageCost(forward_s=1.0, backward_input_s=1.0, backward_weight_s=0.5).full_backward_s
    1.5
    """

    forward_s: float
    backward_input_s: float
    backward_weight_s: float
    activation_bytes: int = 0
    weight_activation_bytes: int = 0
    output_bytes: int = 0
    parameter_bytes: int = 0
    backward_s: float | None = None
    gradient_bytes: int | None = None
    output_gradient_bytes: int | None = None
    forward_communication_s: float = 0.0
    backward_input_communication_s: float = 0.0
    backward_weight_communication_s: float = 0.0
    backward_communication_s: float | None = None
    recompute_s: float | None = None
    recompute_bytes: int | None = None
    offload_bytes: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if field.name.endswith("_s"):
                if not _is_amount(value):
                    raise CostError(f"{field.name} must be seconds, finite and >= 0, got {shown(value)}")
                if type(value) is not float:  # a whole number of 80 digits would not come back from a file
                    object.__setattr__(self, field.name, float(value))
            elif field.name.endswith("_bytes") and not (
                _is_amount(value) and int(value) == value and int(value) <= MOST_BYTES
            ):
                raise CostError(f"{field.name} must be a whole number of bytes from 0 to 2**53, got {shown(value)}")

    @property
    def full_backward_s(self) -> float:
        """Seconds of B, without its communication."""
        return self.backward_input_s + self.backward_weight_s if self.backward_s is None else self.backward_s

    @property
    def again_s(self) -> float:
        """Seconds of R, without its communication."""
        return self.forward_s if self.recompute_s is None else self.recompute_s

    @property
    def kept_bytes(self) -> int:
        """Bytes held from an F to its R."""
        if self.recompute_bytes is not None:
            return self.recompute_bytes
        return min(2 * self.output_bytes, self.activation_bytes)

    @property
    def moved_bytes(self) -> int:
        """Bytes of the activations that O moves to host memory."""
        return self.activation_bytes if self.offload_bytes is None else min(self.offload_bytes, self.activation_bytes)

    @property
    def full_backward_communication_s(self) -> float:
        """Seconds that the device communicates within B."""
        if self.backward_communication_s is not None:
            return self.backward_communication_s
        return self.backward_input_communication_s + self.backward_weight_communication_s

    @property
    def communication_s(self) -> dict[str, float]:
        """Seconds that the device communicates within F, B, I, W and R."""
        return {
            "F": self.forward_communication_s,
            "B": self.full_backward_communication_s,
            "I": self.backward_input_communication_s,
            "W": self.backward_weight_communication_s,
            "R": self.forward_communication_s,
        }

    @property
    def alone_s(self) -> dict[str, float]:
        """Seconds of F, B, I, W and R that run alone: their compute and their communication."""
        compute_s = {
            "F": self.forward_s,
            "B": self.full_backward_s,
            "I": self.backward_input_s,
            "W": self.backward_weight_s,
            "R": self.again_s,
        }
        return {kind: compute_s[kind] + communication_s for kind, communication_s in self.communication_s.items()}

    @property
    def backward_message_bytes(self) -> int:
        """Bytes of the message that goes back to this stage from the next."""
        return self.output_bytes if self.output_gradient_bytes is None else self.output_gradient_bytes

    @property
    def trained_bytes(self) -> int:
        """Bytes of the gradients."""
        return self.parameter_bytes if self.gradient_bytes is None else self.gradient_bytes

    @property
    def work_s(self) -> float:
        """F and B of one microbatch alone, in seconds: what a partition balances."""
        alone_s = self.alone_s
        return alone_s["F"] + alone_s["B"]


@dataclass(frozen=True, kw_only=True)
class LayerCost(StageCost):
    """What one microbatch costs in one layer that is run as a stage of its own.

    Parameters
    ----------
    name : str
        The layer's name. All other fields are those of StageCost.
    """

    name: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            check_text("name", self.name)
        except InputError as error:
            raise CostError(str(error)) from None


def stage_cost(layers: list[LayerCost] | tuple[LayerCost, ...], *, frees_output: bool = False) -> StageCost:
    """The cost of consecutive layers as one stage.

    Parameters
    ----------
    layers : list or tuple of LayerCost
        Its layers.
    frees_output : bool
        Whether its output is freed once it is sent, as Megatron-LM's `--deallocate-pipeline-outputs` does, and not held
        until the backward ends.

    Notes
    -----
    Seconds and parameter bytes add up. So do activations, but a layer's output is the next one's input and counts once.
    That is an upper bound, since a tensor that no backward needs is not held. Exact bytes come from a profile of the
    stage as cut. The stage's output is that of its last layer. What it holds until R is its first layer's input and its
    output.
    """
    if not layers:
        raise CostError("a stage needs at least one layer, got none")
    fused = any(layer.backward_s is not None for layer in layers)
    fused_communication = any(layer.backward_communication_s is not None for layer in layers)
    knows_gradients = any(layer.gradient_bytes is not None for layer in layers)
    recomputed = any(layer.recompute_s is not None for layer in layers)
    moves_some = any(layer.offload_bytes is not None for layer in layers)
    input_bytes = None if layers[0].recompute_bytes is None else layers[0].recompute_bytes - layers[0].output_bytes
    shared = sum(layer.output_bytes for layer in (layers if frees_output else layers[:-1]))
    return StageCost(
        forward_s=total_s(layer.forward_s for layer in layers),
        backward_input_s=total_s(layer.backward_input_s for layer in layers),
        backward_weight_s=total_s(layer.backward_weight_s for layer in layers),
        backward_s=total_s(layer.full_backward_s for layer in layers) if fused else None,
        forward_communication_s=total_s(layer.forward_communication_s for layer in layers),
        backward_input_communication_s=total_s(layer.backward_input_communication_s for layer in layers),
        backward_weight_communication_s=total_s(layer.backward_weight_communication_s for layer in layers),
        backward_communication_s=total_s(layer.full_backward_communication_s for layer in layers)
        if fused_communication
        else None,
        activation_bytes=max(sum(layer.activation_bytes for layer in layers) - shared, 0),
        weight_activation_bytes=sum(layer.weight_activation_bytes for layer in layers),
        output_bytes=layers[-1].output_bytes,
        output_gradient_bytes=layers[-1].output_gradient_bytes,
        parameter_bytes=sum(layer.parameter_bytes for layer in layers),
        gradient_bytes=sum(layer.trained_bytes for layer in layers) if knows_gradients else None,
        recompute_s=total_s(layer.again_s for layer in layers) if recomputed else None,
        recompute_bytes=None if input_bytes is None else max(input_bytes, 0) + layers[-1].output_bytes,
        offload_bytes=sum(layer.moved_bytes for layer in layers) if moves_some else None,
    )


def hand_on_cost(before: StageCost) -> StageCost:
    """The cost of a stage without layers, after the stage `before`: it hands on what it receives.

    It takes no time. Its output is its input, so each microbatch is held once.
    """
    return StageCost(
        forward_s=0.0,
        backward_input_s=0.0,
        backward_weight_s=0.0,
        activation_bytes=before.output_bytes,
        output_bytes=before.output_bytes,
        output_gradient_bytes=before.output_gradient_bytes,
    )
