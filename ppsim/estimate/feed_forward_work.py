"""Feed-forward work: the operations of a block's MLP, or of its experts, from the normed stream on.

Letters: m = b s tokens, h hidden, f intermediate, t tensor-parallel ranks, E experts of which each token takes k.
"""

from __future__ import annotations

from typing import NamedTuple

from ppsim.estimate.block import Block, Experts
from ppsim.estimate.operations import Part, grouped_linear, linear, pointwise
from ppsim.estimate.work import INDEX_BYTES, STATISTIC_BYTES, Execution, Operation


class Routed(NamedTuple):
    """How a rank's tokens reach experts.

    own_tokens: of this rank, which it routes. copies: of them, one for each expert that a token goes to. rows: copies
    that this rank's experts get, if all experts get equally many. local: experts on this rank. width: of each on it.
    """

    own_tokens: int
    copies: int
    rows: int
    local: int
    width: int


def routed(experts: Experts, execution: Execution) -> Routed:
    """A rank's share."""
    tokens = execution.stream_tokens
    copies = tokens * experts.active
    # Ranks that share an expert all get the tokens of all of them.
    gathered = execution.expert_ranks if execution.sequence_parallel else 1
    return Routed(
        own_tokens=tokens,
        copies=copies,
        rows=copies * gathered,
        local=experts.count // execution.ep,
        width=experts.intermediate // execution.expert_ranks,
    )


def feed_forward_part(block: Block, execution: Execution) -> Part:
    """fc2(act(fc1(x))) or the gated MLP, or experts and the MLP that all tokens share."""
    if block.experts is None:
        return _mlp(block, execution, block.intermediate // execution.tp, "")
    part = _experts(block, block.experts, execution)
    shared = block.experts.shared_intermediate
    if not shared:
        return part
    wide = execution.dtype_bytes
    stream = execution.stream_tokens * block.hidden
    beside = _mlp(block, execution, shared // execution.tp, "shared ")
    operations = [*part.operations, *beside.operations, pointwise("sum with shared", 3 * stream, 0, wide)]
    saved = part.saved | beside.saved
    if block.experts.shared_gate:
        operations.append(linear("shared gate", execution.stream_tokens, block.hidden, 1, wide))
        operations.append(pointwise("shared weight", 2 * stream, 3 * stream, wide))
        saved |= {"shared weight": execution.stream_tokens * wide, "shared output": stream * wide}
    return Part(tuple(operations), saved, part.inputs | beside.inputs, part.gradients | beside.gradients)


def _mlp(block: Block, execution: Execution, width: int, name: str) -> Part:
    tokens, wide = execution.tokens, execution.dtype_bytes

    def product(label: str, inputs: int, outputs: int) -> Operation:
        return linear(f"{name}{label}", tokens, inputs, outputs, wide)

    size = tokens * width
    activation = pointwise(f"{name}activation", 2 * size, 3 * size, wide)
    last = product("down" if block.gated else "fc2", width, block.hidden)
    ups = ("gate", "up") if block.gated else ("fc1",)
    if not block.gated:
        operations: tuple[Operation, ...] = (product("fc1", block.hidden, width), activation, last)
    else:
        widths = {"gate and up": 2 * width} if execution.joint_projections else {"gate": width, "up": width}
        made = (product(label, block.hidden, columns) for label, columns in widths.items())
        operations = (*made, activation, pointwise(f"{name}product", 3 * size, 5 * size, wide), last)
    held = ("gate", "up", "activation", "product") if block.gated else ("fc1 output", "activation")
    stream = execution.stream_tokens * block.hidden * wide
    return Part(
        operations=operations,
        saved={f"{name}{label}": size * wide for label in held},
        inputs={f"{name}last input": size * wide},
        gradients={f"{name}{label}": size * wide for label in ups} | {f"{name}last": stream},
    )


def _experts(block: Block, experts: Experts, execution: Execution) -> Part:
    """Router, dispatch, the experts' products in one kernel each, and their weighted sum."""
    wide, hidden = execution.dtype_bytes, block.hidden
    own, copies, rows, local, width = routed(experts, execution)
    stream, sent, size = own * hidden, copies * hidden, rows * width
    router = linear("router", own, hidden, experts.count, wide)
    routing = pointwise("routing", 2 * own * experts.count, 2 * own * experts.count, STATISTIC_BYTES)
    dispatch = pointwise("dispatch", stream + sent, stream + sent, wide)
    # What comes from other ranks is sorted by expert, and put back.
    moved = 2 * rows * hidden
    sort = (pointwise("sort by expert", moved, moved, wide),) if execution.ep > 1 and local > 1 else ()

    def product(label: str, inputs: int, outputs: int) -> Operation:
        return grouped_linear(f"experts' {label}", rows, inputs, outputs, wide, groups=local)

    ups = ("gate", "up") if block.gated else ("fc1",)
    widths = {"gate and up": 2 * width} if block.gated and execution.joint_projections else dict.fromkeys(ups, width)
    made = tuple(product(label, hidden, columns) for label, columns in widths.items())
    activation = [pointwise("experts' activation", 2 * size, 3 * size, wide)]
    if block.gated:
        activation.append(pointwise("experts' product", 3 * size, 5 * size, wide))
    last = product("down" if block.gated else "fc2", width, hidden)
    # I: the gradient in, the experts' outputs for that of the weights, and a weighted copy out for each.
    combine = pointwise("combine", sent + stream, stream + 2 * sent, wide)
    held = ("gate", "up", "activation", "product") if block.gated else ("fc1 output", "activation")
    return Part(
        operations=(router, routing, dispatch, *sort, *made, *activation, last, *sort, combine),
        saved={
            "router probabilities": own * experts.count * STATISTIC_BYTES,
            "chosen experts": copies * INDEX_BYTES,
            "weights of experts": copies * STATISTIC_BYTES,
            "experts' input": rows * hidden * wide,
            **{f"experts' {label}": size * wide for label in held},
            "experts' output": sent * wide,
        },
        inputs={"experts' input": rows * hidden * wide, "experts' last input": size * wide},
        gradients={
            "router": own * experts.count * wide,
            **{f"experts' {label}": size * wide for label in ups},
            "experts' last": rows * hidden * wide,
        },
    )
