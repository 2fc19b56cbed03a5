"""The routes of the Hugging Face hub's API that reading a data set needs, on this machine."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "0" * 40


class Hub:
    """Data sets by name, each with its files; a token that they need, if any; and the requests that were answered.

    Args:
        repositories: the files of each data set by path
        token: what requests must contain
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]], token: str = "") -> None:
        self.repositories, self.token = repositories, token
        self.requests: list[tuple[str, str]] = []
        self.failures: list[tuple[str, int]] = []  # the status of the next answer to a path that contains a text
        self.endpoint = ""

    def answer(self, method: str, path: str, headers: Any) -> tuple[int, dict[str, str], bytes]:
        self.requests.append((method, path))
        for failure in self.failures:
            if failure[0] in path:
                self.failures.remove(failure)
                return failure[1], {}, b""
        parts = urlsplit(path)
        if match := re.fullmatch(r"/signed/([^/]+/[^/]+)/(.+)", parts.path):
            assert not headers["authorization"], "a token is sent to another host"
            return self._content(self.repositories[match[1]][unquote(match[2])], headers["range"])
        return self._answer(parts.path, "recursive=true" in parts.query.lower(), headers)

    def _answer(self, path: str, is_recursive: bool, headers: Any) -> tuple[int, dict[str, str], bytes]:
        match = re.fullmatch(r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/([^/]+)(?:/(.*))?)?)?", path)
        if not match or match[1] not in self.repositories or (self.token and headers["authorization"] != self.token):
            return 401, {"X-Error-Code": "RepoNotFound"}, b'{"error": "not found"}'
        files, route = self.repositories[match[1]], match[2]
        place = unquote(match[4] or "")
        if route in (None, "revision"):
            return 200, {}, json.dumps({"id": match[1], "sha": SHA}).encode()
        if route == "tree":
            entries = self._tree(files, place, is_recursive)
            return (200, {}, json.dumps(entries).encode()) if entries else self._missing()
        assert route == "resolve", path
        if place not in files:
            return self._missing()
        location = f"{self.endpoint.replace('127.0.0.1', 'localhost')}/signed/{match[1]}/{match[4]}"
        return 302, {"Location": location, "ETag": f'"{SHA}"', "X-Repo-Commit": SHA}, b""

    def _missing(self) -> tuple[int, dict[str, str], bytes]:
        return 404, {"X-Error-Code": "EntryNotFound"}, b'{"error": "entry not found"}'

    def _content(self, data: bytes, span: str | None) -> tuple[int, dict[str, str], bytes]:
        if not span:
            return 200, {}, data
        first, last = span.removeprefix("bytes=").split("-")
        stop = int(last) + 1 if last else len(data)
        if int(first) >= len(data):
            return 416, {}, b""
        return 206, {"Content-Range": f"bytes {first}-{stop - 1}/{len(data)}"}, data[int(first) : stop]

    def _tree(self, files: dict[str, bytes], folder: str, is_recursive: bool) -> list[dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        prefix = f"{folder}/" if folder else ""
        for path, data in files.items():
            if path.startswith(prefix):
                names = path.removeprefix(prefix).split("/")
                for depth in range(1, len(names) if is_recursive else min(2, len(names))):
                    parent = prefix + "/".join(names[:depth])
                    entries[parent] = {"type": "directory", "oid": SHA, "size": 0, "path": parent}
                if is_recursive or len(names) == 1:
                    oid = hashlib.sha1(data, usedforsecurity=False).hexdigest()
                    entries[path] = {"type": "file", "oid": oid, "size": len(data), "path": path}
        return list(entries.values())


@contextlib.contextmanager
def hub_server(hub: Hub) -> Iterator[str]:
    """Serves a hub; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            status, headers, data = hub.answer(self.command, self.path, self.headers)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = _answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub.endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
