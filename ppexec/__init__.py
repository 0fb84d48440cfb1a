"""ppexec: run a pipeline schedule for real, measure it, and prove its gradients."""

from ppexec.api import profile, run, train, verify
from ppexec.config import RunConfig
from ppexec.models import Model
from ppexec.pool import WorkerError, WorkerPool
from ppexec.session import Session
from ppexec.train import TrainReport
from ppexec.verify import VerifyReport

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
