"""Layout: which layers form which stage, as Megatron's `--pipeline-model-parallel-layout` spells it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from ppsim.checks import check_fields, checked, shown
from ppsim.errors import InputError

LETTERS = {"E": "embedding", "t": "transformer layer", "m": "multi-token prediction layer", "L": "head with the loss"}
_MOST = 100_000  # letters and bars that repeats may write out: beyond any model, so more is a typing error
_GROUP = re.compile(r"\(([^()]+)\)\*(\d+)", re.ASCII)
_REPEATED = re.compile(r"([EtmL|])\*(\d+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layers of each stage.

    Parameters
    ----------
    stages : sequence of str
        A letter for each layer of each stage: E the embedding, t a transformer layer, m a layer of multi-token
        prediction, L the head with the loss. A stage without layers, which passes activations on, is "".

    Raises
    ------
    InputError
        For other letters, no layers, or layers in another order than E, t, m, L with at most one E and one L; if the
        first stage is empty; or if there is an L and it is not in the last stage.

    Notes
    -----
    With p pipeline ranks, stage s is Megatron's pipeline rank s mod p and virtual stage s // p.

    Examples
    --------
    >>> layout = Layout.parse("Et*3|(tt|)*29,m|L")
    >>> len(layout.stages), layout.stages[:2], sum(layout.sizes)
    (32, ('Ettt', 'tt'), 64)
    >>> str(layout)
    'Ettt|(tt|)*29m|L'
    """

    stages: Sequence[str]

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "stages", tuple(self.stages))
        _check_order(self.stages)

    @classmethod
    @checked
    def parse(cls, text: str) -> Layout:
        """Read a layout.

        Parameters
        ----------
        text : str
            Stages parted by bars. `t*3` is three layers; `(tt|)*29` repeats what is in parentheses, bars too. Commas
            and spaces mean nothing.

        Raises
        ------
        InputError
            If the text cannot be read, or its stages are refused as in `Layout`.
        """
        try:
            unrolled = re.sub(r"[,\s]", "", text)
            for pattern in (_GROUP, _REPEATED):
                unrolled = _unroll(pattern, unrolled)
            if wrong := re.search(r"[^EtmL|]", unrolled):
                raise InputError(
                    f"{wrong[0]!r} cannot be read: write E, t, m, L and | alone, repeated as in t*3 or (tt|)*29"
                )
            return cls(stages=unrolled.split("|"))
        except InputError as error:
            raise InputError(f"layout {shown(text)}: {error}") from None

    @classmethod
    @checked
    def of_sizes(
        cls, sizes: Sequence[int], *, embedding: bool = True, prediction_layers: int = 0, head: bool = True
    ) -> Layout:
        """The layout whose stages have these numbers of layers.

        Parameters
        ----------
        sizes : sequence of int, shape (stages,)
            Layers of each stage, those of embedding and head among them.
        embedding, head : bool
            Whether the first layer is the embedding and the last the head.
        prediction_layers : int
            How many layers before the head are of multi-token prediction.

        Raises
        ------
        InputError
            If there are fewer layers than embedding, prediction layers and head, or the stages are refused as in
            `Layout`.
        """
        if any(size < 0 for size in sizes) or prediction_layers < 0:
            raise InputError(f"sizes {list(sizes)}, prediction_layers {prediction_layers}: give numbers of 0 or more")
        ends = int(embedding) + prediction_layers + int(head)
        if sum(sizes) < ends:
            raise InputError(
                f"{sum(sizes)} layers cannot hold embedding, prediction layers and head, {ends}: give more"
            )
        letters = "E" * embedding + "t" * (sum(sizes) - ends) + "m" * prediction_layers + "L" * head
        stages, start = [], 0
        for size in sizes:
            stages.append(letters[start : start + size])
            start += size
        return cls(stages=stages)

    @property
    def sizes(self) -> list[int]:
        """The number of layers of each stage, shape (stages,); 0 for a stage that passes activations on."""
        return [len(stage) for stage in self.stages]

    def check_counts(self, layers: int, stages: int) -> None:
        """Check that the layout is of that many layers and stages.

        Raises
        ------
        InputError
            If it is not. The message has both counts, and the layout's layers by letter.
        """
        if len(self.stages) != stages:
            raise InputError(
                f"layout {self} has {len(self.stages)} stages, and {stages} are wanted: write {stages - 1} bars, or "
                f"take {len(self.stages)} stages"
            )
        if sum(self.sizes) != layers:
            letters = "".join(self.stages)
            counts = ", ".join(f"{letters.count(each)} {each}" for each in LETTERS if each in letters)
            raise InputError(
                f"layout {self} has {sum(self.sizes)} layers ({counts}), and there are {layers}: write one letter for "
                "each, in order"
            )

    def __str__(self) -> str:
        """Runs of a layer written as `t*3` and runs of equal stages as `(tt|)*29`, where that is shorter."""
        parts: list[str] = []
        *before, last = self.stages
        for stage, same in groupby(before):
            count = len(list(same))
            written = f"{_counted(stage)}|"
            repeated = f"({written})*{count}" if stage else f"|*{count}"
            parts.append(min((written * count, repeated), key=len))
        return "".join(parts) + _counted(last)


def _unroll(pattern: re.Pattern[str], text: str) -> str:
    """Write out what is repeated, if it does not get too long."""
    # Numbers with more digits than the largest count are not even read: Python refuses thousands of digits.
    length = len(text)
    for match in pattern.finditer(text):
        if len(match[2]) > len(str(_MOST)) or (length := length + len(match[1]) * int(match[2])) > _MOST:
            raise InputError(f"{shown(match[0])} is longer than {_MOST} letters: repeat fewer times")
    return pattern.sub(lambda match: match[1] * int(match[2]), text)


def _counted(stage: str) -> str:
    """The stage with runs of a layer written as `t*3` where that is shorter."""
    runs = ((letter, len(list(same))) for letter, same in groupby(stage))
    return "".join(min((letter * count, f"{letter}*{count}"), key=len) for letter, count in runs)


def _check_order(stages: Iterable[str]) -> None:
    stages = tuple(stages)
    letters = "".join(stages)
    unknown = next((each for each in letters if each not in LETTERS), None)
    if unknown is not None:
        raise InputError(f"{unknown!r} is no layer: write " + ", ".join(f"{key} ({LETTERS[key]})" for key in LETTERS))
    if not letters:
        raise InputError("there is no layer: write at least one t")
    if not re.fullmatch("E?t*m*L?", letters):
        raise InputError(
            "layers must come in the order E, t, m, L, with at most one E and one L: what a microbatch passes first "
            "stands first"
        )
    if not stages[0]:
        raise InputError("the first stage is empty and receives nothing that it could pass on: give it a layer")
    if "L" in letters and not stages[-1].endswith("L"):
        raise InputError("the loss must stand in the last stage: leave out the stages after L")
