"""ppexec: run a pipeline schedule for real, measure it, and prove its gradients."""

from ppexec.api import profile, run, verify
from ppexec.config import RunConfig
from ppexec.models import Model
from ppexec.pool import WorkerError, WorkerPool
from ppexec.session import Session
from ppexec.verify import VerifyReport

__all__ = ["Model", "RunConfig", "Session", "VerifyReport", "WorkerError", "WorkerPool", "profile", "run", "verify"]
