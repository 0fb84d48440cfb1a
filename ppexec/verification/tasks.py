"""Tasks: what a worker is asked to verify."""

from __future__ import annotations

from ppexec.machine.mesh import meet
from ppexec.verification.comparison import Comparison, compare_with_reference
from ppexec.workers.worker import Worker


def verify(worker: Worker) -> list[Comparison]:
    """Run a step, and compare this worker's outputs and gradients with one process without a pipeline."""
    batch = worker.load(0)
    worker.clear()
    meet(worker.mesh)
    records = worker.step(batch, keep_outputs=True)
    worker.note_losses(batch)
    outputs = {microbatch: output for record in records for microbatch, output in record.outputs.items()}
    return compare_with_reference(worker, outputs, [each[-1] for each in batch.boundaries])
