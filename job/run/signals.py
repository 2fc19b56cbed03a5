"""SIGINT, SIGTERM and SIGUSR1 as requests to the run."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StopRequest:
    """What signals ask of the run: SIGINT or SIGTERM once, to save and stop; again, to stop at once.

    SIGUSR1 asks for a checkpoint. SIGHUP is ignored: a terminal may go away.
    """

    def __init__(self) -> None:
        self.status = 0  # the exit status of a stop, once one is wanted
        self.save = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listens for signals within; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._hear) for number in heard}
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _: Any) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif self.status:
            raise KeyboardInterrupt
        else:
            self.status = 128 + number
