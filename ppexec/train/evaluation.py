"""Evaluation: the loss of held-out data in the middle of a training, which does not notice it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ppexec.stage.draws import Draws
from ppexec.stage.stage import Stage
from ppexec.stage.timed import TimedStage
from ppexec.train.gradients import mean, own_losses, total
from ppexec.workers.worker import Worker, run_step, sequence_of


class Evaluation:
    """The held-out loss of a worker's run, by the forwards of its schedule on its mesh. All workers must build theirs.

    Parameters
    ----------
    worker : Worker
        Its layers are evaluated as they are, without dropout and gradients, in evaluation mode.

    Notes
    -----
    A training goes on with the same bits as without evaluations: the stages here are others on the same layers, so that
    gradients, what is kept of microbatches and which layers draw random numbers stay as they were, and each module gets
    its mode back.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        config = worker.config
        program = config.pipeline.forward_only().program
        self._stages = [
            Stage(
                stage.index,
                stage.layers,
                first_layer=stage.first_layer,
                loss=stage.loss,
                microbatches=stage.microbatches,
                trains=False,
                copies_input=stage.copies_input,
                randomness=stage.randomness,
                draws=Draws(config.seed),
            )
            for stage in worker.real_stages
        ]
        stages_of: dict[int, Mapping[int, Stage | TimedStage]] = {
            rank.number: {stage.index: stage for stage in self._stages if stage.index in rank.stages}
            for rank in worker.ranks
        }
        self._ranks = worker.build_ranks(program, worker.specs_of(program), stages_of)
        self._sequence = sequence_of(program, list(stages_of))

    def loss(self) -> float:
        """The mean over the held-out microbatches of all replicas. Collective over the world."""
        worker, rounds = self._worker, self._worker.config.evaluate_steps
        losses: dict[int, float] = {}
        with self._evaluating():
            for number in range(rounds):
                batch = worker.load(0, rounds=rounds, round_number=number, held_out=True)
                run_step(worker.device, self._ranks, self._sequence, batch, is_timed=False)
                for stage in self._stages:
                    losses |= {batch.positions[at]: float(loss) for at, loss in stage.losses.items()}
        return mean(total(worker, own_losses(worker, losses, rounds)).tolist())

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put the layers into evaluation mode, and each module back into its own afterwards."""
        modes = [
            (module, module.training) for stage in self._stages for layer in stage.layers for module in layer.modules()
        ]
        for stage in self._stages:
            if stage.randomness is not None:
                stage.randomness.off()
            for layer in stage.layers:
                layer.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for stage in self._stages:
                stage.losses.clear()
