"""Registry: builds schedules by name, and takes new ones in."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import cast

from ppsim.checks import check_memory, check_whole, checked
from ppsim.errors import InputError
from ppsim.schedule.named.afab import afab, afab_eager
from ppsim.schedule.named.both_ways import chimera, dualpipe
from ppsim.schedule.named.controllable_memory import v_half, v_min
from ppsim.schedule.named.interleaved import interleaved_1f1b, interleaved_overlap, interleaved_zb, looped_bfs
from ppsim.schedule.named.one_f_one_b import eager_one_f_one_b, one_f_one_b
from ppsim.schedule.named.v_shape import dualpipe_v, zb_v
from ppsim.schedule.named.zero_bubble import zb_h1, zb_h2
from ppsim.schedule.order import Order
from ppsim.schedule.placement import loop_placement, v_placement
from ppsim.schedule.schedule import Schedule

OrderOfRank = Callable[..., Order]
OrdersOfAll = Callable[..., Sequence[Order]]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What `register` was given; `orders` gives all ranks' orders whether or not its rule sees them at once."""

    name: str
    orders: OrdersOfAll
    placement: Callable[[int, int], tuple[int, ...]]
    stages_per_rank: int
    chunked: bool
    grouped: bool
    copies: int
    requirement: Callable[[int, int, int], str | None]


_ACTION_BYTES = 64  # at least, of an action while a schedule is built
_FEW_ACTIONS = 4096  # of schedules that are kept: a few megabytes in all
_ENTRIES: dict[str, _Entry] = {}
_ALIASES: dict[str, str] = {}


def _anything(ranks: int, microbatches: int, stages_per_rank: int) -> None:
    """No requirement."""
    return


def _both_ways(ranks: int, microbatches: int, stages_per_rank: int) -> str | None:
    """Ranks in two equal halves, and a microbatch for each direction."""
    if ranks % 2:
        near = f"{ranks - 1} or {ranks + 1}" if ranks > 1 else "2"
        return f"needs an even number of ranks, half of them nearer to each end, got {ranks}: take {near}"
    if microbatches < 2:
        return f"needs a microbatch for each of its two directions, got {microbatches}: take 2 or more"
    return None


def _in_equal_halves(ranks: int, microbatches: int, stages_per_rank: int) -> str | None:
    """As `_both_ways`, with as many microbatches from each end."""
    if microbatches % 2:
        near = f"{microbatches - 1} or {microbatches + 1}" if microbatches > 1 else "2"
        return f"needs as many microbatches from each end, got {microbatches}: take {near}"
    return _both_ways(ranks, microbatches, stages_per_rank)


def register(
    name: str,
    order: OrderOfRank | OrdersOfAll,
    *,
    also: str | None = None,
    all_ranks: bool = False,
    placement: Callable[[int, int], tuple[int, ...]] = loop_placement,
    stages_per_rank: int = 1,
    chunked: bool = False,
    grouped: bool = False,
    copies: int = 1,
    requirement: Callable[[int, int, int], str | None] = _anything,
) -> None:
    """Make a schedule known by name.

    Parameters
    ----------
    name : str
        The name; a name that is known is replaced.
    order : callable
        Called as `order(rank, ranks, microbatches)`; gives that rank's Order.
    also : str, optional
        A further name, which `schedule_names` does not list.
    all_ranks : bool
        True for a rule that sees all ranks at once: `order` is called without the rank and gives one Order per rank.
    placement : callable
        (ranks, stages_per_rank) -> the rank of each stage.
    stages_per_rank : int
        The natural number of stages per rank.
    chunked : bool
        Whether other numbers are possible; then `order` is called with the number as a further argument.
    grouped : bool
        Whether microbatches pass through a rank's stages in rounds of a size that may be chosen; then `order` is called
        with that size, or None, as the last argument.
    copies : int
        Copies of the model that the ranks hold; see `Schedule`.
    requirement : callable
        (ranks, microbatches, stages_per_rank) -> None, or what is wrong and the remedy.
    """
    _ENTRIES[name] = _Entry(
        name=name,
        orders=cast(OrdersOfAll, order) if all_ranks else _rank_by_rank(cast(OrderOfRank, order)),
        placement=placement,
        stages_per_rank=stages_per_rank,
        chunked=chunked,
        grouped=grouped,
        copies=copies,
        requirement=requirement,
    )
    if also:
        _ALIASES[also] = name


def _rank_by_rank(order: OrderOfRank) -> OrdersOfAll:
    """The orders of all ranks from a rule for one."""

    def orders(ranks: int, *rest: int | None) -> list[Order]:
        return [order(rank, ranks, *rest) for rank in range(ranks)]

    return orders


def schedule_names() -> list[str]:
    """Every schedule that `build_schedule` knows, without aliases."""
    return list(_ENTRIES)


def _entry(name: str) -> _Entry:
    """What is known under a name; raises InputError with the nearest name."""
    try:
        return _ENTRIES[_ALIASES.get(name, name)]
    except KeyError:
        close = difflib.get_close_matches(name, [*_ENTRIES, *_ALIASES], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"unknown schedule {name!r}: {hint}known are {', '.join(_ENTRIES)}") from None


def natural_stages_per_rank(name: str) -> int:
    """The number of stages per rank that `build_schedule` takes when none is given. Raises InputError as that does."""
    return _entry(name).stages_per_rank


def takes_stages_per_rank(name: str) -> bool:
    """Whether a schedule leaves the number of stages per rank free. Raises InputError as `build_schedule` does."""
    return _entry(name).chunked


def schedule_copies(name: str) -> int:
    """How many copies of the model the ranks of a schedule hold. Raises InputError as `build_schedule` does."""
    return _entry(name).copies


def schedule_placement(name: str, ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """The rank of each stage, without building the orders. Raises InputError as `build_schedule` does."""
    return _entry(name).placement(ranks, stages_per_rank)


def unmet_requirement(name: str, ranks: int, microbatches: int, stages_per_rank: int) -> str | None:
    """What `build_schedule` would refuse about these numbers, and the remedy; None if nothing."""
    entry = _entry(name)
    if stages_per_rank != entry.stages_per_rank and not entry.chunked:
        return (
            f"{entry.name} has {entry.stages_per_rank} stage(s) per rank, got stages_per_rank={stages_per_rank}: "
            f"leave it out or set it to {entry.stages_per_rank}"
        )
    complaint = entry.requirement(ranks, microbatches, stages_per_rank)
    return f"{entry.name} {complaint}" if complaint else None


@checked
def build_schedule(
    name: str,
    *,
    ranks: int,
    microbatches: int,
    stages_per_rank: int | None = None,
    microbatch_group: int | None = None,
) -> Schedule:
    """Build a schedule by name.

    Parameters
    ----------
    name : str
        One of `schedule_names()`, or "gpipe" for "afab".
    ranks : int
        Number of ranks, p >= 1.
    microbatches : int
        Number of microbatches, m >= 1.
    stages_per_rank : int, optional
        Stages on each rank, v; None takes the schedule's natural number.
    microbatch_group : int, optional
        Microbatches of a round of an interleaved schedule, p or more. None takes rounds of p, or a few more where p
        does not divide m.

    Returns
    -------
    Schedule

    Raises
    ------
    InputError
        For an unknown name, or numbers that the schedule does not allow, with the nearest that work.

    Examples
    --------
    >>> print(build_schedule("1f1b", ranks=2, microbatches=2).to_csv(), end="")
    0F0,0F1,0B0,0B1
    1F0,1B0,1F1,1B1
    """
    entry = _entry(name)
    for field, value in (
        ("ranks", ranks),
        ("microbatches", microbatches),
        ("stages_per_rank", stages_per_rank),
        ("microbatch_group", microbatch_group),
    ):
        if value is not None:
            check_whole(field, value)
    v = entry.stages_per_rank if stages_per_rank is None else stages_per_rank
    complaint = unmet_requirement(name, ranks, microbatches, v)
    if complaint:
        raise InputError(complaint)
    if microbatch_group is not None:
        _check_group(entry, ranks, microbatches, microbatch_group)
    actions = 2 * ranks * v * microbatches // entry.copies
    check_memory(
        f"{ranks} ranks with {v} stage(s) each and {microbatches} microbatches",
        _ACTION_BYTES * actions,
        "take fewer microbatches or ranks",
    )
    build = _built_before if actions <= _FEW_ACTIONS else _built
    # Plain numbers: NumPy's are equal to them, and whoever asks next would get them.
    group = None if microbatch_group is None else int(microbatch_group)
    return build(entry, int(ranks), int(microbatches), int(v), group)


def _built(entry: _Entry, ranks: int, microbatches: int, v: int, microbatch_group: int | None) -> Schedule:
    extra = (*((v,) if entry.chunked else ()), *((microbatch_group,) if entry.grouped else ()))
    return Schedule(
        orders=tuple(entry.orders(ranks, microbatches, *extra)),
        placement=entry.placement(ranks, v),
        microbatches=microbatches,
        name=entry.name,
        copies=entry.copies,
    )


# Studies ask for the same few schedules with many costs. A schedule cannot change, and keeps the tables made from it.
_built_before = lru_cache(maxsize=64)(_built)


def _check_group(entry: _Entry, ranks: int, microbatches: int, group: int) -> None:
    """Refuse rounds that the schedule does not have, and those in which the pipeline would run empty."""
    if not entry.grouped:
        having = ", ".join(each.name for each in _ENTRIES.values() if each.grouped)
        raise InputError(f"{entry.name} has no rounds of microbatches: leave microbatch_group out, or take {having}")
    if group < ranks:
        raise InputError(
            f"microbatch_group {group} is below {ranks} ranks, so that ranks would wait: take {ranks} or more"
        )
    last = microbatches % group
    if 0 < last < ranks and microbatches > group:
        raise InputError(
            f"microbatch_group {group} leaves a last round of {last} of {microbatches} microbatches, fewer than "
            f"{ranks} ranks: take a group that divides them, or leaves that many"
        )


register("afab", afab, also="gpipe")
register("afab-eager", afab_eager)
register("1f1b", one_f_one_b)
register("1f1b-eager", eager_one_f_one_b)
register("interleaved-1f1b", interleaved_1f1b, stages_per_rank=2, chunked=True, grouped=True)
register("looped-bfs", looped_bfs, stages_per_rank=2, chunked=True)
register("1f1b-overlap", partial(interleaved_overlap, stages_per_rank=1))
register("interleaved-1f1b-overlap", interleaved_overlap, stages_per_rank=2, chunked=True, grouped=True)
register("zb-h1", zb_h1)
register("zb-h2", zb_h2)
register("interleaved-zb", interleaved_zb, stages_per_rank=2, chunked=True, grouped=True)
register("zb-v", zb_v, stages_per_rank=2, placement=v_placement)
register("v-half", v_half, stages_per_rank=2, placement=v_placement, all_ranks=True)
register("v-min", v_min, stages_per_rank=2, placement=v_placement, all_ranks=True)
register("dualpipe-v", dualpipe_v, stages_per_rank=2, placement=v_placement)
# The other copy's stages go back over the ranks, so that they stand as on the way up of a V.
register("dualpipe", dualpipe, stages_per_rank=2, placement=v_placement, copies=2, requirement=_in_equal_halves)
register("chimera", chimera, stages_per_rank=2, placement=v_placement, copies=2, requirement=_both_ways)
