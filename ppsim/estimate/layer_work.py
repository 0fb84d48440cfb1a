"""Layer work: the operations of an embedding, a block and a head, and what autograd keeps of each.

Letters: m = b s tokens, h hidden, f intermediate, a heads, d head_dim, t tensor-parallel ranks, V vocabulary.
"""

from __future__ import annotations

from ppsim.checks import checked
from ppsim.errors import InputError
from ppsim.estimate.transformer import Transformer
from ppsim.estimate.work import INDEX_BYTES, STATISTIC_BYTES, Execution, LayerWork, Operation, Product, Work


@checked
def transformer_work(model: Transformer, execution: Execution) -> list[LayerWork]:
    """The work of [embedding, block 0, ..., head] for one microbatch on one tensor-parallel rank.

    Raises
    ------
    InputError
        If tp does not divide the model, or if seq exceeds a learned table of positions.

    Notes
    -----
    `saved` is what PyTorch's autograd keeps. Norms are one kernel each; q, k, v and o are linear layers of their own.
    Fused attention keeps q, k, v, its output and a log-sum-exp per row; unfused attention keeps probabilities.
    Activation functions keep their input. A gated MLP keeps gate, up, act(gate) and the product.

    `kept`, between I and W, is the input of every linear layer and norm and the gradient of its output.

    Without the norms' statistics an unfused GPT block with dropout and 2-byte elements saves
    s b h (10 + 24 / t + 5 a s / (h t)) bytes, as in Korthikanti et al., Reducing Activation Recomputation in Large
    Transformer Models, 2022, equation 2. With t = 1 that is equation 1, 34 s b h + 5 a s^2 b.
    """
    model.check_shards(execution.tp)
    if execution.split_vocabulary and model.vocabulary % execution.tp:
        raise InputError(
            f"tp {execution.tp} does not divide the vocabulary {model.vocabulary}: pad the vocabulary, "
            "or leave embedding and head whole"
        )
    model.check_seq(execution.seq)
    blocks = [block_work(model, execution, f"block {index}") for index in range(model.layers)]
    return [embedding_work(model, execution), *blocks, head_work(model, execution)]


def linear(name: str, rows: int, inputs: int, outputs: int, dtype_bytes: int) -> Operation:
    """Y = X A with X (rows, inputs): 2 m k n FLOPs in F, in I (dX = dY A^T) and in W (dA = X^T dY).

    Each reads two of X, A, Y's shapes and writes the third; the bias is left out.
    """
    traffic = (rows * inputs + inputs * outputs + rows * outputs) * dtype_bytes
    flops = 2 * rows * inputs * outputs

    def work(*shape: int) -> Work:
        return Work(flops=flops, traffic_bytes=traffic, products=(Product(*shape),))

    return Operation(
        name=name,
        forward=work(rows, outputs, inputs),
        backward_input=work(rows, inputs, outputs),
        backward_weight=work(inputs, outputs, rows),
    )


def pointwise(name: str, forward: int, backward_input: int, dtype_bytes: int, backward_weight: int = 0) -> Operation:
    """An operation that only moves memory: so many elements read and written in F, I and W."""
    return Operation(
        name=name,
        forward=Work(traffic_bytes=forward * dtype_bytes),
        backward_input=Work(traffic_bytes=backward_input * dtype_bytes),
        backward_weight=Work(traffic_bytes=backward_weight * dtype_bytes),
    )


def norm(name: str, tokens: int, hidden: int, dtype_bytes: int) -> Operation:
    """F: x in, y out. I: x and dy in, dx out. W: x and dy in."""
    size = tokens * hidden
    return pointwise(name, 2 * size, 3 * size, dtype_bytes, 2 * size)


def embedding_work(model: Transformer, execution: Execution) -> LayerWork:
    """A row of the table for each token; W writes a dense gradient of the whole table."""
    size = execution.tokens * model.hidden * execution.dtype_bytes
    output = execution.stream_tokens * model.hidden * execution.dtype_bytes
    cut = execution.tp if execution.split_vocabulary else 1
    parameters = (model.vocabulary // cut + model.positions) * model.hidden * execution.dtype_bytes
    ids = execution.tokens * INDEX_BYTES
    lookup = Operation(
        name="lookup",
        forward=Work(traffic_bytes=2 * size + ids),
        backward_weight=Work(traffic_bytes=2 * size + ids + parameters),
    )
    add = pointwise("positions", 2 * size, 0, 1)
    # Summed over the samples as the gradient for the input is computed; one sample's is the output's own.
    summed = size // execution.micro_batch_size if model.positions and execution.micro_batch_size > 1 else 0
    return LayerWork(
        name="embedding",
        operations=(lookup, add) if model.positions else (lookup,),
        forward_reduces=int(cut > 1),
        reduced_bytes=size,
        saved={"tokens": ids},
        kept={"tokens": ids, "output gradient": size, "gradient of positions": summed},
        output_bytes=output,
        parameter_bytes=parameters,
    )


def block_work(model: Transformer, execution: Execution, name: str = "block") -> LayerWork:
    """x + o(attention(norm(x))), then x + fc2(act(fc1(norm(x)))), or the gated MLP."""
    tokens, wide = execution.tokens, execution.dtype_bytes
    mine = execution.stream_tokens
    stream = mine * model.hidden
    attention = attention_operations(model, execution)
    mask = (pointwise("dropout", stream, 0, 2 * wide + 1),) if execution.dropout else ()
    add = pointwise("residual", 3 * stream, 3 * stream, wide)
    operations = (
        norm("norm 1", mine, model.hidden, wide),
        *_projections(model, execution),
        *attention,
        linear("o", tokens, model.query_width // execution.tp, model.hidden, wide),
        *mask,
        add,
        norm("norm 2", mine, model.hidden, wide),
        *_mlp_operations(model, execution),
        *mask,
        add,
    )
    recomputed = {"none": (), "selective": attention, "full": operations}[execution.recompute]
    reduces = 2 if execution.tp > 1 else 0
    return LayerWork(
        name=name,
        operations=operations,
        recomputed=recomputed,
        forward_reduces=reduces,
        # Full recomputation runs the forward's all-reduces again.
        backward_reduces=2 * reduces if execution.recompute == "full" else reduces,
        reduced_bytes=tokens * model.hidden * wide,
        saved=_block_saved(model, execution),
        kept=_block_kept(model, execution),
        output_bytes=stream * wide,
        parameter_bytes=model.shard_parameters(execution.tp) * wide,
    )


def head_work(model: Transformer, execution: Execution) -> LayerWork:
    """norm, projection onto the vocabulary, and the cross entropy (whose log-probabilities autograd keeps)."""
    tokens, wide = execution.tokens, execution.dtype_bytes
    cut = execution.tp if execution.split_vocabulary else 1
    columns = model.vocabulary // cut
    mine = execution.stream_tokens
    stream, logits = mine * model.hidden * wide, tokens * columns * wide
    operations = [
        norm("norm", mine, model.hidden, wide),
        linear("projection", tokens, model.hidden, columns, wide),
    ]
    statistics = _statistics(model, execution)
    saved = {"input": stream, "statistics": statistics, "norm output": stream}
    if execution.loss:
        elements = tokens * columns
        if execution.float32_loss:
            # F: the cast, then maximum, difference, exponential, sum and division; I: three operations on float32.
            operations += [pointwise("float32 logits", elements * (wide + 4), 0, 1)]
            operations += [pointwise("cross entropy", 4 * elements, 3 * elements, 4)]
        else:
            operations.append(pointwise("cross entropy", 2 * logits, 2 * logits, 1))
        kept_bytes = elements * (4 if execution.float32_loss else wide)
        saved |= {"log-probabilities": kept_bytes, "sum of target weights": wide}
    matrix = columns * model.hidden + (columns if model.head_bias else 0)
    return LayerWork(
        name="head",
        operations=tuple(operations),
        backward_reduces=int(cut > 1),
        reduced_bytes=tokens * model.hidden * wide,
        # Of the maximum, the target's logit and the sum (Shoeybi et al., Megatron-LM, 2019, section 3).
        row_reduces=3 if cut > 1 and execution.loss else 0,
        row_bytes=tokens * STATISTIC_BYTES,
        saved=saved,
        kept={
            "input": stream,
            "statistics": statistics,
            "norm output": stream,
            "norm output gradient": stream,
            "logits gradient": logits,
        },
        output_bytes=logits,
        # A tied matrix is there again, as the pipeline's last stage has its own copy.
        parameter_bytes=(model.norm_parameters + matrix) * wide,
    )


def attention_operations(model: Transformer, execution: Execution) -> tuple[Operation, ...]:
    """softmax(Q K^T) V on this rank's heads.

    F has two products of 2 d FLOPs for every pair and head, I four (dP = dO V^T, dV, dQ, dK), and fused a fifth, the
    scores again. Fused attention moves q, k, v and its output; unfused scores and probabilities go to memory as well.
    """
    rows, wide = execution.micro_batch_size * model.heads // execution.tp, execution.dtype_bytes
    queries = execution.tokens * model.query_width // execution.tp * wide
    keys = execution.tokens * model.kv_width // execution.tp * wide
    fused = execution.attention == "fused"
    pairs = rows * model.pairs(execution.seq, masked=fused and execution.skip_masked)
    product = 2 * pairs * model.head_dim
    if fused:
        sums = rows * execution.seq * STATISTIC_BYTES
        whole = Operation(
            name="attention",
            forward=Work(flops=2 * product, traffic_bytes=2 * queries + 2 * keys + sums),
            backward_input=Work(flops=5 * product, traffic_bytes=4 * queries + 4 * keys + sums),
        )
        return (whole,)
    scores = pairs * wide
    seq, head = execution.seq, model.head_dim
    wide_product, narrow_product = Product(seq, seq, head, rows), Product(seq, head, seq, rows)
    drop = (pointwise("attention dropout", pairs, pairs, 2 * wide + 1),) if execution.dropout else ()
    return (
        Operation(
            name="scores",
            forward=Work(flops=product, traffic_bytes=queries + keys + scores, products=(wide_product,)),
            backward_input=Work(
                flops=2 * product, traffic_bytes=2 * (queries + keys) + scores, products=(narrow_product,) * 2
            ),
        ),
        *_softmax(pairs, rows, execution),
        *drop,
        Operation(
            name="context",
            forward=Work(flops=product, traffic_bytes=queries + keys + scores, products=(narrow_product,)),
            backward_input=Work(
                flops=2 * product,
                traffic_bytes=queries + 2 * keys + 2 * scores,
                products=(wide_product, narrow_product),
            ),
        ),
    )


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


def _projections(model: Transformer, execution: Execution) -> tuple[Operation, ...]:
    tokens, wide = execution.tokens, execution.dtype_bytes
    query, kv = model.query_width // execution.tp, model.kv_width // execution.tp
    widths = {"qkv": query + 2 * kv} if execution.joint_projections else {"q": query, "k": kv, "v": kv}
    linears = tuple(linear(name, tokens, model.hidden, width, wide) for name, width in widths.items())
    if model.positions:
        return linears
    turned = 2 * tokens * (query + kv)
    return (*linears, pointwise("rotary", turned, turned, wide))


def _mlp_operations(model: Transformer, execution: Execution) -> tuple[Operation, ...]:
    tokens, wide, width = execution.tokens, execution.dtype_bytes, model.intermediate // execution.tp
    size = tokens * width
    activation = pointwise("activation", 2 * size, 3 * size, wide)
    last = linear("down" if model.gated else "fc2", tokens, width, model.hidden, wide)
    if not model.gated:
        return (linear("fc1", tokens, model.hidden, width, wide), activation, last)
    widths = {"gate and up": 2 * width} if execution.joint_projections else {"gate": width, "up": width}
    ups = (linear(name, tokens, model.hidden, columns, wide) for name, columns in widths.items())
    return (*ups, activation, pointwise("product", 3 * size, 5 * size, wide), last)


def _statistics(model: Transformer, execution: Execution) -> int:
    """A norm's mean and reciprocal deviation of each token; an RMS norm has no mean."""
    return execution.stream_tokens * STATISTIC_BYTES * (2 if model.norm == "layernorm" else 1)


def _block_saved(model: Transformer, execution: Execution) -> dict[str, int]:
    tokens, wide = execution.tokens, execution.dtype_bytes
    stream = execution.stream_tokens * model.hidden * wide
    if execution.recompute == "full":
        return {"input": stream}
    query = tokens * model.query_width // execution.tp * wide
    kv = tokens * model.kv_width // execution.tp * wide
    width = tokens * model.intermediate // execution.tp * wide
    statistics = _statistics(model, execution)
    rows = execution.micro_batch_size * model.heads // execution.tp * execution.seq
    saved = {"input": stream, "statistics 1": statistics, "norm 1 output": stream, "q": query, "k": kv, "v": kv}
    if execution.attention == "fused":
        saved["log-sum-exp"] = rows * STATISTIC_BYTES
    elif execution.recompute == "none":
        scores = rows * execution.seq
        saved["probabilities"] = scores * wide
        if execution.dropout:
            saved |= {"attention dropout mask": scores, "dropped probabilities": scores * wide}
    saved["attention output"] = query
    if execution.dropout:
        saved["dropout mask 1"] = execution.stream_tokens * model.hidden
    saved |= {"middle": stream, "statistics 2": statistics, "norm 2 output": stream}
    names = ("gate", "up", "activation", "product") if model.gated else ("fc1 output", "activation")
    saved |= dict.fromkeys(names, width)
    if execution.dropout:
        saved["dropout mask 2"] = execution.stream_tokens * model.hidden
    return saved


def _block_kept(model: Transformer, execution: Execution) -> dict[str, int]:
    """Norms keep their statistics too. The gradient of fc2's output is that of the block's, which arrived."""
    tokens, wide = execution.tokens, execution.dtype_bytes
    stream = execution.stream_tokens * model.hidden * wide
    query = tokens * model.query_width // execution.tp * wide
    kv = tokens * model.kv_width // execution.tp * wide
    width = tokens * model.intermediate // execution.tp * wide
    statistics = _statistics(model, execution)
    inputs = {"input": stream, "statistics 1": statistics, "norm 1 output": stream, "attention output": query}
    inputs |= {"middle": stream, "statistics 2": statistics, "norm 2 output": stream, "last input": width}
    ups = ("gate", "up") if model.gated else ("fc1",)
    gradients = {"norm 1": stream, "q": query, "k": kv, "v": kv, "o": stream, "norm 2": stream}
    gradients |= {**dict.fromkeys(ups, width), "last": stream}
    # A dropout between a projection and the residual sum gives the projection a gradient of its own, as large.
    return {**inputs, **{f"{name} output gradient": size for name, size in gradients.items()}}
