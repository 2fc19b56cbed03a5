"""The command ``serve``: its arguments, and how it stops."""

import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import requests
from conftest import job, not_none, start_job
from serving import TOKEN, post, start_conversation

from job.training.checkpoint import LoadedCheckpoint

pytestmark = pytest.mark.xdist_group("serving")  # one process, which trains the models once


@pytest.fixture(scope="module")
def run(checkpoints: dict[str, LoadedCheckpoint]) -> Path:
    return Path(checkpoints["char"].checkpoint.path.address).parent.parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the folder of a run or checkpoint is missing"),
        (("nothing",), "nothing"),
        (("RUN", "--port", "x"), "--port = x: is not a port"),
        (("RUN", "--port", "70000"), "--port = 70000: is not a port"),
        (("RUN", "--host", "0.0.0.0", "--port", "0"), "LANES_SERVE_TOKEN"),
        (("RUN", "--host", "192.0.2.1", "--port", "0"), "LANES_SERVE_TOKEN"),
        (("RUN", "--token", "x"), "unknown field token"),
        (("RUN", "--generate.length", "3"), "--generate.length"),
    ],
)
def test_serve_with_invalid_arguments_is_one_line(arguments: Sequence[str], message: str, run: Path) -> None:
    ended = job("serve", *(str(run) if word == "RUN" else word for word in arguments))
    assert (ended.status, ended.out) == (2, "")
    assert len(ended.err.splitlines()) == 1
    assert message in ended.err


def test_serve_on_name_that_is_too_long_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANES_SERVE_TOKEN", TOKEN)
    ended = job("serve", run, "--port", "0", "--host", "a" * 70)
    assert (ended.status, len(ended.err.splitlines())) == (2, 1)
    assert f"--host = {'a' * 70}: is not an address or name" in ended.err


def test_serve_on_port_in_use_is_one_line(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        ended = job("serve", run, "--port", other.getsockname()[1])
    assert ended.status == 2
    assert len(ended.err.splitlines()) == 1
    assert "in use" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_serve_stops_at_once_with_streams_open(number: signal.Signals, status: int, run: Path) -> None:
    process = start_job("serve", run, "--port", "0")
    line = not_none(process.stdout).readline()
    assert line.startswith("serving char at http://127.0.0.1:")
    url = line.split()[-1].rstrip("/")
    client = post(f"{start_conversation(url)}/generate", {"text": "It was", "length": 10_000}, stream=True)
    lines = client.iter_lines()
    assert next(lines) == b"event: token"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as stalled:
        if number == signal.SIGTERM:
            stalled.sendall(b"POST /v1/conversations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            assert requests.get(f"{url}/v1/models", timeout=60).status_code == 200  # after it has been read
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (status, "")
    assert b"event: end" in [*lines]
