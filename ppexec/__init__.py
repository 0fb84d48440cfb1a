"""ppexec: run a pipeline schedule for real, measure it, and prove its gradients."""

from ppexec.api import profile, run, train, verify
from ppexec.config.config import RunConfig
from ppexec.experiment.experiment import Outcome, predict_and_measure
from ppexec.models.model import Model
from ppexec.session import Session
from ppexec.training.train import TrainReport
from ppexec.verification.verify import VerifyReport
from ppexec.workers.pool import WorkerPool
from ppexec.workers.watched_run import WorkerError

__all__ = [
    "Model",
    "Outcome",
    "RunConfig",
    "Session",
    "TrainReport",
    "VerifyReport",
    "WorkerError",
    "WorkerPool",
    "predict_and_measure",
    "profile",
    "run",
    "train",
    "verify",
]
