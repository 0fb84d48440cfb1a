"""Explorer: a server for tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ppsim.explorer.server import ExplorerServer


@contextmanager
def serving() -> Iterator[ExplorerServer]:
    """An explorer at a free port, while the block runs."""
    server = ExplorerServer(0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
