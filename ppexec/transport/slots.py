"""Places: where in shared memory messages lie while they are under way."""

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
    """What lies where: a word for each message, then for each link as many places as it has messages in a step.

    starts: of each link's places, shape (links,). place_bytes: of one of them, shape (links,). links: of each message,
    shape (messages,). size_bytes: of all. So there is always a free place. But memory that nobody has written to takes
    none, and a sender takes a place that was used before if it knows of a free one: few are touched, and they stay in
    the caches.
    """

    starts: tuple[int, ...]
    place_bytes: tuple[int, ...]
    links: tuple[int, ...]
    size_bytes: int

    @classmethod
    def of(cls, program: Program, specs: Sequence[TensorSpec]) -> Layout:
        """The layout for a program's messages, of which each has its spec."""
        link = program.messages.link
        largest = np.zeros(len(program.links()), np.int64)
        np.maximum.at(largest, link, [spec.size_bytes for spec in specs])
        place = -(-largest // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        first = -(-_WORD_BYTES * len(specs) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        ends = first + np.cumsum(place * np.bincount(link, minlength=len(largest)))
        return cls(
            starts=tuple([first, *ends.tolist()][:-1]),
            place_bytes=tuple(place.tolist()),
            links=tuple(link.tolist()),
            size_bytes=int(ends[-1]) if len(ends) else first,
        )


class Places:
    """One rank's view of the places: as sender it says where a message goes, as receiver it finds it there.

    A message's word is 0, or 1 + the number of its place from when it is there until its receiver has taken it. Only
    the sender of a link takes places, and it learns from the words of those it sent that they are free again.
    """

    def __init__(self, layout: Layout, specs: Sequence[TensorSpec], memory: memoryview) -> None:
        self.words = memory[: _WORD_BYTES * len(specs)].cast("q")
        self._layout, self._specs = layout, specs
        self._whole = torch.frombuffer(memory, dtype=torch.uint8)
        counts = np.bincount(layout.links, minlength=len(layout.starts)).tolist()
        self._free = [list(range(count))[::-1] for count in counts]
        self._under_way: list[dict[int, int]] = [{} for _ in counts]  # message -> its place, in the order of sending
        self._tensors: dict[tuple[int, int, TensorSpec], torch.Tensor] = {}

    def take(self, message: int) -> int:
        """A free place for a message whose word is 0; the sender's."""
        link = self._layout.links[message]
        free, under_way, words = self._free[link], self._under_way[link], self.words
        if message in under_way:  # a step ago
            free.append(under_way.pop(message))
        while under_way and not words[oldest := next(iter(under_way))]:
            free.append(under_way.pop(oldest))
        place = under_way[message] = free.pop()
        return place

    def tensor(self, message: int, place: int) -> torch.Tensor:
        """The memory of a place, as the tensor that this message is."""
        link, spec = self._layout.links[message], self._specs[message]
        found = self._tensors.get((link, place, spec))
        if found is None:
            start = self._layout.starts[link] + place * self._layout.place_bytes[link]
            found = self._whole[start : start + spec.size_bytes].view(spec.dtype).view(spec.shape)
            self._tensors[link, place, spec] = found
        return found
