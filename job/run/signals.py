"""SIGINT, SIGTERM and SIGUSR1 as requests to the run."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

EXIT_DELAY_S = 1.5  # of a process that is interrupted and has nothing to save
_logger = logging.getLogger(__name__)


class StopRequest:
    """Whether the run is to save and stop, or to save a checkpoint; set by signals or by the code that started it.

    The first SIGINT or SIGTERM requests a stop, the second raises KeyboardInterrupt, and so does the first if there is
    nothing to save. SIGUSR1 requests a checkpoint. SIGHUP is ignored, so that the run survives a closed terminal.
    """

    def __init__(self) -> None:
        self.exit_code = 0  # of the process; not 0 once a stop is requested
        self.checkpoint_requested = False
        self.can_save = True

    def pop_checkpoint_request(self) -> bool:
        """Returns whether a checkpoint was requested since the last call."""
        requested, self.checkpoint_requested = self.checkpoint_requested, False
        if requested:
            _logger.info("a checkpoint is requested by SIGUSR1")
        return requested

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles signals within the block. Does nothing outside the main thread, where Python cannot."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                handler = signal.SIG_IGN if number == signal.SIGHUP else self._on_signal
                stack.callback(signal.signal, number, signal.signal(number, handler))
            yield

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.checkpoint_requested = True
            return
        is_final = self.exit_code or not self.can_save
        self.exit_code = self.exit_code or 128 + number
        if is_final:
            raise KeyboardInterrupt


class ExitTimer:
    """Ends the process some time after SIGINT or SIGTERM, unless its block has ended.

    Python runs handlers of signals in the main thread, which a request to an object store may block for minutes, and so
    may the threads and the clean-up for which a ``KeyboardInterrupt`` waits. What was written is as after a SIGKILL.

    Args:
        delay_s: seconds after the signal
        before_exit: called in another thread
    """

    def __init__(self, delay_s: float, before_exit: Callable[[], None]) -> None:
        self.delay_s, self.before_exit = delay_s, before_exit
        self.ended = threading.Event()

    def __enter__(self) -> "ExitTimer":
        if threading.current_thread() is threading.main_thread():
            reader, self.writer = socket.socketpair()
            self.writer.setblocking(False)
            self.previous = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._wait_for_signal, args=(reader,), daemon=True).start()
        return self

    def _wait_for_signal(self, reader: socket.socket) -> None:
        with reader:
            while number := reader.recv(1):
                if number[0] in (signal.SIGINT, signal.SIGTERM) and not self.ended.wait(self.delay_s):
                    self.before_exit()
                    os._exit(128 + number[0])

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self.previous)
            self.writer.close()
