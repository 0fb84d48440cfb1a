"""Transports: how messages travel between ranks."""

from ppexec.transport.distributed import DistributedTransport
from ppexec.transport.shared import SharedTransport, open_shared
from ppexec.transport.transport import Transport

__all__ = ["DistributedTransport", "SharedTransport", "Transport", "open_shared"]
