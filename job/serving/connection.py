"""A connection to the server, which is closed if its client stops sending a request or reading what was sent."""

import asyncio

from h11 import IDLE, SEND_BODY
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_TIMEOUT_S = 30.0  # in which a client has to send a request, since it has connected or started to send it
READ_TIMEOUT_S = 30.0  # in which a client has to read what could not be sent to it yet


class Connection(H11Protocol):
    """uvicorn's connection, which has no limits of its own but that between two requests.

    Closing it ends its stream, which frees the place.
    """

    _request_timeout: asyncio.TimerHandle | None = None
    _read_timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins the connection."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that writing is paused whenever something is not sent yet
        self._limit_request()

    def data_received(self, data: bytes) -> None:
        """Handles a part of a request."""
        super().data_received(data)
        self._limit_request()

    def _limit_request(self) -> None:
        """Starts the time in which the client has to send the request, and ends it once it is complete."""
        if self.conn.their_state not in (IDLE, SEND_BODY):
            _cancel(self._request_timeout)
            self._request_timeout = None
        elif self._request_timeout is None:
            self._request_timeout = self.loop.call_later(REQUEST_TIMEOUT_S, self.transport.abort)

    def pause_writing(self) -> None:
        """Starts the time in which the client has to read."""
        super().pause_writing()
        self._read_timeout = self.loop.call_later(READ_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Ends it: everything is sent."""
        super().resume_writing()
        _cancel(self._read_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the connection."""
        _cancel(self._request_timeout)
        _cancel(self._read_timeout)
        super().connection_lost(exc)


def _cancel(timeout: asyncio.TimerHandle | None) -> None:
    if timeout is not None:
        timeout.cancel()
