"""Estimate: layer costs from shapes and a device's rates, without running anything."""

from __future__ import annotations

from ppsim.costs.stage_cost import LayerCost
from ppsim.estimate.device import Device
from ppsim.estimate.layer_work import transformer_work
from ppsim.estimate.transformer import Transformer
from ppsim.estimate.work import Attention, Execution, LayerWork, Recompute
from ppsim.network.network import Link


def estimate_costs(
    architecture: Transformer,
    device: Device,
    *,
    micro_batch_size: int,
    seq: int,
    dtype_bytes: int = 2,
    tp: int = 1,
    tp_link: Link | None = None,
    split_vocabulary: bool = False,
    attention: Attention = "fused",
    skip_masked: bool = True,
    dropout: bool = False,
    recompute: Recompute = "none",
    loss: bool = True,
) -> list[LayerCost]:
    """Costs of [embedding, block 0, ..., head] for one microbatch of (micro_batch_size, seq) tokens on one rank.

    Seconds: the sum over a layer's operations of `Device.operation_s`; B is I + W. With tp > 1 every block adds two
    ring all-reduces of the residual stream to F and two to I over `tp_link` (None: they cost nothing), each
    2 (t - 1) messages of 1 / t of its bytes (Shoeybi et al., Megatron-LM, 2019, section 3). Recomputation adds the
    forward once more to I, never to W; what it holds while it runs is not counted. Bytes: as `transformer_work` says.
    The other arguments are those of `ppsim.Execution`.

    Raises ValueError for shapes that do not fit, and for a device whose rate is for elements of another size.
    """
    if device.dtype_bytes is not None and device.dtype_bytes != dtype_bytes:
        raise ValueError(
            f"the rate of {device.name or 'this device'} is for elements of {device.dtype_bytes} bytes, dtype_bytes is "
            f"{dtype_bytes}: state flops_per_s and bytes_per_s for that size"
        )
    execution = Execution(
        micro_batch_size=micro_batch_size,
        seq=seq,
        dtype_bytes=dtype_bytes,
        tp=tp,
        split_vocabulary=split_vocabulary,
        attention=attention,
        skip_masked=skip_masked,
        dropout=dropout,
        recompute=recompute,
        loss=loss,
    )
    link = tp_link or Link()
    return [_cost(work, device, tp, link) for work in transformer_work(architecture, execution)]


def all_reduce_s(size_bytes: int, ranks: int, link: Link) -> float:
    """A ring all-reduce: 2 (t - 1) steps, each of size / t bytes and one latency.

    (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.)
    """
    return 2 * (ranks - 1) * (link.occupied_s(size_bytes / ranks) + link.latency_s)


def _cost(work: LayerWork, device: Device, tp: int, link: Link) -> LayerCost:
    reduce_s = all_reduce_s(work.reduced_bytes, tp, link)
    return LayerCost(
        name=work.name,
        forward_s=device.time_s(work.forward_work) + work.forward_reduces * reduce_s,
        backward_input_s=device.time_s(work.backward_input_work) + work.backward_reduces * reduce_s,
        backward_weight_s=device.time_s(work.backward_weight_work),
        activation_bytes=work.activation_bytes,
        weight_activation_bytes=work.weight_activation_bytes,
        output_bytes=work.output_bytes,
        parameter_bytes=work.parameter_bytes,
    )
