"""Failure: what went wrong in a worker, in a form that can be sent and told apart by its cause."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
import torch.distributed as dist

from ppexec.machine.frames import user_frames
from ppexec.models.model_error import ModelError
from ppexec.transport.waits import LostMessage, WrongMessage
from ppsim.errors import InputError, RunError


class Cause(IntEnum):
    """Why a worker failed. Of several failures the one with the smallest number is the cause of the others."""

    INPUT = 0
    """Something of the user's that only the worker could see."""
    MEMORY = 1
    """Memory ran out."""
    MODEL = 2
    """The user's model, loss or data raised or gave what cannot be used, or the run could not go on."""
    FAULT = 3
    """A fault of ours."""
    TIMED_OUT = 4
    """Another rank did not answer in time: this rank is not to blame."""
    LOST = 5
    """Another rank was gone, perhaps because it timed out: this rank is not to blame."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An exception in a worker.

    Parameters
    ----------
    cause : Cause
        Who is to blame.
    message : str
        What was raised, and by which part of the model.
    details : str
        What to show below the message: the user's frames if the model raised, the whole traceback for a fault of ours,
        else what the error brings along.
    where : str
        Which submitted work failed, such as "in receiving message 4 from rank 1", from the note that a device adds to
        the error; else empty.
    """

    cause: Cause
    message: str
    details: str
    where: str = ""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Describe an exception."""
        found = cls._of(error)
        return replace(found, where=next((note for note in getattr(error, "__notes__", [])), ""))

    @classmethod
    def _of(cls, error: Exception) -> Failure:
        part = str(error) if isinstance(error, ModelError) else ""
        inner = error.__cause__ if isinstance(error, ModelError) and error.__cause__ is not None else error
        cause, said = _cause(error, inner), str(inner)
        if cause in (Cause.INPUT, Cause.TIMED_OUT, Cause.LOST) or isinstance(inner, WrongMessage | RunError):
            return cls(cause=cause, message=said, details=getattr(inner, "details", ""))
        if cause == Cause.MEMORY:
            size = said.split("\n")[0] or "no size given"
            prefix = f"{part}: " if part else ""
            message = f"{prefix}out of memory ({size}): take a smaller micro batch, more stages or recomputation"
            return cls(cause=cause, message=message, details="")
        raised = f"{type(inner).__name__}: {said}"
        if cause == Cause.MODEL:
            return cls(cause=cause, message=f"{part} raised {raised}", details=user_frames(inner))
        frames = "".join(traceback.format_exception(error)).rstrip()
        return cls(cause=cause, message=f"this is a fault of ppexec, please report it ({raised})", details=frames)


def _cause(error: Exception, inner: BaseException) -> Cause:
    if isinstance(inner, InputError):
        return Cause.INPUT
    if isinstance(inner, LostMessage | dist.DistError) or (isinstance(inner, RuntimeError) and "gloo" in str(inner)):
        # gloo and shared memory tell a time-out by their words alone.
        return Cause.TIMED_OUT if "timed out" in str(inner).lower() else Cause.LOST
    # torch raises RuntimeError where the CPU's memory ends.
    if isinstance(inner, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(inner):
        return Cause.MEMORY
    return Cause.MODEL if isinstance(error, ModelError | WrongMessage | RunError) else Cause.FAULT
