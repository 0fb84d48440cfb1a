"""The command `ppsim estimate`: layer costs from shapes and rates, written as a cost file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import tyro

from ppsim.cli import ending
from ppsim.cli.architecture_flags import ArchitectureFlags
from ppsim.cli.command import OptionalFile, OptionalName, OptionalReal, OptionalWhole, Real
from ppsim.costs.cost_file import save_costs
from ppsim.costs.stage_cost import LayerCost
from ppsim.errors import InputError
from ppsim.essential import Essential
from ppsim.estimate.device import Device, device_names, named_device
from ppsim.estimate.estimate import estimate_costs
from ppsim.estimate.transformer import Transformer
from ppsim.export.text_table import text_table
from ppsim.files import check_files
from ppsim.network.link import Link

_DEVICE_HELP = tyro.conf.arg(help=f"A device at its vendor's 16-bit peak rates: {', '.join(device_names())}.")


@dataclass(frozen=True, kw_only=True)
class EstimateCommand(ArchitectureFlags):
    """Derive a transformer's layer costs from its shapes and a device's rates; nothing runs."""

    device: Essential[Annotated[OptionalName, _DEVICE_HELP]] = None
    flops_per_s: OptionalReal = None
    """FLOPs of matrix products per second; with --bytes-per-s, instead of --device."""
    bytes_per_s: OptionalReal = None
    """Bytes per second to and from the device's memory."""
    efficiency: Real = 1.0
    """The share of the FLOPs per second that is reached."""
    bandwidth_efficiency: Real = 1.0
    """The share of the bytes per second that is reached."""
    launch_s: Real = 0.0
    """Seconds that every operation takes besides."""
    micro_batch_size: Essential[int] = 1
    """Sequences of a microbatch."""
    seq: Essential[int] = 1024
    """Tokens of a sequence."""
    dtype_bytes: int = 2
    """Bytes of a weight and of an activation."""
    tp: int = 1
    """Tensor-parallel ranks that share every layer."""
    tp_bytes_per_s: OptionalReal = None
    """Bandwidth between them for all-reduces, in bytes per second (default: no limit)."""
    tp_latency_s: Real = 0.0
    """Latency between them, in seconds."""
    split_vocabulary: bool = False
    """Cut embedding and head over the tensor-parallel ranks too."""
    sequence_parallel: bool = False
    """Cut norms, dropouts and residuals over the tensor-parallel ranks too."""
    ep: int = 1
    """Ranks over which a block's experts are dealt."""
    ep_bytes_per_s: OptionalReal = None
    """Bandwidth of each of them for dispatching tokens to experts, in bytes per second (default: no limit)."""
    ep_latency_s: Real = 0.0
    """Latency of that, in seconds."""
    expert_tp: OptionalWhole = None
    """Tensor-parallel ranks that share each expert (default: all)."""
    cp: int = 1
    """Context-parallel ranks that share every sequence; keys and values go around them."""
    cp_bytes_per_s: OptionalReal = None
    """Bandwidth between them, in bytes per second (default: no limit)."""
    cp_latency_s: Real = 0.0
    """Latency between them, in seconds."""
    mtp: bool = False
    """Count the layers that predict further tokens, which config.json may name, as part of the model."""
    unfused_attention: bool = False
    """Attention that keeps its scores."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What a block's backward computes again instead of keeping it: nothing, the scores, or everything."""
    out: Essential[OptionalFile] = None
    """Write the costs, .json or .csv, for ppsim simulate --costs."""
    json: Essential[bool] = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Print the costs and write them to --out."""
        check_files(self.out)
        model, device = self.architecture(self.seq, mtp=self.mtp), self._device()
        costs = estimate_costs(
            model,
            device,
            micro_batch_size=self.micro_batch_size,
            seq=self.seq,
            dtype_bytes=self.dtype_bytes,
            tp=self.tp,
            tp_link=_link(self.tp_latency_s, self.tp_bytes_per_s),
            split_vocabulary=self.split_vocabulary,
            attention="unfused" if self.unfused_attention else "fused",
            recompute=self.recompute,
            sequence_parallel=self.sequence_parallel,
            ep=self.ep,
            ep_link=_link(self.ep_latency_s, self.ep_bytes_per_s),
            expert_tp=self.expert_tp,
            cp=self.cp,
            cp_link=_link(self.cp_latency_s, self.cp_bytes_per_s),
        )
        about = {
            "estimated": True,
            "architecture": asdict(model),
            "parameters": model.parameters,
            "active_parameters": model.active_parameters,
            "device": asdict(device),
            "micro_batch_size": self.micro_batch_size,
            "seq": self.seq,
            "dtype_bytes": self.dtype_bytes,
            "tp": self.tp,
            "ep": self.ep,
            "cp": self.cp,
            "recompute": self.recompute,
        }
        if self.out is not None:
            save_costs(costs, self.out, environment=about)
        if self.json:
            ending.print_json({**about, "layers": [asdict(cost) for cost in costs]})
        else:
            print(_table(model, device, costs))

    def _device(self) -> Device:
        shares: dict[str, Any] = {
            "efficiency": self.efficiency,
            "bandwidth_efficiency": self.bandwidth_efficiency,
            "launch_s": self.launch_s,
        }
        if self.device is not None:
            if self.flops_per_s is not None or self.bytes_per_s is not None:
                flag = "flops-per-s" if self.flops_per_s is not None else "bytes-per-s"
                raise InputError(f"--device {self.device} has its rates: leave out --{flag} or --device")
            return named_device(self.device, **shares)
        if self.flops_per_s is None or self.bytes_per_s is None:
            raise InputError("no device: give --device NAME, or both --flops-per-s and --bytes-per-s")
        return Device(flops_per_s=self.flops_per_s, bytes_per_s=self.bytes_per_s, **shares)


def _link(latency_s: float, bytes_per_s: float | None) -> Link:
    return Link(latency_s=latency_s) if bytes_per_s is None else Link(latency_s=latency_s, bytes_per_s=bytes_per_s)


def _named(model: Transformer, costs: list[LayerCost]) -> dict[str, LayerCost]:
    """A row for each layer that differs: blocks that are alike share one."""
    named = {"embedding": costs[0]}
    for kind in model.kinds:
        count, words = model.blocks.count(kind), f" ({kind.words})" if len(model.kinds) > 1 else ""
        named[f"each of {count} blocks{words}"] = costs[1 + model.blocks.index(kind)]
    further = costs[1 + model.layers : -1]
    return named | {cost.name: cost for cost in further} | {"head": costs[-1]}


def _table(model: Transformer, device: Device, costs: list[LayerCost]) -> str:
    """The costs as text."""
    is_mixed = any(cost.forward_communication_s for cost in costs)
    rows = [
        {
            "layer": name,
            "F (ms)": f"{cost.forward_s * 1e3:.4g}",
            "I (ms)": f"{cost.backward_input_s * 1e3:.4g}",
            "W (ms)": f"{cost.backward_weight_s * 1e3:.4g}",
            **({"F's exchange (ms)": f"{cost.forward_communication_s * 1e3:.4g}"} if is_mixed else {}),
            "activations": cost.activation_bytes,
            "I to W": cost.weight_activation_bytes,
            "output": cost.output_bytes,
            "parameters": cost.parameter_bytes,
        }
        for name, cost in _named(model, costs).items()
    ]
    active = f", of which a token goes through {model.active_parameters:,}" if model.experts else ""
    left_out = "".join(f"not counted: {each}\n" for each in model.left_out)
    return (
        f"{model.parameters:,} parameters in {model.layers} blocks, an embedding and a head{active}\n{left_out}"
        f"device {device.name or 'as stated'}: {device.flops_per_s * device.efficiency:.4g} FLOP/s, "
        f"{device.bytes_per_s * device.bandwidth_efficiency:.4g} B/s\n\n"
        f"{text_table(rows)}\n"
        "(sizes in bytes, of one microbatch on one rank)"
    )
