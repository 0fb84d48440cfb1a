"""Layer work: the operations of an embedding, a block, a further prediction and a head, and what autograd keeps.

Letters: m = b s tokens, h hidden, f intermediate, a heads, d head_dim, t tensor-parallel ranks, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

from ppsim.checks import checked
from ppsim.errors import InputError
from ppsim.estimate.attention_work import attention_operations, attention_part, ring_bytes
from ppsim.estimate.block import Block
from ppsim.estimate.feed_forward_work import feed_forward_part, routed
from ppsim.estimate.operations import linear, norm, pointwise
from ppsim.estimate.transformer import Transformer
from ppsim.estimate.work import INDEX_BYTES, STATISTIC_BYTES, Execution, LayerWork, Operation, Work


@checked
def transformer_work(model: Transformer, execution: Execution) -> list[LayerWork]:
    """The work of [embedding, block 0, ..., mtp 0, ..., head] for one microbatch on one tensor-parallel rank.

    Raises
    ------
    InputError
        If tp, ep or expert_tp do not divide the model, or if seq exceeds a learned table of positions.

    Notes
    -----
    `saved` is what PyTorch's autograd keeps. Norms are one kernel each; q, k, v and o are linear layers of their own.
    Fused attention keeps q, k, v, its output and a log-sum-exp per row; unfused attention keeps probabilities.
    Activation functions keep their input. A gated MLP keeps gate, up, act(gate) and the product.

    `kept`, between I and W, is the input of every linear layer and norm and the gradient of its output.

    Without the norms' statistics an unfused GPT block with dropout and 2-byte elements saves
    s b h (10 + 24 / t + 5 a s / (h t)) bytes, as in Korthikanti et al., Reducing Activation Recomputation in Large
    Transformer Models, 2022, equation 2. With t = 1 that is equation 1, 34 s b h + 5 a s^2 b.

    All experts are taken to get equally many tokens. Each token goes to its experts in copies of its own, as
    Megatron-LM's all-to-all sends them, also where several of its experts are on one rank.
    """
    model.check_shards(execution.tp, ep=execution.ep, expert_tp=execution.expert_ranks)
    if execution.split_vocabulary and model.vocabulary % execution.tp:
        raise InputError(
            f"tp {execution.tp} does not divide the vocabulary {model.vocabulary}: pad the vocabulary, "
            "or leave embedding and head whole"
        )
    model.check_seq(execution.seq)
    works = {id(kind): block_work(kind, execution) for kind in model.kinds}
    blocks = [replace(works[id(block)], name=f"block {index}") for index, block in enumerate(model.blocks)]
    further = [mtp_work(model, execution, index) for index in range(model.mtp_layers)]
    return [embedding_work(model, execution), *blocks, *further, head_work(model, execution)]


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


def block_work(block: Block, execution: Execution, name: str = "block") -> LayerWork:
    """x + o(attention(norm(x))), then x + fc2(act(fc1(norm(x)))), the gated MLP, or experts.

    Norms may also stand after attention and MLP, or there alone, which is as much work; with one norm for both, they
    run side by side.
    """
    wide, mine = execution.dtype_bytes, execution.stream_tokens
    stream = mine * block.hidden
    attention, feed_forward = attention_part(block, execution), feed_forward_part(block, execution)
    mask = (pointwise("dropout", stream, 0, 2 * wide + 1),) if execution.dropout else ()
    add = pointwise("residual", 3 * stream, 3 * stream, wide)
    norms = [norm(f"norm {number}", mine, block.hidden, wide) for number in range(1, block.norms + 1)]
    operations = (
        *norms[:1],
        *attention.operations,
        *norms[2:3],
        *mask,
        add,
        *norms[1:2],
        *feed_forward.operations,
        *norms[3:4],
        *mask,
        add,
    )
    recomputed = {"none": (), "selective": attention_operations(block, execution), "full": operations}
    work = LayerWork(
        name=name,
        operations=operations,
        recomputed=recomputed[execution.recompute],
        saved=_block_saved(block, execution, attention.saved, feed_forward.saved),
        kept=_block_kept(
            block, execution, attention.inputs | feed_forward.inputs, attention.gradients | feed_forward.gradients
        ),
        output_bytes=stream * wide,
        parameter_bytes=block.parameters(tp=execution.tp, ep=execution.ep, expert_tp=execution.expert_ranks) * wide,
    )
    return _with_communication(work, block, execution)


def _with_communication(work: LayerWork, block: Block, execution: Execution) -> LayerWork:
    """The block's collectives. Full recomputation runs the forward's again."""
    wide, experts = execution.dtype_bytes, block.experts
    again = 2 if execution.recompute == "full" else 1
    reduces = 2 if execution.tp > 1 else 0
    expert_reduces = 0
    if experts is not None and execution.sequence_parallel and execution.tp > 1:
        # Attention, and the MLP that all tokens share; experts gather their own tokens, if ranks share them.
        reduces = 2 if experts.shared_intermediate else 1
        expert_reduces = int(execution.expert_ranks > 1)
    exchanges = 2 if experts is not None and execution.ep > 1 else 0  # dispatch and combine
    share = None if experts is None else routed(experts, execution)
    ring = ring_bytes(block, execution)
    return replace(
        work,
        forward_ring_bytes=ring,
        # Keys and values once more, and their gradients.
        backward_ring_bytes=(again + 1) * ring,
        forward_reduces=reduces,
        backward_reduces=again * reduces,
        reduced_bytes=execution.tokens * block.hidden * wide,
        forward_expert_reduces=expert_reduces,
        backward_expert_reduces=again * expert_reduces,
        expert_reduced_bytes=share.rows * block.hidden * wide if share and expert_reduces else 0,
        forward_exchanges=exchanges,
        backward_exchanges=again * exchanges,
        exchanged_bytes=share.copies * block.hidden * wide if share and exchanges else 0,
    )


def mtp_work(model: Transformer, execution: Execution, index: int) -> LayerWork:
    """A further prediction: the next token's row beside the stream, projected to its width; a block; a final norm.

    It hands on the streams of all predictions before it too, for the head. The first such layer has a copy of the
    table of tokens, as the embedding is on another stage.
    """
    wide, mine = execution.dtype_bytes, execution.stream_tokens
    hidden = model.hidden
    stream = mine * hidden * wide
    lookup = embedding_work(replace(model, positions=0), execution)
    block = block_work(model.blocks[-1], execution, f"mtp {index}")
    before = (
        norm("norm of rows", mine, hidden, wide),
        norm("norm of stream", mine, hidden, wide),
        linear("join", execution.tokens, 2 * hidden, hidden // execution.tp, wide),
    )
    last = norm("final norm", mine, hidden, wide)
    statistics = _statistics(model.blocks[-1], execution)
    joined = {"join input": 2 * stream, "rows": stream, "statistics of rows": statistics, "stream": stream}
    joined |= {"statistics of stream": statistics, "final norm input": stream, "final statistics": statistics}
    gradients = {"rows gradient": stream, "stream gradient": stream, "join gradient": stream, "final gradient": stream}
    own = 3 * model.norm_parameters + 2 * hidden * hidden // execution.tp
    table = lookup.parameter_bytes if index == 0 else 0
    reduces = int(execution.tp > 1)
    return replace(
        block,
        operations=(*lookup.operations, *before, *block.operations, last),
        recomputed=(*before, *block.recomputed, last) if execution.recompute == "full" else block.recomputed,
        forward_reduces=block.forward_reduces + lookup.forward_reduces + reduces,
        backward_reduces=block.backward_reduces + reduces,
        saved=({"rows": stream, "stream": stream} if execution.recompute == "full" else block.saved | joined)
        | {"tokens": lookup.saved["tokens"], "streams before": (index + 1) * stream},
        kept=block.kept | joined | gradients | {"tokens": lookup.saved["tokens"]},
        output_bytes=(index + 2) * stream,
        parameter_bytes=block.parameter_bytes + own * wide + table,
    )


def head_work(model: Transformer, execution: Execution) -> LayerWork:
    """norm, projection onto the vocabulary, and the cross entropy (whose log-probabilities autograd keeps).

    Layers that predict further tokens are normed already; each is projected and has a loss of its own.
    """
    wide, predictions = execution.dtype_bytes, 1 + model.mtp_layers
    tokens = execution.tokens * predictions
    cut = execution.tp if execution.split_vocabulary else 1
    columns = model.vocabulary // cut
    mine = execution.stream_tokens
    stream, logits = mine * model.hidden * wide, tokens * columns * wide
    streams = predictions * stream
    operations = [
        norm("norm", mine, model.hidden, wide),
        linear("projection", tokens, model.hidden, columns, wide),
    ]
    statistics = _statistics(model.blocks[-1], execution)
    saved = {"input": streams, "statistics": statistics, "norm output": stream}
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
            "input": streams,
            "statistics": statistics,
            "norm output": stream,
            "norm output gradient": streams,
            "logits gradient": logits,
        },
        output_bytes=logits,
        # A tied matrix is there again, as the pipeline's last stage has its own copy.
        parameter_bytes=(model.norm_parameters + matrix) * wide,
    )


def _statistics(block: Block, execution: Execution) -> int:
    """A norm's mean and reciprocal deviation of each token; an RMS norm has no mean."""
    return execution.stream_tokens * STATISTIC_BYTES * (2 if block.norm == "layernorm" else 1)


def _block_saved(
    block: Block, execution: Execution, attention: dict[str, int], feed_forward: dict[str, int]
) -> dict[str, int]:
    stream = execution.stream_tokens * block.hidden * execution.dtype_bytes
    if execution.recompute == "full":
        return {"input": stream}
    statistics = _statistics(block, execution)
    mask = execution.stream_tokens * block.hidden
    saved = {"input": stream, "statistics 1": statistics, "norm 1 output": stream, **attention}
    if block.norms > 2:
        saved |= {"statistics 3": statistics, "o output": stream}
    if execution.dropout:
        saved["dropout mask 1"] = mask
    if block.norms > 1:
        saved |= {"middle": stream, "statistics 2": statistics, "norm 2 output": stream}
    saved |= feed_forward
    if block.norms > 3:
        saved |= {"statistics 4": statistics, "last output": stream}
    if execution.dropout:
        saved["dropout mask 2"] = mask
    return saved


def _block_kept(
    block: Block, execution: Execution, inputs: dict[str, int], gradients: dict[str, int]
) -> dict[str, int]:
    """Norms keep their statistics too. The gradient of fc2's output is that of the block's, which arrived."""
    stream = execution.stream_tokens * block.hidden * execution.dtype_bytes
    statistics = _statistics(block, execution)
    kept = {"input": stream, "statistics 1": statistics, "norm 1 output": stream, **inputs}
    normed = {"norm 1": stream}
    if block.norms > 1:
        kept |= {"middle": stream, "statistics 2": statistics, "norm 2 output": stream}
        normed |= {"norm 2": stream}
    for number, name in ((3, "o output"), (4, "last output")):
        if block.norms >= number:
            kept |= {f"statistics {number}": statistics, name: stream}
            normed |= {f"norm {number}": stream}
    # A dropout between a projection and the residual sum gives the projection a gradient of its own, as large.
    return {**kept, **{f"{name} output gradient": size for name, size in (normed | gradients).items()}}
