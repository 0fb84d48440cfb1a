"""ppexec: run a pipeline schedule for real, measure it, and prove its gradients."""

from ppexec.api import profile, run, train, verify
from ppexec.config.config import RunConfig
from ppexec.models.model import Model
from ppexec.session import Session
from ppexec.train.train import TrainReport
from ppexec.verify.verify import VerifyReport
from ppexec.workers.pool import WorkerError, WorkerPool

__all__ = [
    "Model",
    "RunConfig",
    "Session",
    "TrainReport",
    "VerifyReport",
    "WorkerError",
    "WorkerPool",
    "profile",
    "run",
    "train",
    "verify",
]
