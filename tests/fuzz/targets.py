"""Targets: each reader as a function of bytes, with seeds. Anything but an InputError that leaves one is a finding."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ppsim
from ppsim import Conditions, InputError, LayerCost, Network, Reduction, Schedule, StageCost, Trace
from ppsim.costs.layout import Layout
from tests.support.kineto import write_kineto
from tests.support.primus import write_primus

COST = StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, output_bytes=8)
LAYER = LayerCost(forward_s=1.5, backward_input_s=1, backward_weight_s=1, output_bytes=8, name="a")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A reader, what it is first given, and what it is given as a file's name."""

    read: Callable[[bytes], Any]
    seeds: Callable[[], list[bytes]]


@contextlib.contextmanager
def _file(data: bytes, suffix: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path = Path(folder, f"input{suffix}")
        path.write_bytes(data)
        yield path


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def read_schedule(data: bytes) -> None:
    """A schedule that is read and checked can be written, read again and predicted."""
    schedule = Schedule.from_csv(_text(data))
    schedule.check()
    assert Schedule.from_csv(schedule.to_csv(messages=True)).orders == schedule.orders
    ppsim.simulate(schedule, [COST] * schedule.stages)


def read_costs(data: bytes) -> None:
    """Costs that are read can be cut into stages and written."""
    with _file(data, ".json" if data[:1] == b"{" else ".csv") as path:
        layers = ppsim.load_costs(path)
        ppsim.partition(layers, stages=min(2, len(layers)), method="optimal")
        ppsim.save_costs(layers, path)
        assert ppsim.load_costs(path) == layers


def read_network(data: bytes) -> None:
    """A network that is read can be written, and predicts."""
    with _file(data, ".json") as path:
        network = Network.from_file(path)
        network.to_file(path)
        schedule = ppsim.build_schedule("afab", ranks=2, microbatches=2)
        ppsim.simulate(schedule, [COST] * 2, network=network)


def read_trace(data: bytes) -> None:
    """A trace that is read can be shown, or is refused by what shows it.

    Besides files there are their contents spelled as JSON, since a change within compressed bytes gets no further than
    a checksum: an object with the header and the arrays.
    """
    if not data.startswith(b"PK"):
        contents = _json(_text(data))
        if not isinstance(contents, dict) or not isinstance(contents.get("header"), dict):
            raise InputError("no contents of a trace")
        arrays = {}
        for name, values in contents.items():
            with contextlib.suppress(ValueError, OverflowError):
                array = np.array(values)
                if array.dtype.kind in "biuf" and name.isidentifier() and name.isascii():
                    arrays[name] = array
        arrays["header"] = np.frombuffer(json.dumps(contents["header"]).encode(), np.uint8)
        packed = io.BytesIO()
        np.savez(packed, **arrays)
        data = packed.getvalue()
    with _file(data, ".trace") as path:
        trace = Trace.load(path)
        trace.to_frame()
        str(ppsim.attribute(trace))


def read_model(data: bytes) -> None:
    """A configuration that is read gives costs."""
    with _file(data, ".json") as path:
        model = ppsim.read_huggingface_config(path)
        if model.layers < 100:
            ppsim.estimate_costs(model, ppsim.named_device("h100"), micro_batch_size=1, seq=8)


def read_layout(data: bytes) -> None:
    """A partition as flags spell it, and a placement as a trace's header holds it."""
    from ppsim.cli.flags import CostFlags

    cut, _, placement = _text(data).partition("|")
    with (
        _file(
            json.dumps({"layers": [{"forward_s": 1, "backward_input_s": 1, "backward_weight_s": 1}] * 8}).encode(),
            ".json",
        ) as path,
        contextlib.suppress(InputError),
    ):
        CostFlags(costs=path, partition=cut).stage_costs(3, set())
    orders = ppsim.build_schedule("1f1b", ranks=2, microbatches=2).orders
    schedule = Schedule(orders=orders, placement=tuple(_json(placement)), microbatches=2)
    schedule.check()


def read_megatron_layout(data: bytes) -> None:
    """A layout that is read is written, and read again as the same."""
    layout = Layout.parse(_text(data))
    assert Layout.parse(str(layout)) == layout


def read_run(data: bytes) -> None:
    """A folder of another tool's files, given as one object of names and contents, is read and has costs."""
    files = _json(_text(data))
    if not isinstance(files, dict) or len(files) > 5:
        raise InputError("no folder of files")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        for name, contents in files.items():
            if re.fullmatch(r"\w{1,30}\.json", name, re.ASCII):
                Path(folder, name).write_text(json.dumps(contents))
        run = ppsim.read_run(folder)
        str(ppsim.attribute(run.traces[0]))
        ppsim.costs_of(run)


def read_conditions(data: bytes) -> None:
    """Conditions from a trace's header, with their reduction."""
    given = _json(_text(data))
    conditions = Conditions.from_dict(given)
    assert Conditions.from_dict(conditions.to_dict()) == conditions
    ppsim.simulate(ppsim.build_schedule("1f1b", ranks=2, microbatches=2), [COST] * 2, conditions=conditions)


def _json(text: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError("not JSON, and no reader's business") from None
    if not isinstance(found, dict | list):
        raise InputError("no object and no list")
    return found


def _schedules() -> list[bytes]:
    names = ("1f1b", "zb-h1", "interleaved-1f1b", "zb-v")
    built = [ppsim.build_schedule(name, ranks=2, microbatches=4) for name in names]
    overlapped = b"0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1B0,1F1,1I1,1W1\n"
    older = b"0F0,0B0,0W0\n1F0,1BW0\n"
    return [each.to_csv(messages=messages).encode() for each in built for messages in (False, True)] + [
        overlapped,
        older,
    ]


def _written(write: Callable[[Path], Any], suffix: str) -> bytes:
    with _file(b"", suffix) as path:
        write(path)
        return path.read_bytes()


def _costs() -> list[bytes]:
    return [_written(lambda path: ppsim.save_costs([LAYER] * 3, path), suffix) for suffix in (".json", ".csv")]


def _networks() -> list[bytes]:
    link = ppsim.Link(latency_s=1e-5, larger=(ppsim.LinkPiece(from_bytes=1000, latency_s=1e-4, gap_s=1e-4),))
    return [_written(each.to_file, ".json") for each in (Network(), Network(latency_s=0.1, links={(0, 1): link}))]


def _traces() -> list[bytes]:
    schedule = ppsim.build_schedule("1f1b", ranks=2, microbatches=2)
    plain = ppsim.simulate(schedule, [COST] * 2)
    other = ppsim.simulate(schedule, [COST] * 2, slow_ranks={1: 2.0}, reduction=Reduction(replicas=2))
    files = [_written(each.save, ".trace") for each in (plain, other)]
    contents = []
    for file in files:
        with np.load(io.BytesIO(file), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(arrays.pop("header").tobytes())
        contents.append(
            json.dumps({"header": header, **{name: each.tolist() for name, each in arrays.items()}}).encode()
        )
    return [*files, *contents]


def _models() -> list[bytes]:
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 10, "n_positions": 8}
    llama = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 10,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    }
    return [
        json.dumps(each).encode() for each in (gpt2, llama, {**llama, "model_type": "mistral", "sliding_window": 4})
    ]


def _layouts() -> list[bytes]:
    return [
        b"3,2,3|[0, 1]",
        b"even|[0, 0]",
        b"optimal|[1, 0]",
        b"4,4|[0]",
        b"1,6,1|[0, 1, 2]",
        b"Ett/t*3/ttL|[0, 1]",
        b"E(tt/)*2tt,L|[0, 0]",
    ]


def _megatron_layouts() -> list[bytes]:
    return [b"Et*3|(tt|)*29,m|L", b"E|t*2|(t|)*3|mL", b"Et||tL", b"Ettt,|(t|t|)*2L"]


def _runs() -> list[bytes]:
    network = Network(latency_s=0.1)
    pairs, plain = (
        ppsim.simulate(schedule, [COST] * schedule.stages, network=network)
        for schedule in (
            ppsim.build_schedule("dualpipe-v", ranks=2, microbatches=4),
            ppsim.build_schedule("1f1b", ranks=2, microbatches=2),
        )
    )
    folders: list[bytes] = []
    for write in (
        lambda path: write_primus([plain, plain], path, behind_s=[0.0, 1.0]),
        lambda path: write_primus([plain], path, behind_s=[0.0, 1.0], numbered=False),
        lambda path: write_kineto([plain], path, behind_s=[0.0, 1.0]),
        lambda path: write_kineto([pairs], path, behind_s=[0.0, 1.0], kernels=True),
    ):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            contents = {path.name: json.loads(path.read_text()) for path in Path(folder).iterdir()}
        folders.append(json.dumps(contents).encode())
    return folders


def _conditions() -> list[bytes]:
    every = {
        "overlap": 0.9,
        "scale": [[1, 2], [1, 1]],
        "slow_ranks": {"1": 2.0},
        "dispatch_s": 0.1,
        "send_s": 0.1,
        "receive_window": 2,
        "reduction": {"replicas": 2, "latency_s": 0.1, "bytes_per_s": None},
    }
    fair = {"devices": [0, 0], "sharing": "fair", "speeds": [1, 0.6]}
    return [
        json.dumps(each).encode() for each in (every, fair, {"cores": 1, "sharing": "fair", "sharing_efficiency": 0.5})
    ]


TARGETS = {
    "csv": Target(read=read_schedule, seeds=_schedules),
    "costs": Target(read=read_costs, seeds=_costs),
    "network": Target(read=read_network, seeds=_networks),
    "trace": Target(read=read_trace, seeds=_traces),
    "model": Target(read=read_model, seeds=_models),
    "layout": Target(read=read_layout, seeds=_layouts),
    "megatron-layout": Target(read=read_megatron_layout, seeds=_megatron_layouts),
    "run": Target(read=read_run, seeds=_runs),
    "conditions": Target(read=read_conditions, seeds=_conditions),
}
KEPT = Path(__file__).parent / "kept"
