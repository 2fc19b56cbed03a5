"""An S3 server on this machine, a proxy that can refuse requests, and the takeover of a driver that it delays."""

import contextlib
import http.client
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pyarrow import fs

from job.run.metrics import read_rows
from job.storage import Folder

ROOT = Path(__file__).parent.parent
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
HOP_HEADERS = ("connection", "content-length", "expect", "keep-alive", "transfer-encoding")  # not passed on
# Its workers may write parts that nobody commits, and its heartbeat is not the lease.
HARMLESS_CHANGE = re.compile(r"(PUT|POST) \S+/(checkpoints/step-\w+-\w+/(?!manifest)|heartbeat\.json)")
DEADLINE_S = 240.0


def bucket_address(port: int, path: str) -> str:
    """The URI of a path in the bucket, through the server or a proxy."""
    return f"s3://bucket/{path}?scheme=http&endpoint_override=127.0.0.1%3A{port}&region=us-east-1"


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """Starts a server with an empty bucket; yields its port. The environment has the keys inside the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = {name: os.environ.get(name) for name in KEYS}
    os.environ.update(KEYS)
    try:
        deadline = time.monotonic() + 30
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.1)
        options = {"endpoint_override": f"127.0.0.1:{port}", "scheme": "http", "region": "us-east-1"}
        fs.S3FileSystem(allow_bucket_creation=True, **options).create_dir("bucket")
        yield port
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({name: value} if value else {})


class SlowStore(ThreadingHTTPServer):
    """A proxy of an S3 server that answers "slow down" while it is busy. Lists the changes that it passes on."""

    def __init__(self, server_port: int) -> None:
        super().__init__(("127.0.0.1", 0), ForwardingHandler)
        self.s3_port, self.is_busy, self.changes = server_port, False, list[str]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        super().__exit__(*error)


class ForwardingHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SlowStore

    def forward(self) -> None:
        body = self.read_body()
        if self.server.is_busy:
            time.sleep(0.5)
            return self.reply(503, {"Content-Length": str(len(SLOW_DOWN))}, SLOW_DOWN)
        if self.command not in ("GET", "HEAD"):
            self.server.changes.append(f"{self.command} {self.path}")
        connection = http.client.HTTPConnection("127.0.0.1", self.server.s3_port)
        connection.request(self.command, self.path, body, kept_headers(self.headers))
        reply = connection.getresponse()
        data = reply.read()
        size = reply.headers["Content-Length"] if self.command == "HEAD" else str(len(data))
        self.reply(reply.status, {**kept_headers(reply.headers), "Content-Length": size or "0"}, data)
        connection.close()

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def log_message(self, *_: object) -> None:
        pass


class FaultyStore(ThreadingHTTPServer):
    """A proxy of an S3 server that fails some requests, in a fixed order, and counts the faults of each kind.

    Args:
        server_port: of the server
        faults: the fault of each request: ``error`` (500), ``reset``, ``cut`` (half of a body), ``slow`` or empty
        lost: the requests that are always reset, as method and path
    """

    def __init__(self, server_port: int, faults: Iterable[str], lost: str = "never") -> None:
        super().__init__(("127.0.0.1", 0), FaultyHandler)
        self.s3_port, self.is_busy, self.changes = server_port, False, list[str]()
        self.lost, self.faults, self.counts, self.keys = re.compile(lost), iter(faults), Counter[str](), set[str]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        super().__exit__(*error)

    def handle_error(self, *_: object) -> None:  # of a client that closed its connection
        pass


class FaultyHandler(ForwardingHandler):
    server: FaultyStore  # type: ignore[assignment]

    def forward(self) -> None:
        fault = "reset" if self.server.lost.match(f"{self.command} {self.path}") else next(self.server.faults)
        self.server.counts[fault] += 1
        self.server.keys.update(re.findall(r"Credential=(\w+)/", self.headers.get("Authorization", "")))
        if fault == "error":
            self.read_body()
            return self.reply(500, {"Content-Length": "0"}, b"")
        if fault == "reset":  # the peer gets an RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        if fault == "slow":
            time.sleep(0.2)
        self.is_cut = fault == "cut"
        super().forward()

    def reply(self, status: int, headers: dict[str, str], data: bytes) -> None:
        is_cut = getattr(self, "is_cut", False) and len(data) > 1
        super().reply(status, headers, data[: len(data) // 2] if is_cut else data)
        self.close_connection |= is_cut

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward


def kept_headers(headers: Message) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in HOP_HEADERS}


def run_takeover(flags: list[str], folder: Path) -> None:
    """Replaces a driver while its object store refuses its requests, which are answered again afterwards.

    The first driver must write nothing more, and the second one's result must be that of an undisturbed run.
    """
    command = [sys.executable, "-m", "job", "train", *flags, "--run.name", "run", "--scale.workers", "0"]
    subprocess.run([*command, "--run.storage", str(folder)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with s3_server() as port, SlowStore(port) as proxy:
        run = Folder.resolve(bucket_address(port, "runs")) / "run"
        first = start([*command, "--run.storage", bucket_address(proxy.server_port, "runs")])
        second = None
        try:
            wait_for_manifest(run, first)
            proxy.is_busy = True
            # To a process in another PID namespace the first driver is on another host.
            other_host = ["unshare", "--pid", "--fork", "--kill-child"]
            second = start([*other_host, *command, "--run.storage", bucket_address(port, "runs")])
            assert second.stdout
            output = iter(second.stdout.readline, "")
            assert any(line.startswith("resuming from step") for line in output), second.communicate()
            proxy.changes.clear()
            proxy.is_busy = False
            _, err = first.communicate(timeout=DEADLINE_S)
            # Arrow's own log names a part of an upload that was refused, and cannot be turned off from Python.
            lines = [line for line in err.splitlines() if "Error ignored when destroying file" not in line]
            assert (first.returncode, len(lines)) == (1, 1), err
            assert re.match("error: .*(another driver has taken this run over|cannot be written to)", lines[0]), err
            _, err = second.communicate(timeout=DEADLINE_S)
            assert (second.returncode, err) == (0, "")
        finally:
            for process in filter(None, (first, second)):
                process.kill()
        changes = [change for change in proxy.changes if not HARMLESS_CHANGE.match(change)]
        assert changes == [], "the first driver wrote after it had been replaced"
        check_same(run, Folder(str(folder / "run")))


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_manifest(run: Folder, driver: subprocess.Popen[str]) -> None:
    """Waits until a run has a checkpoint."""
    deadline = time.monotonic() + DEADLINE_S
    checkpoints = run / "checkpoints"
    while not any((checkpoints / name).has("manifest.json") for name in checkpoints.names()):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)


def check_same(run: Folder, expected: Folder) -> None:
    """Checks that two runs have the same losses, each step once, and the same result."""
    losses = [[(row["split"], row["step"], row["nats"]) for row in read_rows(folder)] for folder in (run, expected)]
    assert losses[0] == losses[1]
    results = [json.loads(folder.read("result.json")) for folder in (run, expected)]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
