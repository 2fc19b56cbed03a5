"""A connection to the server, which is closed if its client does not read what was sent."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

READ_TIMEOUT_S = 30.0  # in which a client has to read what could not be sent to it yet


class Connection(H11Protocol):
    """uvicorn's connection, which has no limit of its own. Closing it ends its stream, which frees the place."""

    _timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins the connection."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that writing is paused whenever something is not sent yet

    def pause_writing(self) -> None:
        """Starts the time in which the client has to read."""
        super().pause_writing()
        self._timeout = self.loop.call_later(READ_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Ends it: everything is sent."""
        super().resume_writing()
        self._stop_timeout()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the connection."""
        self._stop_timeout()
        super().connection_lost(exc)

    def _stop_timeout(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None
