"""The schedules of the field by name.

A schedule is one function that writes one rank's order; or, where its rule sees all ranks at once, every rank's.
"""

from __future__ import annotations

from ppsim.schedule import v_placement
from ppsim.schedules.afab import afab, afab_eager
from ppsim.schedules.controllable_memory import v_half, v_min
from ppsim.schedules.interleaved import interleaved_1f1b, interleaved_zb, looped_bfs
from ppsim.schedules.one_f_one_b import one_f_one_b
from ppsim.schedules.registry import build_schedule, natural_stages_per_rank, register, schedule_names
from ppsim.schedules.v_shape import dualpipe_v, zb_v
from ppsim.schedules.zero_bubble import zb_h1, zb_h2

register("afab", afab, also="gpipe")
register("afab-eager", afab_eager)
register("1f1b", one_f_one_b)
register("interleaved-1f1b", interleaved_1f1b, stages_per_rank=2, chunked=True)
register("looped-bfs", looped_bfs, stages_per_rank=2, chunked=True)
register("zb-h1", zb_h1)
register("zb-h2", zb_h2)
register("interleaved-zb", interleaved_zb, stages_per_rank=2, chunked=True)
register("zb-v", zb_v, stages_per_rank=2, placement=v_placement)
register("v-half", v_half, stages_per_rank=2, placement=v_placement, all_ranks=True)
register("v-min", v_min, stages_per_rank=2, placement=v_placement, all_ranks=True)
register("dualpipe-v", dualpipe_v, stages_per_rank=2, placement=v_placement)

__all__ = ["build_schedule", "natural_stages_per_rank", "register", "schedule_names"]
