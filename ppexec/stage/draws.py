"""Draws: what layers take from PyTorch's own generators, such as nn.Dropout, is the same wherever they compute."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ppexec.models.seeds import derive
from ppexec.stage.tensor_parallel import placements
from ppsim.errors import InputError

LOSS = -1
"""The number of the loss, which may draw too, among the layers."""
_GENERATORS = threading.RLock()  # PyTorch's are global, and ranks may share a process


class Draws:
    """Seeds PyTorch's generators before each layer by (seed, step, sample, layer), and restores them afterwards.

    A layer that does not draw in its first forward is left alone from then on, since seeding takes time.

    Parameters
    ----------
    seed : int
        The run's.

    Examples
    --------
    >>> draws = Draws(0)
    >>> draws.at(step=3, samples=range(8, 12))
    >>> one, other = (draws.call(5, nn.Dropout(0.5), torch.ones(64)) for _ in range(2))
    >>> torch.equal(one, other)
    True
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._now: tuple[int, int] | None = None
        self._quiet: set[int] = set()

    def at(self, step: int, samples: Sequence[int]) -> None:
        """Say what is computed next: the step, and the global index of each sample of the microbatch."""
        self._now = step, samples[0]

    def off(self) -> None:
        """Leave the generators alone from now on."""
        self._now = None

    def is_quiet(self, layer: int) -> bool:
        """Whether a layer (or `LOSS`) was called and drew nothing."""
        return layer in self._quiet

    def call(self, layer: int, function: Callable[..., Any], *values: Any) -> Any:
        """Call a layer or the loss with the generators that belong to it.

        Parameters
        ----------
        layer : int
            Position in the chain, or `LOSS`.
        function : callable
            The layer or the loss.
        *values
            Its arguments.

        Raises
        ------
        InputError
            If a layer draws that is sharded over tp, since each rank would draw for its own slices.
        """
        if self._now is None or layer in self._quiet:
            return function(*values)
        with _GENERATORS:
            generators = _generators()
            kept = [generator.get_state() for generator in generators]
            try:
                for generator in generators:
                    generator.manual_seed(derive(self._seed, "draws", *self._now, layer))
                before = [generator.get_state() for generator in generators]
                result = function(*values)
                after = [generator.get_state() for generator in generators]
            finally:
                for generator, state in zip(generators, kept, strict=True):
                    generator.set_state(state)
        if all(map(torch.equal, before, after)):
            self._quiet.add(layer)
        elif isinstance(function, nn.Module) and any(placements(each) for each in function.parameters()):
            raise InputError(
                f"layer {layer} ({type(function).__name__}) is sharded over tp and draws random numbers, which would "
                "differ from mesh to mesh: take SeededDropout of ppexec.models.dropout, or leave it out of the plan"
            )
        return result


def _generators() -> list[torch.Generator]:
    """The generators that a layer may draw from without naming one."""
    found = [torch.default_generator]
    if torch.cuda.is_initialized():
        found.append(torch.cuda.default_generators[torch.cuda.current_device()])
    return found
