"""Attention work: the operations from a block's normed stream to the output of attention's projection.

Letters: m = b s tokens, h hidden, a heads, d head_dim, t tensor-parallel ranks.
"""

from __future__ import annotations

from ppsim.estimate.block import Block, LatentAttention
from ppsim.estimate.operations import Part, linear, norm, pointwise
from ppsim.estimate.work import STATISTIC_BYTES, Execution, Operation, Product, Work


def attention_part(block: Block, execution: Execution) -> Part:
    """Queries, keys and values; attention; the projection of its output."""
    made = _projected(block, execution) if block.latent is None else _latent(block, block.latent, execution)
    wide = execution.dtype_bytes
    output = execution.tokens * block.output_width // execution.tp * wide
    saved = made.saved | _scores_saved(block, execution) | {"attention output": output}
    projection = linear("o", execution.tokens, block.output_width // execution.tp, block.hidden, wide)
    return Part(
        operations=(*made.operations, *attention_operations(block, execution), projection),
        saved=saved,
        inputs=made.inputs | {"attention output": output},
        gradients=made.gradients | {"o": execution.stream_tokens * block.hidden * wide},
    )


def attention_operations(block: Block, execution: Execution) -> tuple[Operation, ...]:
    """softmax(Q K^T) V on this rank's heads.

    F has two products of 2 d FLOPs for every pair and head, I four (dP = dO V^T, dV, dQ, dK), and fused a fifth, the
    scores again. Fused attention moves q, k, v and its output; unfused scores and probabilities go to memory as well.
    """
    rows, wide = execution.micro_batch_size * block.heads // execution.tp, execution.dtype_bytes
    each = execution.tokens * wide
    queries, keys, values, output = (
        each * width // execution.tp
        for width in (block.query_width, block.key_width, block.value_width, block.output_width)
    )
    fused = execution.attention == "fused"
    pairs = rows * block.pairs(execution.seq, masked=fused and execution.skip_masked) // execution.cp
    head, value = block.head_dim, block.value_dim
    scoring, mixing = 2 * pairs * head, 2 * pairs * value
    if fused:
        sums = rows * execution.seq // execution.cp * STATISTIC_BYTES
        moved = queries + execution.cp * (keys + values) + output  # every rank's keys and values come by
        whole = Operation(
            name="attention",
            forward=Work(flops=scoring + mixing, traffic_bytes=moved + sums),
            backward_input=Work(flops=3 * scoring + 2 * mixing, traffic_bytes=2 * moved + sums),
        )
        return (whole,)
    scores, seq = pairs * wide, execution.seq
    drop = (pointwise("attention dropout", pairs, pairs, 2 * wide + 1),) if execution.dropout else ()
    return (
        Operation(
            name="scores",
            forward=Work(
                flops=scoring, traffic_bytes=queries + keys + scores, products=(Product(seq, seq, head, rows),)
            ),
            backward_input=Work(
                flops=2 * scoring,
                traffic_bytes=2 * (queries + keys) + scores,
                products=(Product(seq, head, seq, rows),) * 2,
            ),
        ),
        *_softmax(pairs, rows, execution),
        *drop,
        Operation(
            name="context",
            forward=Work(
                flops=mixing, traffic_bytes=output + values + scores, products=(Product(seq, value, seq, rows),)
            ),
            backward_input=Work(
                flops=2 * mixing,
                traffic_bytes=output + 2 * values + 2 * scores,
                products=(Product(seq, seq, value, rows), Product(seq, value, seq, rows)),
            ),
        ),
    )


def ring_bytes(block: Block, execution: Execution) -> int:
    """Keys and values that a rank passes on in F: all but one of the context-parallel ranks' shares."""
    share = execution.tokens * (block.key_width + block.value_width) // execution.tp * execution.dtype_bytes
    return (execution.cp - 1) * share


def _softmax(pairs: int, rows: int, execution: Execution) -> tuple[Operation, ...]:
    """One kernel, or an operation each for scale, mask, cast, softmax and cast where no kernel takes so many rows."""
    wide = execution.dtype_bytes
    if rows % execution.softmax_multiple == 0:
        return (pointwise("softmax", 2 * pairs, 3 * pairs, wide),)
    once = pointwise("scale", 2 * pairs, 2 * pairs, wide)
    cast = pointwise("cast", pairs * (wide + 4), pairs * (wide + 4), 1)
    return (
        once,
        pointwise("mask", 2 * pairs, 2 * pairs, wide),
        cast,
        pointwise("softmax", 2 * pairs, 3 * pairs, 4),
        cast,
    )


def _scores_saved(block: Block, execution: Execution) -> dict[str, int]:
    rows = block.heads // execution.tp * execution.tokens
    if execution.attention == "fused":
        return {"log-sum-exp": rows * STATISTIC_BYTES}
    if execution.recompute == "selective":
        return {}
    scores = rows * execution.seq
    saved = {"probabilities": scores * execution.dtype_bytes}
    if execution.dropout:
        saved |= {"attention dropout mask": scores, "dropped probabilities": scores * execution.dtype_bytes}
    return saved


def _projected(block: Block, execution: Execution) -> Part:
    """q, k and v, each a product with the stream; normed and turned where the model does that."""
    tokens, wide = execution.tokens, execution.dtype_bytes
    query, key = block.query_width // execution.tp, block.key_width // execution.tp
    widths = {"qkv": query + 2 * key} if execution.joint_projections else {"q": query, "k": key, "v": key}
    operations = [linear(name, tokens, block.hidden, width, wide) for name, width in widths.items()]
    sizes = {name: tokens * width * wide for name, width in (("q", query), ("k", key), ("v", key))}
    saved, gradients = dict(sizes), dict(sizes)
    inputs: dict[str, int] = {}
    if block.qk_norm != "none":
        has_weights = block.qk_norm != "plain"
        normed = 2 * tokens * (query + key)
        operations.append(pointwise("q and k norms", normed, normed * 3 // 2, wide, normed * has_weights))
        # One for each token and head, or for each token.
        rows = (block.heads + block.kv_heads) // execution.tp if block.qk_norm != "width" else 2
        before = {
            "q before norm": sizes["q"],
            "k before norm": sizes["k"],
            "statistics of q and k": tokens * rows * STATISTIC_BYTES,
        }
        saved |= before
        if has_weights:
            inputs |= before
            gradients |= {"q norm": sizes["q"], "k norm": sizes["k"]}
    if block.rotary:
        turned = 2 * tokens * (query + key)
        operations.append(pointwise("rotary", turned, turned, wide))
    return Part(tuple(operations), saved, inputs, gradients)


def _latent(block: Block, latent: LatentAttention, execution: Execution) -> Part:
    """Queries, keys and values from narrow vectors, which every tensor-parallel rank makes whole.

    With sequence parallelism each rank makes those of its own tokens, and they are gathered instead of the stream.
    """
    tokens, mine, wide = execution.tokens, execution.stream_tokens, execution.dtype_bytes
    query, key = block.query_width // execution.tp, block.key_width // execution.tp
    opened = block.heads // execution.tp * (latent.nope_dim + latent.value_dim)
    operations: list[Operation] = []
    saved: dict[str, int] = {}
    inputs: dict[str, int] = {}
    gradients = {"q": tokens * query * wide, "k and v": tokens * opened * wide}
    narrow = latent.kv_rank + latent.rope_dim
    # What each narrow vector is: its whole width, the width that is normed, and the width that is made from it.
    vectors = {"kv": (narrow, latent.kv_rank, opened)}
    if latent.query_rank is None:
        operations.append(linear("q", tokens, block.hidden, query, wide))
    else:
        vectors = {"q": (latent.query_rank, latent.query_rank, query), **vectors}
    for name, (whole, normed, made) in vectors.items():
        operations += [
            linear(f"{name} latent", mine, block.hidden, whole, wide),
            norm(f"{name} latent norm", mine, normed, wide),
            linear(name, tokens, normed, made, wide),
        ]
        kept = {
            f"{name} latent": mine * whole * wide,
            f"{name} latent statistics": mine * STATISTIC_BYTES,
            f"{name} latent norm output": tokens * normed * wide,
        }
        saved |= kept
        inputs |= kept
        gradients |= {f"{name} latent": mine * whole * wide, f"{name} latent norm": tokens * normed * wide}
    # The part of q that turns, and that of k, once for all heads; then q and k are put together.
    turned = 2 * tokens * (block.heads // execution.tp * latent.rope_dim + latent.rope_dim)
    together = 2 * tokens * (query + key)
    operations += [pointwise("rotary", turned, turned, wide), pointwise("q and k", together, together, wide)]
    # Values are a view of what was made for keys and values together.
    saved |= {"q": tokens * query * wide, "k": tokens * key * wide, "k and v": tokens * opened * wide}
    return Part(tuple(operations), saved, inputs, gradients)
