"""What is checked before a request reaches the API: Host, Origin, token and size; and the headers of each response."""

import hmac
import json
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from job.console import escape_controls

MAX_BODY_BYTES = 1 << 20
_MAX_DISCARDED_BYTES = 1 << 26  # of a body that is too large, so that its client reads the response
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Returns the JSON of an error, whose message is one line."""
    line = escape_controls(message).replace("\n", "\\n")  # it may name what the client has sent
    return JSONResponse({"error": {"status": status, "message": line}}, status, headers)


@dataclass(frozen=True)
class Guard:
    """Checks requests before an application gets them.

    Args:
        app: the application
        token: that requests of the API need; empty: none
        hosts: names that the Host header may have, which DNS rebinding cannot have; None: any, since a token is needed
    """

    app: ASGIApp
    token: str
    hosts: frozenset[str] | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request as ASGI prescribes."""
        assert scope["type"] == "http"  # the server has no web sockets and no lifespan

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            body = await _read_body(receive)
            if body is None:
                refusal = error_response(413, f"the body has more than {MAX_BODY_BYTES:,} bytes")
        if refusal is None:
            await self.app(scope, _replay(body or b"", receive), send_with_headers)
        else:
            await refusal(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.hosts is not None and _host_name(host) not in self.hosts:
            return error_response(403, f"Host {host!r} is not a name of this server")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return error_response(403, f"Origin {origin!r} is not this server")
        if scope["path"].startswith("/v1/") and not self._is_authorized(headers.get("authorization", "")):
            return error_response(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})
        return None

    def _is_authorized(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        is_right = hmac.compare_digest(token.strip().encode(), self.token.encode())
        return not self.token or (is_right and scheme.lower() == "bearer")


def _host_name(host: str) -> str:
    """Returns the name in a Host header, without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).lower()


async def _read_body(receive: Receive) -> bytes | None:
    """Returns the body of a request; None if it is too large, of which no more than the limit is ever in memory."""
    body, size, has_more = bytearray(), 0, True
    while has_more and size <= _MAX_DISCARDED_BYTES:
        message = await receive()
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            body += chunk
        else:
            body.clear()
        has_more = message.get("more_body", False)
    return bytes(body) if size <= MAX_BODY_BYTES else None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns a function that gives the body first, and then what the client does."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


def server_sent_event(name: str, data: Any) -> str:
    """Returns an event as text, with its data as JSON, in which there are no line ends."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
