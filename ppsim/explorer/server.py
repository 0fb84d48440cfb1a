"""Server: gives the page and its answers to a browser on this machine, and to nobody else.

It listens at 127.0.0.1 alone. A page of another site could still send requests there, or have its own name point there;
so a request must name this address as its host, may come from no other origin, and must hold JSON or a run.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import traceback
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from ppsim.errors import InputError
from ppsim.explorer import answers
from ppsim.explorer.runs import MOST_BYTES as MOST_RUN_BYTES
from ppsim.explorer.runs import Runs

HOST = "127.0.0.1"
PORT = 8137
_PORTS_TRIED = 20
MOST_JSON_BYTES = 2**22
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    # Only what this server gives is run, shown or asked for; no page of another site may hold this one in a frame.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class _Refused(Exception):
    """A request that is not answered; the message says why."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class ExplorerServer(ThreadingHTTPServer):
    """The explorer at a port of this machine.

    Parameters
    ----------
    port : int
        Where to listen; 0 for any that is free.

    Raises
    ------
    OSError
        If the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0) -> None:
        super().__init__((HOST, port), _Handler)
        self.runs = Runs()
        pages = resources.files("ppsim.explorer").joinpath("page").iterdir()
        theme = resources.files("ppsim.export").joinpath("theme.css")
        # Read once: a name that is asked for is looked up here and never becomes a path.
        self.pages = {each.name: each.read_bytes() for each in (*pages, theme) if each.name.endswith(tuple(_TYPES))}

    @property
    def address(self) -> str:
        """Where a browser finds the page."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def warm_up(self) -> None:
        """Load what the first answer needs, which takes a second or two, before anybody waits for it."""
        answers.step({"schedule": "1f1b", "ranks": 2, "microbatches": 2}, self.runs)

    @property
    def hosts(self) -> set[str]:
        """What a request may call this server."""
        return {f"{name}:{self.server_address[1]}" for name in (HOST, "localhost")}


def start_server(port: int | None) -> ExplorerServer:
    """A server at this port, or at the first free one from the usual one on. Raises InputError if there is none."""
    for number in range(PORT, PORT + _PORTS_TRIED) if port is None else (port,):
        try:
            return ExplorerServer(number)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
        except OverflowError:
            raise InputError(f"--port {port} is no port: give a number from 0 to 65535") from None
    if port is None:
        raise InputError(f"ports {PORT} to {PORT + _PORTS_TRIED - 1} are all in use: give another --port")
    raise InputError(f"--port {port} is in use or may not be used: give another, or 0 for any")


class _Handler(BaseHTTPRequestHandler):
    """Answers one request after the other of one connection."""

    server: ExplorerServer
    protocol_version = "HTTP/1.1"
    server_version = "ppsim"
    sys_version = ""
    timeout = 60
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """The page, its parts, and what it needs at first."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Questions."""
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for every request says nothing to who has a page open."""

    def _answer(self, work: Callable[[], tuple[str, bytes]]) -> None:
        try:
            self._check_sender()
            kind, body = work()
            status = HTTPStatus.OK
        except _Refused as refused:
            self.close_connection = True  # what was sent may not have been read
            status, kind, body = refused.status, "application/json", _json({"error": str(refused)})
        except InputError as error:  # an answer too: the page shows it
            status, kind, body = HTTPStatus.OK, "application/json", _json({"error": str(error)})
        except Exception as error:
            self.close_connection = True
            traceback.print_exc()  # for the report that the page asks for
            said = f"this is a fault of ppsim, please report it ({type(error).__name__}: {error})"
            status, kind, body = HTTPStatus.INTERNAL_SERVER_ERROR, "application/json", _json({"error": said})
        with contextlib.suppress(ConnectionError, TimeoutError):
            self.send_response(status)
            for name, value in _HEADERS.items():
                self.send_header(name, value)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def _check_sender(self) -> None:
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host not in self.server.hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, "this server answers at its own address alone")
        if origin is not None and origin not in {f"http://{each}" for each in self.server.hosts}:
            raise _Refused(HTTPStatus.FORBIDDEN, "this server answers its own page alone")

    def _get(self) -> tuple[str, bytes]:
        path, query = self._path()
        if path == "/choices":
            return "application/json", _json(answers.choices())
        if path == "/run":
            return "application/json", _json(answers.run(query.get("number", ""), self.server.runs))
        name = "index.html" if path == "/" else path.removeprefix("/")
        if name not in self.server.pages:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        return _TYPES[name[name.rindex(".") :]], self.server.pages[name]

    def _post(self) -> tuple[str, bytes]:
        path, query = self._path()
        if path == "/run":
            data = self._body("application/octet-stream", MOST_RUN_BYTES)
            number = self.server.runs.add(data, query.get("name", "run")[:200])
            return "application/json", _json(answers.run(number, self.server.runs))
        if path not in ("/step", "/perfetto"):
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such question")
        try:
            given = json.loads(self._body("application/json", MOST_JSON_BYTES))
        except (ValueError, RecursionError):
            raise _Refused(HTTPStatus.BAD_REQUEST, "the question is not JSON") from None
        if path == "/step":
            return "application/json", _json(answers.step(given, self.server.runs))
        return "application/octet-stream", answers.perfetto(given, self.server.runs).encode()

    def _path(self) -> tuple[str, dict[str, str]]:
        parts = urllib.parse.urlsplit(self.path)
        return parts.path, dict(urllib.parse.parse_qsl(parts.query))

    def _body(self, kind: str, most: int) -> bytes:
        """What the request holds. Other sites' forms cannot send these kinds, and they may not ask for more."""
        if self.headers.get_content_type() != kind:
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"the question must be {kind}")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,12}", length):
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "the question must say its length")
        if int(length) > most:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the question has more than {most} bytes")
        return self.rfile.read(int(length))


def _json(document: Any) -> bytes:
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
