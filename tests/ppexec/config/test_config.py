"""RunConfig: what can run, with every number settled; what cannot is refused with the numbers that work."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ppsim
from ppexec import RunConfig
from ppexec.config.shared_waits import wait_alike
from ppsim.schedule.named import registry


def test_an_empty_configuration_is_a_small_run() -> None:
    config = RunConfig()
    assert (config.layers, config.ranks, config.microbatches, config.micro_batch_size) == (8, 2, 8, 2)
    assert (config.hidden, config.intermediate, config.seq) == (512, 2048, 64)
    assert config.global_batch_size == 16
    assert config.world_size == 2
    assert config.pipeline.name == "afab"
    assert config.threads >= 1


def test_the_assignment_preset_has_its_sizes() -> None:
    config = RunConfig(preset="assignment")
    assert (config.micro_batch_size, config.seq, config.hidden, config.intermediate) == (2, 8192, 4096, 16384)


def test_a_size_that_is_given_beats_the_preset() -> None:
    config = RunConfig(preset="assignment", hidden=64, seq=5, micro_batch_size=3, intermediate=7)
    assert (config.micro_batch_size, config.seq, config.hidden, config.intermediate) == (3, 5, 64, 7)


@given(st.integers(1, 12), st.integers(1, 12))
def test_microbatches_and_global_batch_follow_from_each_other(microbatches: int, size: int) -> None:
    by_count = RunConfig(microbatches=microbatches, micro_batch_size=size)
    by_batch = RunConfig(global_batch_size=microbatches * size, micro_batch_size=size)
    assert by_count == by_batch
    assert by_batch.microbatches == microbatches
    assert by_count.global_batch_size == microbatches * size


@given(st.integers(1, 60), st.integers(1, 12))
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(batch: int, size: int) -> None:
    if batch % size == 0:
        assert RunConfig(global_batch_size=batch, micro_batch_size=size).microbatches == batch // size
        return
    with pytest.raises(ValueError, match=f"global_batch_size {batch} .* micro_batch_size {size}") as caught:
        RunConfig(global_batch_size=batch, micro_batch_size=size)
    remedy = str(caught.value).split("take")[1]
    *batches, micro = [int(number) for number in re.findall(r"\d+", remedy)]
    assert batches == [n for n in (batch // size * size, batch // size * size + size) if n]
    assert micro == max(n for n in range(1, size + 1) if batch % n == 0)


def test_a_batch_and_a_number_of_microbatches_that_disagree_are_refused() -> None:
    with pytest.raises(
        ValueError, match="12 over 5 microbatches is at most 3 samples for each, but micro_batch_size is 2"
    ):
        RunConfig(global_batch_size=12, micro_batch_size=2, microbatches=5)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 40))
def test_a_batch_is_divided_over_the_given_microbatches(microbatches: int, dp: int, more: int) -> None:
    """As torch.tensor_split divides it, and each step has samples of its own."""
    size = microbatches * dp + more
    config = RunConfig(global_batch_size=size, microbatches=microbatches, dp=dp)
    parts = microbatches * dp
    for step in (0, 3):
        wanted = torch.arange(step * size, (step + 1) * size).tensor_split(parts)
        got = [list(config.samples_of(step * parts + index)) for index in range(parts)]
        assert got == [part.tolist() for part in wanted]
    assert config.micro_batch_size == max(map(len, wanted))
    assert replace(config) == config


def test_a_batch_smaller_than_its_microbatches_is_refused() -> None:
    with pytest.raises(ValueError, match="global_batch_size 5 leaves nothing for some of 6 microbatches in 2 replicas"):
        RunConfig(global_batch_size=5, microbatches=3, dp=2)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 40))
def test_replicas_may_have_unequal_parts_of_a_batch(counts: list[int], more: int) -> None:
    parts, size = sum(counts), sum(counts) + more
    config = RunConfig(dp=len(counts), replica_microbatches=", ".join(map(str, counts)), global_batch_size=size)
    assert (list(config.microbatches_by_replica), config.microbatches) == (counts, max(counts))
    assert [pipeline.microbatches for pipeline in config.pipelines] == counts
    assert config.pipeline is config.pipelines[config.longest_replica]
    wanted = torch.arange(size).tensor_split(parts)
    assert [list(config.samples_of(index)) for index in range(parts)] == [part.tolist() for part in wanted]
    assert config.micro_batch_size == max(map(len, wanted))
    assert replace(config) == config
    alone = RunConfig(dp=len(counts), replica_microbatches=config.replica_microbatches, micro_batch_size=3)
    assert alone.global_batch_size == 3 * parts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replica_microbatches": "5,x"}, "whole numbers of 1 or more, one for each replica, such as 5,4, got '5,x'"),
        ({"replica_microbatches": "5,0"}, "whole numbers of 1 or more"),
        ({"replica_microbatches": "5,-1"}, "whole numbers of 1 or more"),
        ({"replica_microbatches": "5,4,3"}, r"5,4,3 has 3 number\(s\), but dp is 2: .* or take dp 3"),
        ({"replica_microbatches": "5,4", "microbatches": 4}, "microbatches is 4: leave one of the two out"),
        ({"replica_microbatches": "5,4", "from_csv": Path("some.csv")}, "leave it out, or take a schedule by name"),
        (
            {"replica_microbatches": "5,4", "shard": 1, "schedule": "v-half"},
            "with shard 1 replicas of 5,4 microbatches would not gather .* one sequence: take shard 2, with",
        ),
        ({"replica_microbatches": "5,4", "global_batch_size": 8}, "some of 9 microbatches in 2 replicas"),
        ({"replica_microbatches": "1,200000"}, "microbatches must be at most 100000"),
        (
            {"replica_microbatches": "4,5", "schedule": "interleaved-1f1b", "microbatch_group": 4},
            "replica 1, 5 microbatches: microbatch_group 4 .* for this replica 4 or 6 microbatches would do",
        ),
        ({"replica_microbatches": "5,4", "schedule": "chimera"}, "dp 2 does not go with chimera"),
        ({"replica_microbatches": "2,9", "schedule": "1f1b", "ranks": 4, "receive_window": 1, "streams": "link",
          "layers": 8, "communication": "early"}, "receive_window 1 is of receives posted ahead"),
    ],
)  # fmt: skip
def test_unequal_replicas_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**{"dp": 2, **values})


def test_unequal_replicas_may_share_parameters_that_each_rank_gathers_in_one_sequence() -> None:
    for schedule, shard in (("v-half", 2), ("zb-h1", 1), ("looped-bfs", 1)):
        assert RunConfig(dp=2, replica_microbatches="5,4", schedule=schedule, shard=shard).is_sharded


def test_replicas_that_would_wait_for_each_other_in_a_circle_do_not_wait_alike() -> None:
    """Rank 0 gathers stage 0 once more: after 0B0, which needs that rank 1 has reduced stage 2; or before 0F1, without
    which rank 1 cannot reduce it."""
    late = "0UNSHARD,0F0,0F1,0B0,0RESHARD,0UNSHARD,0B1,0REDUCE_GRAD\n"
    early = "0UNSHARD,0F0,0RESHARD,0UNSHARD,0F1,0B0,0B1,0REDUCE_GRAD\n"
    other = "1UNSHARD,2UNSHARD,1F0,2F0,2B0,1F1,2F1,2B1,2REDUCE_GRAD,1B0,1B1,1REDUCE_GRAD\n"
    first, second = (ppsim.Schedule.from_csv(rank + other) for rank in (late, early))
    assert wait_alike([first, first])
    assert wait_alike([ppsim.Schedule.from_csv(early + other), second])
    assert not wait_alike([first, second])


def test_replicas_that_complete_stages_in_different_orders_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would wait for the other's sum of another stage. No built-in schedule does so."""

    def order(rank: int, ranks: int, microbatches: int) -> ppsim.Order:
        every = range(microbatches)
        forwards = [ppsim.Action(stage, ppsim.Kind.F, mb) for stage in (0, 1) for mb in every]
        inputs = [ppsim.Action(stage, ppsim.Kind.I, mb) for stage in (1, 0) for mb in every]
        weights = [ppsim.Action(stage, ppsim.Kind.W, mb) for stage in ((1, 0) if microbatches % 2 else (0, 1))
                   for mb in every]  # fmt: skip
        return ppsim.Order.of([*forwards, *inputs, *weights])

    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    registry.register("by-parity", order, stages_per_rank=2)
    values = {"dp": 2, "ranks": 1, "schedule": "by-parity"}
    assert RunConfig(**values, replica_microbatches="3,5").step_microbatches == 8
    with pytest.raises(ValueError, match="by-parity completes the stages of a rank in another order with 4 microbatc"):
        RunConfig(**values, replica_microbatches="5,4")


@given(st.integers(1, 40), st.integers(1, 8))
def test_layers_that_do_not_divide_are_refused_with_the_nearest_that_do(layers: int, ranks: int) -> None:
    if layers % ranks == 0:
        assert RunConfig(layers=layers, ranks=ranks).layer_sizes == [layers // ranks] * ranks
        return
    with pytest.raises(ValueError, match=rf"\b{layers} layers .*\b{ranks} stages") as caught:
        RunConfig(layers=layers, ranks=ranks)
    message = str(caught.value)
    if layers > ranks:
        below, above = (int(number) for number in re.findall(r"take (\d+) or (\d+) layers", message)[0])
        assert RunConfig(layers=below, ranks=ranks).layers == layers - layers % ranks
        assert RunConfig(layers=above, ranks=ranks).layers == below + ranks
    else:
        assert f"1 to {layers} stages" in message


def test_layers_are_cut_into_the_sizes_given() -> None:
    assert RunConfig(layers=7, ranks=3, partition="4,1,2").layer_sizes == [4, 1, 2]


@pytest.mark.parametrize("partition", ["4,1", "4,1,1", "4,0,3", "8,-1,0", "", "a,b", "evenly", "1.5,2,3.5"])
def test_sizes_that_do_not_cut_the_layers_are_refused(partition: str) -> None:
    with pytest.raises(ValueError, match=r"sizes|partition"):
        RunConfig(layers=7, ranks=3, partition=partition)


def test_an_optimal_cut_needs_costs_and_follows_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimal partition needs the layers' costs"):
        RunConfig(layers=3, partition="optimal")
    path = tmp_path / "costs.json"
    seconds = (1.0, 1.0, 5.0)
    layers = [ppsim.LayerCost(name=str(s), forward_s=s, backward_input_s=s, backward_weight_s=s) for s in seconds]
    ppsim.save_costs(layers, path)
    assert RunConfig(layers=3, partition="optimal", costs=path).layer_sizes == [2, 1]
    with pytest.raises(ValueError, match=r"has 3 layers, but layers is 4: pass 3"):
        RunConfig(layers=4, costs=path)


WHOLE = ["layers", "dp", "tp", "steps", "hidden", "intermediate", "seq", "micro_batch_size", "microbatches"]
WHOLE += ["global_batch_size", "ranks", "threads", "warmup", "receive_window"]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [-1, 1.5, True, "2", None, 10**12])
def test_a_number_that_is_not_whole_or_in_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        RunConfig(**{name: value})


@pytest.mark.parametrize("name", ["layers", "dp", "tp", "steps"])
def test_what_has_no_default_cannot_be_0(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of 1 or more, got 0"):
        RunConfig(**{name: 0})


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan, math.inf, 1e9])
def test_a_timeout_is_a_time(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        RunConfig(timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "nccl"}, "nccl.*needs an NVIDIA GPU.*take --backend gloo"),
        ({"schedule": "afap"}, "unknown schedule 'afap': did you mean 'afab'"),
        ({"stages_per_rank": 3}, "afab has 1 stage"),
    ],
)
def test_what_is_not_there_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**changes)


def test_a_schedule_file_sets_ranks_and_microbatches(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(ppsim.build_schedule("afab", ranks=3, microbatches=5).to_csv())
    config = RunConfig(from_csv=path, layers=6)
    assert (config.ranks, config.microbatches, config.global_batch_size) == (3, 5, 10)
    assert config.pipeline.name == "mine"
    with pytest.raises(ValueError, match="has 3 ranks, but ranks is 2: leave it out"):
        RunConfig(from_csv=path, layers=6, ranks=2)
    with pytest.raises(ValueError, match="has 5 microbatches, but microbatches is 4"):
        RunConfig(from_csv=path, layers=6, microbatches=4)


def test_a_schedule_file_from_a_spreadsheet_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """ppsim read such a file and ppexec did not, since each opened it in a way of its own."""
    path = tmp_path / "sheet.csv"
    path.write_bytes(b"\xef\xbb\xbf" + ppsim.build_schedule("afab", ranks=2, microbatches=2).to_csv().encode())
    assert RunConfig(from_csv=path).ranks == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no action"),
        (b"\xff\xfe\x00", "is not text"),
        (b"0F0,0B0\n0F1", "stage 0 computes on rank 0 and on rank 1"),
        (b"0F0junk\n", "row 1, column 1: '0F0junk' is not an action"),
        (b"0F0\n1F0,1B0\n", "stage 0, microbatch 0 has no backward"),
        (b"hello", "'hello' is not an action"),
    ],
)
def test_a_damaged_schedule_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        RunConfig(from_csv=path)


def test_a_schedule_that_would_hang_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "hang.csv"
    path.write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    with pytest.raises(ppsim.ScheduleError, match="wait for ever"):
        RunConfig(from_csv=path)


def test_an_evaluation_runs_the_forwards_alone() -> None:
    schedule = RunConfig(forward_only=True, microbatches=3).pipeline
    assert [[str(action) for action in order] for order in schedule.orders] == [
        ["0F0", "0F1", "0F2"],
        ["1F0", "1F1", "1F2"],
    ]


# Fewer than 2 p microbatches


@given(st.integers(2, 6), st.data())
def test_few_microbatches_warn_with_the_bubble_and_the_number_that_halves_it(ranks: int, data: st.DataObject) -> None:
    microbatches = data.draw(st.integers(1, 2 * ranks - 1))
    config = RunConfig(layers=ranks, ranks=ranks, microbatches=microbatches)
    (warning,) = config.warnings()
    bubble = (ranks - 1) / (microbatches + ranks - 1)
    # (p - 1) / (m' + p - 1) <= bubble / 2 from m' = 2 m + p - 1 on.
    halving = 2 * microbatches + ranks - 1
    assert f"{microbatches} microbatches over {ranks} ranks are fewer than 2 x ranks = {2 * ranks}" in warning
    assert f"a bubble fraction of {bubble:.3f}; {halving} microbatches would halve it" in warning


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (2, 4), (3, 6), (4, 9)])
def test_enough_microbatches_do_not_warn(ranks: int, microbatches: int) -> None:
    assert RunConfig(layers=ranks, ranks=ranks, microbatches=microbatches).warnings() == []


def test_a_configuration_as_json_values_makes_the_same_configuration(tmp_path: Path) -> None:
    path = tmp_path / "one.csv"
    path.write_text("0F0,0B0\n")
    config = RunConfig(from_csv=path, layers=2)
    values = config.to_dict()
    assert values["from_csv"] == str(path)
    assert RunConfig(**{**values, "from_csv": Path(values["from_csv"])}) == config


def test_a_layout_cuts_a_gpt_with_its_embedding_and_head() -> None:
    config = RunConfig(model="gpt", layers=4, hidden=32, ranks=2, layout="Et*3|tL")
    assert config.layer_sizes == [4, 2]


@pytest.mark.parametrize(
    ("layout", "says"),
    [("Et*3||tL", "3 stages, and 2"), ("Et*2|tL", "5 layers"), ("t*3|t*3", "write the letters EttttL")],
)
def test_a_layout_of_another_model_is_refused(layout: str, says: str) -> None:
    with pytest.raises(ppsim.InputError, match=says):
        RunConfig(model="gpt", layers=4, hidden=32, ranks=2, layout=layout)


def test_an_empty_stage_is_not_run() -> None:
    with pytest.raises(ppsim.InputError, match="leaves stage 1 empty"):
        RunConfig(model="gpt", layers=4, hidden=32, ranks=3, layout="Et*3||tL")


@pytest.mark.parametrize("option", ["stages_per_rank", "microbatch_group"])
def test_options_of_a_named_schedule_have_no_meaning_for_a_file(tmp_path: Path, option: str) -> None:
    """They were passed over in silence."""
    path = tmp_path / "schedule.csv"
    path.write_text(ppsim.build_schedule("1f1b", ranks=2, microbatches=4).to_csv())
    with pytest.raises(ppsim.InputError, match=f"{option} 2 is of a schedule by name"):
        RunConfig(from_csv=path, **{option: 2})


def test_stated_communication_is_refused_where_nothing_waits_for_it() -> None:
    """Cause of a bug: backend "local" ran it without a word as if it had been derived; the prediction did not."""
    with pytest.raises(ppsim.InputError, match="take communication 'derived'"):
        RunConfig(backend="local", device="threads", communication="early")
    assert RunConfig(backend="local", device="threads", communication="derived").pipeline.communication is None
