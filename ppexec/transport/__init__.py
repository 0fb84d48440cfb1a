"""Transports: how messages travel between ranks."""

from ppexec.transport.distributed import DistributedTransport
from ppexec.transport.shared import SharedMemory, SharedTransport, open_memory
from ppexec.transport.transport import Transport

__all__ = ["DistributedTransport", "SharedMemory", "SharedTransport", "Transport", "open_memory"]
