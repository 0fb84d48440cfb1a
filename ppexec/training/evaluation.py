"""Evaluation: the loss of held-out data in the middle of a training, of which it changes no bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ppexec.stage.draws import Draws
from ppexec.stage.stage import Stage
from ppexec.stage.timed import TimedStage
from ppexec.training.gradients import StepLosses, total
from ppexec.workers.rank import run_step, sequence_of
from ppexec.workers.worker import Worker


class Evaluation:
    """The held-out loss of a worker's run, computed with the forwards of the training's schedule.

    Building one is collective: every worker must build its own.

    Parameters
    ----------
    worker : Worker
        Its layers are evaluated as they are, without dropout and gradients, in evaluation mode.

    Notes
    -----
    A training continues with the same bits as without evaluations. An evaluation has stages of its own on the same
    layers. So gradients, held activations and the record of which layers draw random numbers are not touched.
    Afterwards each module is in the mode in which it was.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        config = worker.config
        self._program = program = worker.pipeline.forward_only().program
        self._stages = [
            Stage(
                stage.index,
                stage.layers,
                first_layer=stage.first_layer,
                is_first=stage.is_first,
                loss=stage.loss,
                microbatches=stage.microbatches,
                trains=False,
                copies_input=stage.copies_input,
                randomness=stage.randomness,
                draws=Draws(config.seed),
                counts_terms=stage.counts_terms,
                sharded=stage.sharded,
            )
            for stage in worker.real_stages
        ]
        stages_of: dict[int, Mapping[int, Stage | TimedStage]] = {
            rank.number: {stage.index: stage for stage in self._stages if stage.index in rank.stages}
            for rank in worker.ranks
        }
        specs = worker.specs_of(program, [worker.boundaries] * worker.pipeline.microbatches)
        self._ranks = worker.build_ranks(program, specs, stages_of)
        self._shapes = [
            worker.boundaries[0].name
        ] * worker.pipeline.microbatches  # those for which messages are prepared
        self._sequence = sequence_of(program, list(stages_of))

    def loss(self) -> float:
        """The loss of all replicas' held-out microbatches, as if they were one step. Collective over the world."""
        worker, rounds = self._worker, self._worker.config.evaluate_steps
        losses = StepLosses.none(worker, rounds)
        terms = 0.0
        with self._evaluating():
            for batch in worker.load_rounds(0, rounds, held_out=True):
                if batch.shapes != self._shapes:
                    self._ranks = worker.open_for(batch, self._program, self._ranks)
                    self._shapes = batch.shapes
                run_step(worker.device, self._ranks, self._sequence, batch, is_timed=False)
                losses.note(worker, batch, self._stages)
                terms += sum(float(number) for stage in self._stages for number in stage.terms.values())
        # `note` divided sums by the training's count of terms; here the count is the evaluation's.
        if worker.model.reduction == "sum" and any(stage.loss is not None for stage in self._stages):
            losses.whole = worker.loss_weights.over_replicas(terms)
        return StepLosses.of_row(total(worker, losses.row(worker))).mean

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Put the layers into evaluation mode, and each module back into its own afterwards."""
        modes = [
            (module, module.training) for stage in self._stages for layer in stage.layers for module in layer.modules()
        ]
        for stage in self._stages:
            if stage.randomness is not None:
                stage.randomness.off()  # a training's forward turns it on again
            for layer in stage.layers:
                layer.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for stage in self._stages:
                stage.losses.clear()
                stage.terms.clear()
