"""What ``serve`` refuses or ends: clients that stall, large bodies, too many streams, other hosts, missing tokens."""

import json
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ROOT, wait_until
from serving import TEXT, TOKEN, error_of, pause_reading, post, serving, start_conversation

from job.errors import UserError
from job.serving import guard
from job.serving.connection import Connection
from job.serving.conversations import ServedModel
from job.serving.guard import MAX_BODY_BYTES
from job.serving.server import Server, build_server, page_address, read_token

pytestmark = pytest.mark.xdist_group("serving")  # one process, which trains the models once


@pytest.mark.slow
def test_client_that_does_not_read_is_disconnected_which_frees_its_place(
    served: tuple[Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.serving.connection.READ_TIMEOUT_S", 0.1)
    server, url = served
    body = json.dumps({"text": "It was", "length": 10_000, "alternatives": 50}).encode()  # more than buffers hold
    path, port = start_conversation(url).partition("/v1/")[2], int(url.rpartition(":")[2])
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        head = f"POST /v1/{path}/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert client.recv(1) == b"H"
        engine, state = server.service.engine, server.server_state
        wait_until(
            lambda: not (server.service.has_events or engine.num_streams or state.connections),
            60, "the client is still connected", 0.01,
        )  # fmt: skip
        received = b""
        with suppress(ConnectionResetError):
            while part := client.recv(1 << 20):
                received += part
    assert b"event: token" in received and b"event: end" not in received


REQUEST = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "sent", [b"", REQUEST[:-2], b"POST /v1/conversations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"]
)
def test_client_that_sends_no_complete_request_is_disconnected(
    served: tuple[Server, str], monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr("job.serving.connection.REQUEST_TIMEOUT_S", 0.1)
    server, url = served
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as client:
        client.sendall(sent)
        assert client.recv(1) == b""
    wait_until(lambda: not server.server_state.connections, 60, "the client is still connected", 0.01)


def test_client_that_does_not_end_its_second_request_is_disconnected(served: tuple[Server, str]) -> None:
    """The first one, once it is complete, has all time that its answer takes."""
    server, url = served
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as client:
        client.sendall(REQUEST)
        assert client.recv(1) == b"H"
        connections = server.server_state.connections
        (connection,) = (other for other in connections if other.client == client.getsockname())  # type: ignore[union-attr]
        assert isinstance(connection, Connection)
        assert connection._request_timeout is None
        client.sendall(REQUEST[:-2])
        wait_until(lambda: connection._request_timeout, 60, "the second request is not limited", 0.01)


def test_body_of_10_mb_is_refused_and_never_in_memory(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    class Body(bytearray):
        def __iadd__(self, chunk: Any) -> "Body":  # type: ignore[misc]
            super().__iadd__(chunk)
            kept.append(len(self))
            return self

    monkeypatch.setattr(guard, "bytearray", Body, raising=False)
    body = {"text": "a" * 10_000_000}
    conversation = start_conversation(url)
    status, message = error_of(post(f"{conversation}/generate", body))
    assert (status, message) == (413, "the body has more than 1,048,576 bytes")
    chunks = (b"a" * 65536 for _ in range(160))  # without a Content-Length
    assert error_of(requests.post(f"{conversation}/generate", data=chunks, timeout=60))[0] == 413
    assert max(kept) <= MAX_BODY_BYTES


def test_streams_beyond_the_limit_get_429_until_a_client_is_gone(served: tuple[Server, str]) -> None:
    server, url = served
    engine = server.service.engine
    limit, engine.max_streams = engine.max_streams, 2
    try:
        body = {"text": "It was", "length": 10_000}
        clients = [post(f"{start_conversation(url)}/generate", body, stream=True) for _ in range(2)]
        refused = post(f"{start_conversation(url)}/generate", body)
        assert error_of(refused)[0] == 429
        assert int(refused.headers["retry-after"]) > 0
        clients[0].close()
        conversation = start_conversation(url)
        answers = list[int]()

        def is_accepted() -> bool:
            answers.append(post(f"{conversation}/generate", {"text": "It", "length": 1}).status_code)
            return answers[-1] != 429

        wait_until(is_accepted, 60, "the place of a closed connection is not free", 0.01)
        assert answers[-1] == 200
        clients[1].close()
    finally:
        engine.max_streams = limit
    wait_until(lambda: not engine.num_streams, 60, "a stream has no client but its place", 0.01)
    assert not server.service.has_events


def test_next_tokens_whose_client_is_gone_free_their_place(
    served: tuple[Server, str], models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a long text is read."""
    server, url = served
    is_reading, is_freed = pause_reading(models["char"].ensemble, monkeypatch)
    conversation = start_conversation(url)
    body = json.dumps({"text": TEXT}).encode()
    path, port = conversation.partition("/v1/")[2], int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as client:
        head = f"POST /v1/{path}/next HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert is_reading.wait(60)
    try:
        wait_until(lambda: not server.service.has_events, 10, "a request has no client but its place", 0.01)
    finally:
        is_freed.set()
    wait_until(lambda: not server.service.engine.num_streams, 60, "a stream has no client but its place", 0.01)


def test_hosts_and_origins_of_others_are_refused(url: str) -> None:
    port = url.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        assert error_of(requests.get(f"{url}/v1/models", headers={"Host": host}, timeout=60))[0] == 403
        assert requests.get(url, headers={"Host": host}, timeout=60).status_code == 403
    for origin in ("http://evil.example", "null", f"http://localhost:{int(port) + 1}"):
        assert error_of(post(f"{url}/v1/conversations", {}, headers={"Origin": origin}))[0] == 403
    assert post(f"{url}/v1/conversations", {}, headers={"Origin": url}).status_code == 201
    assert requests.get(f"{url}/v1/models", headers={"Host": f"localhost:{port}"}, timeout=60).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.2", "0:0:0:0:0:0:0:1"])
def test_loopback_address_that_is_served_is_an_allowed_host(host: str, models: dict[str, ServedModel]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        name = page_address(host, listener).removeprefix("http://").rstrip("/")
    server = build_server([models["char"]], host, "")
    server.service.engine.close()
    app = server.config.app
    assert isinstance(app, guard.Guard)
    for value, is_refused in ((name, False), ("localhost", False), ("127.0.0.3", True)):
        assert bool(app._refusal({"type": "http", "path": "/", "headers": [(b"host", value.encode())]})) == is_refused


def test_responses_have_a_strict_content_security_policy(url: str) -> None:
    for path in ("/", "/page.js", "/v1/models", "/nothing", "/openapi.json"):
        headers = requests.get(url + path, timeout=60).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_page_has_no_address_of_another_host() -> None:
    for path in (ROOT / "job" / "serving" / "static").iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text


def test_token_is_needed_for_the_api_where_there_is_one(models: dict[str, ServedModel]) -> None:
    with serving([models["char"]], "0.0.0.0", TOKEN) as (_, url):
        for value in ("", "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer é"):
            answer = requests.get(f"{url}/v1/models", headers={"Authorization": value.encode()}, timeout=60)
            assert error_of(answer)[0] == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        headers = {"Authorization": f"Bearer {TOKEN}", "Host": "gpu-7.example"}
        assert requests.get(f"{url}/v1/models", headers=headers, timeout=60).status_code == 200
        assert requests.get(url, timeout=60).status_code == 200  # the page asks for the token


def test_read_token_needs_one_unless_only_this_machine_can_connect(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert [read_token({}, host) for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3")] == [""] * 4
    assert read_token({"LANES_SERVE_TOKEN": TOKEN}, "0.0.0.0") == TOKEN
    assert read_token({"LANES_SERVE_TOKEN_FILE": str(tmp_path / "token")}, "127.0.0.1") == TOKEN
    for environment in ({}, {"LANES_SERVE_TOKEN": ""}, {"LANES_SERVE_TOKEN": "short"},
                        {"LANES_SERVE_TOKEN": f"{TOKEN} é"}, {"LANES_SERVE_TOKEN": f"{TOKEN}\n{TOKEN}"},
                        {"LANES_SERVE_TOKEN_FILE": str(tmp_path / "none")}):  # fmt: skip
        for host in ("0.0.0.0", "::", "gpu-7.example"):
            with pytest.raises(UserError, match="TOKEN"):
                read_token(environment, host)
