"""Transports: how messages travel between ranks."""

from ppexec.transport.distributed import DistributedTransport

__all__ = ["DistributedTransport"]
