"""Estimate: layer costs from shapes and a device's rates, without running anything."""

from __future__ import annotations

from ppsim.checks import checked
from ppsim.costs.stage_cost import LayerCost
from ppsim.errors import InputError
from ppsim.estimate.device import Device
from ppsim.estimate.layer_work import transformer_work
from ppsim.estimate.transformer import Transformer
from ppsim.estimate.work import Attention, Execution, LayerWork, Recompute, Work
from ppsim.network.link import Link


@checked
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
    sequence_parallel: bool = False,
    ep: int = 1,
    ep_link: Link | None = None,
    expert_tp: int | None = None,
    cp: int = 1,
    cp_link: Link | None = None,
) -> list[LayerCost]:
    """Estimate the costs of a transformer's layers for one microbatch on one rank.

    Parameters
    ----------
    architecture : Transformer
        The model's shapes.
    device : Device
        The rates of each rank's device.
    micro_batch_size, seq : int
        Samples of a microbatch, and tokens of a sample.
    dtype_bytes : int
        Bytes of an element.
    tp : int
        Tensor-parallel ranks t.
    tp_link : Link, optional
        What connects them. By default their communication costs nothing.
    split_vocabulary, attention, skip_masked, dropout, recompute, loss, sequence_parallel, ep, expert_tp, cp
        As in `ppsim.Execution`.
    ep_link : Link, optional
        What connects the ranks over which experts are dealt. By default their communication costs nothing.
    cp_link : Link, optional
        What connects context-parallel ranks; likewise. Passing keys and values on costs what attention does not hide.

    Returns
    -------
    list of LayerCost
        Of [embedding, block 0, ..., mtp 0, ..., head]. Bytes are those of `transformer_work`.

    Raises
    ------
    InputError
        If shapes do not fit, or if the device's rate is for elements of another size.

    Notes
    -----
    The seconds of a layer are the sum of `Device.operation_s` over its operations. B is I + W. With t > 1 each block
    adds two ring all-reduces of the residual stream to F and two to I (Shoeybi et al., Megatron-LM, 2019, section 3).
    With sequence parallelism these are a reduce-scatter and an all-gather, which together move as much.
    Dispatching tokens to experts and combining what comes back are two all-to-alls in F and two in I. As an overlapped
    pair of microbatches can hide them, they stand in `forward_communication_s` and `backward_input_communication_s`.
    Recomputation adds the forward to I, not to W. What it holds while it runs is not counted.

    Examples
    --------
    >>> import ppsim
    >>> gpt = ppsim.Transformer.gpt(layers=2, hidden=1024, heads=16, vocabulary=50_304, positions=1024)
    >>> costs = estimate_costs(gpt, ppsim.named_device("h100"), micro_batch_size=1, seq=1024)
    >>> [cost.name for cost in costs]
    ['embedding', 'block 0', 'block 1', 'head']
    """
    if device.dtype_bytes is not None and device.dtype_bytes != dtype_bytes:
        raise InputError(
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
        sequence_parallel=sequence_parallel,
        ep=ep,
        expert_tp=expert_tp,
        cp=cp,
    )
    links = (tp_link or Link(), ep_link or Link(), cp_link or Link())
    return [_cost(work, device, execution, *links) for work in transformer_work(architecture, execution)]


def all_reduce_s(size_bytes: int, ranks: int, link: Link) -> float:
    """Seconds of a ring all-reduce over t ranks: 2 (t - 1) steps, each with 1 / t of the bytes and one latency.

    Parameters
    ----------
    size_bytes : int
        Bytes that are added up.
    ranks : int
        t.
    link : Link
        Between neighbours in the ring.

    Notes
    -----
    Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.
    """
    return 2 * (ranks - 1) * (link.occupied_s(size_bytes / ranks) + link.latency_s)


def all_to_all_s(size_bytes: int, ranks: int, link: Link) -> float:
    """Seconds of an all-to-all over e ranks: each sends e - 1 messages of 1 / e of its bytes, one after another."""
    return (ranks - 1) * link.occupied_s(size_bytes / ranks) + (link.latency_s if ranks > 1 else 0.0)


def _cost(
    work: LayerWork, device: Device, execution: Execution, tp_link: Link, ep_link: Link, cp_link: Link
) -> LayerCost:
    reduce_s = all_reduce_s(work.reduced_bytes, execution.tp, tp_link)
    gather_s = all_reduce_s(work.expert_reduced_bytes, execution.expert_ranks, tp_link)
    exchange_s = all_to_all_s(work.exchanged_bytes, execution.ep, ep_link)
    return LayerCost(
        name=work.name,
        forward_s=device.time_s(work.forward_work)
        + work.forward_reduces * reduce_s
        + work.forward_expert_reduces * gather_s
        + _ring_s(work.forward_ring_bytes, execution.cp, cp_link, _attention_s(device, work.forward_work)),
        backward_input_s=device.time_s(work.backward_input_work)
        + work.backward_reduces * reduce_s
        + work.backward_expert_reduces * gather_s
        + _ring_s(work.backward_ring_bytes, execution.cp, cp_link, _attention_s(device, work.backward_input_work)),
        forward_communication_s=work.forward_exchanges * exchange_s,
        backward_input_communication_s=work.backward_exchanges * exchange_s,
        backward_weight_s=device.time_s(work.backward_weight_work),
        activation_bytes=work.activation_bytes,
        weight_activation_bytes=work.weight_activation_bytes,
        output_bytes=work.output_bytes,
        parameter_bytes=work.parameter_bytes,
    )


def _attention_s(device: Device, works: list[Work]) -> float:
    """Seconds of fused attention, the one operation that computes and is no product of two matrices."""
    return device.time_s(work for work in works if work.flops and not work.products)


def _ring_s(size_bytes: int, ranks: int, link: Link, attention_s: float) -> float:
    """Seconds of passing so many bytes on in a ring that attention on all ranks' shares but the own does not hide."""
    if not size_bytes:
        return 0.0
    passed_s = link.occupied_s(size_bytes) + (ranks - 1) * link.latency_s
    return max(passed_s - attention_s * (ranks - 1) / ranks, 0.0)
