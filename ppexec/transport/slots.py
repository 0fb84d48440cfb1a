"""Slots: where in shared memory messages lie while they are under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ppexec.models.shapes import TensorSpec
from ppsim import Program

_ALIGNMENT_BYTES = 64
_WORD_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything lies in the shared memory: first a word per message, then the slots of each link.

    A link has as many slots as it has messages in a step, so a slot is always free. This costs little: memory that
    nobody has written to takes no space. A sender prefers a slot that was used before, so few slots are touched, and
    these stay in the caches.

    Parameters
    ----------
    starts : tuple of int, shape (links,)
        Offset of each link's first slot, in bytes.
    slot_bytes : tuple of int, shape (links,)
        Size of one slot of each link.
    links : tuple of int, shape (messages,)
        The link of each message.
    size_bytes : int
        Size of words and slots together.
    """

    starts: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    links: tuple[int, ...]
    size_bytes: int

    @classmethod
    def of(cls, program: Program, specs: Sequence[TensorSpec]) -> Layout:
        """Lay out the messages of a program; `specs` has the shape (messages,)."""
        link = program.messages.link
        largest = np.zeros(len(program.links()), np.int64)
        np.maximum.at(largest, link, [spec.size_bytes for spec in specs])
        slot_bytes = -(-largest // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        first = -(-_WORD_BYTES * len(specs) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        ends = first + np.cumsum(slot_bytes * np.bincount(link, minlength=len(largest)))
        return cls(
            starts=tuple([first, *ends.tolist()][:-1]),
            slot_bytes=tuple(slot_bytes.tolist()),
            links=tuple(link.tolist()),
            size_bytes=int(ends[-1]) if len(ends) else first,
        )

    def holds(self, specs: Sequence[TensorSpec]) -> bool:
        """Whether messages of these specs fit in the slots of their links; `specs` has the shape (messages,)."""
        return all(spec.size_bytes <= self.slot_bytes[link] for spec, link in zip(specs, self.links, strict=True))


class Slots:
    """One rank's view of the slots: a sender chooses the slot of a message, its receiver reads it from there.

    The word of a message tells whether the message is there. A sender sets it to 1 + the number of the slot, and the
    receiver sets it back to 0 when it has copied the message. Only the sender of a link chooses slots. It sees from the
    words of the messages that it sent which of its slots are free again.

    Parameters
    ----------
    layout : Layout
        Where words and slots lie.
    specs : sequence of TensorSpec, shape (messages,)
        Shape and type of each message.
    memory : memoryview
        The shared memory, at least `layout.size_bytes` long.
    """

    def __init__(self, layout: Layout, specs: Sequence[TensorSpec], memory: memoryview) -> None:
        self.words = memory[: _WORD_BYTES * len(specs)].cast("q")
        self._layout = layout
        self._whole = torch.frombuffer(memory, dtype=torch.uint8)
        counts = np.bincount(layout.links, minlength=len(layout.starts)).tolist()
        self._free = [list(range(count))[::-1] for count in counts]
        self._under_way: list[dict[int, int]] = [{} for _ in counts]  # message -> its slot, in the order of sending
        self._tensors: dict[tuple[int, int, int], torch.Tensor] = {}  # by link, slot and number of the spec
        self._numbers: dict[TensorSpec, int] = {}
        self.use(specs)

    def use(self, specs: Sequence[TensorSpec]) -> None:
        """Take the specs of the next steps, which the layout holds; shape (messages,)."""
        self._specs = list(specs)
        # A number stands for a spec, since to look up a spec takes as long as to copy a small message.
        self._spec_of = [self._numbers.setdefault(spec, len(self._numbers)) for spec in specs]

    def take(self, message: int) -> int:
        """Choose a free slot for a message whose word is 0; only its sender may call this."""
        link = self._layout.links[message]
        free, under_way, words = self._free[link], self._under_way[link], self.words
        if message in under_way:  # sent in the step before, and received since
            free.append(under_way.pop(message))
        while under_way and not words[oldest := next(iter(under_way))]:
            free.append(under_way.pop(oldest))
        slot = under_way[message] = free.pop()
        return slot

    def tensor(self, message: int, slot: int) -> torch.Tensor:
        """A slot's memory, as a tensor with the message's shape and type."""
        key = link, slot, _ = self._layout.links[message], slot, self._spec_of[message]
        found = self._tensors.get(key)
        if found is None:
            spec = self._specs[message]
            start = self._layout.starts[link] + slot * self._layout.slot_bytes[link]
            found = self._whole[start : start + spec.size_bytes].view(spec.dtype).view(spec.shape)
            self._tensors[key] = found
        return found
