"""Tutorial: from ten questions about a first pipeline to a schedule that nobody has published.

Question   A course on pipeline parallelism asks ten things: how to seed, what to assert, what is sent, who loads data,
           who talks to whom, how to run all forwards before all backwards, and how to prove the result. What are the
           answers, and what comes after them?

Command    python studies/tutorial.py

Method     Cells, marked `# %%`: VS Code, PyCharm and Spyder run them one by one, Jupyter opens them with jupytext, and
           Python runs all in a row. Every answer is computed by its cell; the text around it asks.

Answer     The last cell's: an order for uneven stages under a memory limit that no published schedule with one stage
           per rank keeps, its predicted and its measured step, and gradients that have the bits of one process.

Writes studies/out/tutorial/found.csv, the order in PyTorch's format.
"""

# %%
from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas
import torch

import ppexec
import ppsim
from ppexec.config.bubble_warning import bubble_warning
from ppexec.models.initialize import initialize_layer
from ppexec.models.mlp import MLPBlock, mlp
from ppexec.models.seeds import derive
from ppsim.export.staircase import staircase, unit_trace

show = print
with contextlib.suppress(ImportError):
    from IPython import display, get_ipython

    if get_ipython() is not None:  # a script may run where IPython is installed
        show = display.display  # pictures and tables, in a notebook
logging.disable(logging.WARNING)

OUT = Path("studies/out/tutorial")
OUT.mkdir(parents=True, exist_ok=True)
POOL = ppexec.WorkerPool()  # processes that are started once and take many runs
SIZES = {"layers": 8, "hidden": 64, "seq": 16, "micro_batch_size": 2, "microbatches": 8, "ranks": 4, "threads": 1}


def config(**changes: object) -> ppexec.RunConfig:
    """The run of most questions: eight layers on four ranks, eight microbatches; with some things changed."""
    return ppexec.RunConfig(**{**SIZES, **changes})


def table(rows: list[dict[str, object]]) -> pandas.DataFrame:
    """Rows as a table whose first column names them."""
    return pandas.DataFrame(rows).set_index(next(iter(rows[0])))


# %% [markdown]
# ## 1. Which ranks need the same seed?
#
# A mesh has three directions: pipeline stages (pp), replicas (dp) and shards of a layer (tp). A seed for each rank
# needs a rule for each direction. A seed for each *parameter* needs none: what a parameter starts with depends on the
# run's seed, its layer and its name, and a shard is a slice of it. If that is right, every mesh starts from the model
# of one process, and one step has that process's outputs and gradients.

# %%
meshes = []
for dp, pp, tp in [(1, 2, 1), (2, 1, 1), (1, 1, 2)]:
    report = ppexec.verify(config(dp=dp, ranks=pp, tp=tp, microbatches=4), pool=POOL)
    meshes.append(
        {
            "mesh (dp, pp, tp)": (dp, pp, tp),
            "as one process": report.passed,
            "largest difference": report.max_gradient_diff,
            "tolerance": report.tolerance,
        }
    )
show(table(meshes))

# %% [markdown]
# And what do seeds by rank do? Two replicas that mix their dp rank into the seed, and two tp ranks that draw their
# halves of a square matrix from one seed:

# %%


def draw(seed: int, rows: int = 64) -> torch.Tensor:
    """A matrix with 64 columns from a stream of its own."""
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))


replicas = [draw(derive(0, "dp", rank)) for rank in range(2)]
halves = [draw(derive(0, "shared"), rows=32) for _ in range(2)]
show(
    table(
        [
            {"what": "largest difference of two replicas", "value": float((replicas[0] - replicas[1]).abs().max())},
            {"what": "rank of a whole 64 x 64 draw", "value": int(torch.linalg.matrix_rank(draw(0)))},
            {"what": "rank of two equal halves", "value": int(torch.linalg.matrix_rank(torch.cat(halves)))},
        ]
    )
)

# %% [markdown]
# ## 2. What must divide, and how many microbatches are enough?
#
# Wrong sizes are best refused before anything starts, with the nearest that works. Few microbatches are not wrong, only
# slow, so they get a warning with a number.

# %%
for wrong in ({"layers": 10}, {"global_batch_size": 7, "microbatches": 8}):
    try:
        print(config(**wrong).layer_sizes)
    except ppsim.InputError as error:
        print(f"{wrong}: {error}")
print(*bubble_warning(ppsim.build_schedule("afab", ranks=4, microbatches=4)))

# %%
cost = ppsim.StageCost(forward_s=1, backward_input_s=1, backward_weight_s=1, activation_bytes=1)
bubbles = [
    {"m / p": factor}
    | {
        f"p = {p}": ppsim.simulate(
            ppsim.build_schedule("afab", ranks=p, microbatches=factor * p), [cost] * p
        ).bubble_fraction
        for p in (2, 4, 8)
    }
    for factor in (1, 2, 4, 8)
]
show(table(bubbles))

# %% [markdown]
# ## 3. What shape does a message have?
#
# A message is what a stage gives for one microbatch. Layers on PyTorch's meta device have shapes and no memory, so that
# even sizes that fit no laptop can be asked. The same question at a small size is then put to messages that were sent.

# %%
with torch.device("meta"):
    output = MLPBlock(4096, 16384, dtype=torch.bfloat16)(torch.empty(2, 8192, 4096, dtype=torch.bfloat16))
print(f"{list(output.shape)} of {output.dtype}: {output.numel() * output.element_size() / 2**20:g} MiB")

with torch.device("meta"):
    small = MLPBlock(SIZES["hidden"], 4 * SIZES["hidden"])(
        torch.empty(SIZES["micro_batch_size"], SIZES["seq"], SIZES["hidden"])
    )
afab = ppexec.run(config(schedule="afab", steps=3), pool=POOL)
events = afab.to_frame()
sent = events[events["kind"] == "SEND_F"]["size_bytes"].unique().tolist()
print(f"{list(small.shape)}: {small.numel() * small.element_size()} bytes; sent: {sent}")

# %% [markdown]
# ## 4. What is the answer without a pipeline?
#
# A loop in one process: each microbatch forward and backward, gradients added up. It knows nothing of this toolkit but
# the model's layers and its data. Its loss is kept for question 8.

# %%
one = config()
model = mlp(one)
layers = [
    initialize_layer(layer, index=index, seed=one.seed, device=torch.device("cpu"))
    for index, layer in enumerate(model.layers)
]
losses = []
for microbatch in range(one.microbatches):
    value, target = model.sample(microbatch)
    for layer in layers:
        value = layer(value)
    loss = model.loss(value, target)
    (loss / one.microbatches).backward()
    losses.append(loss.item())
baseline = sum(losses) / len(losses)
print(f"loss of one process: {baseline:.9g}")

# %% [markdown]
# ## 5. Which layers does a rank hold?
#
# Equal layers are cut evenly. A language model's head is no equal layer; here it costs as much as three. Cut by cost,
# the largest stage is as small as can be.

# %%
work = [1.0] * 11 + [3.0]
cuts = []
for method in ("even", "optimal"):
    sizes = ppsim.partition_sizes(len(work), stages=4, method=method, work_s=work)
    ends = [sum(sizes[:stage]) for stage in range(5)]
    largest = max(sum(work[first:last]) for first, last in pairwise(ends))
    cuts.append({"cut": method, "layers of each stage": sizes, "largest stage": largest})
show(table(cuts))

# %% [markdown]
# ## 6. Who reads the data?
#
# Inputs go where a forward waits for nothing; targets go where the last stage stands. That is a question to the
# schedule's own tables, and the answer is not the same for every schedule.

# %%
readers = []
for name in ("afab", "interleaved-1f1b", "zb-v"):
    program = ppsim.build_schedule(name, ranks=4, microbatches=8).program
    first = (program.message_in < 0) & (program.stage == 0) & (program.kind == ppsim.Kind.F)
    last = program.stage == program.schedule.stages - 1
    readers.append(
        {
            "schedule": name,
            "ranks that read inputs": sorted(set(program.rank[first].tolist())),
            "ranks that read targets": sorted(set(program.rank[last].tolist())),
        }
    )
show(table(readers))

# %% [markdown]
# ## 7. Who sends what to whom?
#
# The schedule states what is computed. Messages follow: one wherever a stage's neighbour stands on another rank.

# %%
program = ppsim.build_schedule("afab", ranks=4, microbatches=8).program
messages = program.messages
kinds = program.kind[messages.producer]
talk = pandas.DataFrame(
    {
        "sends": [f"{ppsim.Kind(kind).name} of rank {rank}" for kind, rank in zip(kinds, messages.source, strict=True)],
        "to rank": messages.destination,
    }
)
show(talk.value_counts(sort=False).rename("messages").reset_index())

# %% [markdown]
# ## 8. How does the pipeline run?
#
# All forwards, then all backwards. The drawing is computed with F = 1 and B = 2. Then the loss of a real step on four
# ranks is held against the loop of question 4.

# %%
print(staircase(unit_trace(ppsim.build_schedule("afab", ranks=4, microbatches=4))))
trained = ppexec.train(config(schedule="afab"), steps=1, pool=POOL)
print(f"loss of the pipeline: {trained.losses[0]:.9g}; of one process: {baseline:.9g}")

# %% [markdown]
# ## 9 and 10. Are outputs and gradients right?
#
# A tolerance hides small mistakes, such as a microbatch that counts twice. Where the same operations run in the same
# order the bits can be compared. All outputs of the last stage and all gradients of all stages are.

# %%
proofs = []
for name in ("afab", "1f1b", "zb-h1", "zb-v"):
    report = ppexec.verify(config(schedule=name), pool=POOL)
    proofs.append(
        {
            "schedule": name,
            "tensors": report.compared,
            "outputs bit-equal": report.outputs_bit_equal,
            "gradients bit-equal": report.gradients_bit_equal,
        }
    )
show(table(proofs))

# %% [markdown]
# ## Beyond: a model with uneven stages, and too little memory
#
# Nine layers on four ranks, the last with three of them. The layers are profiled: seconds and bytes. Each rank may hold
# three microbatches of a two-layer stage. Which published schedules, at one stage per rank, keep that?

# %%
uneven = config(layers=9, hidden=256, seq=64, partition="2,2,2,3")
profile = ppexec.profile(uneven, pool=POOL)
stages = ppsim.partition(profile, stages=4, method=[2, 2, 2, 3])
limit = 3 * stages[0].activation_bytes
published = []
for name in ppsim.schedule_names():
    schedule = ppsim.build_schedule(name, ranks=4, microbatches=8)
    if schedule.stages == 4:
        trace = ppsim.simulate(schedule, stages)
        held = int(trace.peak_activation_bytes.max())
        published.append(
            {
                "schedule": name,
                "step (ms)": trace.makespan_s * 1e3,
                "holds (MiB)": held / 2**20,
                "keeps the limit": held <= limit,
            }
        )
print(f"limit: {limit / 2**20:g} MiB")
show(table(published))

# %% [markdown]
# Then one is searched. `lower_bound_s` is what no order under the limit can beat, so one sees how good the result is.
# The drawing has F = I = W = 1 on every stage, so that it can be read; the search has the profiled seconds.

# %%
found = ppsim.search(stages, ranks=4, microbatches=8, memory_limit_bytes=limit)
known = {tuple(ppsim.build_schedule(row["schedule"], ranks=4, microbatches=8).orders) for row in published}
print(f"holds {found.trace.peak_activation_bytes.max() / 2**20:g} MiB of {limit / 2**20:g}")
print(
    f"step {found.trace.makespan_s * 1e3:.2f} ms; no order under the limit is below {found.lower_bound_s * 1e3:.2f} ms"
)
print(f"is one of the published: {tuple(found.schedule.orders) in known}")
show(found if show is not print else staircase(unit_trace(found.schedule)))

# %% [markdown]
# It is a schedule like any other: a CSV in PyTorch's format. It runs for real, each action for the time that was
# profiled and with real messages, so that four ranks on few cores show their bubbles; and once more with real compute,
# to hold its gradients against one process.
# This prediction also has what the runtime and its messages take on this machine, which known runs beside it show.

# %%
path = OUT / "found.csv"
path.write_text(found.schedule.to_csv())
own = replace(uneven, from_csv=path, steps=5)
outcome = ppexec.predict_and_measure(replace(own, compute="timed"), pool=POOL, costs=stages, verify=False)
report = ppexec.verify(own, pool=POOL)
POOL.close()
print(f"predicted {outcome.predicted.makespan_s * 1e3:.2f} ms, measured {outcome.median.makespan_s * 1e3:.2f} ms")
print(f"held as predicted: {(outcome.predicted.peak_activation_bytes == outcome.median.peak_activation_bytes).all()}")
print(f"gradients bit-equal to one process: {report.gradients_bit_equal}")
print(f"written to {path}: load it with ppexec run --from-csv, or with PyTorch's runtime")
