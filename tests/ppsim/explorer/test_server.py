"""Server: it answers its own page on this machine, and nobody else."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from ppsim.errors import InputError
from ppsim.explorer.server import MOST_JSON_BYTES, ExplorerServer, start_server
from tests.support.explorer import serving

JSON = {"Content-Type": "application/json"}
ASKED = {"schedule": "1f1b", "ranks": 2, "microbatches": 2}


@pytest.fixture(scope="module")
def server() -> Iterator[ExplorerServer]:
    with serving() as found:
        yield found


def _send(
    server: ExplorerServer, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


def test_the_page_and_its_parts_are_given(server: ExplorerServer) -> None:
    status, headers, body = _send(server, "GET", "/")
    assert status == 200
    assert b"<title>ppsim explorer</title>" in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert _send(server, "GET", "/main.js")[1]["Content-Type"].startswith("text/javascript")
    assert set(json.loads(_send(server, "GET", "/choices")[2])["schedules"]) >= {"1f1b", "zb-v"}


def test_a_question_is_answered(server: ExplorerServer) -> None:
    status, _, body = _send(server, "POST", "/step", json.dumps(ASKED), JSON)
    assert status == 200
    assert json.loads(body)["picture"]["ranks"] == 2


@pytest.mark.parametrize(
    "path",
    [
        "/../server.py",
        "/..%2fserver.py",
        "//etc/passwd",
        "/server.py",
        "/page/main.js",
        "/main.js/",
        "/%00",
        "/.",
        "/run/x",
    ],
)
def test_no_other_file_is_given(server: ExplorerServer, path: str) -> None:
    assert _send(server, "GET", path)[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1.evil.example:1", ""])
def test_other_names_for_this_address_are_refused(server: ExplorerServer, host: str) -> None:
    """Cause: another site may have its own name point here (DNS rebinding)."""
    assert _send(server, "GET", "/", None, {"Host": host})[0] == 403
    assert _send(server, "POST", "/step", json.dumps(ASKED), {**JSON, "Host": host})[0] == 403


def test_pages_of_other_origins_are_refused(server: ExplorerServer) -> None:
    for origin in ("http://evil.example", "null", "https://127.0.0.1"):
        assert _send(server, "POST", "/step", json.dumps(ASKED), {**JSON, "Origin": origin})[0] == 403
    own = server.address.rstrip("/")
    assert _send(server, "POST", "/step", json.dumps(ASKED), {**JSON, "Origin": own})[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_form_can_send_is_refused(server: ExplorerServer, kind: str) -> None:
    assert _send(server, "POST", "/step", json.dumps(ASKED), {"Content-Type": kind})[0] == 415
    assert _send(server, "POST", "/run", b"x", {"Content-Type": kind})[0] == 415


@pytest.mark.parametrize(
    ("length", "status"), [(str(MOST_JSON_BYTES + 1), 413), ("9" * 12, 413), ("-1", 411), ("x", 411), ("1" * 30, 411)]
)
def test_questions_have_a_size(server: ExplorerServer, length: str, status: int) -> None:
    """What is too large is refused by its head: nothing of it is read."""
    host, port = server.server_address[:2]
    with socket.create_connection((host, port), timeout=20) as connection:
        head = [f"POST /step HTTP/1.1\r\nHost: {host!s}:{port}", "Content-Type: application/json"]
        connection.sendall("\r\n".join([*head, f"Content-Length: {length}", "", ""]).encode())
        assert f" {status} ".encode() in connection.recv(100)


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff", b"1" * 10_000])
def test_what_is_no_json_is_refused(server: ExplorerServer, body: bytes) -> None:
    assert _send(server, "POST", "/step", body, JSON)[0] == 400


def test_what_cannot_be_is_an_answer_and_no_fault(server: ExplorerServer) -> None:
    status, _, body = _send(server, "POST", "/step", json.dumps({"schedule": "<script>"}), JSON)
    assert status == 200
    assert "error" in json.loads(body)
    for method, path, data, headers in (
        ("POST", "/run?name=a", b"junk", {"Content-Type": "application/octet-stream"}),
        ("GET", "/run?number=none", None, {}),
        ("POST", "/perfetto", b"[1]", JSON),
    ):
        status, _, body = _send(server, method, path, data, headers)
        assert status == 200
        assert "error" in json.loads(body)
    assert _send(server, "POST", "/eval", b"{}", JSON)[0] == 404
    assert _send(server, "PUT", "/step", b"{}", JSON)[0] == 501


def test_it_listens_on_this_machine_alone(server: ExplorerServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_a_port_in_use_is_said(server: ExplorerServer) -> None:
    with pytest.raises(InputError, match="in use"):
        start_server(server.server_address[1])
    with pytest.raises(InputError, match="0 to 65535"):
        start_server(70000)
