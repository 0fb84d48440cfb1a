"""Train and checkpoint: the same curve on every mesh, and on with the same loss after a move to another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from torch.nn import functional

import ppexec
import ppsim
from ppexec import RunConfig, Session, WorkerPool
from ppexec.measure.assemble import with_memory
from ppexec.models.initialize import initialize_layer
from ppexec.models.load import load_model
from ppexec.models.seeds import microbatch_order
from ppexec.training.checkpoint import newest
from ppsim.simulation.memory_columns import with_columns
from ppsim.simulation.memory_levels import optimizer_state_bytes
from tests.support.remote import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")

BATCH = 4


def mesh(dp: int, pp: int, tp: int, **changes: object) -> RunConfig:
    """The same global batch on every mesh."""
    values = {"schedule": "1f1b", "dtype": "float64", "learning_rate": 0.01, **changes}
    return tiny(dp=dp, ranks=pp, tp=tp, microbatches=BATCH // dp, **values)


def plain_losses(config: RunConfig, steps: int) -> list[float]:
    """The same training in plain PyTorch, with its own AdamW on a whole model."""
    model = load_model(config)
    layers = [
        initialize_layer(m, index=i, seed=config.seed, device=torch.device("cpu")) for i, m in enumerate(model.layers)
    ]
    network = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for index in microbatch_order(config.seed, step=step, microbatches=BATCH).tolist():
            inputs, target = model.sample(index)
            loss = functional.mse_loss(network(inputs), target)
            (loss / BATCH).backward()
            total += float(loss.detach())
        optimizer.step()
        losses.append(total / BATCH)
    return losses


@pytest.mark.parametrize(("dp", "pp", "tp"), [(1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 2), (2, 2, 2), (1, 4, 1)])
def test_every_mesh_trains_as_plain_pytorch_does(pool: WorkerPool, dp: int, pp: int, tp: int) -> None:
    config = mesh(dp, pp, tp)
    expected = plain_losses(config, 5)
    report = ppexec.train(config, steps=5, pool=pool)
    assert report.steps == [0, 1, 2, 3, 4]
    assert report.losses == pytest.approx(expected, rel=1e-12)
    assert expected[0] != pytest.approx(plain_losses(replace(config, learning_rate=0.0), 2)[1])


@pytest.mark.parametrize("schedule", ["zb-h1", "interleaved-1f1b", "zb-v"])
def test_every_schedule_trains_alike(pool: WorkerPool, schedule: str) -> None:
    config = mesh(1, 2, 2, schedule=schedule)
    assert ppexec.train(config, steps=3, pool=pool).losses == pytest.approx(plain_losses(config, 3), rel=1e-12)


MOVES = [((2, 2, 1), (1, 4, 1)), ((2, 2, 1), (1, 2, 2)), ((1, 2, 2), (2, 1, 1)), ((1, 1, 4), (1, 2, 2))]


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_a_checkpoint_goes_on_alike_on_another_mesh(
    pool: WorkerPool, tmp_path: Path, before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    with Session(mesh(*before), pool=pool) as session:
        session.train(2)
        folder = session.save_checkpoint(tmp_path)
        expected = session.train(2).losses
    assert folder.name == "step-00000002"
    report = ppexec.train(mesh(*after, schedule="zb-h1"), steps=2, resume=tmp_path, pool=pool)
    assert report.steps == [2, 3]
    assert report.losses == pytest.approx(expected, rel=1e-12)  # the second needs the moments too


def test_the_same_mesh_goes_on_bit_by_bit(pool: WorkerPool, tmp_path: Path) -> None:
    config = mesh(1, 2, 2, dtype="float32")
    with Session(config, pool=pool) as session:
        session.train(2)
        session.save_checkpoint(tmp_path)
        expected = session.train(3).losses
    assert ppexec.train(config, steps=3, resume=tmp_path, pool=pool).losses == expected


def test_the_newest_complete_checkpoint_is_taken(pool: WorkerPool, tmp_path: Path) -> None:
    first = ppexec.train(mesh(1, 1, 1), steps=1, save=tmp_path, pool=pool)
    second = ppexec.train(mesh(1, 1, 1), steps=1, save=tmp_path, resume=tmp_path, pool=pool)
    (tmp_path / "step-00000009").mkdir()  # a save that was killed
    assert second.checkpoint is not None
    assert newest(tmp_path) == Path(second.checkpoint)
    assert first.checkpoint is not None
    assert newest(Path(first.checkpoint)) == Path(first.checkpoint)


def test_no_checkpoint_and_one_of_another_model_are_refused(pool: WorkerPool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        ppexec.train(mesh(1, 1, 1), resume=tmp_path, pool=pool)
    ppexec.train(mesh(1, 1, 1), steps=1, save=tmp_path, pool=pool)
    with pytest.raises(
        ValueError, match=r"a tensor of shape \[32, 8\] for model.layers.0.fc1.weight, where .* \[64, 8\]"
    ):
        ppexec.train(mesh(1, 1, 1, intermediate=64), resume=tmp_path, pool=pool)
    with pytest.raises(ValueError, match=r"holds nothing for model.layers.4.fc1.weight"):
        ppexec.train(mesh(1, 1, 1, layers=5), resume=tmp_path, pool=pool)


def test_what_cannot_be_trained_is_refused(pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="forward_only has no gradients"):
        ppexec.train(mesh(1, 1, 1, forward_only=True), pool=pool)
    with pytest.raises(ValueError, match="learning_rate must be a number of 0 or more, got -1"):
        tiny(learning_rate=-1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_nudge_moves_every_parameter_by_a_rounding_and_alike_on_every_mesh(pool: WorkerPool, tmp_path: Path) -> None:
    """Read from the checkpoints of both meshes, as anyone can, in one process."""
    config = mesh(1, 1, 1)
    initial = {
        f"model.layers.{index}.{name}": parameter.detach()
        for index, layer in enumerate(load_model(config).layers)
        for name, parameter in initialize_layer(
            layer, index=index, seed=config.seed, device=torch.device("cpu")
        ).named_parameters()
    }
    for number, at in enumerate([(1, 1, 1), (1, 2, 2)]):
        with Session(mesh(*at), pool=pool) as session:
            session.nudge()
            folder = session.save_checkpoint(tmp_path / str(number))
        found = {key: torch.zeros_like(value) for key, value in initial.items()}
        torch.distributed.checkpoint.load(found, checkpoint_id=folder, no_dist=True)
        for key, value in initial.items():
            assert torch.allclose(found[key], value, rtol=4.5e-16, atol=0)
            assert (found[key] != value).all()
        if number == 0:
            first = found
    assert all(torch.equal(first[key], found[key]) for key in initial)


@pytest.mark.parametrize(("dp", "pp", "tp"), [(1, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_adamws_state_is_counted_and_as_large_as_predicted(pool: WorkerPool, dp: int, pp: int, tp: int) -> None:
    """Two moments for each of the rank's own parameters, and a counter of 4 bytes for each tensor."""
    config = mesh(dp, pp, tp)
    with Session(config, pool=pool) as session:
        assert all(rank.optimizer_bytes is None for rank in session.memory())  # no training, no optimizer
        session.train(1)
        (trace,) = session.measure(1)
        measured = with_memory(trace, session.memory())
    assert measured.optimizer_bytes is not None
    assert measured.gradient_bytes is not None
    gradients = measured.memory.gradient_bytes
    assert gradients is not None
    tensors = config.layers // pp * 4
    block_bytes = 8 * (2 * 8 * 32 // tp + 32 // tp + 8)
    assert gradients.tolist() == [config.layers // pp * block_bytes] * pp
    expected = [optimizer_state_bytes("adamw", size, tensors=tensors) for size in gradients.tolist()]
    assert measured.optimizer_bytes.tolist() == measured.memory.to_dict()["optimizer_bytes"] == expected
    cost = ppsim.StageCost(
        forward_s=1, backward_input_s=1, backward_weight_s=1, parameter_bytes=config.layers // pp * block_bytes
    )
    predicted = with_columns(ppsim.simulate(config.pipeline, [cost] * pp), optimizer="adamw")
    assert predicted.optimizer_bytes is not None
    assert (measured.optimizer_bytes - predicted.optimizer_bytes).tolist() == [4 * tensors] * pp


@pytest.mark.parametrize("recompute", [False, True])
def test_a_tied_gpt_goes_on_from_a_checkpoint_on_another_mesh(
    pool: WorkerPool, tmp_path: Path, recompute: bool
) -> None:
    """Both copies of the weight are saved, and still equal where they are one rank's, or two ranks' of another mesh."""
    more = {"model": "gpt", "tied": True, "dropout": 0.1, "recompute": recompute}
    with Session(mesh(2, 2, 1, **more), pool=pool) as session:
        session.train(2)
        session.save_checkpoint(tmp_path)
        expected = session.train(2).losses
    for at in [(1, 1, 1), (1, 4, 1), (1, 2, 2)]:
        found = ppexec.train(mesh(*at, **more), steps=2, resume=tmp_path, pool=pool).losses
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("model", ["uneven", "by_targets", "by_loss"])
def test_every_reduction_trains_alike_on_every_mesh(pool: WorkerPool, model: str) -> None:
    """The loss of a step counts samples or terms, over all rounds and replicas; so does that of held-out data."""
    base = {"model": f"tests.ppexec.verification.test_sizes:{model}", "layers": 4, "dtype": "float64",
            "schedule": "1f1b", "evaluate_every": 2}  # fmt: skip
    one = ppexec.train(tiny(**base, ranks=1, microbatches=8, steps=3), pool=pool)
    for mesh in ({"ranks": 2, "accumulate": 2}, {"ranks": 2, "dp": 2}, {"ranks": 1, "dp": 2, "accumulate": 2}):
        microbatches = 8 // (mesh.get("dp", 1) * mesh.get("accumulate", 1))
        rounds = mesh.get("accumulate", 1)
        other = ppexec.train(tiny(**base, **mesh, microbatches=microbatches, evaluate_steps=rounds, steps=3), pool=pool)
        assert other.held_out_losses == pytest.approx(one.held_out_losses, rel=1e-12)
        assert other.losses == pytest.approx(one.losses, rel=1e-12)
        assert other.gradient_norms == pytest.approx(one.gradient_norms, rel=1e-12)


def test_a_batch_that_does_not_divide_trains_alike_on_every_mesh(pool: WorkerPool) -> None:
    base = {"layers": 4, "dtype": "float64", "schedule": "zb-h1", "global_batch_size": 13, "micro_batch_size": 0,
            "steps": 3}  # fmt: skip
    one = ppexec.train(tiny(**base, ranks=1, microbatches=8), pool=pool)
    two = ppexec.train(tiny(**base, ranks=2, microbatches=4, dp=2), pool=pool)
    assert two.losses == pytest.approx(one.losses, rel=1e-12)
    assert two.gradient_norms == pytest.approx(one.gradient_norms, rel=1e-12)
