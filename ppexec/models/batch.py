"""Data: the microbatches of a step, inputs where the first stage is, targets where the last is, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ppexec.models.model import Sample
from ppexec.models.model_error import reraise
from ppexec.models.seeds import microbatch_order
from ppexec.models.shapes import BoundarySpec, Tree
from ppsim.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A step's microbatches on one rank.

    Parameters
    ----------
    inputs : list of tensors or pytrees of tensors
        By microbatch, on the rank of the first stage; empty on others.
    targets : list of tensors or pytrees of tensors
        By microbatch, on the rank of the last stage; empty on others.
    step : int
        Number of the step.
    samples : list of range
        By microbatch, on every rank, the global indices of its samples. Dropout is keyed by them.
    positions : list of int
        By microbatch, its place among all of the step, over rounds and replicas, by global index.
    boundaries : list of list of BoundarySpec
        By microbatch, on every rank, what crosses the boundaries of the chain. Empty where all are single tensors.
    shapes : list of str
        By microbatch, on every rank, the name of the kind of input it has: equal ones have equal boundaries.
    shares : list of (float, float)
        By microbatch, on the rank of the last stage, what its loss counts in that of the step: part and whole. Empty
        where all count the same.
    rounds : int
        How many batches make the step. Their gradients are accumulated, and each loss counts 1 / rounds as much.
    completes_step : bool
        Whether it is the last of them, after which the gradients are added up over replicas and tied places.
    """

    inputs: list[Tree] = field(default_factory=list)
    targets: list[Tree] = field(default_factory=list)
    step: int = 0
    samples: list[range] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    boundaries: list[list[BoundarySpec]] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    shares: list[tuple[float, float]] = field(default_factory=list)
    rounds: int = 1
    completes_step: bool = True


def load_batch(
    sample: Sample,
    *,
    seed: int,
    step: int,
    microbatches: int | Sequence[int],
    samples_of: Callable[[int], range] = lambda microbatch: range(microbatch, microbatch + 1),
    dp_rank: int = 0,
    rounds: int = 1,
    round_number: int = 0,
    first_index: int = 0,
    has_first: bool,
    has_last: bool,
    device: torch.device,
) -> Batch:
    """Read a replica's microbatches of a round of a step, in the order of (seed, step).

    Parameters
    ----------
    sample : callable
        The model's: global microbatch index to (inputs, targets).
    seed, step : int
        What the order of the data depends on.
    microbatches : int, or sequence of int, shape (dp,)
        Of the round, of each replica; one number for a single replica.
    samples_of : callable
        The global indices of a microbatch's samples, by its own global index; one each unless given.
    dp_rank : int
        Which replica reads.
    rounds, round_number : int
        Rounds of the step, and which of them is read.
    first_index : int
        Global index of the first microbatch of step 0.
    has_first, has_last : bool
        Whether the rank holds the first stage, which needs inputs, and the last, which needs targets.
    device : torch.device
        Where they are put.

    Raises
    ------
    InputError
        If a microbatch is not a pair of tensors, or of pytrees of tensors.
    """
    order = microbatch_order(
        seed,
        step=step,
        microbatches=microbatches,
        dp_rank=dp_rank,
        rounds=rounds,
        round_number=round_number,
    )
    indices = (first_index + order).tolist()
    batch = Batch(
        step=step,
        samples=[samples_of(index) for index in indices],
        positions=(order - step * rounds * int(np.sum(microbatches))).tolist(),
        rounds=rounds,
        completes_step=round_number == rounds - 1,
    )
    if not (has_first or has_last):
        return batch
    storages: set[int] = set()

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return _own(tensor.to(device), storages)

    for index in indices:
        inputs, targets = read_sample(sample, index)
        if has_first:
            batch.inputs.append(pytree.tree_map_only(torch.Tensor, place, inputs))
        if has_last:
            batch.targets.append(pytree.tree_map_only(torch.Tensor, place, targets))
    return batch


def read_sample(sample: Sample, index: int) -> tuple[Tree, Tree]:
    """Read the microbatch of a global index. Raises InputError if it is not a pair of tensors or pytrees of them."""
    try:
        pair = sample(index)
    except Exception as error:
        reraise(error, f"sample({index})")
    wanted = f"sample({index}) must give (inputs, targets), two tensors"
    if not (isinstance(pair, tuple) and len(pair) == 2):
        raise InputError(f"{wanted}, got {type(pair).__name__}")
    for name, part in zip(("inputs", "targets"), pair, strict=True):
        try:
            BoundarySpec.of(part)
        except ValueError as error:
            raise InputError(f"{wanted}; got as {name} {error}") from None
    return pair


def _own(tensor: torch.Tensor, taken: set[int]) -> torch.Tensor:
    """A tensor whose storage no other tensor of the batch has, so that each counts its own bytes."""
    tensor = fitted(tensor)
    if tensor.untyped_storage()._cdata in taken:
        tensor = tensor.clone()
    taken.add(tensor.untyped_storage()._cdata)
    return tensor


def fitted(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if its storage holds more: a slice of a data set would keep all of it as an activation."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
